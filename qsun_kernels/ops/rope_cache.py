"""Tables of cosines and sines for rotary position embedding, with the usual context extensions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

__all__ = ["RopeKind", "RopeParameters", "inverse_frequencies", "rope_cache"]

RopeKind = Literal["default", "linear", "llama3", "yarn"]

# What a configuration may state beside the fields of RopeParameters without changing what is computed.
_NAMES_OF_KIND = ("rope_type", "type")
_NEEDED: Mapping[RopeKind, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True, slots=True)
class RopeParameters:
    """How positions become angles.

    theta: base of the wavelengths (RoFormer, arXiv 2104.09864, section 3.2.2).
    kind: ``default``; ``linear`` divides every frequency by `factor` (position interpolation, arXiv
    2306.15595);
        ``llama3`` divides the low frequencies, keeps the high ones and blends between (the Llama 3.1
        release); ``yarn`` blends by wavelength and scales the attention logits (YaRN, arXiv 2309.00071,
        sections 3.2 to 3.4).
    factor: how many times longer the context became.
    original_max_position_embeddings: tokens of context before the extension (llama3, yarn).
    low_freq_factor, high_freq_factor: the blended wavelengths, as original context / wavelength (llama3).
    attention_factor: what cosines and sines are multiplied by (yarn); None derives it from `factor`, or from
    `mscale`
        and `mscale_all_dim` when both are given.
    beta_fast, beta_slow: rotations over the original context above which a frequency is kept, and below which
    it is
        divided (yarn). truncate: round the blended range outward to whole dimensions (yarn).

    Raises ValueError or TypeError naming the field.
    """

    theta: float
    kind: RopeKind = "default"
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.kind not in get_args(RopeKind):
            raise ValueError(
                f"kind is {self.kind!r}, expected one of {', '.join(map(repr, get_args(RopeKind)))}"
            )
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "kind" or (value is None and field.name not in ("theta", *_NEEDED[self.kind])):
                continue
            if field.name == "truncate":
                if not isinstance(value, bool):
                    raise TypeError(f"truncate is {value!r}, expected True or False")
            elif isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(
                    f"{field.name} is {value!r}, expected a number for {self.kind} rotary positions"
                )
            elif not (0.0 < value < math.inf):
                raise ValueError(f"{field.name} is {value!r}, expected a positive finite number")
        if self.theta <= 1.0:
            raise ValueError(
                f"theta is {self.theta!r}, expected more than 1: wavelengths grow by powers of it"
            )
        if self.original_max_position_embeddings is not None and self.original_max_position_embeddings % 1:
            raise ValueError(
                f"original_max_position_embeddings is {self.original_max_position_embeddings!r}, "
                "expected a whole number"
            )
        low, high = self.low_freq_factor, self.high_freq_factor
        if self.kind == "llama3" and low is not None and high is not None and low >= high:
            raise ValueError(f"low_freq_factor is {low!r}, expected less than high_freq_factor {high!r}")

    @classmethod
    def from_mapping(
        cls,
        mapping: Mapping[str, Any] | None,
        *,
        theta: float | None = None,
        max_position_embeddings: int | None = None,
    ) -> RopeParameters:
        """Read `rope_parameters` or `rope_scaling` of a model configuration; None or an empty mapping is the
        default.

        theta: `rope_theta` of the configuration, for mappings that do not carry it. max_position_embeddings:
        taken for a missing `original_max_position_embeddings`, and for a missing yarn `factor` as the ratio
        of the two.
        Raises ValueError naming an unknown kind, a rotary part narrower than the head, an unknown key or a
        missing one.
        """
        given = {key: value for key, value in (mapping or {}).items() if value is not None}
        kinds = [given.pop(name) for name in _NAMES_OF_KIND if name in given]
        kind: Any = kinds[0] if kinds else "default"
        base = given.pop("rope_theta", theta)
        if base is None:
            raise ValueError("rope_theta is missing, expected it in the configuration")
        if kind not in get_args(RopeKind):
            expected = ", ".join(map(repr, get_args(RopeKind)))
            raise ValueError(f"rope_type is {kind!r}, expected one of {expected}")
        partial = given.pop("partial_rotary_factor", 1.0)
        if partial != 1.0:
            raise ValueError(f"partial_rotary_factor is {partial!r}, expected 1.0: whole heads are rotated")
        unknown = sorted(set(given) - {field.name for field in fields(cls)} - {"finetuned"})
        if unknown:
            raise ValueError(
                f"rope_parameters has unknown keys {unknown}, expected those of {kind}: {_NEEDED[kind]}"
            )
        given.pop("finetuned", None)
        if kind in ("llama3", "yarn") and max_position_embeddings is not None:
            original = given.setdefault("original_max_position_embeddings", max_position_embeddings)
            if kind == "yarn":
                given.setdefault("factor", max_position_embeddings / original)
        missing = [name for name in _NEEDED[kind] if name not in given]
        if missing:
            raise ValueError(f"rope_parameters of {kind} lacks {missing}, expected {_NEEDED[kind]}")
        return cls(theta=base, kind=kind, **given)


def inverse_frequencies(params: RopeParameters, head_dim: int) -> tuple[Tensor, float]:
    """Radians a position of each of the head_dim / 2 pairs, float32 on the CPU, and the factor of cosine and
    sine.

    Raises ValueError for a head_dim that is not even and positive.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}, expected a positive even number")
    # Every step is in float32 in the order in which models were trained with it, so that angles agree bit for
    # bit.
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    wavelengths = params.theta**exponents
    inverse = 1.0 / wavelengths
    if params.kind == "default":
        return inverse, 1.0
    factor = cast(float, params.factor)
    if params.kind == "linear":
        return inverse / factor, 1.0
    if params.kind == "llama3":
        return _llama3(params, inverse, factor), 1.0
    return _yarn(params, head_dim, wavelengths, factor), _yarn_attention_factor(params, factor)


def _llama3(params: RopeParameters, inverse: Tensor, factor: float) -> Tensor:
    """Keep wavelengths under context / high_freq_factor, divide those over context / low_freq_factor, blend
    between.
    """
    context = cast(int, params.original_max_position_embeddings)
    low = cast(float, params.low_freq_factor)
    high = cast(float, params.high_freq_factor)
    wavelength = 2 * math.pi / inverse
    is_long = wavelength > context / low
    divided = torch.where(is_long, inverse / factor, inverse)
    kept_share = (context / wavelength - low) / (high - low)
    blended = (1 - kept_share) * divided / factor + kept_share * divided
    return torch.where(is_long | (wavelength < context / high), divided, blended)


def _yarn(params: RopeParameters, head_dim: int, wavelengths: Tensor, factor: float) -> Tensor:
    """Blend kept and divided frequencies by a ramp over the pairs (YaRN, section 3.2, "NTK-by-parts")."""
    context = cast(int, params.original_max_position_embeddings)

    def pair_that_turns(rotations: float) -> float:
        """The (fractional) pair whose angle makes that many full turns over the original context."""
        return head_dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(params.theta))

    first, last = pair_that_turns(params.beta_fast), pair_that_turns(params.beta_slow)
    if params.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001  # a step instead of a division by zero
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)
    kept_share = 1 - ramp
    return (1.0 / (factor * wavelengths)) * (1 - kept_share) + (1.0 / wavelengths) * kept_share


def _yarn_attention_factor(params: RopeParameters, factor: float) -> float:
    """0.1 ln(factor) + 1 (YaRN, section 3.4), or the ratio of two such terms where a model gives both
    mscales.
    """
    if params.attention_factor is not None:
        return params.attention_factor

    def term(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if params.mscale is not None and params.mscale_all_dim is not None:
        return term(params.mscale) / term(params.mscale_all_dim)
    return term(1.0)


def rope_cache(
    params: RopeParameters, head_dim: int, max_positions: int, device: torch.device | str | None = None
) -> Tensor:
    """The table that `apply_rope` reads: float32 (max_positions, head_dim), a row being [cosines | sines] of
    the pairs.

    Made on the CPU and then moved, so that every device turns by the same angles.
    Raises ValueError for a head_dim that is not even, or a negative max_positions.
    """
    if max_positions < 0:
        raise ValueError(f"max_positions is {max_positions}, expected at least 0")
    inverse, attention_factor = inverse_frequencies(params, head_dim)
    angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), inverse)
    table = torch.cat((angles.cos(), angles.sin()), dim=-1)
    if attention_factor != 1.0:
        table *= attention_factor
    return table.to(device)
