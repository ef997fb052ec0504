"""`qsun-bench soak`: it holds where all is right, and finds what is planted."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qsun.core import StepOutput
from qsun.engine.engine import DecodeEngine
from qsun.engine.runner import running
from qsun.kv_cache.block_tables import BlockTables
from qsun.models.build import Placement
from qsun.modules.decode import DecodeModule
from qsun.modules.prefill import PrefillModule
from qsun_bench import commands, results, soak, views
from qsun_bench.cli import main
from qsun_bench.engine_models import Setting, Source, describe, load
from qsun_bench.engine_suites import KvDtype
from qsun_bench.random_model import model_config, random_decode_module
from qsun_bench.results import Run
from qsun_bench.shapes import shape as shape_of
from qsun_bench.soak import Request, Soak, soak_engine, soak_models
from qsun_bench.soak_check import Reference, tolerance_of
from qsun_bench.soak_ledger import Ledger, growth_of
from qsun_bench.soak_traffic import Traffic
from qsun_kernels.quant import Bits, QuantSpec
from qsun_kernels.testing import timing

CPU = torch.device("cpu")
STEPS = 500
"""A soak's seconds: the clock here counts how often it was read, so that a soak is the same everywhere."""


@pytest.fixture(scope="module")
def asked() -> Request:
    source = Source(CPU, "tiny", layers=1, dtype=torch.float32)
    return Request(source, Setting(16), STEPS, context=128, check_share=0.4, rest_s=STEPS / 3)


@pytest.fixture(scope="module")
def modules(asked: Request) -> tuple[DecodeModule, list[PrefillModule]]:
    decode = load(asked.source, asked.setting, describe(asked.source, asked.context).config)
    return decode, list(soak_models(asked, decode))


def soaked(
    asked: Request, decode: DecodeModule, prefills: list[PrefillModule], reference: list[PrefillModule]
) -> tuple[Soak, DecodeEngine]:
    """A soak that is over. reference: the modules that answers are held against."""
    engine = soak_engine(asked, decode, prefills)
    checks = Reference.create(
        decode, reference, context=asked.context, kv=asked.setting.kv, backend=asked.source.backend
    )
    made = Soak(asked, engine, checks, clock=itertools.count().__next__)
    made.run()
    return made, engine


def ledger_sees(ledger: Ledger) -> bool:
    before = ledger.num_violations
    ledger.judge_the_check()
    return ledger.num_violations == before


def test_all_holds_and_everything_happened(
    asked: Request, modules: tuple[DecodeModule, list[PrefillModule]]
) -> None:
    decode, prefills = modules
    made, engine = soaked(asked, decode, prefills, prefills)
    ledger, stats = made.ledger, engine.stats()
    assert ledger.violations == [] and ledger.num_violations == ledger.leaked_blocks == 0
    assert ledger.wrong_tokens == 0 and ledger.checked_tokens > 100 and ledger.checked_requests > 5
    assert 0 <= ledger.largest_gap <= tolerance_of(torch.float32, "auto")
    assert ledger.found_tokens > 0.8 * ledger.swapped_tokens > 0
    counts = ledger.counts
    assert min(counts[name] for name in ("length", "cancelled", "refused", "tokens")) > 0
    assert counts["asked"] == counts["length"] + counts["cancelled"] + counts["refused"]
    assert counts["rests"] >= 3 and len(ledger.memory) == counts["rests"] + 1
    assert stats.swaps > 0 and stats.rebuilds > 0 and stats.prefix_hit_tokens > 0 and stats.evictions > 0
    assert stats.blocks_in_use == 0 and made.steps_s


@pytest.mark.parametrize(("bits", "kv"), [(4, "auto"), (8, "int4")])
def test_the_dtypes_of_a_product_stay_within_their_tolerance(bits: int, kv: KvDtype) -> None:
    source = Source(CPU, "tiny", layers=2)
    asked = Request(source, Setting(bits, kv), 150, context=96, check_share=0.6, rest_s=150)
    decode = load(source, asked.setting, describe(source, asked.context).config)
    prefills = list(soak_models(asked, decode))
    made, _ = soaked(asked, decode, prefills, prefills)
    assert made.ledger.violations == [] and made.ledger.checked_tokens > 50
    assert ledger_sees(made.ledger)
    # Not by luck: half of what is tolerated is never needed here.
    assert 2 * made.ledger.largest_gap <= tolerance_of(torch.bfloat16, kv)


def test_a_planted_wrong_token_is_found(
    asked: Request, modules: tuple[DecodeModule, list[PrefillModule]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token of one answer that is checked."""
    decode, prefills = modules
    hear = Soak._hear
    chosen: list[str] = []

    def telling(self: Soak, output: StepOutput) -> None:
        asked_for = self._live[output.request_id].asked if output.request_id in self._live else None
        if not chosen and asked_for is not None and asked_for.is_checked and output.token_ids:
            chosen.append(output.request_id)
            output = replace(output, token_ids=(output.token_ids[0] ^ 1, *output.token_ids[1:]))
        hear(self, output)

    monkeypatch.setattr(Soak, "_hear", telling)
    made, _ = soaked(replace(asked, seconds=STEPS // 2), decode, prefills, prefills)
    assert chosen and made.ledger.wrong_tokens >= 1 and made.ledger.largest_gap > 0.1
    assert f"{chosen[0]} of model-" in made.ledger.violations[0] and "are wrong" in made.ledger.violations[0]


def test_a_check_that_would_find_nothing_is_told() -> None:
    ledger = Ledger(swapped_tokens=100, found_tokens=49)
    assert not ledger_sees(ledger)
    assert "blind" in ledger.violations[0] and "49" in ledger.violations[0]
    assert ledger_sees(Ledger(swapped_tokens=100, found_tokens=50))
    assert ledger_sees(Ledger(swapped_tokens=3, found_tokens=0)), "too few to tell"


def test_blocks_shared_across_models_are_found(
    asked: Request, modules: tuple[DecodeModule, list[PrefillModule]]
) -> None:
    """Models that claim one provenance read each other's KV, and answer fluently."""
    decode, prefills = modules
    alike = [
        PrefillModule(module.name, module.stack, module.card, "the same", ())
        for module in prefills
        if module.first_token == "decode"
    ]
    made, _ = soaked(replace(asked, models=len(alike), seconds=STEPS // 2), decode, alike, alike)
    assert made.ledger.wrong_tokens > 20 and made.ledger.leaked_blocks == 0


def most_likely(reference: Reference, model: str, prompt: list[int], answer: list[int]) -> int:
    """The next token of an answer by a model of the convention "decode"."""
    with running(None, None):
        reference._pass(reference.prefills[model].stack, prompt[:-1], 0)
        hidden = reference._pass(reference.decode.stack, [prompt[-1], *answer], len(prompt) - 1)
        return int(reference.decode.logits(hidden[-1:]).argmax())


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (3, True), (2, True), (2, False)])
def test_answers_of_few_bits_tell_whose_kv_they_read(bits: Bits, symmetric: bool) -> None:
    """An answer is held against what the decode module says behind another model's reading of the prompt.

    Random weights with a mean lead all tokens to one hidden state, whoever read the prompt.
    """
    shape = replace(shape_of("tiny"), hidden=256, intermediate=512, vocabulary=1024)
    config = model_config(shape, 6, 128)
    placement = Placement(torch.float32, CPU, None)
    decode = random_decode_module(config, QuantSpec(bits, 64, symmetric), placement, torch.float32)
    request = Request(Source(CPU, "tiny", dtype=torch.float32), Setting(bits), STEPS, models=3)
    own, _, other = soak_models(request, decode)
    reference = Reference.create(decode, [own, other], context=128, kv="auto", backend=None)
    prompt = torch.randint(config.vocab_size, (24,), generator=torch.Generator().manual_seed(0)).tolist()
    answer: list[int] = []
    for _ in range(40):
        answer.append(most_likely(reference, own.name, prompt, answer))
    assert max(reference.gaps(own.name, prompt, answer)) < tolerance_of(torch.float32, "auto")
    assert len(set(answer)) > 20
    found = [gap > tolerance_of(torch.bfloat16, "auto") for gap in reference.gaps(other.name, prompt, answer)]
    assert sum(found) > 35


def test_a_leaked_block_is_found(
    asked: Request, modules: tuple[DecodeModule, list[PrefillModule]], monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, prefills = modules
    release: Callable[..., None] = BlockTables.release
    kept: list[int] = []

    def forgetting(self: BlockTables, sequence: Any) -> None:
        if not kept and len(sequence.block_ids) > 1:
            kept.append(sequence.block_ids.pop())
        release(self, sequence)

    monkeypatch.setattr(BlockTables, "release", forgetting)
    made, engine = soaked(replace(asked, seconds=STEPS // 2), decode, prefills, prefills)
    assert kept and engine.stats().blocks_in_use == 1
    assert made.ledger.leaked_blocks == 1 and made.ledger.wrong_tokens == 0
    assert made.ledger.violations[0].startswith("1 blocks are held by nobody's requests")


def test_an_engine_that_falls_silent_is_found(
    asked: Request, modules: tuple[DecodeModule, list[PrefillModule]], monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, prefills = modules
    monkeypatch.setattr(soak, "_SILENT_STEPS", 30)
    monkeypatch.setattr(DecodeEngine, "step", lambda self: [])
    made, _ = soaked(replace(asked, seconds=60), decode, prefills, prefills)
    assert any("told nothing in 30 steps" in violation for violation in made.ledger.violations)


def test_what_the_engine_tells_is_held_against_what_was_asked() -> None:
    """Ends of every wrong kind, told by nobody's engine."""
    made = Soak.__new__(Soak)
    made.ledger, made._to_check = Ledger(), []
    made._live = {}
    for index, (reason, told) in enumerate(
        [("error", 0), ("cancelled", 2), ("stop", 2), ("length", 3), ("length", 4)]
    ):
        asked_for = SimpleNamespace(
            request_id=str(index), expected=4, cancel_at=None, is_checked=False, model="m"
        )
        made._live[str(index)] = soak._Answer(asked_for)  # type: ignore[arg-type]
        made._hear(StepOutput(str(index), "m", (7,) * told, "", None, reason, "why"))  # type: ignore[arg-type]
    made._hear(StepOutput("0", "m", (), "", None, "length"))
    assert [violation.split(" ", 1)[1] for violation in made.ledger.violations] == [
        "failed: why",
        "was cancelled by nobody",
        "stopped, and has nothing to stop at",
        "ended with 3 tokens, expected 4",
        "was told of, which was over or never asked for",
    ]


def test_memory_that_grows() -> None:
    flat = [5e8] * 9 + [9e8 + 1e6 * (i % 3) for i in range(21)]
    assert growth_of(flat[:11], 1 << 25, 0.03) is None
    grown, slack = growth_of(flat, 1 << 25, 0.03) or (0.0, 0.0)
    assert abs(grown) < 2e6 < slack
    grown, slack = growth_of([9e8 + 4e6 * i for i in range(30)], 1 << 25, 0.03) or (0.0, 0.0)
    assert grown == pytest.approx(4e7) and grown > slack


def test_requests_that_leave_objects_behind_are_found() -> None:
    """Too few bytes to show in the memory of the process."""
    ledger, kept = Ledger(), []
    for _ in range(15):
        kept += [[index] for index in range(400)]
        ledger.sample_memory(0.0, CPU)
    growth = ledger.growth()
    assert growth["objects"] == pytest.approx(2000, rel=0.1) and growth["device"] == 0
    assert [violation.split(", ")[0] for violation in ledger.violations] == [
        f"memory grew by {growth['objects']} objects"
    ]


def test_traffic_is_the_seed_s_own() -> None:
    def drawn(seed: int) -> list[Any]:
        traffic = Traffic(["a", "b"], zipf=1.0, context=64, vocabulary=50, check_share=0.5, seed=seed)
        return [one for _ in range(2000) for one in traffic.before_step()]

    first = drawn(3)
    assert first == drawn(3) != drawn(4)
    assert sum(one.model == "a" for one in first) > sum(one.model == "b" for one in first) > 0
    for one in first:
        room = 64 - len(one.prompt)
        assert one.expected == max(0, min(one.params.max_tokens, room))
        assert not one.is_checked or (one.params.greedy and one.expected)
    assert any(not one.expected for one in first) and any(one.params.max_tokens == 64 for one in first)
    assert any(one.cancel_at == 0 for one in first) and any(not one.params.greedy for one in first)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "last_level_cache_bytes", lambda device: 256 << 10)
    probe = timing.read_bandwidth
    monkeypatch.setattr(commands, "read_bandwidth", lambda device: probe(device, probe_bytes=8 << 20))


OPTIONS = ["soak", "--device", "cpu", "--layers", "1", "--context", "64", "--minutes", "0.04", "--rest", "1"]


@pytest.mark.usefixtures("quick")
def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plot = tmp_path / "soak.json", tmp_path / "soak.png"
    assert main([*OPTIONS, "--check", "0.5", "--json", str(out), "--plot", str(plot)]) == 0
    assert plot.read_bytes()[:4] == b"\x89PNG"
    run = results.load(str(out))
    (record,) = run.records
    assert record.ok and record.op == "soak" and record.us and record.fields["models"] == 6
    assert record.measured["checked"]["wrong"] == 0 < record.measured["checked"]["tokens"]
    assert record.measured["stats"]["blocks_in_use"] == record.measured["leaked_blocks"] == 0
    assert "tiny.L1.w4g128.m6" in capsys.readouterr().out
    assert "| tiny.L1.w4g128.m6 | torch | 0." in str(views.markdown(run))


@pytest.mark.usefixtures("quick")
def test_what_is_found_is_told_by_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Reference, "gaps", lambda self, model, prompt, answer: [1.5] * len(answer))
    assert main([*OPTIONS, "--check", "0.5", "--json", "-"]) == 1
    captured = capsys.readouterr()
    (row,) = json.loads(captured.out)["records"]
    assert not row["ok"] and row["measured"]["checked"]["wrong"] > 0
    assert "violations, the first: soak-" in captured.err and "1.5 standard deviations" in captured.err


def test_a_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["soak", "--device", "cpu", "--model", str(tmp_path)])
    assert (
        ended.value.code == 2 and "--model: a soak gives each model random weights" in capsys.readouterr().err
    )


@pytest.mark.gpu
def test_a_soak_on_a_gpu(device: torch.device) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    source = Source(device, "smollm2-135m", layers=2)
    asked = Request(source, Setting(4), 10.0, max_batch=16, context=512, check_share=0.2, rest_s=3.0)
    record, why = soak.soak_record(asked)
    assert record.ok, why
    assert record.measured["checked"]["tokens"] > 100 and record.measured["stats"]["swaps"] > 0
    assert isinstance(Run(results.header(device, "soak", 3e12, "0123456"), (record,)).to_json(), str)
