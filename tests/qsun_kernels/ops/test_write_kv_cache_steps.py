"""write_kv_cache with a norm, a rotary embedding, a rotation and codes, against the separate operators."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qsun_kernels import apply_rope, rms_norm, write_kv_cache
from qsun_kernels.backends.reference.hadamard import hadamard
from qsun_kernels.testing import inputs
from qsun_kernels.testing.kv_codes import KV_KINDS, KvKind, dequantised
from qsun_kernels.testing.kv_writes import judge_kv_write, kv_write

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STEPS = [(), ("rope",), ("norm", "rope"), ("norm", "rope", "rotate"), ("rotate",), ("norm",)]


@pytest.mark.parametrize("steps", STEPS, ids=" ".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kv", (*KV_KINDS, torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_agrees_with_float64(
    head_dim: int,
    kv: KvKind | torch.dtype,
    dtype: torch.dtype,
    steps: tuple[str, ...],
    device: torch.device,
) -> None:
    if head_dim == 96:
        steps = tuple(step for step in steps if step != "rotate")
    call = kv_write(
        inputs.generator(head_dim), 9, dtype=dtype, kv=kv, head_dim=head_dim, steps=steps, device=device
    )
    judge_kv_write(call.run(backend="torch"), call).require()


@pytest.mark.parametrize("tokens", inputs.ODD_ROWS)
def test_any_number_of_tokens(tokens: int, device: torch.device) -> None:
    source = inputs.generator(tokens)
    call = kv_write(source, tokens, dtype=torch.bfloat16, kv="int4", block_size=5, device=device)
    judge_kv_write(call.run(backend="torch"), call).require()


def test_one_call_is_the_chain_of_operators(device: torch.device) -> None:
    """Bit for bit: each step rounds where its own operator does."""
    dtype = torch.bfloat16
    call = kv_write(inputs.generator(1), 7, dtype=dtype, kv=dtype, head_dim=128, device=device)
    assert call.q is not None and call.positions is not None and call.cos_sin is not None
    assert call.q_norm is not None and call.k_norm is not None
    q, k = (
        rms_norm(heads, norm, eps=call.eps, backend="torch")
        for heads, norm in ((call.q, call.q_norm), (call.k, call.k_norm))
    )
    q, k = apply_rope(q, k, call.positions, call.cos_sin, backend="torch")
    unrotated = replace(call, rotate=False).run(backend="torch")
    expected = call.before.k_cache.clone(), call.before.v_cache.clone()
    write_kv_cache(k, call.v, *expected, call.slot_mapping, backend="torch")
    assert unrotated.q is not None and torch.equal(unrotated.q, q)
    assert torch.equal(unrotated.k_cache.view(torch.uint8), expected[0].view(torch.uint8))
    assert torch.equal(unrotated.v_cache.view(torch.uint8), expected[1].view(torch.uint8))
    rotated = call.run(backend="torch")
    assert rotated.q is not None and torch.equal(rotated.q, hadamard(q).to(dtype))


def test_rotation_leaves_scores_alone(device: torch.device) -> None:
    call = kv_write(
        inputs.generator(2), 8, dtype=torch.float32, kv=torch.float32, heads=(2, 2), skip=0.0, device=device
    )
    scores = []
    for rotate in (False, True):
        got = replace(call, rotate=rotate).run(backend="torch")
        block, offset = call.slot_mapping // 4, call.slot_mapping % 4
        assert got.q is not None
        scores.append((got.q * got.k_cache[block, :, offset]).sum(-1))
    assert torch.allclose(*scores, rtol=1e-5, atol=1e-4)


def test_a_skipped_token_has_its_query(device: torch.device) -> None:
    call = kv_write(inputs.generator(3), 6, dtype=torch.float16, kv="int8", skip=1.0, device=device)
    assert (call.slot_mapping < 0).all()
    got = call.run(backend="torch")
    assert got.q is not None and got.q.isfinite().all()
    judge_kv_write(got, call).require()


@pytest.mark.parametrize("kind", KV_KINDS)
def test_a_value_that_is_not_finite_spoils_its_head_alone(kind: KvKind, device: torch.device) -> None:
    """Its own value alone where one scale was given for all."""
    call = kv_write(
        inputs.generator(4), 5, dtype=torch.bfloat16, kv=kind, skip=0.0, steps=("rope",), device=device
    )
    call.k[1, 2, 5], call.v[3, 0, 9] = torch.nan, torch.inf
    got = call.run(backend="torch")
    for name, cache, scale, (token, head) in (
        ("k", got.k_cache, got.k_scale, (1, 2)),
        ("v", got.v_cache, got.v_scale, (3, 0)),
    ):
        assert scale is not None
        slots = call.slot_mapping
        codes = cache.view(torch.uint8)[slots // 4, :, slots % 4].view(cache.dtype)
        of_tokens = scale if scale.shape == (1,) else scale[slots // 4, :, slots % 4]
        is_nan = dequantised(codes, of_tokens).isnan()
        if kind == "fp8-tensor":
            # Turning spreads a NaN to the other half of its pair.
            assert int(is_nan.sum()) == (2 if name == "k" else 1) and is_nan[token, head].any()
        else:
            assert is_nan[token, head].all() and int(is_nan.sum()) == is_nan.shape[-1]


def test_keys_can_go_without_queries(device: torch.device) -> None:
    source = inputs.generator(5)
    call = kv_write(source, 7, dtype=torch.bfloat16, kv="fp8", steps=("norm", "rope"), device=device)
    alone = replace(call, q=None, q_norm=None)
    got, expected = alone.run(backend="torch"), call.run(backend="torch")
    judge_kv_write(got, alone).require()
    assert torch.equal(got.k_cache.view(torch.uint8), expected.k_cache.view(torch.uint8))
