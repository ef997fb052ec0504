"""Whom ours are compared with on the same problems, one file each: other people's kernels, or other ways.

A peer is a module of this folder with NAME (as in the records), OPERATOR (ours that it is compared with),
`available(case, device)` -> None or the reason it cannot run that case, and `prepare(operands)` ->
Prepared, whose `run(activation)` is timed. It may have a NOTE: what a reader of its figures must know. A peer
whose package is not installed says so in `available`; the package is imported nowhere else, and only once the
device and the problem are ones that it takes.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from qsun_bench.cases import Case, Oracle
from qsun_kernels.testing.tolerances import Comparison


@dataclass(frozen=True, slots=True)
class Prepared:
    """Operands in a contender's own layout.

    run: activation -> result, the call that is timed. streamed: the tensors that the call reads from memory.
    oracle: what the result is judged by where the contender's format cannot hold the operands' values; None
    means by the operands. plan: makes anew what `run` was given of the operands' lengths, which a model does
    once a step for all of its layers; it is timed apart. plans_on_host: it cannot be captured in a graph, so
    what it takes is the host's time. judge: (activation, what `run` returned) -> the judgement, for a call
    that also changes its operands; an oracle is then not asked.
    """

    run: Callable[[Tensor], Any]
    streamed: tuple[Tensor, ...]
    oracle: Oracle | None = None
    plan: Callable[[], object] | None = None
    plans_on_host: bool = False
    judge: Callable[[Tensor, Any], Comparison] | None = None


class Peer(Protocol):
    """The face of a module of this folder."""

    NAME: str
    OPERATOR: str

    def available(self, case: Case, device: torch.device) -> str | None: ...

    def prepare(self, operands: Any) -> Prepared: ...


def modules() -> Sequence[Peer]:
    """Every peer, by name."""
    names = sorted(i.name for i in pkgutil.iter_modules(__path__) if not i.name.startswith("_"))
    return [cast(Peer, importlib.import_module(f"{__name__}.{name}")) for name in names]
