"""Rotary parameters from and to the words of config.json and GGUF."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from qsun.errors import UnsupportedModel
from qsun.models.fields import Fields
from qsun_kernels import RopeParameters
from qsun_kernels.ops.rope_cache import RopeKind, inverse_frequencies

_SCALING_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}

# What every Llama 3.1, 3.2 and 3.3 was released with; only the factor differs.
LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_CONTEXT = 1.0, 4.0, 8192


def rope_from_fields(fields: Fields, max_positions: int) -> RopeParameters:
    """Read one object with rope_theta, rope_type (or type) and the scaling's own fields.

    max_positions: max_position_embeddings, which stands in for a missing original_max_position_embeddings.
    Raises UnsupportedModel naming a rotary type that is not implemented, ValueError for missing, unknown or
    impossible values.
    """
    kind = fields.string("rope_type", fields.raw("type", "default"))
    if kind not in get_args(RopeKind):
        raise UnsupportedModel(
            f"{fields.source}: rope_type is {kind!r}, expected one of {', '.join(get_args(RopeKind))}"
        )
    values = {name: fields.raw(name) for name in fields.names()}
    for name, value in values.items():
        if type(value) in (int, float):
            fields.number(name)
    try:
        return RopeParameters.from_mapping(values, max_position_embeddings=max_positions)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{fields.source}: {error}") from error


def rope_to_hf(rope: RopeParameters) -> dict[str, Any]:
    """`rope_parameters` as transformers 5 writes them, with only the fields that the type uses."""
    raw: dict[str, Any] = {"rope_theta": float(rope.theta), "rope_type": rope.kind}
    for name in _SCALING_FIELDS[rope.kind]:
        value = getattr(rope, name)
        if value is not None:
            raw[name] = float(value) if isinstance(value, (int, float)) and type(value) is not bool else value
    if "original_max_position_embeddings" in raw:
        raw["original_max_position_embeddings"] = int(raw["original_max_position_embeddings"])
    return raw


def rope_from_frequency_factors(theta: float, factors: Tensor, head_dim: int, source: str) -> RopeParameters:
    """Recognise the divisors of frequencies that GGUF files of Llama 3 carry in place of parameters.

    factors: float32 (head_dim / 2,), frequency without scaling over frequency with it.
    Raises UnsupportedModel when they are not those of Llama 3 for any factor.
    """
    default = RopeParameters(theta)
    largest = float(factors.max()) if factors.numel() else 0.0
    if largest > 1.0:
        candidate = RopeParameters(
            theta,
            kind="llama3",
            factor=round(largest, 4),
            low_freq_factor=LLAMA3_LOW,
            high_freq_factor=LLAMA3_HIGH,
            original_max_position_embeddings=LLAMA3_CONTEXT,
        )
        plain, scaled = inverse_frequencies(default, head_dim)[0], inverse_frequencies(candidate, head_dim)[0]
        if plain.shape == factors.shape and torch.allclose(plain / scaled, factors, rtol=1e-4, atol=0.0):
            return candidate
    elif tuple(factors.shape) == (head_dim // 2,) and bool((factors == 1).all()):
        return default
    raise UnsupportedModel(
        f"{source}: rope_freqs.weight {tuple(factors.shape)} reaches {largest:g}, expected ones or the "
        f"divisors of Llama 3 (low {LLAMA3_LOW}, high {LLAMA3_HIGH}, context {LLAMA3_CONTEXT}) for some "
        "factor"
    )
