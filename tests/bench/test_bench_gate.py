"""A wrong kernel is found, is not timed and enters no ratio."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qsun_bench import commands, contenders, measure, tables
from qsun_bench.cases import Selection, suites
from qsun_bench.cases.attention import AttentionCase
from qsun_bench.cases.wna16 import DenseOracle, Wna16Case, Wna16Operands
from qsun_bench.cli import main
from qsun_bench.contenders import Contender
from qsun_bench.gate import judge
from qsun_bench.peers import Prepared
from qsun_bench.results import parse
from qsun_kernels.quant import QuantSpec
from qsun_kernels.testing import timing

CPU = torch.device("cpu")
CASE = Wna16Case("m", 4, 256, 512, QuantSpec(4, 64, True), torch.bfloat16)


def spoil_one_column(out: Tensor) -> Tensor:
    """What a kernel does that forgets the last tile of N."""
    out[:, -1] = 0
    return out


def lose_precision(out: Tensor) -> Tensor:
    """What accumulation in half precision does: no element is far off, all are a little."""
    noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    return (out.float() * (1 + 0.02 * noise)).to(out.dtype)


def return_nan(out: Tensor) -> Tensor:
    out[0, 0] = float("nan")
    return out


def return_float32(out: Tensor) -> Tensor:
    return out.float()


def transpose(out: Tensor) -> Tensor:
    return out.transpose(0, 1)


WRONG: tuple[Callable[[Tensor], Tensor], ...] = (
    spoil_one_column,
    lose_precision,
    return_nan,
    return_float32,
    transpose,
)


@pytest.mark.parametrize("spoil", WRONG, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "case",
    [
        CASE,
        AttentionCase("a", (65, 17), 4, 2, 64, torch.bfloat16),
        AttentionCase("a", (65, 17), 4, 2, 64, torch.bfloat16, kv="int4"),
    ],
    ids=["wna16", "attention", "attention-codes"],
)
def test_wrong_results_are_judged_wrong(
    case: Wna16Case | AttentionCase, spoil: Callable[[Tensor], Tensor]
) -> None:
    operands, x = case.operands(CPU), case.activation(CPU)
    exact, plain = operands.exact(x), operands.plain(x)
    assert judge("right", plain.clone(), exact=exact, plain=plain).ok
    verdict = judge("wrong", spoil(plain.clone()), exact=exact, plain=plain, terms=operands.terms(x))
    assert not verdict.ok and verdict.reason.startswith("wrong:")


@pytest.fixture
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "last_level_cache_bytes", lambda device: 128 << 10)
    monkeypatch.setattr(timing, "_WARM_UP_S", 0.005)
    monkeypatch.setattr(commands, "read_bandwidth", lambda device: 1e10)


def contender_that(spoil: Callable[[Tensor], Tensor]) -> Contender:
    def prepare(operands: Wna16Operands) -> Prepared:
        weight = operands.dense(operands.dtype).clone()
        return Prepared(lambda x: spoil(x @ weight.T), (weight,))

    return Contender("cuda", "wna16_linear", lambda case, device: None, prepare)


def test_a_wrong_kernel_is_not_timed(small_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []
    clock = measure.time_calls

    def watched(*arguments, **named):  # type: ignore[no-untyped-def]
        timed.append("once")
        return clock(*arguments, **named)

    monkeypatch.setattr(measure, "time_calls", watched)
    chosen = [contender_that(spoil_one_column), contender_that(lambda out: out)]
    wrong, right = measure.measure([CASE], chosen, CPU, seconds=0.01)
    assert wrong.record is not None and not wrong.record.ok and wrong.record.us is None
    assert wrong.record.error is None or wrong.record.error > 1
    assert right.record is not None and right.record.ok and right.record.us is not None
    assert timed == ["once"]


def test_a_kernel_that_raises_is_a_finding(small_cache: None) -> None:
    def fail(out: Tensor) -> Tensor:
        raise RuntimeError("an illegal memory access was encountered")

    (outcome,) = measure.measure([CASE], [contender_that(fail)], CPU, seconds=0.01)
    assert outcome.record is not None and not outcome.record.ok and outcome.record.error is None
    assert outcome.note == "RuntimeError: an illegal memory access was encountered"


def test_a_failure_after_the_gate_is_a_finding_too(
    small_cache: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Laying out the copies may run out of memory, and a capture may fail."""
    prepared: list[int] = []

    def prepare(operands: Wna16Operands) -> Prepared:
        prepared.append(1)
        if len(prepared) > 1:
            raise MemoryError("no room for the second copy")
        return contender_that(lambda out: out).prepare(operands)

    (outcome,) = measure.measure(
        [CASE], [Contender("marlin", "wna16_linear", lambda case, device: None, prepare)], CPU, seconds=0.01
    )
    assert outcome.record is not None and outcome.record.failed and outcome.record.us is None
    assert outcome.record.note == "MemoryError: no room for the second copy"

    def refuse(*arguments: object, **named: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(measure, "time_calls", refuse)
    (outcome,) = measure.measure([CASE], [contender_that(lambda out: out)], CPU, seconds=0.01)
    assert outcome.record is not None and outcome.record.failed and "capturing" in outcome.record.note


def test_a_lost_device_ends_the_run_with_a_reason(small_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = iter(["", "machete broke the CUDA context before (misaligned address)"])
    monkeypatch.setattr(measure, "_why_lost", lambda contender, device: next(reasons))
    chosen = [contender_that(lambda out: out)] * 3
    other = Wna16Case("m", 4, 128, 256, QuantSpec(4, 64, True), torch.bfloat16)
    outcomes = list(measure.measure([CASE, other], chosen, CPU, seconds=0.01))
    assert [outcome.record is not None for outcome in outcomes] == [True, True, False, False, False, False]
    assert all("misaligned address" in outcome.note for outcome in outcomes[2:])


def test_the_oracle_is_asked_once_a_case(small_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    exact = Wna16Operands.exact

    def counted(self: Wna16Operands, x: Tensor) -> Tensor:
        asked.append(x.shape[0])
        return exact(self, x)

    monkeypatch.setattr(Wna16Operands, "exact", counted)
    other = Wna16Case("m", 8, 256, 512, QuantSpec(4, 64, True), torch.bfloat16)
    outcomes = list(measure.measure([CASE, other], [contender_that(lambda out: out)] * 3, CPU, seconds=0.01))
    assert len(outcomes) == 6 and sorted(asked) == [4, 8]


def test_a_format_of_its_own_is_judged_by_its_own_values(small_cache: None) -> None:
    """NF4 cannot hold the case's weights: what counts is whether it multiplies by what it holds."""

    def prepare(operands: Wna16Operands, scale: float) -> Prepared:
        weight = (operands.dense(torch.float64) * 0.9).to(operands.dtype)
        oracle = DenseOracle(weight.double(), operands.dtype)
        return Prepared(lambda x: (x @ weight.T) * scale, (weight,), oracle)

    for scale, right in ((1.0, True), (1.05, False)):
        peer = Contender(
            "nf4",
            "wna16_linear",
            lambda case, device: None,
            lambda o, s=scale: prepare(o, s),
            "its own values",
        )
        (outcome,) = measure.measure([CASE], [peer], CPU, seconds=0.01)
        assert outcome.record is not None and outcome.record.ok is right
        assert (outcome.record.note == "its own values") is right


def test_a_wrong_kernel_shows_no_speed(small_cache: None) -> None:
    chosen = [contender_that(spoil_one_column), Contender("dense", "wna16_linear", *_right())]
    records = [outcome.record for outcome in measure.measure([CASE], chosen, CPU, seconds=0.01)]
    wrong, dense = (record for record in records if record is not None)
    row = tables.record_row(wrong, 1.0, {dense.case: dense})
    assert row[2:6] == ("WRONG", "", "", "")
    # Nor does anything get a speed-up over a wrong baseline.
    assert tables.speed_up(dense, {wrong.case: wrong}) == ""


def _right():  # type: ignore[no-untyped-def]
    right = contender_that(lambda out: out)
    return right.available, right.prepare


def test_the_command_exits_with_1_on_a_wrong_kernel(
    small_cache: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real = contenders.contenders

    def with_a_wrong_one(op: str, variants: Sequence[str]) -> list[Contender]:
        return [contender_that(spoil_one_column), *(c for c in real(op, variants) if c.name == "dense")]

    monkeypatch.setattr(contenders, "contenders", with_a_wrong_one)
    suite = suites()["wna16"]
    assert suite.cases(Selection(CPU, smoke=True))
    out = tmp_path / "run.json"
    options = ["--smoke", "--device", "cpu", "--batch", "1", "--seconds", "0.01", "--json", str(out)]
    assert main(["wna16", *options]) == 1
    captured = capsys.readouterr()
    assert "WRONG: smollm2-135m.qkv.w4g64.M1 cuda: " in captured.err
    run = parse(out.read_text(), "run.json")
    assert {record.backend: record.ok for record in run.records} == {"cuda": False, "dense": True}
    assert all(record.us is None for record in run.records if not record.ok)
    json.loads(out.read_text(), parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
