"""The sizes of the models that the cases are named after, from their published configurations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of one decoder-only transformer.

    hidden, intermediate, vocabulary: widths. layers, q_heads, kv_heads, head_dim: of the attention.
    """

    name: str
    layers: int
    hidden: int
    intermediate: int
    q_heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @property
    def linears(self) -> Mapping[str, tuple[int, int]]:
        """(N, K) of the matrices of one layer, as they are multiplied: q, k, v as one and gate, up as one."""
        q, kv = self.q_heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "qkv": (q + 2 * kv, self.hidden),
            "o": (self.hidden, q),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }


SHAPES: Mapping[str, ModelShape] = {
    shape.name: shape
    for shape in (
        ModelShape("smollm2-135m", 30, 576, 1536, 9, 3, 64, 49152),
        ModelShape("llama-3.1-8b", 32, 4096, 14336, 32, 8, 128, 128256),
        ModelShape("qwen3-8b", 36, 4096, 12288, 32, 8, 128, 151936),
        ModelShape("llama-3.1-70b", 80, 8192, 28672, 64, 8, 128, 128256),
    )
}


def shape(name: str) -> ModelShape:
    """The shape of that name; ValueError with the known names for another."""
    if name not in SHAPES:
        raise ValueError(f"shape is {name!r}, expected one of {', '.join(SHAPES)}")
    return SHAPES[name]
