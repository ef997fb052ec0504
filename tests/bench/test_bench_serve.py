"""`qsun-bench serve`: what is counted, whose requests share a step, how a load is played by the clock."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qsun.core import SamplingParams, StepOutput
from qsun.engine.engine import DecodeEngine
from qsun.engine.options import EngineOptions
from qsun_bench import commands, engine_models, results, serve, serve_tables, step_gate
from qsun_bench.cli import main
from qsun_bench.engine_models import Setting, Source, load
from qsun_bench.prefill_models import prefill_modules
from qsun_bench.random_model import model_config
from qsun_bench.results import Record, Run
from qsun_bench.serve import DoesNotFit, Load, Request, cache_shares, serve_records
from qsun_bench.serve_arms import Arm, PerModelArm, SharedArm, play
from qsun_bench.serve_metrics import PROMISED_TPOT_MS, Objective, Served, summarise
from qsun_bench.shapes import ModelShape
from qsun_bench.workload import Arrival
from qsun_kernels.testing import timing

CPU = torch.device("cpu")
TINY = ModelShape("tiny", "llama", 2, 128, 256, 4, 2, 64, 512, False, 1e4)
NAMES = ("model-0", "model-1", "model-2")
PROMISED = Objective(ttft_s=1.0, tpot_s=0.1)


def served(*stamps: float, at: float = 0.0, tokens: int | None = None, error: str | None = None) -> Served:
    arrival = Arrival(at, "m", 4, len(stamps) if tokens is None else tokens)
    return Served(arrival, list(stamps), 0.0, error)


@pytest.mark.parametrize(
    ("one", "meets"),
    [
        (served(1.0, 1.1, 1.2), True),
        (served(1.01, 1.1), False),  # the first token came late
        (served(3.9, 3.95, at=3.0), True),  # from its arrival on
        (served(0.5, 0.6, 0.71), False),  # 0.105 s a token
        (served(0.5), True),  # one token has no time per token
        (served(0.5, 0.6, tokens=3), False),  # not served whole
        (served(0.5, 0.6, error="failed"), False),
        (served(tokens=2), False),
    ],
)
def test_what_meets_the_objective(one: Served, meets: bool) -> None:
    assert one.meets(PROMISED) is meets


def test_goodput_counts_what_was_promised_and_kept() -> None:
    every = [served(0.5, 0.6, 0.7), served(2.0, 2.1), served(1.0, tokens=9), served(0.2, 0.9)]
    every[1].lag_s = 0.25
    told = summarise(every, 4.0, PROMISED)
    assert (told["requests"], told["finished"], told["met"]) == (4, 3, 1)
    assert told["goodput_s"] == 0.25 and told["requests_s"] == 0.75 and told["tokens_s"] == 2.0
    assert told["ttft_ms"] == {"mean": 900.0, "p50": 500.0, "p95": 1850.0, "p99": 1970.0}
    assert told["tpot_ms"]["p50"] == 100.0 and told["tpot_ms"]["p99"] == pytest.approx(688.0)
    assert told["submission_lag_ms"]["mean"] == 62.5


def test_goodput_is_told_over_the_arrivals_and_for_other_promises() -> None:
    """The last answers, alone on the device, take time that no load had."""
    every = [served(0.5, 0.512, 0.524), served(2.0, 2.028), served(1.5, 1.59), served(2.5, 2.512)]
    told = summarise(every, 8.0, PROMISED, span_s=4.0)
    assert told["goodput_s"] == 0.25 and told["requests_s"] == 0.5
    by = told["goodput_by_tpot_ms"]
    assert list(by) == [str(promised) for promised in PROMISED_TPOT_MS]
    assert (by["10"], by["15"], by["25"], by["30"], by["100"]) == (0.0, 0.25, 0.25, 0.25, 0.25)
    late = Objective(ttft_s=3.0, tpot_s=0.03)
    assert summarise(every, 8.0, late, span_s=4.0)["goodput_by_tpot_ms"] == by | {
        **dict.fromkeys(("15", "20", "25"), 0.5),
        **dict.fromkeys(("30", "40", "50", "75", "100"), 0.75),
        "100": 1.0,
    }


def engine_of(names: Sequence[str], batch: int = 4) -> DecodeEngine:
    source = Source(CPU, "tiny")
    module = load(source, Setting(4), model_config(TINY, 2, 64))
    options = EngineOptions(max_batch_size=batch, max_model_len=64, memory=1 << 22, prefix_reuse=False)
    engine = DecodeEngine(module, None, options)
    for prefill in prefill_modules(source, module, names):
        engine.add_model(prefill.name, prefill)
    return engine


class Watched:
    """An arm whose steps are kept: the models of the tokens that each told."""

    def __init__(self, arm: Arm) -> None:
        self.arm = arm
        self.steps: list[set[str]] = []

    @property
    def engines(self) -> Sequence[DecodeEngine]:
        return self.arm.engines

    @property
    def has_work(self) -> bool:
        return self.arm.has_work

    def submit(self, *request: Any) -> None:
        self.arm.submit(*request)

    def step(self) -> Sequence[StepOutput]:
        outputs = self.arm.step()
        self.steps.append({output.model for output in outputs if output.token_ids})
        return outputs


def load_of_three(tokens: int = 6) -> tuple[list[Arrival], list[list[int]]]:
    arrivals = [Arrival(0.0, NAMES[i % 3], 5 + i, tokens) for i in range(9)]
    return arrivals, [list(range(arrival.prompt_tokens)) for arrival in arrivals]


@pytest.mark.parametrize("order", ["round-robin", "longest-queue"])
def test_per_model_steps_never_mix_models(order: Any) -> None:
    arrivals, prompts = load_of_three()
    arm = Watched(PerModelArm({name: engine_of([name]) for name in NAMES}, order))
    found, wall = play(arm, arrivals, prompts, limit_s=60.0)
    assert all(one.done for one in found) and 0 < wall < 60
    told = [models for models in arm.steps if models]
    assert all(len(models) == 1 for models in told)
    assert set.union(*told) == set(NAMES)
    if order == "round-robin":
        # While all have work they take turns.
        turns = [next(iter(models)) for models in told[:9]]
        assert all(len(set(turns[i : i + 3])) == 3 for i in range(0, 9, 3))


def test_shared_steps_hold_all_models() -> None:
    arrivals, prompts = load_of_three()
    arm = Watched(SharedArm(engine_of(NAMES, batch=9)))
    found, _ = play(arm, arrivals, prompts, limit_s=60.0)
    assert all(one.done for one in found)
    assert set(NAMES) in arm.steps
    # All nine decode together: each model by itself would take three times as many steps.
    assert sum(bool(models) for models in arm.steps) <= 9


def test_an_engine_of_two_models_is_no_engine_of_one() -> None:
    with pytest.raises(ValueError, match="the engine of 'model-0' has the models"):
        PerModelArm({"model-0": engine_of(NAMES[:2])})


class FakeEngine:
    """Serves every request one token a step; a step takes a second of the test's clock."""

    models = ("m",)

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.live: dict[str, int] = {}
        self.cancelled: list[str] = []

    @property
    def has_work(self) -> bool:
        return bool(self.live)

    def submit(self, prompt: Any, *, model: str, params: SamplingParams, request_id: str) -> None:
        self.live[request_id] = params.max_tokens

    def step(self) -> list[StepOutput]:
        self.clock.now += 1.0
        outputs = []
        for name in list(self.live):
            self.live[name] -= 1
            over = not self.live[name]
            outputs.append(StepOutput(name, "m", (1,), "", None, "length" if over else None))
            if over:
                del self.live[name]
        return outputs

    def cancel(self, request_id: str) -> bool:
        if request_id in self.live:
            self.cancelled.append(request_id)
        return self.live.pop(request_id, None) is not None


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def test_a_load_is_played_by_the_clock() -> None:
    clock = FakeClock()
    engine = FakeEngine(clock)
    arrivals = [Arrival(0.0, "m", 1, 2), Arrival(0.5, "m", 1, 1), Arrival(9.0, "m", 1, 1)]
    arm = SharedArm(engine)  # type: ignore[arg-type]
    found, wall = play(arm, arrivals, [[1]] * 3, limit_s=100.0, clock=clock, sleep=clock.sleep)
    assert [one.stamps_s for one in found] == [[1.0, 2.0], [2.0], [10.0]]
    # The second arrived while a step ran; nothing ran when the third was to come.
    assert [one.lag_s for one in found] == [0.0, 0.5, 0.0] and clock.slept == [7.0]
    assert [one.ttft_s for one in found] == [1.0, 1.5, 1.0] and wall == 10.0


def test_a_load_is_left_at_its_limit() -> None:
    clock = FakeClock()
    engine = FakeEngine(clock)
    arrivals = [Arrival(0.0, "m", 1, 50), Arrival(0.0, "m", 1, 2), Arrival(99.0, "m", 1, 1)]
    arm = SharedArm(engine)  # type: ignore[arg-type]
    found, wall = play(arm, arrivals, [[1]] * 3, limit_s=3.5, clock=clock, sleep=clock.sleep)
    assert wall == 4.0 and engine.cancelled == ["0"] and not arm.has_work
    assert [one.done for one in found] == [False, True, False]
    assert serve._wrong(found, cut=True) == ""
    assert serve._wrong(found, cut=False).startswith("2 requests ended early, the first with 4 of 50")


def test_the_longest_queue_goes_first_and_turns_are_fair() -> None:
    clock = FakeClock()
    order: deque[str] = deque()

    class Named(FakeEngine):
        def __init__(self, name: str) -> None:
            super().__init__(clock)
            self.models = (name,)

        def step(self) -> list[StepOutput]:
            order.append(self.models[0])
            return super().step()

    def arm(kind: Any) -> PerModelArm:
        order.clear()
        made = PerModelArm({name: Named(name) for name in "abc"}, kind)  # type: ignore[misc]
        for i, name in enumerate("abbbc"):
            made.submit(str(i), name, [1], SamplingParams(max_tokens=2))
        while made.has_work:
            made.step()
        return made

    arm("round-robin")
    assert list(order) == ["a", "b", "c", "a", "b", "c"]
    arm("longest-queue")
    assert list(order) == ["b", "b", "a", "c", "a", "c"]


def test_caches_follow_popularity_and_hold_the_longest() -> None:
    arrivals = [Arrival(0.0, "a", 60, 20), Arrival(1.0, "b", 10, 10)]
    assert cache_shares(arrivals, 1000, {"a": 100, "b": 100}) == {"a": 100 + 640, "b": 100 + 160}
    with pytest.raises(DoesNotFit, match="--kv-memory: 150 B, expected at least 200 B"):
        cache_shares(arrivals, 150, {"a": 100, "b": 100})


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Request:
    monkeypatch.setattr(engine_models, "shape", lambda name: TINY)
    arrivals, _ = load_of_three(3)
    return Request(
        Source(CPU, "tiny"),
        Setting(4),
        [Load("m3", arrivals, {"models": 3})],
        Objective(60.0, 60.0),
        ("shared", "per-model"),
        max_batch=4,
        prefill_chunk=16,
    )


def test_records_of_both_arms(tiny: Request) -> None:
    shared, alone = (record for record, why in serve_records(tiny) if record is not None and not why)
    assert (shared.backend, alone.backend) == ("shared", "per-model") and shared.case == "tiny.L2.w4g128.m3"
    for record in (shared, alone):
        told = record.measured
        assert record.ok and record.us == pytest.approx(1e3 * told["tpot_ms"]["p50"], abs=0.1)
        assert told["met"] == told["finished"] == told["requests"] == 9 and told["unfinished"] == 0
        assert told["drawn"]["by_model"] == dict.fromkeys(NAMES, 3)
        # Nine requests of three tokens, all by the decode module.
        assert told["mean_batch"] * told["decode_steps"] == pytest.approx(27, abs=0.2)
        assert "distinct fingerprints" in record.note and told["memory"]["kv"] > 0
    assert shared.measured["decode_steps"] < alone.measured["decode_steps"]
    assert shared.measured["mean_batch"] > alone.measured["mean_batch"]
    assert "order" not in shared.fields and alone.fields["order"] == "round-robin"


@pytest.mark.parametrize(
    ("kept", "played"),
    [((), "r4 r2 r1"), ((1,), "r4 r2 r1"), ((1, 2), "r4 r2 r3"), ((1, 2, 3, 4, 5), "r4 r6 r5"),
     ((1, 2, 3, 4, 5, 6, 7), "r4 r6 r7")],
)  # fmt: skip
def test_the_last_rate_that_is_served_is_bisected(
    kept: tuple[int, ...], played: str, tiny: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of seven rates each arm plays three."""

    def judged(self: Any, name: str, arm: Arm, load_: Load, *_: Any) -> tuple[Record, str]:
        met = 9 if load_.fields["rate"] in kept else 8
        measured = {"met": met, "requests": 10}
        return Record("serve", load_.name, name, 1.0, 1, 0.5, True, {}, measured=measured), ""

    monkeypatch.setattr(serve._Bench, "play", judged)
    loads = [Load(f"r{rate}", tiny.loads[0].arrivals, {"rate": rate}, 1.0) for rate in range(1, 8)]
    found = [record for record, _ in serve_records(replace(tiny, loads=loads, bisect=0.9))]
    for arm in ("shared", "per-model"):
        assert " ".join(r.case for r in found if r is not None and r.backend == arm) == played
    every = [record for record, _ in serve_records(replace(tiny, loads=loads, arms=("shared",)))]
    assert [record.case for record in every if record is not None] == [load_.name for load_ in loads]


def test_offered_is_told_over_the_arrivals(tiny: Request) -> None:
    loads = [Load("m3.r9", tiny.loads[0].arrivals, {"rate": 9}, 2.0)]
    ((record, _),) = serve_records(replace(tiny, loads=loads, arms=("shared",)))
    assert record is not None and record.measured["offered_s"] == 4.5 == record.measured["goodput_s"]


def test_a_model_of_short_requests_gets_a_small_cache(tiny: Request) -> None:
    """What its longest request takes and no more, although a prompt chunk would be longer."""
    arrivals = [Arrival(0.0, "model-0", 60, 3), Arrival(0.0, "model-1", 3, 2)]
    a_token = 2 * 2 * 2 * 64 * 2
    request = Request(
        tiny.source,
        tiny.setting,
        [Load("two", arrivals, {})],
        tiny.objective,
        ("shared", "per-model"),
        prefill_chunk=64,
        # Four blocks and a spare one for the first, one and a spare one for the second.
        kv_memory=(5 + 2) * 16 * a_token,
    )
    for record, why in serve_records(request):
        assert record is not None and record.ok and record.measured["finished"] == 2, why
        assert record.measured["memory"]["kv"] == request.kv_memory
        assert record.measured["memory"]["prefill"] > 0


def test_a_wrong_step_is_not_served(tiny: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    make = step_gate.random_decode_module

    def made(config: Any, spec: Any, placement: Any, *rest: Any, **named: Any) -> Any:
        module = make(config, spec, placement, *rest, **named)
        if placement.backend is None:
            module.stack.layers[0].mlp_norm.weight.mul_(1.05)
        return module

    monkeypatch.setattr(step_gate, "random_decode_module", made)
    monkeypatch.setattr(serve, "play", lambda *_, **__: pytest.fail("a wrong step was served"))
    found = list(serve_records(tiny))
    assert len(found) == 2
    for record, why in found:
        assert record is not None and not record.ok and record.us is None and "worst error" in why


def test_an_option_that_the_engine_lacks_is_told(tiny: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "refusal", lambda setting, **options: f"this engine takes no {options}")
    tiny = Request(tiny.source, tiny.setting, tiny.loads, tiny.objective, ("shared",), overlap="on")
    ((record, why),) = serve_records(tiny)
    assert record is not None and record.failed and record.fields["overlap"] == "on"
    assert why == "this engine takes no {'overlap': 'on'}"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = timing.read_bandwidth
    monkeypatch.setattr(commands, "read_bandwidth", lambda device: probe(device, probe_bytes=8 << 20))


def run_of(options: list[str], tmp_path: Path) -> Run:
    out = tmp_path / "run.json"
    arguments = ["serve", "--smoke", "--layers", "1", "--device", "cpu", "--json", str(out), *options]
    assert main([*arguments, "--slo-ttft", "60000", "--slo-tpot", "60000"]) == 0
    return results.load(str(out))


def test_the_command_serves_and_draws(
    quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "run.png"
    options = ["--rate", "4,12", "--duration", "0.5", "--models", "2", "--plot", str(plot)]
    run = run_of(options, tmp_path)
    assert [(r.backend, r.fields["rate"]) for r in run.records] == [
        ("shared", 4.0),
        ("shared", 12.0),
        ("per-model", 4.0),
        ("per-model", 12.0),
    ]
    assert all(record.ok and record.measured["finished"] for record in run.records)
    assert plot.read_bytes()[:4] == b"\x89PNG"
    out = capsys.readouterr().out
    assert "vs per-model" in out and "smollm2-135m.L1.w4g64.m2z1.r12" in out


def test_the_command_plays_a_trace(quick: None, tmp_path: Path) -> None:
    trace = tmp_path / "day.jsonl"
    rows = [
        {"arrival_s": 0.1 * i, "model": name, "prompt_tokens": 6, "output_tokens": 3}
        for i, name in enumerate(["sql", "chat", "sql"])
    ]
    trace.write_text("\n".join(map(json.dumps, rows)))
    (record,) = run_of(["--trace", str(trace), "--arms", "shared"], tmp_path).records
    assert record.case.endswith(".trace-day") and record.fields["trace"] == "day.jsonl"
    assert record.measured["drawn"]["by_model"] == {"sql": 2, "chat": 1}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--rate", "0"], "--rate: got '0', expected requests a second above 0"),
        (["--rate", "4,2", "--bisect", "0.9"], "--bisect: looks for the last rate that is served"),
        (["--bisect", "90"], "--bisect: got '90', expected a share above 0 and at most 1"),
        (["--trace", "x", "--bisect", "0.9"], "--bisect: a trace states it"),
        (["--models", "0"], "--models: got '0', expected integers of at least 1"),
        (["--zipf", "-1"], "--zipf: got '-1', expected a number of at least 0"),
        (["--slo-ttft", "soon"], "--slo-ttft: got 'soon', expected milliseconds above 0"),
        (["--prompt-tokens", "9,3"], "--prompt-tokens: got '9,3', expected MEDIAN,P95"),
        (["--output-tokens", "9"], "--output-tokens: got '9', expected MEDIAN,P95"),
        (["--arms", "shared,mine"], "--arms: got 'shared,mine', expected some of shared, per-model"),
        (["--order", "random"], "--order: invalid choice: 'random'"),
        (["--kv-memory", "many"], "--kv-memory: got 'many', expected bytes or a size such as 40GiB"),
        (["--kv-memory", "1"], "--kv-memory: 1 B, expected at least"),
        (["--rate", "1", "--trace", "x"], "--trace: not allowed with argument --rate"),
        (["--trace", "x", "--models", "2"], "--models: a trace states it"),
        (["--model", "gpt-5"], "--model/--shape: got 'gpt-5', expected one of smollm2-135m"),
        (["--dtype", "fp32"], "--dtype: the step is judged against float32"),
        (["--bits", "5"], "--bits: got '5', expected some of 16, 8, 4, 3, 2"),
    ],
)
def test_usage_errors(options: list[str], says: str, quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["serve", "--smoke", "--layers", "1", "--device", "cpu", *options])
    assert exit_.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.damaged
def test_a_trace_that_is_not_there(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--smoke", "--device", "cpu", "--trace", "nowhere.csv"]) == 3
    assert "nowhere.csv" in capsys.readouterr().err


def test_records_are_told_as_a_table(tiny: Request) -> None:
    from qsun_bench import serve_tables, views

    measured = {
        "offered_s": 2.0, "met": 8, "requests": 10, "goodput_s": 3.0, "tokens_s": 90.0, "mean_batch": 4.5,
        "unfinished": 1, "ttft_ms": {"p50": 1.0, "p95": 2.0, "p99": 3.0},
        "tpot_ms": {"p50": 4.0, "p95": 5.0, "p99": 6.0},
    }  # fmt: skip
    shared = Record("serve", "m.r2", "shared", 4000.0, 1, 0.5, True, {}, measured=measured)
    alone = Record(
        "serve", "m.r2", "per-model", 9.0, 1, 0.5, True, {}, measured=measured | {"goodput_s": 2.0}
    )
    failed = Record("serve", "m.r4", "shared", None, 1, None, False, {}, "because")
    run = Run(results.header(CPU, "qsun-bench serve", 2e10, "0123456"), (shared, alone, failed))
    rows = serve_tables.rows(run)
    assert rows[0][:3] == ("m.r4", "shared", "FAILED")
    assert rows[1] == (
        "m.r2", "shared", "2", "8/10", "3", "1.50x", "90.0",
        "1.0", "2.0", "3.0", "4.00", "5.00", "6.00", "4.5", "1",
    )  # fmt: skip
    assert rows[2][5] == "", "the baseline is not told against itself"
    assert "| m.r2 | shared | 2 | 8/10 |" in str(views.markdown(run))


def test_the_best_of_either_arm() -> None:
    def record(arm: str, rate: int, goodput: float, tpot: float = 20.0) -> Record:
        fields = {"rate": rate, "slo_ttft_ms": 1000.0, "slo_tpot_ms": tpot}
        measured = {"goodput_s": goodput, "offered_s": rate + 0.5}
        return Record("serve", f"m.m8z1.r{rate}", arm, 1.0, 1, 0.5, True, fields, measured=measured)

    records = (record("shared", 9, 9.0), record("shared", 4, 4.0), record("per-model", 4, 3.0))
    run = Run(results.header(CPU, "qsun-bench serve", 2e10, "0123456"), records)
    assert serve_tables.best(run) == (("1000", "20", "9 of 9.5", "3 of 4.5", "3.00x"),)
    assert serve_tables.best(replace(run, records=records[:2])) == ()
    assert "| 9 of 9.5 | 3 of 4.5 | 3.00x |" in serve_tables.brief(run)
    assert "no two arms" in serve_tables.brief(replace(run, records=records[:2]))
    assert serve_tables.best(replace(run, records=(*records, record("per-model", 3, 3.0, 30.0)))) == ()
    none = replace(run, records=(records[0], record("per-model", 4, 0.0)))
    assert serve_tables.best(none)[0][3:] == ("0 of 4.5", "")


@pytest.mark.gpu
def test_both_arms_on_a_gpu(device: torch.device) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    arrivals, _ = load_of_three(8)
    request = Request(
        Source(device, "smollm2-135m", layers=2),
        Setting(4),
        [Load("m3", arrivals, {"models": 3})],
        Objective(60.0, 60.0),
        ("shared", "per-model"),
        max_batch=16,
    )
    for record, why in serve_records(request):
        assert record is not None and record.ok, why
        assert record.measured["finished"] == 9 and record.measured["memory"]["peak"] > 0
