"""The engine's parts by themselves: memory plan, swap space, input tensors, buckets."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import qsun.engine.runner as runner_module
from qsun.core import Chunk, Request, SamplingParams, Sequence
from qsun.engine.cuda_graphs import batch_buckets, bucket_for
from qsun.engine.inputs import prefill_inputs
from qsun.engine.memory import format_bytes, parse_memory, plan_memory
from qsun.engine.options import kv_format_of
from qsun.engine.runner import Runner
from qsun.engine.swap import HostSwap, pack_kv
from qsun.kv_cache.format import KVFormat
from qsun.kv_cache.tensors import CachedBlocks, KVCache
from qsun_kernels import write_kv_cache

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, 0),
        (12345, 12345),
        ("2GiB", 2 * 2**30),
        ("1.5 MiB", 3 * 2**19),
        ("500MB", 5 * 10**8),
        ("77", 77),
        (" 3 kb ", 3000),
        (0.25, 0.25),
        (1.0, 1.0),
    ],
)
def test_memory_in_every_form(value, expected) -> None:
    assert parse_memory(value, "memory") == expected
    assert type(parse_memory(value, "memory")) is type(expected)


def plan(memory=None, swap_memory=None, **changes):
    arguments = dict(bytes_per_block=1000, block_size=16, useful_tokens=10**9, device=CPU)
    return plan_memory(memory, swap_memory, **{**arguments, **changes})


def test_memory_plans() -> None:
    assert plan(10_999, 2500).num_blocks == 10 and plan(10_999, 2500).swap_blocks == 2
    assert plan("1MB", 0).swap_blocks == 0
    # A default takes no more than the largest batch of the longest requests fills: 3 blocks for 33 tokens.
    small = plan(useful_tokens=33)
    assert (small.num_blocks, small.num_tokens, small.kv_bytes) == (3, 48, 3000)
    assert small.swap_blocks == 3, "swap space beyond the cache itself is of no use"
    assert plan().kv_bytes <= 2**30
    assert "3 blocks of 16 tokens" in str(small) and "largest batch" in str(small)


@pytest.mark.damaged
def test_more_memory_than_there_is_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"is 10+ bytes for the KV cache, expected at most \d+: .* free on cpu"
    ):
        plan(10**18)


def test_bytes_for_a_reader() -> None:
    assert [format_bytes(n) for n in (5, 2048, 3 * 2**19, 2**31)] == [
        "5 B",
        "2.00 KiB",
        "1.50 MiB",
        "2.00 GiB",
    ]


def test_cache_formats() -> None:
    assert kv_format_of("auto", torch.bfloat16, 80) == KVFormat(torch.bfloat16, torch.bfloat16)
    assert kv_format_of("float16", torch.bfloat16, 80) == KVFormat(torch.float16, torch.float16)
    assert kv_format_of(torch.float32, torch.bfloat16, 80) == KVFormat(torch.float32, torch.float32)
    assert kv_format_of("fp8", torch.bfloat16, 80) == KVFormat(torch.float8_e4m3fn, torch.bfloat16)
    assert kv_format_of("int8", torch.float16, 80) == KVFormat(torch.int8, torch.float16)
    assert kv_format_of("int4", torch.bfloat16, 64) == KVFormat(torch.uint8, torch.bfloat16, rotates=True)
    assert [str(kv_format_of(name, torch.bfloat16, 128)) for name in ("auto", "fp8", "int8", "int4")] == [
        "bfloat16",
        "fp8",
        "int8",
        "int4, rotated",
    ]


@pytest.mark.damaged
def test_heads_that_cannot_be_rotated_are_no_4_bit_codes() -> None:
    message = "kv_cache_dtype is 'int4', .* head_dim is 96; expected a power of two, or another .*'int8'"
    with pytest.raises(ValueError, match=message):
        kv_format_of("int4", torch.bfloat16, 96)


@pytest.mark.parametrize(
    ("largest", "buckets"),
    [
        (1, (1,)),
        (2, (1, 2)),
        (3, (1, 2, 3)),
        (8, (1, 2, 4, 8)),
        (44, (1, 2, 4, 8, 16, 24, 32, 40, 44)),
        (64, (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)),
        (200, (1, 2, 4, 8, *range(16, 65, 8), *range(80, 129, 16), 160, 192, 200)),
    ],
)
def test_buckets(largest: int, buckets: tuple[int, ...]) -> None:
    assert batch_buckets(largest) == buckets
    for rows in range(1, largest + 1):
        bucket = bucket_for(rows, buckets)
        assert rows <= bucket < max(2 * rows, 2) and bucket in buckets
        assert bucket - rows < 8 or bucket - rows < rows / 4


@pytest.fixture
def kv_cache(decode_module) -> KVCache:
    cache = KVCache.allocate(decode_module.config, 12, 4, torch.float32, CPU)
    # Whatever is read without having been written shows.
    for k, v in cache.layers:
        k.fill_(float("nan"))
        v.fill_(float("nan"))
    return cache


def test_swap_space_moves_blocks_and_counts(kv_cache) -> None:
    swap = HostSwap(kv_cache, 3)
    content = torch.randn(3, 2, 2, 2, 4, 16)
    kv_cache.write_blocks([5, 1], CachedBlocks(content))
    saved = swap.save([5, 1])
    assert saved is not None and swap.used == 2
    assert swap.has_room(1) and not swap.has_room(2) and swap.save([2, 3]) is None and swap.used == 2
    swap.restore(saved, [7, 8, 9])  # one block more than was saved: room for what comes next
    assert swap.used == 0
    assert torch.equal(kv_cache.read_blocks([7, 8]).data, content)
    assert kv_cache.read_blocks([9]).data.isnan().all()
    saved = swap.save([7])
    swap.drop(saved)
    assert swap.used == 0


def test_a_host_without_memory_is_no_swap_room(kv_cache, monkeypatch) -> None:
    swap = HostSwap(kv_cache, 3)

    def exhausted(self, blocks):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(KVCache, "read_blocks", exhausted)
    assert swap.save([1]) is None and swap.used == 0 and swap.num_failed_saves == 1


@pytest.mark.damaged
def test_a_negative_swap_space_is_refused(kv_cache) -> None:
    with pytest.raises(ValueError, match="capacity must be at least 0 blocks, got -1"):
        HostSwap(kv_cache, -1)


@pytest.mark.parametrize("length", [1, 4, 7, 8])
def test_given_kv_is_packed_into_blocks(kv_cache, length: int) -> None:
    k, v = torch.randn(2, 3, length, 2, 16).requires_grad_()
    saved = pack_kv(k, v, 4)
    assert saved.counted == 0 and not saved.blocks.data.requires_grad
    blocks = [3, 10][: -(-length // 4)]
    HostSwap(kv_cache, 0).restore(saved, blocks)
    for layer, (k_cache, v_cache) in enumerate(kv_cache.layers):
        for position in range(length):
            block, offset = blocks[position // 4], position % 4
            assert torch.equal(k_cache[block, :, offset], k[layer, position])
            assert torch.equal(v_cache[block, :, offset], v[layer, position])


@pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_given_kv_has_the_codes_of_kv_computed_here(decode_module, kind: str, dtype: torch.dtype) -> None:
    """Bit for bit what a layer writes of the same keys: the angles of position 0 turn nothing."""
    length, kv_format = 7, kv_format_of(kind, dtype, 16)
    k, v = torch.randn(2, 3, length, 2, 16).to(dtype).requires_grad_()
    saved = pack_kv(k, v, 4, kv_format)
    cache = KVCache.allocate(decode_module.config, 2, 4, kv_format, CPU)
    no_turn = torch.cat((torch.ones(1, 8), torch.zeros(1, 8)), dim=1)
    for layer in range(3):
        kv, keys = cache.layer(layer), k.detach()[layer]
        write_kv_cache(
            *(keys, v.detach()[layer], kv.k, kv.v, torch.arange(length)),
            q=keys,
            positions=torch.zeros(length, dtype=torch.int64),
            cos_sin=no_turn,
            rotate=kv.rotates,
            k_scale=kv.k_scale,
            v_scale=kv.v_scale,
        )
    expected = cache.read_blocks([0, 1])
    assert saved.counted == 0 and len(saved.blocks) == 2
    assert torch.equal(saved.blocks.data.view(torch.uint8), expected.data.view(torch.uint8))
    assert torch.equal(saved.blocks.scales, expected.scales)
    assert saved.blocks.scales.any() and not saved.blocks.scales[..., 1, :, 3].any()  # the unused end


def sequence_of(tokens: list[int], blocks: list[int], name: str = "r") -> Sequence:
    request = Request(name, "m", tuple(tokens), SamplingParams(), 0, 0, 8)
    sequence = Sequence(request, "m", len(tokens) - 1, list(tokens))
    sequence.block_ids = blocks
    return sequence


def test_prefill_inputs_lay_chunks_side_by_side() -> None:
    first = sequence_of([10, 11, 12, 13, 14, 15], [7, 2])
    second = sequence_of([20, 21, 22], [5])
    chunks = [Chunk(first, 3, 2, "prefill"), Chunk(second, 0, 2, "prefill")]
    token_ids, ctx = prefill_inputs(chunks, 4, CPU)
    assert token_ids.tolist() == [13, 14, 20, 21]
    assert ctx.positions.tolist() == [3, 4, 0, 1]
    assert ctx.slot_mapping.tolist() == [31, 8, 20, 21]
    parts = [(c.start, c.length, c.context_len, c.block_ids.tolist()) for c in ctx.attention.chunks]
    assert parts == [(0, 2, 3, [7, 2]), (2, 2, 0, [5])]
    assert all(t.dtype == torch.int64 for t in (token_ids, ctx.positions, ctx.slot_mapping))


class NoRoom:
    """In the place of `DecodeGraphs`, on a device that is full."""

    def __init__(self, *_) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.damaged
@pytest.mark.parametrize("mode", ["auto", "on"])
def test_graphs_that_do_not_fit_name_the_settings_to_change(decode_module, kv_cache, monkeypatch, mode):
    """Not even "auto" goes on without graphs: the memory would be short at the first long prompt instead."""
    arguments = dict(max_batch_size=8, max_blocks=3, backend=None)
    runner = Runner(decode_module, kv_cache, stream=None, cuda_graphs="auto", **arguments)
    monkeypatch.setattr(runner_module, "DecodeGraphs", NoRoom)
    device = SimpleNamespace(device="cuda:0")
    with pytest.raises(ValueError, match=r"max_batch_size is 6 .* 2.00 GiB.* cuda_graphs='off'"):
        runner._capture((1, 2, 6), device, mode)
