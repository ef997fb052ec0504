"""The sizes of the models that the cases are named after, as their authors published them; and a tiny one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of one decoder-only transformer.

    hidden, intermediate, vocabulary: widths. q_heads, kv_heads, head_dim: of the attention. tied: the
    embedding is the lm_head too. The architecture decides about the norms of queries and keys.
    """

    name: str
    architecture: Literal["llama", "qwen3"]
    layers: int
    hidden: int
    intermediate: int
    q_heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    rope_theta: float

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
        ModelShape("smollm2-135m", "llama", 30, 576, 1536, 9, 3, 64, 49152, True, 1e5),
        ModelShape("llama-3.1-8b", "llama", 32, 4096, 14336, 32, 8, 128, 128256, False, 5e5),
        ModelShape("qwen3-8b", "qwen3", 36, 4096, 12288, 32, 8, 128, 151936, False, 1e6),
        ModelShape("llama-3.1-70b", "llama", 80, 8192, 28672, 64, 8, 128, 128256, False, 5e5),
        # Of no published model: what a CPU steps through in milliseconds.
        ModelShape("tiny", "llama", 3, 128, 256, 4, 2, 64, 4096, False, 1e4),
    )
}

MATRIX_SETS: Mapping[str, tuple[tuple[str, str], ...]] = {
    # From 9 to 242 MB in W4 g128: every size at which the launch, the grid or the memory decides.
    "decode7": (
        ("llama-3.1-8b", "o"),
        ("llama-3.1-8b", "qkv"),
        ("llama-3.1-8b", "gate_up"),
        ("llama-3.1-8b", "down"),
        ("llama-3.1-70b", "qkv"),
        ("llama-3.1-70b", "gate_up"),
        ("llama-3.1-70b", "down"),
    ),
}
"""Named choices of (model, matrix), accepted wherever a model is, as is MODEL.MATRIX."""

SHAPE_NAMES: tuple[str, ...] = (*SHAPES, *MATRIX_SETS)


def shape(name: str) -> ModelShape:
    """The shape of that name; ValueError with the known names for another."""
    if name not in SHAPES:
        raise ValueError(f"shape is {name!r}, expected one of {', '.join(SHAPE_NAMES)} or MODEL.MATRIX")
    return SHAPES[name]


def matrices(names: Sequence[str]) -> Sequence[tuple[ModelShape, str]]:
    """(model, matrix) of every matrix of the named models and sets and of MODEL.MATRIX, each once."""
    found: dict[tuple[str, str], ModelShape] = {}
    for name in names:
        for model, matrix in _matrices_of(name):
            found.setdefault((model, matrix), shape(model))
    return [(sizes, matrix) for (_, matrix), sizes in found.items()]


def _matrices_of(name: str) -> Sequence[tuple[str, str]]:
    if name in MATRIX_SETS:
        return MATRIX_SETS[name]
    model, _, matrix = name.rpartition(".")
    if name not in SHAPES and model in SHAPES and matrix in SHAPES[model].linears:
        return [(model, matrix)]
    return [(name, matrix) for matrix in shape(name).linears]


def models(names: Sequence[str]) -> Sequence[ModelShape]:
    """The named models and those that the named sets take matrices from, each once."""
    return list({sizes.name: sizes for sizes, _ in matrices(names)}.values())
