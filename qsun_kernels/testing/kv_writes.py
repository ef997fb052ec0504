"""`write_kv_cache` with the steps before it: random calls, and whether what came out is right.

Values are written as they come, so their codes and scales count bit for bit; so do slots that no token
writes. Keys and queries went through float32 arithmetic and are judged by the rule of `tolerances`: against
the steps in float64, with torch's own functions in their dtype, one after another, as the measure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qsun_kernels.ops import RopeParameters, rope_cache, write_kv_cache
from qsun_kernels.testing import inputs, oracles
from qsun_kernels.testing.kv_codes import KvKind, dequantised, kv_dtype_of, quantised_rows
from qsun_kernels.testing.tolerances import Comparison, all_of, compare, compare_bits

__all__ = ["KvWrite", "Written", "hadamard_matrix", "judge_kv_write", "kv_write"]


@dataclass(frozen=True, slots=True)
class Written:
    """What a call returned and what the caches and scales hold after it."""

    q: Tensor | None
    k_cache: Tensor
    v_cache: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None


@dataclass(frozen=True, slots=True)
class KvWrite:
    """Arguments of `write_kv_cache`, with shapes as there; kind says what a cache of codes is."""

    k: Tensor
    v: Tensor
    before: Written
    slot_mapping: Tensor
    q: Tensor | None
    positions: Tensor | None
    cos_sin: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: float
    rotate: bool
    kind: KvKind | None

    def run(self, **options: Any) -> Written:
        """Call the operator on copies of the caches. options: of the call, such as backend."""
        k_cache, v_cache = self.before.k_cache.clone(), self.before.v_cache.clone()
        k_scale, v_scale = (
            None if scale is None else scale.clone() for scale in (self.before.k_scale, self.before.v_scale)
        )
        arguments: dict[str, Any] = {
            **{"q": self.q, "positions": self.positions, "cos_sin": self.cos_sin, "q_norm": self.q_norm},
            **{"k_norm": self.k_norm, "eps": self.eps, "rotate": self.rotate},
            **{"k_scale": k_scale, "v_scale": v_scale},
        }
        q: Tensor | None
        with inputs.poisoned_outputs():
            q = write_kv_cache(self.k, self.v, k_cache, v_cache, self.slot_mapping, **(arguments | options))
        return Written(q, k_cache, v_cache, k_scale, v_scale)


def kv_write(
    source: torch.Generator,
    tokens: int,
    *,
    dtype: torch.dtype,
    kv: KvKind | torch.dtype,
    heads: tuple[int, int] = (5, 3),
    head_dim: int = 64,
    block_size: int = 4,
    steps: Sequence[str] = ("norm", "rope", "rotate"),
    skip: float = 0.3,
    device: torch.device | str = "cpu",
) -> KvWrite:
    """A call with tokens (q, k, v) of one matrix, NaN behind each, and caches full of random bytes.

    kv: a kind of codes, or the dtype of a cache without scales. steps: any of "norm", "rope", "rotate"; with
    none of them there are no queries. About a share `skip` of the tokens has no slot.
    """
    q, k, v = inputs.qkv_views(source, tokens, *heads, head_dim, dtype, device)
    num_blocks = -(-tokens // block_size) + 2
    kind: KvKind | None = None if isinstance(kv, torch.dtype) else kv
    kv_dtype = kv if isinstance(kv, torch.dtype) else kv_dtype_of(kv)
    width = head_dim // 2 if kind == "int4" else head_dim
    slots = (num_blocks, heads[1], block_size)

    def cache() -> Tensor:
        size = (*slots, width * kv_dtype.itemsize)
        return torch.randint(0, 256, size, generator=source, dtype=torch.uint8).view(kv_dtype).to(device)

    def scale(given: float) -> Tensor | None:
        if kind is None:
            return None
        if kind == "fp8-tensor":
            return torch.tensor([given], device=device)
        return torch.rand(slots, generator=source).to(device)

    norms: list[Tensor | None] = [None, None]
    if "norm" in steps:
        norms = [inputs.normal(source, (head_dim,), dtype, device) for _ in range(2)]
    has_rope = "rope" in steps
    return KvWrite(
        k=k,
        v=v,
        before=Written(None, cache(), cache(), scale(0.013), scale(0.011)),
        slot_mapping=inputs.slot_mapping(source, tokens, num_blocks * block_size, skip=skip, device=device),
        q=q if steps else None,
        positions=torch.randint(0, 90, (tokens,), generator=source).to(device) if has_rope else None,
        cos_sin=rope_cache(RopeParameters(10000.0), head_dim, 90, torch.device(device)) if has_rope else None,
        q_norm=norms[0],
        k_norm=norms[1],
        eps=1e-6,
        rotate="rotate" in steps,
        kind=kind,
    )


def hadamard_matrix(size: int) -> Tensor:
    """H / sqrt(size), float64, by Sylvester's construction: H(2n) is [[H, H], [H, -H]]."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix.div(size**0.5)


def _exact(call: KvWrite, heads: Tensor, norm: Tensor | None) -> tuple[Tensor, Tensor]:
    """Heads (T, H, D) after the steps in float64, and the scale of their errors."""
    wide = heads.double()
    if norm is not None:
        wide = oracles.exact_rms_norm(wide, norm, call.eps)
    scale = wide.abs()
    if call.positions is not None and call.cos_sin is not None:
        scale = oracles.pair_lengths(wide, call.positions, call.cos_sin)
        wide = oracles.exact_apply_rope(wide, call.positions, call.cos_sin)
    if call.rotate:
        scale = scale.square().mean(-1, keepdim=True).sqrt().expand_as(wide)
        wide = wide @ hadamard_matrix(wide.shape[-1]).to(wide.device)
        scale = scale.maximum(wide.abs())
    return wide, scale


def _plain(call: KvWrite, heads: Tensor, norm: Tensor | None) -> Tensor:
    """The steps as operators of torch, each rounding to the dtype of the heads."""
    if norm is not None:
        heads = oracles.plain_rms_norm(heads, norm, call.eps)
    if call.positions is not None and call.cos_sin is not None:
        heads = oracles.plain_apply_rope(heads, call.positions, call.cos_sin)
    if call.rotate:
        heads = heads @ hadamard_matrix(heads.shape[-1]).to(heads)
    return heads


def judge_kv_write(got: Written, call: KvWrite) -> Comparison:
    """got: of `KvWrite.run`."""
    kept = call.slot_mapping >= 0
    slots = call.slot_mapping[kept]
    block_size = call.before.k_cache.shape[2]
    at = (slots // block_size, slots % block_size)
    judged = [
        *_judge_untouched("k", got.k_cache, got.k_scale, call.before.k_cache, call.before.k_scale, at),
        *_judge_untouched("v", got.v_cache, got.v_scale, call.before.v_cache, call.before.v_scale, at),
        *_judge_values(got, call, kept, at),
        _judge_keys(got, call, kept, at),
    ]
    if call.q is not None:
        exact, scale = _exact(call, call.q, call.q_norm)
        assert got.q is not None and got.q.is_contiguous() and got.q.dtype == call.q.dtype
        judged.append(compare("q", got.q, exact, _plain(call, call.q, call.q_norm), scale=scale))
    else:
        assert got.q is None
    return all_of(judged)


def _judge_untouched(
    name: str,
    cache: Tensor,
    scale: Tensor | None,
    cache_before: Tensor,
    scale_before: Tensor | None,
    at: tuple[Tensor, Tensor],
) -> list[Comparison]:
    """Every byte of the slots that nobody wrote, and a scale that was given."""
    pairs = [(cache.view(torch.uint8), cache_before.view(torch.uint8))]
    if scale is not None and scale_before is not None:
        if scale.shape == (1,):
            return [
                *_judge_untouched(name, cache, None, cache_before, None, at),
                compare_bits(f"{name}_scale", scale, scale_before),
            ]
        pairs.append((scale[..., None], scale_before[..., None]))
    judged = []
    for after, before in pairs:
        others = torch.ones(after.shape[0], after.shape[2], dtype=torch.bool, device=after.device)
        others[at] = False
        rows = [t.transpose(1, 2)[others] for t in (after, before)]
        judged.append(compare_bits(f"slots of {name} that no token has", *rows))
    return judged


def _judge_values(got: Written, call: KvWrite, kept: Tensor, at: tuple[Tensor, Tensor]) -> list[Comparison]:
    """Values come from no arithmetic: their bits count."""
    block, offset = at
    rows = call.v[kept]
    stored = got.v_cache.view(torch.uint8)[block, :, offset]
    if call.kind is None:
        expected = rows.to(got.v_cache.dtype).contiguous()
        return [compare_bits("v_cache", stored, expected.view(torch.uint8))]
    assert got.v_scale is not None
    given = got.v_scale if call.kind == "fp8-tensor" else None
    codes, scales = quantised_rows(rows, call.kind, given)
    judged = [compare_bits("v_cache", stored, codes.view(torch.uint8))]
    if given is None:
        judged.append(compare_bits("v_scale", got.v_scale[block, :, offset], scales))
    return judged


def _judge_keys(got: Written, call: KvWrite, kept: Tensor, at: tuple[Tensor, Tensor]) -> Comparison:
    block, offset = at
    exact, scale = (t[kept] for t in _exact(call, call.k, call.k_norm))
    plain = _plain(call, call.k, call.k_norm)[kept]
    if call.kind is None:
        stored = got.k_cache[block, :, offset]
        return compare("k_cache", stored, exact, plain.to(stored.dtype), scale=scale)
    assert got.k_scale is not None
    given = got.k_scale if call.kind == "fp8-tensor" else None
    stored = got.k_cache.view(torch.uint8)[block, :, offset].view(got.k_cache.dtype)
    scales = got.k_scale if given is not None else got.k_scale[block, :, offset]
    plain_values = dequantised(*quantised_rows(plain, call.kind, given))
    # An error of a step is as large anywhere in a head.
    largest = exact.abs().amax(-1, keepdim=True).expand_as(exact)
    return compare("k_cache", dequantised(stored, scales).float(), exact, plain_values.float(), scale=largest)
