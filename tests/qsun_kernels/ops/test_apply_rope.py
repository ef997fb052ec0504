"""apply_rope: against complex multiplication in float64, on views, at odd sizes."""

from __future__ import annotations

import math

import pytest
import torch

from qsun_kernels import RopeParameters, apply_rope, rope_cache
from qsun_kernels.testing import inputs, judge

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_q_heads", "num_kv_heads", "head_dim"), [(4, 2, 64), (9, 3, 80), (1, 1, 2), (7, 1, 128)]
)
def test_agrees_with_float64(
    num_q_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    source = inputs.generator(head_dim)
    cos_sin = rope_cache(RopeParameters(10000.0), head_dim, 500, device)
    for tokens in inputs.ODD_ROWS:
        q, k, _ = inputs.qkv_views(source, tokens, num_q_heads, num_kv_heads, head_dim, dtype, device)
        positions = torch.randint(0, 500, (tokens,), generator=source).to(device)
        with inputs.poisoned_outputs():
            turned = apply_rope(q, k, positions, cos_sin, backend="torch")
        assert all(t.is_contiguous() for t in turned)
        judge.judge_apply_rope(turned, q, k, positions, cos_sin).require()


def test_by_hand() -> None:
    # One pair turned by 1 radian a position.
    q = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]])
    cos_sin = rope_cache(RopeParameters(10000.0), 2, 4)
    turned, _ = apply_rope(q, q, torch.tensor([1, 3]), cos_sin)
    assert turned[0, 0].tolist() == pytest.approx([math.cos(1), math.sin(1)], abs=1e-6)
    assert turned[1, 0].tolist() == pytest.approx([-2 * math.sin(3), 2 * math.cos(3)], abs=1e-6)


def test_position_zero_changes_nothing_and_inputs_stay() -> None:
    q, k, _ = inputs.qkv_views(inputs.generator(1), 3, 4, 2, 16, torch.float16)
    before = q.clone(), k.clone()
    cos_sin = rope_cache(RopeParameters(10000.0), 16, 8)
    still = apply_rope(q, k, torch.zeros(3, dtype=torch.int64), cos_sin)
    assert all(torch.equal(a, b) for a, b in zip(still, before, strict=True))
    apply_rope(q, k, torch.tensor([1, 2, 3]), cos_sin)
    assert torch.equal(q, before[0])
    assert torch.equal(k, before[1])


def test_scores_depend_on_the_distance_only() -> None:
    # The property that rotary positions exist for (RoFormer, equation 11).
    source = inputs.generator(2)
    q, k = (inputs.normal(source, (1, 1, 64), torch.float32) for _ in range(2))
    cos_sin = rope_cache(RopeParameters(10000.0), 64, 300)

    def score(at_q: int, at_k: int) -> float:
        turned_q, _ = apply_rope(q, q, torch.tensor([at_q]), cos_sin)
        turned_k, _ = apply_rope(k, k, torch.tensor([at_k]), cos_sin)
        return float((turned_q * turned_k).sum())

    assert score(7, 3) == pytest.approx(score(204, 200), abs=1e-3)
    assert abs(score(7, 3) - score(7, 5)) > 0.1


def test_nan_spoils_its_own_pair_only() -> None:
    q = torch.ones(2, 1, 8)
    q[1, 0, 2] = math.nan
    turned, _ = apply_rope(
        q, torch.ones(2, 1, 8), torch.tensor([1, 2]), rope_cache(RopeParameters(100.0), 8, 4)
    )
    assert turned.isnan().nonzero().tolist() == [[1, 0, 2], [1, 0, 6]]


@pytest.mark.damaged
@pytest.mark.parametrize("position", [-1, 8])
def test_a_position_outside_the_table_is_an_error_on_the_cpu(position: int) -> None:
    q = torch.ones(1, 1, 4)
    with pytest.raises(IndexError, match="out of range"):
        apply_rope(q, q, torch.tensor([position]), rope_cache(RopeParameters(100.0), 4, 8))
