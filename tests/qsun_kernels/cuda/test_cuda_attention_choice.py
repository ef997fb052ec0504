"""paged_attention_decode on CUDA: which kernel, which configuration, and what is refused. Needs no GPU."""

from __future__ import annotations

import pytest

from qsun_kernels.errors import KernelLaunchError

FLOAT, HALF, BFLOAT, FP8, INT8, INT4 = range(6)  # dtype codes
NONE, TENSOR, TOKEN = range(3)  # of scales


@pytest.mark.parametrize(
    ("batch", "heads", "head_dim", "max_blocks", "window", "expected"),
    [
        (1, (32, 8), 128, 64, -1, (4, 1, 16, 16)),  # 1K tokens in parts of 64
        (1, (32, 8), 128, 4096, -1, (4, 1, 16, 66)),  # 64K tokens: four blocks a multiprocessor
        (64, (32, 8), 128, 128, -1, (4, 1, 16, 2)),
        (256, (32, 8), 128, 32, -1, (4, 1, 16, 1)),  # enough requests: nothing is cut
        (256, (32, 8), 128, 2048, -1, (4, 1, 16, 8)),  # unless one could be much longer than the others
        (1, (9, 3), 64, 8, -1, (4, 1, 8, 2)),
        (1, (16, 1), 256, 4, -1, (8, 2, 32, 1)),
        (1, (8, 8), 80, 4096, 100, (1, 1, 16, 2)),  # a window bounds what there is to cut
        (0, (8, 8), 64, 4, -1, (1, 1, 8, 1)),
        (2, (8, 8), 64, 0, -1, (1, 1, 8, 1)),
    ],
)
def test_choose_paged_attention_split(
    extension, h100, batch, heads, head_dim, max_blocks, window, expected
) -> None:
    sizes = (batch, 1, *heads, head_dim, 16, max_blocks, window, FLOAT, FLOAT, NONE, h100)
    assert extension.choose_paged_attention_decode(*sizes) is None
    assert extension.paged_attention_plan_bytes(None, *sizes) == 0
    config = extension.choose_paged_attention_split(*sizes)
    assert (config.head_tile, config.head_tiles, config.lanes, config.num_parts) == expected, repr(config)
    assert config.grid == batch * heads[1] * config.head_tiles * config.num_parts
    scratch = extension.paged_attention_decode_scratch_bytes(None, *sizes)
    partial = batch * heads[0] * config.num_parts
    assert scratch == (0 if config.num_parts == 1 else 4 * (-(-partial // 4) * 4 + partial * head_dim))


def test_split_cuts_every_query_token(extension, h100) -> None:
    """Each is a row of its own there: twice the tokens need half the parts."""
    sizes = (2, 1, 8, 8, 64, 16, 4096, -1, FLOAT, FLOAT, NONE, h100)
    one, four = (extension.choose_paged_attention_split(sizes[0], q_len, *sizes[2:]) for q_len in (1, 4))
    assert (one.num_parts, four.num_parts) == (33, 16)
    assert four.grid == 2 * 4 * 8 * 16


@pytest.mark.parametrize(
    ("heads", "q_len", "head_dim", "expected"),
    [
        ((32, 8), 1, 64, (4, 4, 2)),
        ((32, 8), 1, 96, (4, 4, 2)),
        ((32, 8), 1, 128, (4, 3, 2)),
        ((32, 8), 1, 256, (4, 3, 1)),  # two rings do not fit
        ((64, 4), 4, 128, (4, 3, 2)),  # 64 query rows: 16 a warp
        ((64, 4), 5, 128, (8, 4, 1)),  # 80 rows: eight warps
        ((16, 1), 8, 256, (8, 3, 1)),
    ],
)
def test_choose_paged_attention_decode(extension, h100, heads, q_len, head_dim, expected) -> None:
    sizes = (3, q_len, *heads, head_dim, 16, 64, -1, BFLOAT, BFLOAT, NONE, h100)
    config = extension.choose_paged_attention_decode(*sizes)
    assert (config.warps, config.stages, config.blocks_per_sm) == expected, repr(config)
    assert config.parts == config.blocks_per_sm * h100.sm_count and config.overlaps_producer
    rows = heads[0] // heads[1] * q_len
    assert rows <= config.warps * 16
    ring = config.stages * 4 * 2 * 16 * (head_dim * 2 + 16)
    assert config.blocks_per_sm * (ring + 3072) <= 228 * 1024
    assert extension.paged_attention_plan_bytes(None, *sizes) == (
        16 + 32 * config.parts + 4 * 3 * (4 + heads[1])
    )
    slots = 2 * config.parts * rows
    scratch = extension.paged_attention_decode_scratch_bytes(None, *sizes)
    assert scratch == 4 * (-(-slots // 4) * 4 + slots * head_dim)

    # Two requests or more have to fit into the 64 query rows that share a prefix.
    assert config.prefix_parts == (config.parts if rows <= 32 else 0), repr(config)
    prefixes = extension.paged_attention_prefixes_bytes(None, *sizes)
    sharing = extension.paged_attention_sharing_scratch_bytes(None, *sizes)
    if config.prefix_parts:
        assert prefixes == 16 + 32 * config.prefix_parts + 4 * 3 * (4 + 4 + 2)
        kept = 64 * config.prefix_parts + 3 * q_len * heads[0]
        assert sharing == scratch + 4 * (-(-kept // 4) * 4 + kept * head_dim)
        assert config.min_prefix_tiles == 4 and config.min_saved_tiles == 2 * config.prefix_parts
    else:
        assert prefixes == 0


@pytest.mark.parametrize(
    ("change", "shares"),
    [
        ({}, True),
        ({"num_q_heads": 32, "q_len": 2}, True),
        ({"num_q_heads": 32, "q_len": 3}, False),  # 48 rows: no two requests in 64
        ({"window": 2**31}, False),
        ({"batch": 4096}, True),
        ({"batch": 4097}, False),
        ({"head_dim": 80}, False),
        ({"kv_dtype": INT8, "kv_scales": TOKEN}, False),
    ],
)
def test_who_shares_prefixes(extension, h100, change, shares) -> None:
    sizes = {
        "batch": 1, "q_len": 1, "num_q_heads": 8, "num_kv_heads": 2, "head_dim": 128, "block_size": 16,
        "max_blocks": 4, "window": -1, "dtype": BFLOAT, "kv_dtype": BFLOAT, "kv_scales": NONE,
        "props": h100, **change,
    }  # fmt: skip
    assert (extension.paged_attention_prefixes_bytes(config=None, **sizes) > 0) == shares
    config = extension.choose_paged_attention_decode(**sizes)
    assert (config is not None and config.prefix_parts > 0) == shares


@pytest.mark.parametrize(
    ("batch", "change", "expected"),
    [
        (1, {}, (2, 3, -1)),
        (11, {}, (2, 3, -1)),  # 88 items for 132 multiprocessors
        (12, {}, (1, 4, 3)),
        (16, {}, (1, 4, 3)),
        (17, {}, (2, 3, -1)),  # 136: two for some multiprocessors
        (28, {}, (2, 3, -1)),
        (29, {}, (2, 3, 3)),  # 232 of 264
        (64, {}, (2, 3, 3)),  # more than there are parts: never whole
        (16, {"head_dim": 64}, (2, 4, -1)),  # the whole ring fits twice
        (29, {"head_dim": 64}, (2, 4, 6)),
        (16, {"head_dim": 256}, (1, 3, 1)),
        (16, {"q_len": 4}, (1, 4, 3)),
        (16, {"q_len": 5}, (2, 3, -1)),  # 20 query rows
        (1, {"kv_dtype": INT8, "kv_scales": TOKEN}, (2, 3, 6)),
        (16, {"kv_dtype": FP8, "kv_scales": TENSOR}, (2, 3, 6)),
        (17, {"kv_dtype": FP8, "kv_scales": TENSOR}, (2, 3, -1)),
        (16, {"kv_dtype": INT4, "kv_scales": TOKEN}, (4, 3, -1)),  # four blocks a multiprocessor
        (64, {"kv_dtype": INT4, "kv_scales": TOKEN}, (4, 3, 12)),  # 512 of 528
    ],
)
def test_where_requests_stay_whole(extension, h100, batch, change, expected) -> None:
    """Where each multiprocessor has one item, or about as many as all others."""
    sizes = {
        "batch": batch, "q_len": 1, "num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128, "block_size": 16,
        "max_blocks": 4, "window": -1, "dtype": BFLOAT, "kv_dtype": BFLOAT, "kv_scales": NONE,
        "props": h100, **change,
    }  # fmt: skip
    config = extension.choose_paged_attention_decode(**sizes)
    assert (config.blocks_per_sm, config.stages, config.whole_slack) == expected, repr(config)
    assert config.parts == config.blocks_per_sm * h100.sm_count


def test_a_ring_fits_an_older_gpu(extension, a100) -> None:
    for head_dim, expected in ((64, (4, 2)), (96, (3, 2)), (128, (4, 1)), (256, (2, 1))):
        config = extension.choose_paged_attention_decode(
            1, 1, 8, 8, head_dim, 16, 64, -1, HALF, HALF, NONE, a100
        )
        assert (config.stages, config.blocks_per_sm) == expected, repr(config)
        assert not config.overlaps_producer


@pytest.mark.parametrize(
    ("kind", "heads", "q_len", "head_dim", "expected"),
    [
        ((INT4, TOKEN), (32, 8), 1, 64, (4, 4, 4)),
        ((INT4, TOKEN), (32, 8), 1, 128, (4, 3, 4)),
        ((INT4, TOKEN), (32, 8), 3, 128, (4, 4, 2)),  # 12 query rows: twice the registers
        ((INT4, TOKEN), (32, 8), 5, 128, (8, 4, 1)),
        ((INT4, TOKEN), (32, 8), 1, 256, (4, 3, 2)),
        ((INT8, TOKEN), (32, 8), 1, 128, (4, 3, 2)),  # two rings of three stages fit
        ((FP8, TENSOR), (32, 8), 1, 64, (4, 3, 4)),
        ((FP8, TOKEN), (32, 8), 1, 256, (4, 3, 1)),
    ],
)
def test_choose_for_codes(extension, h100, kind, heads, q_len, head_dim, expected) -> None:
    sizes = (3, q_len, *heads, head_dim, 16, 64, -1, BFLOAT, *kind, h100)
    config = extension.choose_paged_attention_decode(*sizes)
    assert (config.warps, config.stages, config.blocks_per_sm) == expected, repr(config)
    assert config.parts == config.blocks_per_sm * h100.sm_count
    row = head_dim // 2 if kind[0] == INT4 else head_dim
    ring = config.stages * 4 * 2 * 32 * (row + 4)
    assert config.blocks_per_sm * (ring + 2176) <= 228 * 1024


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_dtype": BFLOAT}, "kv_dtype is bfloat16; expected float16 as q, or codes"),
        ({"kv_dtype": 9}, "kv_dtype is unknown; expected float16 as q, or codes"),
        ({"kv_scales": TOKEN}, "kv_scales is token; expected none for float16"),
        ({"kv_dtype": INT8}, "kv_scales is none; expected token for int8"),
        ({"kv_dtype": INT4, "kv_scales": TENSOR}, "kv_scales is tensor; expected token for int4"),
        ({"kv_dtype": FP8, "kv_scales": 7}, "kv_scales is unknown; expected token or tensor"),
        (
            {"dtype": FLOAT, "kv_dtype": INT8, "kv_scales": TOKEN},
            "dtype is float32; expected float16 or bfloat16 beside int8",
        ),
    ],
)
def test_refused_caches(extension, h100, change, message) -> None:
    sizes = {**SIZES, "max_blocks": 4, "props": h100, **change}
    with pytest.raises(KernelLaunchError) as caught:
        extension.choose_paged_attention_decode(
            **{name: value for name, value in sizes.items() if name not in ("device", "stream")}
        )
    assert message in caught.value.error


@pytest.mark.parametrize(
    ("change", "is_planned"),
    [
        ({}, True),
        ({"dtype": HALF, "kv_dtype": HALF}, True),
        ({"dtype": FLOAT, "kv_dtype": FLOAT}, False),
        ({"head_dim": 96}, True),
        ({"head_dim": 80}, False),
        ({"block_size": 8}, False),
        ({"num_q_heads": 16 * 2, "q_len": 8}, True),
        ({"num_q_heads": 17 * 2, "q_len": 8}, False),  # 136 query rows
        ({"batch": 32768}, True),
        ({"batch": 32769}, False),
        ({"kv_dtype": FP8, "kv_scales": TENSOR}, True),
        ({"kv_dtype": FP8, "kv_scales": TOKEN, "dtype": HALF}, True),
        ({"kv_dtype": INT8, "kv_scales": TOKEN, "num_q_heads": 32, "q_len": 8}, True),
        ({"kv_dtype": INT4, "kv_scales": TOKEN, "head_dim": 256, "q_len": 8, "num_q_heads": 16}, True),
        ({"kv_dtype": INT4, "kv_scales": TOKEN, "head_dim": 256, "q_len": 8, "num_q_heads": 18}, False),
        ({"kv_dtype": INT4, "kv_scales": TOKEN, "head_dim": 96}, False),
        ({"kv_dtype": INT4, "kv_scales": TOKEN, "block_size": 8}, False),
    ],
)
def test_which_kernel_serves_which_sizes(extension, h100, change, is_planned) -> None:
    sizes = {
        "batch": 1, "q_len": 1, "num_q_heads": 8, "num_kv_heads": 2, "head_dim": 128, "block_size": 16,
        "max_blocks": 4, "window": -1, "dtype": BFLOAT, "kv_dtype": BFLOAT, "kv_scales": NONE,
        "props": h100, **change,
    }  # fmt: skip
    assert (extension.choose_paged_attention_decode(**sizes) is not None) == is_planned
    assert (extension.paged_attention_plan_bytes(config=None, **sizes) > 0) == is_planned


@pytest.mark.parametrize(
    ("head_dim", "batch", "is_planned"),
    [(128, 1, True), (256, 1, False), (64, 25000, True), (64, 26000, False)],
)
def test_what_a_small_shared_memory_holds(extension, head_dim, batch, is_planned) -> None:
    """Neither two tiles of head_dim 256 nor the first units of 26000 requests fit into 99 KiB."""
    small = extension.DeviceProps(
        compute_major=8, compute_minor=6, sm_count=84, shared_memory_per_block=99 * 1024, l2_bytes=6 << 20
    )
    sizes = (batch, 1, 8, 8, head_dim, 16, 64, -1, HALF, HALF, NONE, small)
    config = extension.choose_paged_attention_decode(*sizes)
    assert (config is not None) == is_planned
    assert (extension.paged_attention_plan_bytes(None, *sizes) > 0) == is_planned
    if config is None:
        split = extension.choose_paged_attention_split(*sizes)
        partial = batch * 8 * split.num_parts
        expected = 0 if split.num_parts == 1 else 4 * (-(-partial // 4) * 4 + partial * head_dim)
        assert extension.paged_attention_decode_scratch_bytes(None, *sizes) == expected


# ---- refused arguments

ADDRESS = 4096
SIZES = {
    "batch": 2, "q_len": 1, "num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64, "block_size": 16,
    "window": -1, "dtype": HALF, "kv_dtype": HALF, "kv_scales": NONE, "device": 0, "stream": 0,
}  # fmt: skip
CALLS = {
    "plan_paged_attention": {
        **SIZES,
        **dict.fromkeys(("seq_lens", "block_table", "plan"), ADDRESS),
        **{"plan_bytes": 2**30, "prefixes": 0, "prefixes_bytes": 0, "max_blocks": 4, "block_table_stride": 4},
    },
    "paged_attention_decode": {
        **SIZES,
        **dict.fromkeys(("q", "k_cache", "v_cache", "block_table", "seq_lens"), ADDRESS),
        **dict.fromkeys(("out", "lse", "plan", "scratch"), ADDRESS),
        **{
            "k_scale": 0,
            "v_scale": 0,
            "sinks": 0,
            "plan_bytes": 2**30,
            "prefixes": 0,
            "prefixes_bytes": 0,
            "scratch_bytes": 2**30,
            "num_blocks": 8,
            "max_blocks": 4,
        },
        **{"q_stride": 256, "block_table_stride": 4, "softmax_scale": 0.125, "softcap": 0.0},
        "follows_write": False,
    },
}
"""Arguments that pass every check. The addresses are never followed: what is wrong is refused before."""
CONFIG = {"warps": 4, "stages": 3, "blocks_per_sm": 1, "parts": 5, "min_part_units": 1}


@pytest.mark.damaged
@pytest.mark.parametrize("operator", CALLS)
@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ({"warps": 5}, {}, "config.warps is 5; expected one of 4 8"),
        ({}, {"num_q_heads": 32, "q_len": 8}, "config.warps * 16 is 64; expected at least 128"),
        ({"stages": 1}, {}, "config.stages is 1; expected at least 2"),
        ({"stages": 5}, {}, "config.stages is 5; expected at most 4"),
        ({"parts": 0}, {}, "config.parts is 0; expected at least 1"),
        ({"parts": 8193}, {}, "config.parts is 8193; expected at most 8192"),
        ({"min_part_units": 0}, {}, "config.min_part_units is 0; expected at least 1"),
        (
            {"min_part_units": 2**30 + 1},
            {},
            "config.min_part_units is 1073741825; expected at most 1073741824",
        ),
        ({"whole_slack": -2}, {}, "config.whole_slack is -2; expected at least -1"),
        (
            {"whole_slack": 2**30 + 1},
            {},
            "config.whole_slack is 1073741825; expected at most 1073741824",
        ),
        ({}, {"head_dim": 80}, "config is given; expected sizes that the planned kernel takes"),
        ({}, {"plan_bytes": 223}, "plan_bytes is 223; expected at least 224"),
        ({}, {"plan": 0}, "plan is null"),
        ({"prefix_parts": -1}, {}, "config.prefix_parts is -1; expected at least 0"),
        ({"prefix_parts": 8193}, {}, "config.prefix_parts is 8193; expected at most 8192"),
        ({"prefix_parts": 1}, {"window": 5}, "config.prefix_parts is 1; expected at most 0"),
        ({"prefix_parts": 1}, {"batch": 4097}, "config.prefix_parts is 1; expected at most 0"),
        ({"min_prefix_tiles": 0}, {}, "config.min_prefix_tiles is 0; expected at least 1"),
        ({"min_saved_tiles": -1}, {}, "config.min_saved_tiles is -1; expected at least 0"),
        ({}, {"prefixes": ADDRESS}, "prefixes is given; expected none for sizes that share none"),
        (
            {"prefix_parts": 3},
            {"prefixes": ADDRESS, "prefixes_bytes": 191},
            "prefixes_bytes is 191; expected at least 192",
        ),
        (
            {"prefix_parts": 3},
            {"prefixes": ADDRESS + 8, "prefixes_bytes": 192},
            "prefixes is misaligned; expected an address divisible by 16",
        ),
        (
            {"prefix_parts": 3},
            {"prefixes": ADDRESS, "prefixes_bytes": 192, "block_table": 0},
            "block_table is null",
        ),
    ],
)
def test_refused_configurations(extension, operator, config, change, message) -> None:
    told = extension.PagedAttentionDecodeConfig(**{**CONFIG, **config}, overlaps_producer=False)
    with pytest.raises(KernelLaunchError) as caught:
        getattr(extension, operator)(**{**CALLS[operator], **change, "config": told})
    assert caught.value.operator == operator and message in caught.value.error


@pytest.mark.damaged
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": ADDRESS + 2}, "q is misaligned; expected an address divisible by 4"),
        ({"q_stride": 257}, "q_stride is 257; expected a multiple of 2"),
        ({"out": ADDRESS + 4}, "out is misaligned; expected an address divisible by 8"),
        ({"scratch_bytes": 5199}, "scratch_bytes is 5199; expected at least 5200"),
        ({"scratch": 0}, "scratch is null"),
        (
            {"kv_dtype": INT8, "kv_scales": TOKEN, "q_len": 5, "num_q_heads": 8},
            "config.warps is 4; expected one of 8",
        ),
        ({"kv_dtype": INT4, "kv_scales": TOKEN, "k_scale": 0}, "k_scale is null"),
        ({"kv_dtype": INT4, "kv_scales": TOKEN, "v_scale": 0}, "v_scale is null"),
        (
            {"kv_dtype": INT4, "kv_scales": TOKEN, "v_scale": ADDRESS + 4},
            "v_scale is misaligned; expected an address divisible by 16",
        ),
    ],
)
def test_refused_by_the_planned_kernel(extension, change, message) -> None:
    told = extension.PagedAttentionDecodeConfig(**CONFIG, overlaps_producer=False)
    scales = {"k_scale": ADDRESS, "v_scale": ADDRESS}
    arguments = {**CALLS["paged_attention_decode"], **scales, **change, "config": told}
    with pytest.raises(KernelLaunchError) as caught:
        extension.paged_attention_decode(**arguments)
    assert message in caught.value.error
