"""Linear layers: 16-bit or low-bit weights behind one call, and how several projections become one matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from qsun.layers.norm import RMSNorm
from qsun_kernels import (
    PackedWeight,
    PendingNorm,
    PendingSums,
    PreparedWeight,
    sums_may_pend,
    wna16_linear,
    wna16_linear_pending_norm,
    wna16_linear_pending_sums,
    wna16_linear_rms_norm,
)

Normed: TypeAlias = Tensor | PendingNorm
"""Rows (..., H) behind a norm, or rows (T, H) of whose norm a part is left to the layer that reads them."""


class Linear(Protocol):
    """y = x @ W.T (+ bias), with x (..., K) and y (..., N).

    An x whose norm is pending is for a layer that `qsun.layers.residual.end_block` left it to; elsewhere it
    is a TypeError.
    """

    @property
    def N(self) -> int:
        """Output features."""

    @property
    def K(self) -> int:
        """Input features."""

    @property
    def nbytes(self) -> int:
        """Bytes that the layer keeps and that one call reads."""

    def __call__(self, x: Normed) -> Tensor:
        """Apply the layer."""

    def end_block(self, x: Tensor, stream: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        """Add the layer's output to the residual stream (..., N), and normalise the sum for the next block.

        Returns (normalised, new residual stream).
        """


def whole(x: Normed) -> Tensor:
    """x, whose norm is not pending: else TypeError."""
    if isinstance(x, PendingNorm):
        raise TypeError("x is a PendingNorm, expected a Tensor: this layer is not one low-bit product")
    return x


class DenseLinear:
    """A linear layer with an ordinary weight (N, K) and an optional bias (N,) of the same dtype."""

    __slots__ = ("bias", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        if weight.dim() != 2:
            raise ValueError(f"weight has shape {tuple(weight.shape)}, expected (N, K)")
        if bias is not None and (tuple(bias.shape) != (weight.shape[0],) or bias.dtype != weight.dtype):
            raise ValueError(
                f"bias is {bias.dtype} {tuple(bias.shape)}, expected {weight.dtype} ({weight.shape[0]},)"
            )
        self.weight = weight
        self.bias = bias

    @property
    def N(self) -> int:
        """Output features."""
        return self.weight.shape[0]

    @property
    def K(self) -> int:
        """Input features."""
        return self.weight.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of weight and bias."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: Normed) -> Tensor:
        """x (..., K) -> (..., N)."""
        return functional.linear(whole(x), self.weight, self.bias)

    def end_block(self, x: Tensor, stream: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        """(normalised, new stream): the norm adds the output in its own pass; torch would copy the stream."""
        return norm.add(self(x), stream)


class QuantLinear:
    """A linear layer with a low-bit weight, prepared once for the backend that `prepare_weight` chose."""

    __slots__ = ("bias", "weight")

    def __init__(self, weight: PreparedWeight, bias: Tensor | None = None) -> None:
        if bias is not None and (tuple(bias.shape) != (weight.N,) or bias.dtype != weight.dtype):
            raise ValueError(
                f"bias is {bias.dtype} {tuple(bias.shape)}, expected {weight.dtype} ({weight.N},)"
            )
        self.weight = weight
        self.bias = bias

    @property
    def N(self) -> int:
        """Output features."""
        return self.weight.N

    @property
    def K(self) -> int:
        """Input features."""
        return self.weight.K

    @property
    def nbytes(self) -> int:
        """Bytes of the prepared weight and the bias."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: Normed) -> Tensor:
        """x (..., K) -> (..., N)."""
        return wna16_linear(x, self.weight, self.bias)

    def end_block(self, x: Tensor, stream: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        """(normalised, new stream): the stream is added to the float32 sums; where a kernel adds the parts of
        a product, the norm is made in the same launch.
        """
        return wna16_linear_rms_norm(x, self.weight, stream, norm.weight, eps=norm.eps, bias=self.bias)

    def leave_sums(self, x: Normed) -> PendingSums | None:
        """x (T, K) -> sums of (T, N) for whoever reads them to add; None where the product leaves none."""
        if isinstance(x, PendingNorm) or self.bias is not None or not sums_may_pend(x.shape[0], self.weight):
            return None
        return wna16_linear_pending_sums(x, self.weight)

    def leave_norm(self, x: Tensor, stream: Tensor, norm: RMSNorm) -> tuple[PendingNorm, Tensor]:
        """(norm to be finished by the low-bit layer that reads it, new stream)."""
        return wna16_linear_pending_norm(x, self.weight, stream, norm.weight, eps=norm.eps, bias=self.bias)


class SplitLinear:
    """Projections of one input that cannot be one matrix: their weights have different specs or act-orders.

    Gives what the one matrix would give, at the price of a launch a part and a concatenation.
    """

    __slots__ = ("parts",)

    def __init__(self, parts: Sequence[Linear]) -> None:
        if len({part.K for part in parts}) != 1:
            raise ValueError(f"parts have K of {[part.K for part in parts]}, expected one K for all")
        self.parts = tuple(parts)

    @property
    def N(self) -> int:
        """Output features of all parts together."""
        return sum(part.N for part in self.parts)

    @property
    def K(self) -> int:
        """Input features."""
        return self.parts[0].K

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts)

    def __call__(self, x: Normed) -> Tensor:
        """x (..., K) -> (..., N): the parts' outputs side by side."""
        return torch.cat([part(whole(x)) for part in self.parts], dim=-1)

    def end_block(self, x: Tensor, stream: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        """(normalised, new stream): the parts' outputs are joined first."""
        return norm.add(self(x), stream)


def are_one_matrix(weights: Sequence[PackedWeight]) -> bool:
    """Whether packed weights with the same input can be stacked along N without changing any of them.

    False when specs, K, scale dtypes or the groups of the columns differ, as act-order found for each weight
    may.
    """
    first = weights[0]
    return all(
        (other.spec, other.K, other.scales.dtype) == (first.spec, first.K, first.scales.dtype)
        and torch.equal(other.column_groups(), first.column_groups())
        for other in weights[1:]
    )
