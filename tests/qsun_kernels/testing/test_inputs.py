"""Random problems are what they say: same on every device, poisoned where nothing may look."""

from __future__ import annotations

import math

import pytest
import torch

from qsun_kernels import QuantSpec
from qsun_kernels.testing import inputs, oracles


def test_lengths_follow_the_law_and_add_up() -> None:
    lengths = inputs.zipf_lengths(inputs.generator(0), 64, 131072, 1.0)
    assert sum(lengths) == 131072
    assert min(lengths) >= 1
    ordered = sorted(lengths, reverse=True)
    assert ordered[0] / ordered[9] == pytest.approx(10, rel=0.02)
    assert lengths != ordered
    assert inputs.zipf_lengths(inputs.generator(0), 64, 131072, 1.0) == lengths
    assert inputs.zipf_lengths(inputs.generator(0), 5, 5, 1.2) == [1] * 5


@pytest.mark.damaged
def test_lengths_that_cannot_add_up_are_refused() -> None:
    with pytest.raises(ValueError, match=r"total is 3, expected at least batch \* minimum = 4"):
        inputs.zipf_lengths(inputs.generator(0), 4, 3, 1.0)


@pytest.mark.damaged
def test_more_tokens_than_slots_are_refused() -> None:
    with pytest.raises(ValueError, match="tokens is 5, expected at most num_slots, 4"):
        inputs.slot_mapping(inputs.generator(0), 5, 4)


def test_slots_are_different_and_some_are_skipped() -> None:
    slots = inputs.slot_mapping(inputs.generator(0), 500, 600, skip=0.25)
    kept = slots[slots >= 0]
    assert len(kept.unique()) == len(kept)
    assert int(kept.max()) < 600
    assert 80 < int((slots < 0).sum()) < 170


@pytest.mark.parametrize("window", [None, 6])
def test_only_what_a_request_may_read_is_a_number(window: int | None) -> None:
    lengths = [0, 1, 13, 8]
    case = inputs.paged_attention_inputs(
        inputs.generator(0),
        lengths,
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=8,
        block_size=4,
        dtype=torch.float32,
        window=window,
    )
    readable = sum(length if window is None else min(length, window) for length in lengths)
    for cache in (case.k_cache, case.v_cache):
        assert int(cache.isfinite().sum()) == readable * 2 * 8
        assert int(cache.isnan().sum()) == cache.numel() - readable * 2 * 8
    owned = [case.block_table[r, : -(-length // 4)].tolist() for r, length in enumerate(lengths)]
    flat = [block for blocks in owned for block in blocks]
    assert len(set(flat)) == len(flat)
    for request, blocks in enumerate(owned):
        stale = case.block_table[request, len(blocks) :].long()
        assert len(stale) >= 2
        assert case.k_cache[stale].isnan().all()
        keys, values = oracles.cached_tokens(case, request, 0)
        assert len(keys) == min(lengths[request], window or math.inf)
        assert keys.isfinite().all()
        assert values.isfinite().all()
    assert not case.q.is_contiguous()
    assert case.q.isfinite().all()


def test_views_of_one_matrix_have_poison_behind_them() -> None:
    q, k, v = inputs.qkv_views(inputs.generator(0), 5, 4, 2, 8, torch.float16)
    assert (q.shape, k.shape, v.shape) == ((5, 4, 8), (5, 2, 8), (5, 2, 8))
    assert q.stride() == k.stride() == v.stride() == (72, 8, 1)
    assert q.isfinite().all()
    behind = v.as_strided((4, 8), (72, 1), v.storage_offset() + 16)
    assert behind.isnan().all()


def test_packed_weights_use_every_code_and_different_scales() -> None:
    for bits in (2, 3, 4, 8):
        spec = QuantSpec(bits, 32, False)  # type: ignore[arg-type]
        packed = inputs.packed_weight(inputs.generator(0), 64, 320, spec, act_order=True).validate()
        assert len(packed.codes().unique()) == spec.max_code + 1
        assert len(packed.scales.unique()) == packed.scales.numel()
        assert packed.g_idx is not None
        assert packed.g_idx.bincount().tolist() == [32] * 10
        assert 0.1 < float(oracles.exact_weight(packed).norm(dim=1).mean()) < 10


def test_outputs_are_poisoned_inside_only() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    with inputs.poisoned_outputs():
        assert torch.empty(1000).isnan().all()
        assert torch.empty_like(torch.ones(10, dtype=torch.float16)).isnan().all()
        assert torch.ones(2).new_empty(10, dtype=torch.bfloat16).isnan().all()
    assert torch.are_deterministic_algorithms_enabled() is before
    with pytest.raises(KeyError), inputs.poisoned_outputs():
        raise KeyError("inside")
    assert torch.are_deterministic_algorithms_enabled() is before


def test_a_sample_of_rows_is_those_rows() -> None:
    packed = inputs.packed_weight(inputs.generator(0), 20, 64, QuantSpec(3, 32, False), act_order=True)
    rows = torch.tensor([3, 19, 0])
    taken = oracles.take_rows(packed, rows)
    assert torch.equal(oracles.exact_weight(taken), oracles.exact_weight(packed)[rows])
