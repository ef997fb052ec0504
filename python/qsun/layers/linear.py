"""Linear layers: 16-bit or low-bit weights behind one call, and how several projections become one matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from qsun_kernels import PackedWeight, PreparedWeight, wna16_linear


class Linear(Protocol):
    """y = x @ W.T (+ bias) (+ residual), with x (..., K), residual and y (..., N)."""

    @property
    def N(self) -> int:
        """Output features."""

    @property
    def K(self) -> int:
        """Input features."""

    @property
    def nbytes(self) -> int:
        """Bytes that the layer keeps and that one call reads."""

    @property
    def adds_residual(self) -> bool:
        """Whether a residual is added before the one rounding, at no cost of its own."""

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Apply the layer."""


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

    @property
    def adds_residual(self) -> bool:
        """False: torch would copy the residual first; the norm that follows adds it in its own pass."""
        return False

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x (..., K) -> (..., N), plus residual (..., N) when given."""
        y = functional.linear(x, self.weight, self.bias)
        return y if residual is None else y + residual


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

    @property
    def adds_residual(self) -> bool:
        """True: `wna16_linear` adds it to the float32 sums."""
        return True

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x (..., K) -> (..., N), plus residual (..., N) when given."""
        return wna16_linear(x, self.weight, self.bias, residual)


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

    @property
    def adds_residual(self) -> bool:
        """False: the parts' outputs are joined first."""
        return False

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x (..., K) -> (..., N): the parts' outputs side by side, plus residual (..., N) when given."""
        y = torch.cat([part(x) for part in self.parts], dim=-1)
        return y if residual is None else y + residual


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
