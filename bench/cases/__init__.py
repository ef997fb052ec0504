"""The registry: which cases a suite has on which kind of device.

A case is a plain value: it names a problem, knows its algorithmic bytes and makes its operands from a seed.
The contenders that run it are elsewhere (`qsun_bench.contenders`), so adding either touches one place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from qsun_bench.kv_choice import KvChoice

if TYPE_CHECKING:
    from qsun_kernels.backends.problems import Problem

Json = str | int | float | bool | None | list[int]


@dataclass(frozen=True, slots=True)
class Selection:
    """What the command line narrowed a suite down to; None and empty mean the suite's default for the device.

    smoke: the least that still goes through every part, for a check rather than a figure. kv, block_sizes:
    of the KV cache. heads: (query heads, key heads).
    """

    device: torch.device
    shapes: tuple[str, ...] = ()
    batches: tuple[int, ...] = ()
    contexts: tuple[int, ...] = ()
    bits: int = 4
    group_size: int | str | None = None
    symmetric: bool = True
    act_order: bool = False
    dtype: torch.dtype = torch.bfloat16
    smoke: bool = False
    kv: tuple[KvChoice, ...] = ()
    block_sizes: tuple[int, ...] = ()
    heads: tuple[tuple[int, int], ...] = ()


class Oracle(Protocol):
    """What is right."""

    def exact(self, activation: Tensor) -> Tensor:
        """The result in float64, from the float64 values of the same operands."""

    def plain(self, activation: Tensor) -> Tensor:
        """What torch computes in the precision of the activation: what calibrates the gate."""

    def terms(self, activation: Tensor) -> Tensor | None:
        """The sum of the absolute values that each element adds up, float64; None if not known."""


class Operands(Protocol):
    """The part of a case that streams from memory: a weight, or a KV cache.

    It is an `Oracle`, too, unless whoever runs the case judges it (`Prepared.judge`).
    """

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor that the call reads from memory."""

    def copy(self) -> Any:
        """The same values in memory of their own."""


class Case(Protocol):
    """One problem of one suite.

    op: the operator. name: unique in its suite. bytes: algorithmic, each operand counted once.
    """

    op: ClassVar[str]

    @property
    def name(self) -> str: ...

    @property
    def bytes(self) -> int: ...

    @property
    def operands_key(self) -> object:
        """Equal for cases that stream equal operands, which are then made once."""

    def fields(self) -> dict[str, Json]:
        """The problem, as a record of the results file carries it."""

    def problem(self, device: torch.device) -> Problem: ...

    def operands(self, device: torch.device) -> Operands: ...

    def activation(self, device: torch.device) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Suite:
    """name: of the subcommand and the results file. baseline: the contender speed-ups are told against.

    own_formats: its cases are of formats of its own choice, which the command line cannot change.
    variants: contenders that no other suite has (qsun_bench.variants).
    """

    name: str
    op: str
    summary: str
    baseline: str
    cases: Callable[[Selection], Sequence[Case]]
    own_formats: bool = False
    variants: tuple[str, ...] = ()


def suites() -> Mapping[str, Suite]:
    """Every suite of operator cases, by name. (`decode` times a whole step and is not made of such cases.)"""
    from qsun_bench.cases import attention, wna16, wna16_formats, write

    formats = (wna16_formats.FORMATS_SUITE, wna16_formats.STEPS_SUITE, wna16_formats.SM80_SUITE)
    return {suite.name: suite for suite in (wna16.SUITE, *formats, attention.SUITE, write.SUITE)}


def generator(device: torch.device, *parts: object) -> torch.Generator:
    """A generator seeded by the values that name an operand: a case is the same in every run."""
    seed = 0x51756E
    for byte in repr(parts).encode():
        seed = (seed * 1099511628211 ^ byte) & 0x7FFFFFFFFFFFFFFF
    return torch.Generator(device).manual_seed(seed)
