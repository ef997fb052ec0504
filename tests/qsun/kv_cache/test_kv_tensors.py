"""The tensors of the KV cache: layout, sizes, and blocks to and from host memory."""

from __future__ import annotations

import pytest
import torch

from qsun.kv_cache.format import CODES, KVFormat
from qsun.kv_cache.tensors import CachedBlocks, KVCache
from qsun.models.hf_config import model_config_from_hf

CONFIG = model_config_from_hf(
    {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
    },
    "config.json",
)


def random_cache(dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> KVCache:
    cache = KVCache.allocate(CONFIG, 7, 4, dtype, device)
    generator = torch.Generator().manual_seed(0)
    for pair in cache.layers:
        for tensor in pair:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return cache


def test_layout_and_sizes():
    cache = KVCache.allocate(CONFIG, 7, 4, torch.bfloat16, "cpu")
    assert (cache.num_layers, cache.num_blocks, cache.block_size) == (3, 7, 4)
    assert (cache.dtype, cache.device) == (torch.bfloat16, torch.device("cpu"))
    for index in range(3):
        kv = cache.layer(index)
        assert kv.k_scale is None and kv.v_scale is None and not kv.rotates
        for tensor in (kv.k, kv.v):
            assert tensor.shape == (7, 2, 4, 16) and tensor.is_contiguous() and not tensor.any()
    assert cache.bytes_per_block == 3 * 2 * 2 * 4 * 16 * 2 == KVCache.block_bytes(CONFIG, 4, torch.bfloat16)
    assert cache.nbytes == 7 * cache.bytes_per_block


def test_layers_share_no_memory():
    cache = KVCache.allocate(CONFIG, 7, 4, torch.float32, "cpu")
    tensors = [tensor for pair in cache.layers for tensor in pair]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_blocks_survive_a_trip_to_the_host_and_to_other_places(device, dtype):
    cache = random_cache(dtype, device)
    before = [tensor.cpu() for pair in cache.layers for tensor in pair]
    saved = cache.read_blocks([5, 0, 3])
    assert saved.data.shape == (3, 2, 3, 2, 4, 16) and saved.device.type == "cpu"
    assert len(saved) == 3 and saved.scales is None
    cache.write_blocks([1, 6, 2], saved)
    after = [tensor.cpu() for pair in cache.layers for tensor in pair]
    moved = {1: 5, 6: 0, 2: 3}
    for old, new in zip(before, after, strict=True):
        for block in range(7):
            assert torch.equal(new[block], old[moved.get(block, block)])


def test_saved_blocks_are_a_copy():
    cache = random_cache()
    saved = cache.read_blocks([2])
    expected = saved.data.clone()
    for pair in cache.layers:
        for tensor in pair:
            tensor.zero_()
    assert torch.equal(saved.data, expected)


def test_no_blocks():
    cache = random_cache()
    none = cache.read_blocks([])
    assert none.data.shape == (3, 2, 0, 2, 4, 16) and len(none) == 0
    cache.write_blocks([], none)


BAD_SIZES = [
    ({"num_blocks": 0}, ValueError, "num_blocks is 0, expected an integer of at least 1"),
    ({"block_size": -4}, ValueError, "block_size is -4, expected an integer of at least 1"),
    ({"num_blocks": True}, ValueError, "num_blocks is True, expected"),
    ({"num_blocks": 2.0}, ValueError, "num_blocks is 2.0, expected"),
    ({"dtype": torch.int8}, TypeError, "dtype is torch.int8, expected one of"),
]


@pytest.mark.damaged
@pytest.mark.parametrize(("changes", "error", "message"), BAD_SIZES, ids=lambda value: str(value)[:30])
def test_bad_sizes_are_named(changes, error, message):
    arguments = {"num_blocks": 7, "block_size": 4, "dtype": torch.float32, **changes}
    with pytest.raises(error, match=message):
        KVCache.allocate(CONFIG, device="cpu", **arguments)


DATA = torch.zeros(3, 2, 2, 2, 4, 16)
BLOCKS = CachedBlocks(DATA)
BAD_WRITES = [
    ([0, 7], BLOCKS, ValueError, r"block_ids contains 7, expected ids in 0..6"),
    ([-1, 0], BLOCKS, ValueError, r"block_ids contains -1, expected ids in 0..6"),
    ([3, 3], BLOCKS, ValueError, r"block_ids is \[3, 3\], expected distinct ids"),
    ([3], BLOCKS, ValueError, r"blocks has shape \(3, 2, 2, 2, 4, 16\), expected \(3, 2, 1, 2, 4, 16\)"),
    (
        [3, 4],
        CachedBlocks(DATA.half()),
        TypeError,
        "blocks has dtype torch.float16, expected torch.float32 like",
    ),
    (
        [3, 4],
        CachedBlocks(DATA, DATA[..., 0]),
        ValueError,
        r"scales of blocks has shape \(3, 2, 2, 2, 4\), expected None",
    ),
]


@pytest.mark.damaged
@pytest.mark.parametrize(("ids", "blocks", "error", "message"), BAD_WRITES, ids=lambda value: str(value)[:20])
def test_bad_writes_are_named_and_change_nothing(ids, blocks, error, message):
    cache = random_cache()
    before = cache.read_blocks(range(7)).data
    with pytest.raises(error, match=message):
        cache.write_blocks(ids, blocks)
    assert torch.equal(cache.read_blocks(range(7)).data, before)


@pytest.mark.damaged
def test_data_of_another_form():
    with pytest.raises(
        ValueError, match=r"data has shape \(3, 7, 2, 4, 16\), expected \(num_layers, 2, num_blocks"
    ):
        KVCache(torch.zeros(3, 7, 2, 4, 16))
    with pytest.raises(ValueError, match=r"data has strides .*, expected a contiguous tensor"):
        KVCache(torch.zeros(3, 2, 7, 2, 16, 4).transpose(4, 5))
    with pytest.raises(TypeError, match=r"data has dtype torch.float64, expected one of"):
        KVCache(torch.zeros(3, 2, 7, 2, 4, 16, dtype=torch.float64))


FORMATS = [
    KVFormat(CODES["fp8"], torch.bfloat16),
    KVFormat(CODES["int8"], torch.float16),
    KVFormat(CODES["int4"], torch.float32, rotates=True),
]


@pytest.mark.parametrize("kv_format", FORMATS, ids=str)
def test_caches_of_codes(device, kv_format):
    cache = KVCache.allocate(CONFIG, 7, 4, kv_format, device)
    width = 8 if kv_format.dtype == torch.uint8 else 16
    kv = cache.layer(1)
    assert kv.k.shape == kv.v.shape == (7, 2, 4, width) and kv.k.dtype == kv_format.dtype
    assert kv.k_scale.shape == kv.v_scale.shape == (7, 2, 4) and kv.k_scale.dtype == torch.float32
    assert kv.k_scale.is_contiguous() and kv.v_scale.is_contiguous()
    assert kv.rotates is kv_format.rotates
    assert cache.bytes_per_block == 3 * 2 * 2 * 4 * (width + 4) == KVCache.block_bytes(CONFIG, 4, kv_format)
    assert cache.nbytes == 7 * cache.bytes_per_block
    # Views of the cache, not copies
    kv.k_scale[3] = 2.0
    assert (cache.layer(1).k_scale[3] == 2.0).all() and not cache.layer(1).v_scale.any()
    assert not cache.layer(0).k_scale.any()


@pytest.mark.parametrize("kv_format", FORMATS, ids=str)
def test_blocks_of_codes_travel_with_their_scales(device, kv_format):
    cache = KVCache.allocate(CONFIG, 7, 4, kv_format, device)
    generator = torch.Generator().manual_seed(0)
    for index in range(3):
        kv = cache.layer(index)
        for codes in (kv.k, kv.v):
            random = torch.randint(256, codes.shape, generator=generator).to(torch.uint8)
            codes.view(torch.uint8).copy_(random)
        for scale in (kv.k_scale, kv.v_scale):
            scale.copy_(torch.rand(scale.shape, generator=generator))
    before = cache.read_blocks(range(7))
    cache.write_blocks([1, 6, 2], cache.read_blocks([5, 0, 3]))
    after = cache.read_blocks(range(7))
    moved = [0, 5, 3, 3, 4, 5, 0]
    for new, old in (
        (after.data.view(torch.uint8), before.data.view(torch.uint8)),
        (after.scales, before.scales),
    ):
        assert torch.equal(new, old[:, :, moved])


@pytest.mark.damaged
def test_codes_without_scales_are_refused():
    data = torch.zeros(3, 2, 7, 2, 4, 16, dtype=torch.int8)
    int8 = KVFormat(torch.int8, torch.float32)
    with pytest.raises(
        ValueError, match=r"scales has shape None, expected \(3, 2, 7, 2, 4\) for a cache of int8"
    ):
        KVCache(data, None, int8)
    with pytest.raises(TypeError, match=r"data has dtype torch.int8, expected one of .* or a kv_format"):
        KVCache(data)
    with pytest.raises(TypeError, match=r"data has dtype torch.int8, expected torch.uint8"):
        KVCache(data, None, KVFormat(torch.uint8, torch.float32))
    with pytest.raises(TypeError, match=r"dtype is torch.int8, expected one of .* or a KVFormat"):
        KVCache.allocate(CONFIG, 7, 4, torch.int8, "cpu")
    with pytest.raises(TypeError, match=r"values is torch.int8, expected one of"):
        KVFormat(torch.int8, torch.int8)
    cache = KVCache.allocate(CONFIG, 7, 4, int8, "cpu")
    with pytest.raises(ValueError, match=r"scales of blocks has shape None, expected \(3, 2, 2, 2, 4\)"):
        cache.write_blocks([1, 2], CachedBlocks(data[:, :, :2]))
