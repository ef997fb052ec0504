"""Checks of arguments that operators share. Each names the argument, what was got and what is expected."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float16, torch.bfloat16)


def floating(name: str, value: Tensor) -> None:
    """A tensor of one of the dtypes that the operators compute with."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a torch.Tensor")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} has dtype {value.dtype}, expected one of {', '.join(map(str, FLOATING))}")


def beside(name: str, value: Tensor, dtype: torch.dtype, device: torch.device, whose: str) -> None:
    """A tensor of this dtype on this device, which are those of `whose` (a name, or why)."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a torch.Tensor")
    if value.dtype != dtype:
        raise TypeError(f"{name} has dtype {value.dtype}, expected {dtype} ({whose})")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, expected {device} ({whose})")


def index(name: str, value: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """A contiguous integer tensor on the device of the operator's data."""
    beside(name, value, dtype, device, "indices on the device of the data")
    contiguous(name, value)


def shape(name: str, value: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """A tensor of exactly this shape; `meaning` spells its sizes, as "(T, Hq, D)"."""
    if value.shape != expected:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {meaning} = {tuple(expected)}")


def rank(name: str, value: Tensor, expected: int, meaning: str) -> None:
    """A tensor of this many dimensions; `meaning` spells them."""
    if value.dim() != expected:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {meaning}")


def contiguous(name: str, value: Tensor) -> None:
    """A contiguous tensor."""
    if not value.is_contiguous():
        raise ValueError(f"{name} has strides {value.stride()}, expected a contiguous tensor")


def rows(name: str, value: Tensor) -> None:
    """A tensor with at least one dimension, whose last one is contiguous."""
    if value.dim() == 0:
        raise ValueError(f"{name} has shape (), expected at least one dimension")
    if value.stride(-1) != 1 and value.shape[-1] > 1:
        raise ValueError(f"{name} has strides {value.stride()}, expected a last dimension of stride 1")


def heads(name: str, value: Tensor, meaning: str) -> None:
    """A tensor (tokens, heads, head_dim) whose heads follow one another; only the token stride is free.

    That is what the three parts of one query-key-value matrix are.
    """
    rank(name, value, 3, meaning)
    _, count, width = value.shape
    if (width > 1 and value.stride(2) != 1) or (count > 1 and value.stride(1) != width):
        raise ValueError(
            f"{name} has strides {value.stride()}, "
            f"expected (any, {width}, 1): the heads of a token side by side"
        )


def positive(name: str, value: int) -> None:
    """An integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name} is {value!r}, expected an integer")
    if value < 1:
        raise ValueError(f"{name} is {value}, expected at least 1")


def epsilon(name: str, value: float) -> None:
    """What is added to a mean of squares before its root is taken."""
    if not (isinstance(value, float | int) and 0 <= value < math.inf):
        raise ValueError(f"{name} is {value!r}, expected a finite number of at least 0")


def rope(name: str, value: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
    """Positions int64 (T,) and angles float32 (max_positions, D) for heads (T, H, D), the argument `name`."""
    T, _, D = value.shape
    if D % 2:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected (T, H, D) with an even D")
    index("positions", positions, torch.int64, value.device)
    shape("positions", positions, (T,), "(T,)")
    beside("cos_sin", cos_sin, torch.float32, value.device, f"angles in float32, on the device of {name}")
    rank("cos_sin", cos_sin, 2, "(max_positions, D)")
    shape("cos_sin", cos_sin, (cos_sin.shape[0], D), "(max_positions, D)")
    contiguous("cos_sin", cos_sin)
