"""Runs cases: operands once, the gate first, then the clock."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from qsun_bench.cases import Case, Operands, Oracle
from qsun_bench.contenders import Contender
from qsun_bench.gate import Verdict, judge, verdict_of
from qsun_bench.peers import Prepared
from qsun_bench.plan_time import time_plan
from qsun_bench.results import Record
from qsun_kernels.testing.timing import copies_to_overflow, time_calls


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one contender on one case.

    record: None when it was not run. note: why it was not run or not timed, empty otherwise.
    """

    case: Case
    contender: str
    record: Record | None
    note: str


@dataclass(frozen=True, slots=True)
class _Reference:
    """What the gate asks for one case: the same for every contender, so computed once."""

    exact: Tensor
    plain: Tensor
    terms: Tensor | None

    @classmethod
    def of(cls, oracle: Oracle, x: Tensor) -> _Reference:
        return cls(oracle.exact(x), oracle.plain(x), oracle.terms(x))


def measure(
    cases: Sequence[Case], contenders: Sequence[Contender], device: torch.device, *, seconds: float
) -> Iterator[Outcome]:
    """Every contender on every case, as each is done.

    Cases that stream equal operands are run together: the operands are made and laid out once for all of
    them, and freed before the next. seconds: about how long each timing takes.

    A contender that raises is a finding, not the end of the run. One that takes the CUDA context with it (an
    illegal access) ends what can be measured: the rest is told as not run, with the reason.
    """
    lost = ""
    by_operands = sorted(range(len(cases)), key=lambda i: _first_with_key(cases, i))
    for _, group in itertools.groupby(by_operands, key=lambda i: _first_with_key(cases, i)):
        members = [cases[i] for i in group]
        if not lost:
            operands = members[0].operands(device)
            references: dict[Case, _Reference] = {}
        for contender in contenders:
            if lost:
                yield from (Outcome(case, contender.name, None, lost) for case in members)
                continue
            yield from _run_contender(contender, members, operands, references, device, seconds)
            lost = _why_lost(contender, device)
        if not lost:
            del operands, references


def _why_lost(contender: Contender, device: torch.device) -> str:
    """Why nothing more can run on the device after `contender`; empty when it can."""
    if device.type != "cuda":
        return ""
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError as error:
        return f"{contender.name} broke the CUDA context before ({_first_line(error)})"
    return ""


def _first_with_key(cases: Sequence[Case], index: int) -> int:
    key = cases[index].operands_key
    return next(i for i, case in enumerate(cases) if case.operands_key == key)


def _run_contender(
    contender: Contender,
    members: Sequence[Case],
    operands: Operands,
    references: dict[Case, _Reference],
    device: torch.device,
    seconds: float,
) -> Iterator[Outcome]:
    possible: list[Case] = []
    for case in members:
        reason = contender.available(case, device)
        if reason is None:
            possible.append(case)
        else:
            yield Outcome(case, contender.name, None, reason)
    if not possible:
        return
    verdicts: dict[Case, Verdict] = {}
    rotation: list[Prepared] = []
    # Whatever a contender raises is its own finding, and other people's code raises anything.
    try:
        prepared = contender.prepare(operands)
        for case in possible:
            verdicts[case] = _gate(case, contender, prepared, operands, references, device)
        if any(verdict.ok for verdict in verdicts.values()):
            size = sum(tensor.nbytes for tensor in prepared.streamed)
            rotation = [prepared]
            rotation += [contender.prepare(operands) for _ in range(copies_to_overflow(size, device) - 1)]
    except Exception as error:
        failure = Verdict(False, None, _first_line(error))
        verdicts = {case: _unless_wrong(verdicts.get(case), failure) for case in possible}
    for case, verdict in verdicts.items():
        us: float | None = None
        plan_us: float | None = None
        if verdict.ok:
            try:
                us = _time(case, rotation, device, seconds)
                plan_us = time_plan(prepared, device)
            except Exception as error:
                verdict, us = Verdict(False, None, _first_line(error)), None
        record = Record(
            op=case.op,
            case=case.name,
            backend=contender.name,
            us=us,
            bytes=case.bytes,
            error=verdict.error,
            ok=verdict.ok,
            fields=case.fields(),
            note=contender.note if verdict.ok else verdict.reason,
            plan_us=plan_us,
        )
        yield Outcome(case, contender.name, record, verdict.reason)


def _unless_wrong(verdict: Verdict | None, failure: Verdict) -> Verdict:
    """The failure, but a result that was judged wrong stays so."""
    return failure if verdict is None or verdict.ok else verdict


def _gate(
    case: Case,
    contender: Contender,
    prepared: Prepared,
    operands: Operands,
    references: dict[Case, _Reference],
    device: torch.device,
) -> Verdict:
    x = case.activation(device)
    try:
        got = prepared.run(x)
    except Exception as error:
        return Verdict(False, None, _first_line(error))
    if prepared.judge is not None:
        return verdict_of(prepared.judge(x, got))
    if prepared.oracle is not None:
        reference = _Reference.of(prepared.oracle, x)
    else:
        if case not in references:
            references[case] = _Reference.of(cast(Oracle, operands), x)
        reference = references[case]
    return judge(
        f"{case.name} by {contender.name}",
        got,
        exact=reference.exact,
        plain=reference.plain,
        terms=reference.terms,
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _time(case: Case, rotation: Sequence[Prepared], device: torch.device, seconds: float) -> float:
    x = case.activation(device)
    calls = [_bound(prepared.run, x) for prepared in rotation]
    timing = time_calls(calls, [prepared.streamed for prepared in rotation], device=device, seconds=seconds)
    return round(timing.us, 3)


def _bound(run: Callable[[Tensor], Any], x: Tensor) -> Callable[[], Any]:
    return lambda: run(x)
