"""The gated feed-forward part of a layer."""

from __future__ import annotations

from torch import Tensor

from qsun.layers.linear import Linear
from qsun_kernels import silu_and_mul


class GatedMLP:
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, "GLU variants", SwiGLU).

    gate_up: gate above up as one matrix (2F, H).  down: (H, F).
    """

    __slots__ = ("down", "gate_up")

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        self.gate_up = gate_up
        self.down = down

    def __call__(self, x: Tensor) -> Tensor:
        """x (T, H) -> (T, H)."""
        return self.down(silu_and_mul(self.gate_up(x)))
