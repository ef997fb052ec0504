"""Is this result of this operator right? One function an operator, by the rule of `tolerances` against
`oracles`.

Scales of packed weights must be in the dtype of the activations (`PackedWeight.with_scales`), as
`prepare_weight` makes them: rounding them is part of loading a model, not of the product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qsun_kernels.backends.problems import PendingNorm
from qsun_kernels.ops import sample_tokens
from qsun_kernels.quant import PackedWeight
from qsun_kernels.testing import oracles
from qsun_kernels.testing.inputs import PagedAttentionInputs
from qsun_kernels.testing.tolerances import Comparison, all_of, compare, compare_bits

__all__ = [
    "judge_apply_rope",
    "judge_dequantize",
    "judge_paged_attention_decode",
    "judge_rms_norm",
    "judge_sample_tokens",
    "judge_silu_and_mul",
    "judge_wna16_gate_up_silu",
    "judge_wna16_linear",
    "judge_write_kv_cache",
]


def judge_rms_norm(
    got: Tensor | tuple[Tensor, Tensor],
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
) -> Comparison:
    """got: the norm, or (norm, r) when there is a residual; r has to be the correctly rounded sum."""
    if residual is None:
        assert isinstance(got, Tensor)
        return _judge_norm(got, x, weight, eps)
    norm, r = got
    expected = (x.double() + residual.double()).to(x.dtype)
    return all_of([compare_bits("rms_norm r", r, expected), _judge_norm(norm, expected, weight, eps)])


def _judge_norm(norm: Tensor, r: Tensor, weight: Tensor, eps: float) -> Comparison:
    exact, plain = oracles.exact_rms_norm(r, weight, eps), oracles.plain_rms_norm(r, weight, eps)
    return compare("rms_norm", norm, exact, plain, scale="element")


def judge_silu_and_mul(got: Tensor, x: Tensor) -> Comparison:
    """got: (..., F) for x (..., 2F)."""
    return compare("silu_and_mul", got, oracles.exact_silu_and_mul(x), oracles.plain_silu_and_mul(x))


def judge_apply_rope(
    got: tuple[Tensor, Tensor], q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor
) -> Comparison:
    """got: (q, k) turned."""
    return all_of(
        compare(
            f"apply_rope {name}",
            turned,
            oracles.exact_apply_rope(heads, positions, cos_sin),
            oracles.plain_apply_rope(heads, positions, cos_sin),
            scale=oracles.pair_lengths(heads, positions, cos_sin),
        )
        for name, turned, heads in zip("qk", got, (q, k), strict=True)
    )


def judge_write_kv_cache(
    got: tuple[Tensor, Tensor],
    before: tuple[Tensor, Tensor],
    k: Tensor,
    v: Tensor,
    slot_mapping: Tensor,
) -> Comparison:
    """got, before: (k_cache, v_cache) after and before the call. Every bit of both caches counts."""
    return all_of(
        compare_bits(f"write_kv_cache {name}_cache", cache, oracles.written_cache(old, rows, slot_mapping))
        for name, cache, old, rows in zip("kv", got, before, (k, v), strict=True)
    )


def judge_paged_attention_decode(got: tuple[Tensor, Tensor], inputs: PagedAttentionInputs) -> Comparison:
    """got: (out, lse)."""
    out, lse = oracles.exact_paged_attention_decode(inputs)
    plain_out, plain_lse = oracles.plain_paged_attention_decode(inputs)
    return all_of(
        [
            _compare_sum("paged_attention_decode out", got[0], out, plain_out),
            _compare_sum("paged_attention_decode lse", got[1], lse, plain_lse),
        ]
    )


def judge_wna16_linear(
    got: Tensor,
    x: Tensor | PendingNorm,
    packed: PackedWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    columns: Tensor | None = None,
) -> Comparison:
    """got: (..., N). columns: int64, outputs to look at when all would take too much float64 memory."""
    expected = (*oracles.plain_rows(x).shape[:-1], packed.N)
    if got.shape != expected:
        report = f"wna16_linear: got {tuple(got.shape)}, expected {expected}"
        return Comparison(False, float("inf"), 0.0, 0.0, report)
    if columns is not None:
        got, packed = got[..., columns], oracles.take_rows(packed, columns)
        bias = None if bias is None else bias[columns]
        residual = None if residual is None else residual[..., columns]
    exact = oracles.exact_linear(x, packed, bias, residual)
    return _compare_sum("wna16_linear", got, exact, oracles.plain_linear(x, packed, bias, residual))


def judge_wna16_gate_up_silu(
    got: Tensor, x: Tensor | PendingNorm, packed: PackedWeight, *, columns: Tensor | None = None
) -> Comparison:
    """got: (..., N / 2) for packed [gate; up] (N, K). columns: as for `judge_wna16_linear`."""
    size = packed.N // 2
    expected = (*oracles.plain_rows(x).shape[:-1], size)
    if got.shape != expected:
        report = f"wna16_gate_up_silu: got {tuple(got.shape)}, expected {expected}"
        return Comparison(False, float("inf"), 0.0, 0.0, report)
    if columns is not None:
        got, packed = got[..., columns], oracles.take_rows(packed, torch.cat((columns, size + columns)))
    exact = oracles.exact_gate_up_silu(x, packed)
    return _compare_sum("wna16_gate_up_silu", got, exact, oracles.plain_gate_up_silu(x, packed))


def _compare_sum(name: str, got: Tensor, exact: oracles.Sum, plain: Tensor) -> Comparison:
    return compare(name, got, exact.value, plain, scale=exact.scale, terms=exact.terms)


def judge_dequantize(got: Tensor, packed: PackedWeight, dtype: torch.dtype) -> Comparison:
    """got: (N, K). The product of two float32 numbers, rounded to dtype, bit for bit."""
    groups = packed.column_groups()
    zeros = packed.spec.zero_point if packed.qzeros is None else packed.qzeros.int()[:, groups]
    expected = (packed.codes().int() - zeros).float() * packed.scales.float()[:, groups]
    return compare_bits("dequantize", got, expected.to(dtype))


def judge_sample_tokens(
    got: tuple[Tensor, Tensor],
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    keys: Tensor,
) -> Comparison:
    """got: (tokens, valid). Those of the reference on the CPU: all that decides is specified to the bit but
    for the logarithms of the noise, see `sample_tokens`.
    """
    arguments = (one.cpu() for one in (logits, temperature, top_k, top_p, min_p, keys))
    expected = sample_tokens(*arguments, backend="torch")
    names = ("sample_tokens tokens", "sample_tokens valid")
    return all_of(compare_bits(*three) for three in zip(names, got, expected, strict=True))
