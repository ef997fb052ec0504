"""`qsun-bench decode`: its gate, its bytes, its clock, its settings."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qsun.core import StepOutput
from qsun.engine import engine as engine_module
from qsun.errors import CheckpointError
from qsun.models.build import Placement
from qsun.modules.decode import DecodeModule
from qsun_bench import decode, decode_steps, engine_models, step_gate
from qsun_bench.decode import Request, decode_records
from qsun_bench.decode_generate import GenerateTimes, time_generate
from qsun_bench.decode_measure import Case, measure_generate, planned_bytes
from qsun_bench.decode_steps import given_engine, settle, submit_given, time_tokens
from qsun_bench.decode_tables import baseline_of, build
from qsun_bench.engine_models import Setting, Source, kv_token_bytes, refusal, step_weight_bytes
from qsun_bench.engine_suites import KV_DTYPES, KvDtype
from qsun_bench.popularity import Mix
from qsun_bench.prefill_models import prefill_modules
from qsun_bench.random_model import model_config, random_decode_module
from qsun_bench.random_weights import random_packed_weight, weight_bytes
from qsun_bench.results import Header, Record, Run, parse
from qsun_bench.shapes import ModelShape, shape
from qsun_bench.step_gate import judge_step
from qsun_kernels.quant import Bits, QuantSpec
from qsun_kernels.quant.packing import pack_codes

CPU = torch.device("cpu")
SPEC = QuantSpec(4, 64, True)
TINY = ModelShape("tiny", "qwen3", 4, 128, 256, 4, 2, 64, 512, False, 1e4)
READ = 2e10
HEADER = Header("cpu (test)", "0123456789ab", "2026-01-31", "2.13.0", None, None, "qsun-bench decode", 0.02)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Request:
    monkeypatch.setattr(engine_models, "shape", lambda name: TINY)
    return Request(Source(CPU, "tiny"), batches=(2,), contexts=(16,), tokens=4)


def tiny_module(dtype: torch.dtype = torch.bfloat16, spec: QuantSpec | None = SPEC) -> DecodeModule:
    return random_decode_module(model_config(TINY, 2, 256), spec, Placement(dtype, CPU), torch.bfloat16)


def test_bytes_of_a_step() -> None:
    """Facts of Llama-3.1-8B in W4 g128 with a 16-bit lm_head: 4.65 GB of weights, 128 KiB of KV a token."""
    sizes = shape("llama-3.1-8b")
    config = model_config(sizes, sizes.layers, 1024)
    spec, bf16 = QuantSpec(4, 128, True), torch.bfloat16
    assert step_weight_bytes(config, spec, bf16) == pytest.approx(4.65e9, rel=0.005)
    assert step_weight_bytes(config, None, bf16) == pytest.approx(15.0e9, rel=0.005)
    # An lm_head of 8 bits is half of 1.05 GB, and its scales.
    assert step_weight_bytes(config, spec, bf16, QuantSpec(8, 128, True)) == pytest.approx(4.13e9, rel=0.005)
    assert kv_token_bytes(config, "auto", bf16) == 128 << 10
    # A code of half or a quarter of the bytes, and a float32 for each of 2 x 32 x 8 heads.
    assert kv_token_bytes(config, "int8", bf16) == kv_token_bytes(config, "fp8", bf16) == (64 << 10) + 2048
    assert kv_token_bytes(config, "int4", bf16) == (32 << 10) + 2048


def test_the_random_module_holds_what_the_bytes_count() -> None:
    module = tiny_module()
    algorithmic = step_weight_bytes(module.config, SPEC, torch.bfloat16)
    # torch's int4 layout stores an unused offset beside each scale; norms of heads are not counted.
    extra = sum(weight_bytes(n, k, SPEC, torch.bfloat16) - n * k // 2 for n, k in TINY.linears.values())
    assert algorithmic <= module.bytes_per_step <= algorithmic + 2 * extra + 4 * 2 * 64 * 2


def test_the_engine_takes_what_the_cache_was_planned_with() -> None:
    module = tiny_module()
    engine = given_engine(module, "auto", batch=3, longest=24, backend=None)
    engine.prepare()
    stats = engine.stats()
    assert stats.kv_bytes / (stats.blocks * 16) == kv_token_bytes(module.config, "auto", torch.bfloat16)
    case = Case(Setting(), 3, 16, 8, 512, generate=True)
    assert planned_bytes(module, case) == stats.kv_bytes


def test_the_same_function_in_two_precisions() -> None:
    """The gate's exact step must multiply by the same rounded weights."""
    low, high = tiny_module(), tiny_module(torch.float32)
    assert torch.equal(low.embed_tokens.float(), high.embed_tokens)
    assert torch.equal(low.lm_head.float(), high.lm_head)


def test_a_setting_that_the_engine_refuses_is_told_in_its_words(tiny: Request) -> None:
    request = replace(tiny, kv=("auto", "fp9"), bits=(4,), lm_head_bits=(16,))  # type: ignore[arg-type]
    (refused, why), (taken, _) = decode_records(request, READ)
    assert (
        refused is not None
        and refused.failed
        and refused.us is None
        and refused.case == "tiny.L4.w4g128.kv-fp9"
    )
    assert why == refused.note and "ValueError: kv_cache_dtype must be" in why and "'fp9'" in why
    assert taken is not None and taken.ok
    assert parse(Run(HEADER, (refused, taken)).to_json(), "run").records == (refused, taken)


def test_an_argument_that_the_engine_lacks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(path: Path, *, bits: int | None = None) -> None:
        raise AssertionError("an argument that is not there was taken")

    def taking(path: Path, *, lm_head_bits: int = 16) -> None:
        if lm_head_bits not in (4, 8, 16):
            raise ValueError(f"lm_head_bits is {lm_head_bits}")
        raise CheckpointError(f"{path}: not there")

    monkeypatch.setattr(engine_models, "load_decode_module", without)
    reason = refusal(Setting(lm_head_bits=8))
    assert reason is not None and "TypeError: " in reason and "argument 'lm_head_bits'" in reason
    assert refusal(Setting()) is None
    monkeypatch.setattr(engine_models, "load_decode_module", taking)
    assert refusal(Setting(lm_head_bits=8)) is None
    assert "ValueError: lm_head_bits is 2" in str(refusal(Setting(lm_head_bits=2)))
    assert "no such_option=1: TypeError: " in str(refusal(Setting(), such_option=1))


def test_an_lm_head_of_few_bits_runs() -> None:
    setting = Setting(4, "auto", 8)
    assert refusal(setting) is None
    verdict = judge_step(Source(CPU), setting, model_config(TINY, 4, 128))
    assert verdict.ok, verdict.reason
    module = engine_models.load(Source(CPU, "smollm2-135m", layers=1), setting, model_config(TINY, 1, 64))
    dense = engine_models.load(Source(CPU, "smollm2-135m", layers=1), Setting(4), model_config(TINY, 1, 64))
    assert (module.lm_head_bits, dense.lm_head_bits) == (8, 16)


def test_an_engine_that_fails_in_a_setting_is_told(tiny: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken as an option, and refused later: the reason is recorded; in the default setting it is raised."""

    def refuse(source: Source, setting: Setting, config: object) -> None:
        raise TypeError("k has dtype bfloat16")

    monkeypatch.setattr(step_gate, "judge_step", refuse)
    monkeypatch.setattr(decode, "refusal", lambda setting: None)
    ((record, why),) = decode_records(replace(tiny, kv=("int8",), bits=(4,)), READ)
    assert record is not None and record.failed and "TypeError: k has dtype bfloat16" in why
    with pytest.raises(TypeError, match="k has dtype"):
        list(decode_records(replace(tiny, bits=(4,)), READ))


def taken(kv: KvDtype) -> Setting:
    setting = Setting(4, kv)
    assert refusal(setting) is None
    return setting


@pytest.mark.parametrize("kv", KV_DTYPES)
def test_a_right_step_passes_in_every_kv_dtype(kv: KvDtype) -> None:
    setting = taken(kv)
    verdict = judge_step(Source(CPU), setting, model_config(TINY, 4, 128))
    assert verdict.ok and verdict.error is not None, verdict.reason


@pytest.mark.parametrize("kv", KV_DTYPES)
def test_wrong_values_in_the_cache_are_caught(kv: KvDtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five per cent, and only where no backend was named: as a broken kernel of ours would be."""
    setting = taken(kv)
    submit_kv = engine_module.DecodeEngine.submit_kv

    def spoilt(self: Any, prompt: Any, k: torch.Tensor, v: torch.Tensor, *rest: Any, **named: Any) -> str:
        wrong = v * 1.05 if self.options.backend is None else v
        return submit_kv(self, prompt, k, wrong, *rest, **named)

    monkeypatch.setattr(engine_module.DecodeEngine, "submit_kv", spoilt)
    verdict = judge_step(Source(CPU), setting, model_config(TINY, 4, 128))
    assert not verdict.ok and verdict.reason.startswith(f"a decode step of w4 kv-{kv}: worst error")


def spoil(make: Callable[..., DecodeModule]) -> Callable[..., DecodeModule]:
    """A norm that is wrong by five per cent, only where no backend was named."""

    def made(config: Any, spec: Any, placement: Placement, *rest: Any, **named: Any) -> DecodeModule:
        module = make(config, spec, placement, *rest, **named)
        if placement.backend is None:
            module.stack.layers[0].mlp_norm.weight.mul_(1.05)
        return module

    return made


def test_a_wrong_step_is_not_timed(tiny: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_gate, "random_decode_module", spoil(step_gate.random_decode_module))
    monkeypatch.setattr(decode, "measure_steps", lambda *_, **__: pytest.fail("a wrong step was timed"))
    monkeypatch.setattr(decode, "measure_generate", lambda *_, **__: pytest.fail("a wrong step was timed"))
    found = list(decode_records(replace(tiny, generate="also"), READ))
    assert len(found) == 4
    for record, note in found:
        assert record is not None and not record.ok and not record.failed and record.us is None
        assert note.startswith("a decode step of w") and "worst error" in note


def test_a_step_that_is_not_finite_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    make = step_gate.random_decode_module

    def made(config: Any, spec: Any, placement: Placement, *rest: Any, **named: Any) -> DecodeModule:
        module = make(config, spec, placement, *rest, **named)
        if placement.backend is None:
            module.stack.layers[0].mlp_norm.weight.fill_(torch.nan)
        return module

    monkeypatch.setattr(step_gate, "random_decode_module", made)
    assert not judge_step(Source(CPU), Setting(), model_config(TINY, 4, 128)).ok


def test_records_of_both_kinds_with_a_mix_and_whole_answers(tiny: Request) -> None:
    request = replace(tiny, mix=Mix(2, 1.0), generate="also", breakdown=True)
    found = [record for record, _ in decode_records(request, READ) if record is not None]
    assert [record.case.removeprefix("tiny.L4.") for record in found] == [
        f"{weights}.b2.c16{rest}"
        for weights in ("w4g128", "w16")
        for rest in ("", ".mix2z1", ".generate", ".generate.mix2z1")
    ]
    assert [record.backend for record in found] == ["torch"] * 4 + ["dense"] * 4
    for record in found:
        told = record.measured
        assert record.ok and record.us == told["tpot_us"]["p50"] and told["tpot_us"]["p99"] >= record.us
        assert told["floor_us"] == pytest.approx(record.bytes / READ * 1e6, abs=0.1)
        assert told["of_floor"] == pytest.approx(told["floor_us"] / record.us, abs=1e-4)
        assert told["kv_token_bytes"] == 4 * 2 * 2 * 64 * 2
        assert told["memory"]["kv"] > 0 and told["memory"]["peak"] is None
        assert ("ratio" in told) == (".mix" in record.case)
        assert ("breakdown" in told) == (record.fields["mode"] == "steps" and "models" not in record.fields)
        assert (told["memory"]["prefill"] > 0) == ("ttft_ms" in told) == (record.fields["mode"] == "generate")
    run = Run(HEADER, tuple(found))
    assert parse(run.to_json(), "run") == run
    # 16-bit weights are what their own quantised batch is told against.
    assert [baseline_of(record, found) for record in found] == found[4:] * 2
    titles = [table.title.split(" of ")[0] for table in build(run)]
    assert titles == ["", "memory, GB", "whole answers", "operators", "operators"]


def test_what_does_not_fit_is_told(tiny: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "free_bytes", lambda device: 1000)
    found = list(decode_records(tiny, READ))
    assert [record for record, _ in found] == [None, None]
    assert all("1000 are free" in note for _, note in found)


def test_what_the_model_is_too_short_for_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "describe", lambda source, longest: engine_models.describe(source, 48))
    request = Request(
        Source(CPU, "smollm2-135m", layers=1), bits=(4,), batches=(1,), contexts=(16,), tokens=4
    )
    ((record, note),) = decode_records(request, READ)
    assert record is None and note.endswith("requests come to 92 tokens, the model takes 48")


def test_a_checkpoint_is_timed_as_asked_for(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    source = Source(CPU, tmp_path / "model", group_size=32)
    request = Request(source, bits=(4,), batches=(1,), contexts=(16,), tokens=3, generate="also")
    (steps, note), (whole, _) = decode_records(request, READ)
    assert steps is not None and steps.ok and note == ""
    assert steps.case == "model.L2.w4g32.b1.c16" and steps.fields["group_size"] == 32
    assert whole is not None and whole.ok and whole.case == "model.L2.w4g32.b1.c16.generate"


class FakeEngine:
    """Tells what it is given, a call at a time."""

    def __init__(self, *calls: int) -> None:
        self.calls = deque(calls)

    def step(self) -> list[StepOutput]:
        told = self.calls.popleft()
        return [StepOutput(str(i), "m", (1,), "", None, None) for i in range(told)]

    def stats(self) -> str:
        return "stats"


def test_a_token_told_one_call_later_is_counted_once() -> None:
    """An engine that overlaps host and device tells nothing at first; then every call tells a batch."""
    times = iter([0.0, 0.1, 1.0, 3.0, 4.0, 5.0])
    found = time_tokens(FakeEngine(0, 3, 3, 3, 3), 3, 4, clock=lambda: next(times))  # type: ignore[arg-type]
    assert found.intervals_s == pytest.approx((1.0, 2.0, 1.0, 1.0))
    assert found.us == pytest.approx(1e6) and found.mean_us == pytest.approx(1.25e6)
    assert found.p99_us == pytest.approx(1.97e6)


def test_a_batch_that_is_not_whole_is_refused() -> None:
    with pytest.raises(RuntimeError, match="told 2 tokens, expected one for each of 3"):
        time_tokens(FakeEngine(3, 2), 3, 4)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="told 0 tokens"):
        time_tokens(FakeEngine(*[0] * 20), 3, 4)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="does not run a batch of 3: stats"):
        settle(FakeEngine(*[2] * 50), 3)  # type: ignore[arg-type]


def test_a_mixed_batch_is_one_batch() -> None:
    engine = given_engine(tiny_module(), "auto", batch=5, longest=60, backend=None)
    submit_given(engine, ["a", "b", "a", "c", "a"], 8, 40)
    settle(engine, 5)
    outputs = engine.step()
    assert sorted(output.model for output in outputs) == ["a", "a", "a", "b", "c"]
    assert engine.models == ("a", "b", "c")


def test_given_kv_waits_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is bounded, and with it the lead of the first requests; all come to run at once."""
    config = tiny_module().config
    a_request = 8 * kv_token_bytes(config, "auto", torch.bfloat16)
    at_once = decode_steps.given_at_once
    assert at_once(config, 6, 8, torch.bfloat16) == 6
    monkeypatch.setattr(decode_steps, "_GIVEN_BYTES", 2 * a_request)
    assert at_once(config, 6, 8, torch.bfloat16) == 2
    assert at_once(config, 64, 8, torch.bfloat16) == 4 and at_once(config, 1, 8, torch.bfloat16) == 1
    monkeypatch.setattr(decode_steps, "_GIVEN_BYTES", 1)
    engine = given_engine(tiny_module(), "int8", batch=5, longest=80, backend=None)
    submit_given(engine, ["a"] * 5, 8, 60)
    assert engine.stats().running == 4 and engine.stats().waiting == 1
    settle(engine, 5)
    assert len(time_tokens(engine, 5, 6).intervals_s) == 6


def test_whole_answers_alone(tiny: Request) -> None:
    found = [record for record, _ in decode_records(replace(tiny, bits=(4,), generate="only"), READ)]
    assert [record.case for record in found if record is not None] == ["tiny.L4.w4g128.b2.c16.generate"]


@pytest.mark.parametrize(("bits", "K"), [(2, 70), (3, 64), (3, 70), (4, 100), (8, 33)])
def test_random_codes_are_uniform_and_packed(bits: Bits, K: int) -> None:
    spec = QuantSpec(bits, "channel", True)
    packed = random_packed_weight(400, K, spec, torch.bfloat16, torch.Generator().manual_seed(1)).validate()
    codes = packed.codes()
    assert torch.equal(pack_codes(codes, bits), packed.qweight)
    counts = codes.flatten().long().bincount(minlength=1 << bits)
    expected = codes.numel() / (1 << bits)
    assert counts.numel() == 1 << bits and (counts - expected).abs().max() < 6 * expected**0.5


def test_tpot_leaves_out_the_first_token() -> None:
    times = GenerateTimes(9.0, ((2.0, 3.0, 4.0, 6.0), (3.5, 4.5, 5.0, 5.5)))
    assert times.ttft_s == [2.0, 3.5]
    assert times.tpot_s == pytest.approx([4 / 3, 2 / 3])
    # All decode from 3.5, when the second has its first token, to 5.5, when it has its last.
    assert times.settled_s == pytest.approx([1.0, 0.5, 0.5])


def test_whole_answers_are_checked() -> None:
    with pytest.raises(ValueError, match="tokens is 1, expected at least 2"):
        time_generate(SimpleNamespace(), [[1]], ["m"], 1)  # type: ignore[arg-type]


def test_models_on_one_stack_share_no_block() -> None:
    module = tiny_module()
    first, second = prefill_modules(Source(CPU, "tiny"), module, ["a", "b"])
    assert first.stack is second.stack and first.fingerprint != second.fingerprint
    assert (first.name, second.card.name) == ("a", "b")
    case = Case(Setting(), 4, 24, 3, 512, Mix(2, 0.0), generate=True)
    figures = measure_generate(
        module, [*prefill_modules(Source(CPU, "tiny"), module, ["model-0", "model-1"])], case, None
    )
    assert figures.us > 0 and "distinct fingerprints" in figures.note


def test_a_ratio_needs_the_same_batch() -> None:
    fields = {"model": "m", "layers": 2, "batch": 1, "context": 8, "tokens": 4, "mode": "steps",
              "dtype": "bfloat16", "kv_dtype": "bfloat16", "lm_head_bits": 16}  # fmt: skip
    quantised = Record("decode", "a", "cuda", 5.0, 1, 0.5, True, fields | {"bits": 4})
    dense = Record("decode", "b", "dense", 9.0, 1, 0.5, True, fields | {"bits": 16})
    few = replace(dense, fields=fields | {"bits": 16, "kv_dtype": "int8"})
    assert baseline_of(quantised, [quantised, few, dense]) is dense
    assert baseline_of(quantised, [quantised, few]) is None
    assert baseline_of(replace(quantised, fields=fields | {"batch": 8}), [dense]) is None


@pytest.mark.gpu
def test_steps_on_a_gpu_are_told_with_host_time_and_operators(device: torch.device) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    source = Source(device, "smollm2-135m", layers=2)
    request = Request(
        source, batches=(1, 4), contexts=(64,), tokens=32, host=True, breakdown=True, generate="also"
    )
    found = [record for record, _ in decode_records(request, 3e12)]
    assert len(found) == 8
    for record in found:
        assert record is not None and record.ok, record
        assert record.measured["memory"]["peak"] > record.measured["memory"]["weights"]
        if record.fields["mode"] == "steps":
            assert record.measured["host"]["device_us"] > 0 and record.measured["breakdown"]["operators"]
