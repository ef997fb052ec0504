"""What each operator should give: in float64, and as one would write it in torch at the precision of the
inputs.

The float64 forms share no code with the backends. The plain forms are the other half of the tolerance rule
(see `tolerances`): torch's own functions in the dtype of the inputs, with a rounding after each.
Shapes are those of the operators.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from qsun_kernels.backends.problems import PendingNorm
from qsun_kernels.quant import PackedWeight
from qsun_kernels.testing.inputs import PagedAttentionInputs
from qsun_kernels.testing.kv_codes import dequantised

__all__ = [
    "Sum",
    "cached_tokens",
    "exact_apply_rope",
    "exact_gate_up_silu",
    "exact_linear",
    "exact_paged_attention_decode",
    "exact_rms_norm",
    "exact_silu_and_mul",
    "exact_weight",
    "pair_lengths",
    "plain_apply_rope",
    "plain_gate_up_silu",
    "plain_linear",
    "plain_paged_attention_decode",
    "plain_rms_norm",
    "plain_silu_and_mul",
    "take_rows",
    "written_cache",
]


@dataclass(frozen=True, slots=True)
class Sum:
    """A float64 result that adds many terms up, with what its errors are judged by.

    scale: the largest of |value|, what is rounded on the way, and the root of the terms' squares. terms: the
    sum of their absolute values. All of one shape.
    """

    value: Tensor
    scale: Tensor
    terms: Tensor

    @classmethod
    def zeros(cls, shape: tuple[int, ...], device: torch.device) -> Sum:
        """Nothing added up yet."""
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(3)))


def exact_rms_norm(r: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm of r (..., H), to which a residual has been added already."""
    wide = r.double()
    return wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def plain_rms_norm(r: Tensor, weight: Tensor, eps: float) -> Tensor:
    """torch's own norm."""
    return functional.rms_norm(r, (r.shape[-1],), weight, eps)


def exact_silu_and_mul(x: Tensor) -> Tensor:
    """Gate in the first half of each row, up in the second."""
    half = x.shape[-1] // 2
    gate, up = x[..., :half].double(), x[..., half:].double()
    return gate * torch.sigmoid(gate) * up


def plain_silu_and_mul(x: Tensor) -> Tensor:
    """Two operations of torch."""
    half = x.shape[-1] // 2
    return functional.silu(x[..., :half]) * x[..., half:]


def exact_apply_rope(heads: Tensor, positions: Tensor, cos_sin: Tensor) -> Tensor:
    """One of q and k: each pair is a complex number, and its angle's cosine and sine another."""
    half = heads.shape[-1] // 2
    wide, angles = heads.double(), cos_sin.double()[positions][:, None, :]
    turned = torch.complex(wide[..., :half], wide[..., half:]) * torch.complex(
        angles[..., :half], angles[..., half:]
    )
    return torch.cat((turned.real, turned.imag), dim=-1)


def pair_lengths(heads: Tensor, positions: Tensor, cos_sin: Tensor) -> Tensor:
    """The length of the pair that each element of the turned heads belongs to: turning keeps it, up to
    cos_sin's own.
    """
    lengths, stretch = (
        torch.hypot(*t.double().chunk(2, dim=-1)) for t in (heads, cos_sin[positions][:, None, :])
    )
    return (lengths * stretch).repeat(1, 1, 2)


def plain_apply_rope(heads: Tensor, positions: Tensor, cos_sin: Tensor) -> Tensor:
    """The formula that model code uses, with cosines and sines in the dtype of the heads."""
    half = heads.shape[-1] // 2
    cos, sin = cos_sin[positions][:, None, :].to(heads.dtype).chunk(2, dim=-1)
    other = torch.cat((-heads[..., half:], heads[..., :half]), dim=-1)
    return heads * torch.cat((cos, cos), dim=-1) + other * torch.cat((sin, sin), dim=-1)


def written_cache(cache: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    """A copy of the cache (num_blocks, H, block_size, D) after rows (T, H, D) went to their slots, one by
    one.
    """
    cache = cache.clone()
    block_size = cache.shape[2]
    for row, slot in zip(rows, slots.tolist(), strict=True):
        if slot >= 0:
            cache[slot // block_size, :, slot % block_size] = row.to(cache.dtype)
    return cache


def cached_tokens(inputs: PagedAttentionInputs, request: int, token: int) -> tuple[Tensor, Tensor]:
    """Keys and values (tokens, Hkv, D) that a query token (0 to q_len - 1) of a request attends to, one by
    one out of the cache.
    """
    stop = int(inputs.seq_lens[request]) - inputs.q_len + token + 1
    first = 0 if inputs.window is None else max(0, stop - inputs.window)
    block_size = inputs.k_cache.shape[2]
    table = inputs.block_table[request].tolist()
    at = [(table[position // block_size], position % block_size) for position in range(first, stop)]
    blocks = torch.tensor([block for block, _ in at], dtype=torch.long, device=inputs.k_cache.device)
    offsets = torch.tensor([offset for _, offset in at], dtype=torch.long, device=inputs.k_cache.device)
    return (
        _tokens_at(inputs.k_cache, inputs.k_scale, blocks, offsets),
        _tokens_at(inputs.v_cache, inputs.v_scale, blocks, offsets),
    )


def _tokens_at(cache: Tensor, scale: Tensor | None, blocks: Tensor, offsets: Tensor) -> Tensor:
    """Tokens (T, H, D) of a cache; of a cache of codes the numbers that they stand for, float64."""
    if scale is None:
        return cache[blocks, :, offsets]
    # torch moves bytes about where it does not move float8.
    codes = cache.view(torch.uint8)[blocks, :, offsets].view(cache.dtype)
    return dequantised(codes, scale if scale.shape == (1,) else scale[blocks, :, offsets])


def _attending_tokens(inputs: PagedAttentionInputs) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(row of q, keys, values) of every query token that attends to anything."""
    for row in range(inputs.q.shape[0]):
        keys, values = cached_tokens(inputs, *divmod(row, inputs.q_len))
        if len(keys):
            yield row, keys, values


def exact_paged_attention_decode(inputs: PagedAttentionInputs) -> tuple[Sum, Sum]:
    """out (B * q_len, Hq, D) and lse (B * q_len, Hq)."""
    rows, Hq, D = inputs.q.shape
    out = Sum.zeros((rows, Hq, D), inputs.q.device)
    lse = Sum.zeros((rows, Hq), inputs.q.device)
    lse.value.fill_(-torch.inf)
    sinks = None if inputs.sinks is None else inputs.sinks.double()
    if sinks is not None:
        lse.value.copy_(sinks.expand_as(lse.value))
        lse.scale.copy_(lse.value.abs())
    for row, keys, values in _attending_tokens(inputs):
        keys, values = keys.double(), values.double()  # (tokens, Hkv, D)
        q = inputs.q[row].double().view(keys.shape[1], -1, D)

        def scores_of(q: Tensor, keys: Tensor) -> Tensor:
            return torch.einsum("hgd,thd->thg", q, keys).flatten(1)

        def mix(weights: Tensor, values: Tensor) -> Tensor:
            return torch.einsum("thg,thd->hgd", weights.unflatten(1, (values.shape[1], -1)), values).flatten(
                0, 1
            )

        scores = scores_of(q, keys) * inputs.softmax_scale
        if inputs.softcap is not None:
            # Its slope is at most 1, so that the errors of a score below still bound those of a capped one.
            scores = inputs.softcap * (scores / inputs.softcap).tanh()
        logits = scores if sinks is None else torch.cat((scores, sinks[None]))
        weights = logits.softmax(0)[: len(scores)]
        # Of the token whose score is least certain: an error of a score is one of its weight and of the
        # logarithm.
        score_terms = scores_of(q.abs(), keys.abs()).amax(0) * abs(inputs.softmax_scale)
        score_scale = scores_of(q.square(), keys.square()).amax(0).sqrt() * abs(inputs.softmax_scale)
        out.value[row] = mix(weights, values)
        out.terms[row] = mix(weights, values.abs()) * (1 + score_terms[:, None])
        out.scale[row] = out.value[row].abs().maximum(mix(weights.square(), values.square()).sqrt())
        lse.value[row] = logits.logsumexp(0)
        lse.scale[row] = lse.value[row].abs() + score_scale
        lse.terms[row] = lse.value[row].abs() + score_scale + score_terms
    return out, lse


def plain_paged_attention_decode(inputs: PagedAttentionInputs) -> tuple[Tensor, Tensor]:
    """torch's own attention in the dtype of q, token by token; the logarithm in float32.

    torch has no softcap and no sinks: with one of them the scores and the softmax are float32, as in its
    fused attention, and the weights are rounded to the dtype of q for the product with the values.
    """
    rows, Hq, _ = inputs.q.shape
    out = torch.zeros(inputs.q.shape, dtype=inputs.q.dtype, device=inputs.q.device)
    lse = torch.full((rows, Hq), -torch.inf, dtype=torch.float32, device=inputs.q.device)
    if inputs.sinks is not None:
        lse.copy_(inputs.sinks.expand_as(lse))
    for row, keys, values in _attending_tokens(inputs):
        group = Hq // keys.shape[1]
        q = inputs.q[row].unsqueeze(1)
        k, v = (t.to(q.dtype).repeat_interleave(group, dim=1).transpose(0, 1) for t in (keys, values))
        scores = (q.float() @ k.float().transpose(1, 2)) * inputs.softmax_scale  # (Hq, 1, tokens)
        if inputs.softcap is not None:
            scores = inputs.softcap * (scores / inputs.softcap).tanh()
        logits = scores
        if inputs.sinks is not None:
            logits = torch.cat((scores, inputs.sinks[:, None, None]), dim=-1)
        if inputs.softcap is None and inputs.sinks is None:
            attended = functional.scaled_dot_product_attention(
                q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), scale=inputs.softmax_scale
            )
        else:
            attended = logits.softmax(-1)[..., : len(keys)].to(q.dtype) @ v
        out[row] = attended.view(Hq, -1)
        lse[row] = logits.squeeze(1).logsumexp(-1)
    return out, lse


def exact_weight(packed: PackedWeight) -> Tensor:
    """(N, K) in float64, from codes, zero points and scales as they are."""
    groups = packed.column_groups()
    zeros = packed.spec.zero_point if packed.qzeros is None else packed.qzeros.double()[:, groups]
    return (packed.codes().double() - zeros) * packed.scales.double()[:, groups]


def exact_rows(x: Tensor | PendingNorm) -> Tensor:
    """The rows that a product multiplies, in float64; of a norm that is pending, the norm."""
    if isinstance(x, Tensor):
        return x.double()
    mean = x.squares.double().sum(-1, keepdim=True) / x.weighted.shape[-1]
    return x.weighted.double() / (mean + x.eps).sqrt()


def plain_rows(x: Tensor | PendingNorm) -> Tensor:
    """The same in the dtype of the activations."""
    return x if isinstance(x, Tensor) else exact_rows(x).to(x.weighted.dtype)


def exact_linear(
    x: Tensor | PendingNorm,
    packed: PackedWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Sum:
    """``x @ W.T (+ bias) (+ residual)``, (..., N)."""
    weight, wide = exact_weight(packed), exact_rows(x)
    product = wide @ weight.T
    value, terms, squares = product, wide.abs() @ weight.abs().T, wide.square() @ weight.square().T
    for term in (bias, residual):
        if term is not None:
            value, terms, squares = value + term, terms + term.abs(), squares + term.double().square()
    return Sum(value, squares.sqrt().maximum(value.abs()).maximum(product.abs()), terms)


def plain_linear(
    x: Tensor | PendingNorm,
    packed: PackedWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """torch's own linear layer on the weight dequantised to the dtype of x, then the residual."""
    x = plain_rows(x)
    y = functional.linear(x, exact_weight(packed).to(x.dtype), bias)
    return y if residual is None else y + residual


def exact_gate_up_silu(x: Tensor | PendingNorm, packed: PackedWeight) -> Sum:
    """``silu(gate) * up`` with gate and up the two halves of ``x @ W.T``, (..., N / 2).

    An error of gate arrives times silu'(gate) * up, one of up times silu(gate); errors of both, rounded as x
    is, times each other. The scale is the largest of the three, the terms are the sum of the first two.
    """
    product = exact_linear(x, packed)
    gate, up = product.value.chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    silu, slope = gate * sigmoid, sigmoid * (1 + gate * (1 - sigmoid))
    of_gate, of_up = (slope * up).abs(), silu.abs()
    gate_scale, up_scale = product.scale.chunk(2, dim=-1)
    gate_terms, up_terms = product.terms.chunk(2, dim=-1)
    both = torch.finfo(plain_rows(x).dtype).eps / 2 * gate_scale * up_scale
    scale = (of_gate * gate_scale).maximum(of_up * up_scale).maximum(both)
    return Sum(silu * up, scale, of_gate * gate_terms + of_up * up_terms)


def plain_gate_up_silu(x: Tensor | PendingNorm, packed: PackedWeight) -> Tensor:
    """torch's own linear layer, then two operations."""
    return plain_silu_and_mul(plain_linear(x, packed))


def take_rows(packed: PackedWeight, rows: Tensor) -> PackedWeight:
    """The weight of some output rows only, to judge a large product by a sample. rows: int64 (R,)."""
    qzeros = None if packed.qzeros is None else packed.qzeros[rows]
    return PackedWeight(
        packed.spec,
        len(rows),
        packed.K,
        packed.qweight[rows],
        packed.scales[rows],
        qzeros,
        packed.g_idx,
    )
