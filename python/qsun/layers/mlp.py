"""The gated feed-forward part of a layer."""

from __future__ import annotations

from torch import Tensor

from qsun.layers.linear import Linear, Normed
from qsun_kernels import PreparedWeight, silu_and_mul, wna16_gate_up_silu


class GateUpSilu:
    """silu(gate(x)) * up(x) with gate above up as one low-bit matrix, without a pass in between.

    weight: (2F, H), prepared by `qsun_kernels.prepare_gate_up`.
    """

    __slots__ = ("weight",)

    def __init__(self, weight: PreparedWeight) -> None:
        self.weight = weight

    @property
    def N(self) -> int:
        """Rows of gate and up together, twice the output features."""
        return self.weight.N

    @property
    def K(self) -> int:
        """Input features."""
        return self.weight.K

    @property
    def nbytes(self) -> int:
        """Bytes of the prepared weight, which one call reads."""
        return self.weight.nbytes

    def __call__(self, x: Normed) -> Tensor:
        """x (..., H) -> (..., F)."""
        return wna16_gate_up_silu(x, self.weight)


class GatedMLP:
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, "GLU variants", SwiGLU).

    gate_up: gate above up as one matrix (2F, H), alone or with what follows it.  down: (H, F).
    """

    __slots__ = ("down", "gate_up")

    def __init__(self, gate_up: Linear | GateUpSilu, down: Linear) -> None:
        self.gate_up = gate_up
        self.down = down

    def gated(self, x: Normed) -> Tensor:
        """silu(gate(x)) * up(x), the input of `down`: x (T, H) -> (T, F)."""
        if isinstance(self.gate_up, GateUpSilu):
            return self.gate_up(x)
        return silu_and_mul(self.gate_up(x))

    def __call__(self, x: Tensor) -> Tensor:
        """x (T, H) -> (T, H)."""
        return self.down(self.gated(x))
