"""Right before fast: the rule of the tests, asked before anything is timed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qsun_kernels.testing.tolerances import Comparison, compare


@dataclass(frozen=True, slots=True)
class Verdict:
    """ok: whether the result is right.

    error: its worst error over what is allowed, None when nothing came out.
    reason: what is wrong, in one line; empty when it is right.
    """

    ok: bool
    error: float | None
    reason: str


def judge(name: str, got: Tensor, *, exact: Tensor, plain: Tensor, terms: Tensor | None = None) -> Verdict:
    """Judge a result by `qsun_kernels.testing.tolerances`.

    exact: float64. plain: torch's result in the dtype of `got`. terms: float64, as in `compare`.
    """
    return verdict_of(compare(name, got, exact, plain, terms=terms))


def verdict_of(result: Comparison) -> Verdict:
    """A judgement by the same rule as the record tells it."""
    if result.allowed <= 0:
        return Verdict(False, None, result.report)
    error = result.worst / result.allowed
    # The results file is JSON, which has no infinity: a result with misplaced NaN has no error to tell.
    finite = error == error and error != float("inf")
    return Verdict(result.ok, float(f"{error:.4g}") if finite else None, "" if result.ok else result.report)
