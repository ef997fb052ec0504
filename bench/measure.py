"""Runs cases: operands once, the gate first, then the clock."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qsun_bench.cases import Case, Operands
from qsun_bench.contenders import Contender
from qsun_bench.gate import Verdict, judge
from qsun_bench.peers import Prepared
from qsun_bench.results import Record
from qsun_kernels.testing.timing import copies_to_overflow, time_calls

# What a kernel that cannot run raises: the failure is a finding of the benchmark, not the end of it.
_FAILURES = (RuntimeError, ValueError, TypeError, NotImplementedError)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one contender on one case.

    record: None when it was not run. note: why it was not run or not timed, empty otherwise.
    """

    case: Case
    contender: str
    record: Record | None
    note: str


def measure(
    cases: Sequence[Case], contenders: Sequence[Contender], device: torch.device, *, seconds: float
) -> Iterator[Outcome]:
    """Every contender on every case, as each is done.

    Cases that stream equal operands are run together: the operands are made and laid out once for all of
    them. seconds: about how long each timing takes.
    """
    by_operands = sorted(range(len(cases)), key=lambda i: _first_with_key(cases, i))
    for _, group in itertools.groupby(by_operands, key=lambda i: _first_with_key(cases, i)):
        members = [cases[i] for i in group]
        operands = members[0].operands(device)
        for contender in contenders:
            yield from _run_contender(contender, members, operands, device, seconds)
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _first_with_key(cases: Sequence[Case], index: int) -> int:
    key = cases[index].operands_key
    return next(i for i, case in enumerate(cases) if case.operands_key == key)


def _run_contender(
    contender: Contender, members: Sequence[Case], operands: Operands, device: torch.device, seconds: float
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
    try:
        prepared = contender.prepare(operands)
    except _FAILURES as error:
        failed = _failure(error)
        verdicts = dict.fromkeys(possible, failed)
    else:
        verdicts = {case: _gate(case, contender, prepared, operands, device) for case in possible}
    rotation: list[Prepared] = []
    if any(verdict.ok for verdict in verdicts.values()):
        size = sum(tensor.nbytes for tensor in prepared.streamed)
        rotation = [prepared]
        rotation += [contender.prepare(operands) for _ in range(copies_to_overflow(size, device) - 1)]
    for case, verdict in verdicts.items():
        us = _time(case, rotation, device, seconds) if verdict.ok else None
        record = Record(
            op=case.op,
            case=case.name,
            backend=contender.name,
            us=us,
            bytes=case.bytes,
            error=verdict.error,
            ok=verdict.ok,
            fields=case.fields(),
        )
        yield Outcome(case, contender.name, record, verdict.reason)


def _gate(
    case: Case, contender: Contender, prepared: Prepared, operands: Operands, device: torch.device
) -> Verdict:
    x = case.activation(device)
    try:
        got = prepared.run(x)
    except _FAILURES as error:
        return _failure(error)
    exact, plain, terms = operands.exact(x), operands.plain(x), operands.terms(x)
    return judge(f"{case.name} by {contender.name}", got, exact=exact, plain=plain, terms=terms)


def _failure(error: Exception) -> Verdict:
    return Verdict(False, None, f"{type(error).__name__}: {error}".splitlines()[0])


def _time(case: Case, rotation: Sequence[Prepared], device: torch.device, seconds: float) -> float:
    x = case.activation(device)
    calls = [_bound(prepared.run, x) for prepared in rotation]
    timing = time_calls(calls, [prepared.streamed for prepared in rotation], device=device, seconds=seconds)
    return round(timing.us, 3)


def _bound(run: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Any]:
    return lambda: run(x)
