"""The built binding on any machine: its facts, choices, refused arguments, errors without a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qsun_kernels.errors import KernelLaunchError

H100 = {
    "compute_major": 9,
    "compute_minor": 0,
    "sm_count": 132,
    "shared_memory_per_block": 232_448,
    "l2_bytes": 52_428_800,
}
NO_DRIVER = re.compile(r"cudaError(InsufficientDriver|NoDevice|NotSupported|StubLibrary)")


@pytest.fixture
def h100(extension):
    return extension.DeviceProps(**H100)


@pytest.fixture
def a100(extension):
    """No clusters, and less shared memory."""
    return extension.DeviceProps(
        **{**H100, "compute_major": 8, "sm_count": 108, "shared_memory_per_block": 166_912}
    )


def test_build_info_is_complete(extension) -> None:
    info = extension.build_info()
    assert set(info) == {"archs", "nvcc", "host_compiler", "revision", "cuda_runtime"}
    assert info["archs"] and all(re.fullmatch(r"\d+[af]?", arch) for arch in info["archs"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", info["nvcc"])
    assert info["cuda_runtime"] >= 12000
    assert info["host_compiler"] and info["revision"]


def test_the_libraries_need_only_each_other_and_the_system(extension) -> None:
    """No CUDA runtime, no torch, no libpython to find at run time, and no path of the build machine."""
    package = Path(extension.__file__).parent
    allowed = (
        "libqsun",
        "libstdc++",
        "libgcc_s",
        "libc.",
        "libm.",
        "libdl",
        "libpthread",
        "librt",
        "ld-linux",
    )
    for library in (Path(extension.__file__), package / "libqsun.so"):
        try:
            listed = subprocess.run(
                ["readelf", "-d", library], capture_output=True, text=True, check=True
            ).stdout
        except FileNotFoundError:
            pytest.skip("needs readelf")
        for name in re.findall(r"\(NEEDED\).*\[(.+)\]", listed):
            assert name.startswith(allowed), f"{library.name} needs {name}"
        assert re.findall(r"\((?:RUNPATH|RPATH)\).*\[(.+)\]", listed) == ["$ORIGIN"]


def test_importing_touches_no_gpu(extension) -> None:
    """A process that hides every GPU imports the binding and asks it for its build."""
    script = "from qsun_kernels import _C; print(_C.build_info()['archs'], _C.driver_version() >= 0)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=hidden_gpus(), check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("True")


def hidden_gpus() -> dict[str, str]:
    return {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


def test_errors_without_a_gpu_are_clean(extension) -> None:
    """Questions and launches fail with the runtime's own words, and the process goes on."""
    script = """
from qsun_kernels import _C
from qsun_kernels.errors import KernelLaunchError
for ask in (lambda: _C.device_info(0), lambda: _C.silu_and_mul(16, 16, 2, 64, 128, 1, 0, 0),
            lambda: _C.wna16_linear(16, 16, 16, 0, 0, 0, 0, 16, 1, 32, 32, 32, 0, 32, 4, 32, 0, 0, 0)):
    try:
        ask()
    except (RuntimeError, KernelLaunchError) as error:
        print(type(error).__name__, error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=hidden_gpus(), check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["RuntimeError", "KernelLaunchError", "KernelLaunchError"]
    assert all(NO_DRIVER.search(line) for line in lines), done.stdout
    assert "num_rows=2 size=64" in lines[1] and "M=1 N=32 K=32 bits=4" in lines[2]


# ---- which kernel, which grid


@pytest.mark.parametrize(
    ("M", "N", "tile_m", "warps", "grid_n", "grid_m"),
    [
        (1, 4096, 1, 8, 256, 1),
        (2, 4096, 2, 8, 256, 1),
        (3, 4096, 4, 8, 256, 1),
        (8, 28672, 8, 8, 1792, 1),
        (9, 4096, 8, 8, 256, 2),
        (1, 576, 1, 2, 144, 1),  # few rows: smaller blocks, more of them
        (1, 1, 1, 2, 1, 1),
        (64, 576, 8, 8, 36, 8),
        (10**7, 2, 8, 8, 1, 65535),  # a grid's second dimension ends there, the kernel takes more turns
    ],
)
def test_choose_wna16_linear(extension, h100, M, N, tile_m, warps, grid_n, grid_m) -> None:
    config = extension.choose_wna16_linear(M, N, h100)
    got = (config.tile_m, config.warps, config.grid_n, config.grid_m)
    assert got == (tile_m, warps, grid_n, grid_m), repr(config)
    assert repr(config) == (
        f"Wna16LinearConfig(tile_m={tile_m} warps={warps} grid_n={grid_n} grid_m={grid_m})"
    )


@pytest.mark.parametrize("N", (1, 15, 16, 17, 576, 4095, 2**31 - 1))
def test_every_weight_row_has_a_warp(extension, h100, N) -> None:
    for M in (1, 2, 4, 8, 100):
        config = extension.choose_wna16_linear(M, N, h100)
        assert config.grid_n * config.warps * 2 >= N > (config.grid_n - 1) * config.warps * 2
        assert config.tile_m * config.grid_m >= M


def test_choose_rms_norm(extension, h100, a100) -> None:
    half = 1
    choose = extension.choose_rms_norm
    expected = "RmsNormConfig(width=8 threads=256 overlaps_producer=1)"
    assert repr(choose(4096, 4096, 4096, half, h100)) == expected
    assert choose(4096, 576, 576, half, h100).threads == 64
    assert choose(4096, 10**6, 10**6, half, h100).threads == 1024
    for unaligned in ((4098, 4096, 4096), (4096, 4095, 4096), (4096, 4096, 4097)):
        assert choose(*unaligned, half, h100).width == 1
    assert not choose(4096, 4096, 4096, half, a100).overlaps_producer


def test_choose_write_kv_cache(extension, h100) -> None:
    half, int8 = 1, 4
    choose = extension.choose_write_kv_cache
    copy = choose(4096, 128, 0, 128, False, half, half, h100)
    assert repr(copy) == "WriteKvCacheConfig(copies=1 is_wide=1 lanes=0 overlaps_producer=1)"
    assert not choose(4096, 128, 0, 127, False, half, half, h100).is_wide
    for arguments in ((4, 128, True, half), (0, 128, True, half), (0, 128, False, int8)):
        config = choose(4096, 128, *arguments, half, h100)
        assert (config.copies, config.is_wide, config.lanes) == (False, True, 8)
    for dtype, lanes in (
        (half, {16: 1, 64: 4, 80: 8, 96: 8, 128: 8, 256: 16, 512: 32}),
        (0, {8: 1, 256: 32}),
    ):
        for head_dim, expected in lanes.items():
            assert choose(4096, 512, 4, head_dim, True, int8, dtype, h100).lanes == expected
    # A vector of each half: 16 elements of 16 bits; an address, a stride that 16 bytes do not divide
    for k, k_stride, head_dim in ((4096, 512, 24), (4098, 512, 128), (4096, 129, 128)):
        assert not choose(k, k_stride, 4, head_dim, True, int8, half, h100).is_wide
    ampere = extension.DeviceProps(**{**H100, "compute_major": 8})
    assert not choose(4096, 128, 4, 128, True, half, half, ampere).overlaps_producer


@pytest.mark.parametrize(
    ("vocabulary", "dtype", "blocks", "staged"),
    [(1, 0, 1, True), (2048, 0, 1, True), (2049, 0, 2, True), (49152, 1, 8, True), (128256, 0, 8, True),
     (151936, 2, 8, True), (400_000, 0, 8, True), (600_000, 0, 8, False), (2**22, 2, 8, False)],
)  # fmt: skip
def test_choose_sample_tokens(extension, h100, vocabulary, dtype, blocks, staged) -> None:
    config = extension.choose_sample_tokens(vocabulary, dtype, h100)
    assert (config.blocks, config.staged, config.overlaps_producer) == (blocks, staged, True)
    assert config.shared_bytes <= h100.shared_memory_per_block
    if staged:  # the share of the row, wherever it begins, beside what the search needs
        assert config.shared_bytes > vocabulary * 4 / blocks


def test_choose_sample_tokens_without_clusters(extension, a100) -> None:
    config = extension.choose_sample_tokens(128256, 0, a100)
    assert (config.blocks, config.staged, config.overlaps_producer) == (1, False, False)
    assert extension.choose_sample_tokens(32000, 0, a100).staged


# ---- refused arguments

ADDRESS = 4096


def call(addresses: str, **values: float) -> dict[str, float]:
    """Arguments that pass every check: an address for each of the names, and values."""
    return {**dict.fromkeys(addresses.split(), ADDRESS), **values}


CALLS = {
    "rms_norm": call(
        "x weight out", residual=0, residual_out=0, num_rows=2, hidden_size=64, x_stride=64,
        residual_stride=0, eps=0,
    ),
    "silu_and_mul": call("x out", num_rows=2, size=64, x_stride=128),
    "sample_tokens": call(
        "logits temperature top_k top_p min_p keys tokens valid", num_rows=2, vocab_size=64, logits_stride=64
    ),
    "apply_rope": call(
        "q k positions cos_sin q_out k_out", num_tokens=2, num_q_heads=4, num_kv_heads=2, head_dim=64,
        q_stride=256, k_stride=128, max_positions=100,
    ),
    "write_kv_cache": call(
        "k v q q_out k_cache v_cache k_scale v_scale slot_mapping positions cos_sin q_norm k_norm",
        num_tokens=2, num_q_heads=4, num_kv_heads=2, head_dim=64, num_blocks=3, block_size=16,
        max_positions=100, q_stride=256, k_stride=128, v_stride=128, eps=1e-6, rotate=True, kv_dtype=4,
        kv_scales=2,
    ),
    "wna16_linear": call(
        "x qweight scales out", qzeros=0, g_idx=0, bias=0, residual=0, M=2, N=32, K=64, x_stride=64,
        residual_stride=0, out_stride=32, bits=4, group_size=32,
    ),
    "wna16_panels": call(
        "x panels out", config=None, bias=0, residual=0, norm_weight=0, norm_out=0, norm_eps=0.0, scratch=0,
        scratch_bytes=0, M=2, N=32,
        K=64, column_blocks=1, x_stride=64, residual_stride=0, out_stride=32, bits=4, groups_per_block=1,
        has_zeros=False, gate_up=False, batch_invariant=False, prefetch_weights=True,
    ),
    "gather_columns": call("x perm out", M=2, K=64, columns=128, x_stride=64, prefetch_perm=True),
    "dequantize": call(
        "qweight scales out", qzeros=0, g_idx=0, N=32, K=64, bits=4, group_size=32, scale_dtype=1
    ),
    "paged_attention_decode": call(
        "q k_cache v_cache block_table seq_lens out lse plan scratch", config=None, k_scale=0, v_scale=0,
        sinks=0, plan_bytes=2**30, prefixes=0, prefixes_bytes=0, scratch_bytes=2**30,
        batch=2, q_len=1, num_q_heads=4, num_kv_heads=2, head_dim=64,
        num_blocks=8, block_size=16, max_blocks=4, q_stride=256, block_table_stride=4, window=-1,
        softmax_scale=0.125, softcap=0.0, follows_write=False, kv_dtype=1, kv_scales=0,
    ),
    "plan_paged_attention": call(
        "seq_lens plan", config=None, block_table=0, plan_bytes=2**30, prefixes=0, prefixes_bytes=0, batch=2,
        q_len=1, num_q_heads=4, num_kv_heads=2, head_dim=64, block_size=16, max_blocks=0,
        block_table_stride=0, window=-1, kv_dtype=1, kv_scales=0,
    ),
}  # fmt: skip
ENDING = {"dtype": 1, "device": 0, "stream": 0}
REFUSED = [
    *(
        (op, {"dtype": 9}, "dtype is 9; expected 0 (float32), 1 (float16), 2 (bfloat16)")
        for op in CALLS
        if op != "wna16_panels"
    ),
    ("wna16_panels", {"dtype": 0}, "dtype is 0; expected 1 (float16), 2 (bfloat16)"),
    ("wna16_panels", {"bits": 5}, "bits is 5; expected one of 2 3 4 8"),
    ("wna16_panels", {"groups_per_block": 3}, "groups_per_block is 3; expected one of 1 2 4"),
    ("wna16_panels", {"M": -1}, "M is -1; expected at least 0"),
    ("wna16_panels", {"N": 0}, "N is 0; expected at least 1"),
    ("wna16_panels", {"K": 200}, "column_blocks * 128 is 128; expected at least 200"),
    ("wna16_panels", {"N": 33, "gate_up": True}, "N is 33; expected a multiple of 2"),
    ("wna16_panels", {"bias": ADDRESS, "gate_up": True}, "bias is given; expected null with gate_up"),
    ("wna16_panels", {"residual": ADDRESS, "gate_up": True}, "residual is given; expected null with gate_up"),
    ("wna16_panels", {"x": 0}, "x is null"),
    ("wna16_panels", {"panels": 0}, "panels is null"),
    ("wna16_panels", {"panels": 4104}, "panels is misaligned; expected an address divisible by 16"),
    ("wna16_panels", {"out": 0}, "out is null"),
    ("rms_norm", {"x": 0}, "x is null; expected a device pointer"),
    ("rms_norm", {"weight": 0}, "weight is null"),
    ("rms_norm", {"out": 0}, "out is null"),
    ("rms_norm", {"num_rows": -1}, "num_rows is -1; expected at least 0"),
    ("rms_norm", {"num_rows": 2**31}, "num_rows is 2147483648; expected at most 2147483647"),
    ("rms_norm", {"hidden_size": 0}, "hidden_size is 0; expected at least 1"),
    ("rms_norm", {"residual": ADDRESS}, "residual_out is null; expected null exactly when residual is null"),
    ("rms_norm", {"residual_out": ADDRESS}, "residual_out is given; expected null exactly when"),
    ("silu_and_mul", {"x": 0}, "x is null"),
    ("silu_and_mul", {"num_rows": -5}, "num_rows is -5; expected at least 0"),
    ("silu_and_mul", {"size": 0}, "size is 0; expected at least 1"),
    ("sample_tokens", {"logits": 0}, "logits is null"),
    ("sample_tokens", {"keys": 0}, "keys is null"),
    ("sample_tokens", {"valid": 0}, "valid is null"),
    ("sample_tokens", {"num_rows": -1}, "num_rows is -1; expected at least 0"),
    ("sample_tokens", {"num_rows": 2**28}, "num_rows is 268435456; expected at most 268435455"),
    ("sample_tokens", {"vocab_size": 0}, "vocab_size is 0; expected at least 1"),
    ("sample_tokens", {"vocab_size": 2**22 + 1}, "vocab_size is 4194305; expected at most 4194304"),
    ("apply_rope", {"positions": 0}, "positions is null"),
    ("apply_rope", {"head_dim": 63}, "head_dim is 63; expected a multiple of 2"),
    ("apply_rope", {"num_tokens": -1}, "num_tokens is -1; expected at least 0"),
    ("apply_rope", {"max_positions": 0}, "max_positions is 0; expected at least 1"),
    ("apply_rope", {"num_kv_heads": 0}, "num_kv_heads is 0; expected at least 1"),
    ("write_kv_cache", {"slot_mapping": 0}, "slot_mapping is null"),
    ("write_kv_cache", {"block_size": 0}, "block_size is 0; expected at least 1"),
    ("write_kv_cache", {"num_blocks": -1}, "num_blocks is -1; expected at least 0"),
    ("write_kv_cache", {"v_cache": 0}, "v_cache is null"),
    ("write_kv_cache", {"v_scale": 0}, "v_scale is null"),
    ("write_kv_cache", {"q_out": 0}, "q_out is null"),
    ("write_kv_cache", {"positions": 0}, "positions is null"),
    ("write_kv_cache", {"q_norm": 0}, "q_norm is null; expected given where k_norm is"),
    ("write_kv_cache", {"k_norm": 0}, "q_norm is given; expected null where k_norm is null"),
    ("write_kv_cache", {"max_positions": 0}, "max_positions is 0; expected at least 1"),
    (
        "write_kv_cache",
        {"head_dim": 96},
        "head_dim is 96; expected a power of two, at least 16 (8 in float32)",
    ),
    ("write_kv_cache", {"head_dim": 1024}, "head_dim is 1024; expected at most 512"),
    ("write_kv_cache", {"head_dim": 63, "rotate": False}, "head_dim is 63; expected a multiple of 2"),
    ("write_kv_cache", {"kv_dtype": 9}, "kv_dtype is 9; expected 0 to 5"),
    ("write_kv_cache", {"kv_dtype": 1}, "kv_scales is token; expected none for a cache of values"),
    ("write_kv_cache", {"kv_scales": 1}, "kv_scales is tensor; expected token"),
    ("write_kv_cache", {"kv_dtype": 3, "kv_scales": 0}, "kv_scales is none; expected token or tensor"),
    (
        "write_kv_cache",
        {"kv_dtype": 5, "head_dim": 6, "rotate": False},
        "head_dim is 6; expected a multiple of 4",
    ),
    ("wna16_linear", {"bits": 5}, "bits is 5; expected one of 2 3 4 8"),
    ("wna16_linear", {"group_size": 48}, "group_size is 48; expected one of 32 64 128 -1"),
    ("wna16_linear", {"M": -1}, "M is -1; expected at least 0"),
    ("wna16_linear", {"N": 0}, "N is 0; expected at least 1"),
    ("wna16_linear", {"K": 0}, "K is 0; expected at least 1"),
    ("wna16_linear", {"qweight": 0}, "qweight is null"),
    ("wna16_linear", {"qweight": 4098}, "qweight is misaligned; expected an address divisible by 4"),
    ("wna16_linear", {"scales": 0}, "scales is null"),
    ("wna16_linear", {"out": 0}, "out is null"),
    ("wna16_linear", {"dtype": 1}, "dtype is float16; expected float32; 16-bit activations take panels"),
    ("dequantize", {"bits": 0}, "bits is 0; expected one of 2 3 4 8"),
    ("dequantize", {"group_size": 0}, "group_size is 0; expected one of"),
    ("dequantize", {"scale_dtype": -1}, "dtype is -1; expected"),
    ("dequantize", {"N": -3}, "N is -3; expected at least 0"),
    ("paged_attention_decode", {"head_dim": 100}, "head_dim is 100; expected a multiple of 8"),
    ("paged_attention_decode", {"head_dim": 264}, "head_dim is 264; expected at most 256"),
    ("paged_attention_decode", {"num_q_heads": 5}, "num_q_heads is 5; expected a multiple of 2"),
    ("paged_attention_decode", {"num_kv_heads": 0}, "num_kv_heads is 0; expected at least 1"),
    ("paged_attention_decode", {"block_size": 24}, "block_size is 24; expected a power of two"),
    ("paged_attention_decode", {"block_size": 4}, "block_size is 4; expected at least 8"),
    (
        "paged_attention_decode",
        {"max_blocks": 2**27},
        "max_blocks * block_size is 2147483648; expected at most",
    ),
    ("paged_attention_decode", {"window": -2}, "window is -2; expected at least -1"),
    (
        "paged_attention_decode",
        {"k_cache": 4104},
        "k_cache is misaligned; expected an address divisible by 16",
    ),
    ("paged_attention_decode", {"seq_lens": 0}, "seq_lens is null"),
    ("paged_attention_decode", {"lse": 0}, "lse is null"),
    ("paged_attention_decode", {"batch": -1}, "batch is -1; expected at least 0"),
    ("paged_attention_decode", {"q_len": 0}, "q_len is 0; expected at least 1"),
    ("paged_attention_decode", {"q_len": 9}, "q_len is 9; expected at most 8"),
    ("paged_attention_decode", {"softcap": -1.0}, "softcap is -1.000000; expected above 0, or 0 for none"),
    ("paged_attention_decode", {"plan": 4104}, "plan is misaligned; expected an address divisible by 16"),
    (
        "paged_attention_decode",
        {"dtype": 2, "kv_dtype": 1},
        "kv_dtype is float16; expected bfloat16 as q, or codes",
    ),
    (
        "paged_attention_decode",
        {"kv_dtype": 4, "kv_scales": 2, "k_scale": 4104, "v_scale": 4096},
        "k_scale is misaligned; expected an address divisible by 16",
    ),
    ("plan_paged_attention", {"seq_lens": 0}, "seq_lens is null"),
    ("plan_paged_attention", {"batch": -1}, "batch is -1; expected at least 0"),
    ("plan_paged_attention", {"q_len": 9}, "q_len is 9; expected at most 8"),
]


@pytest.mark.damaged
@pytest.mark.parametrize(("operator", "change", "message"), REFUSED)
def test_refused_arguments(extension, operator, change, message) -> None:
    """Refused before anything is launched, so these addresses are never followed."""
    arguments = {**CALLS[operator], **ENDING, **change}
    with pytest.raises(KernelLaunchError) as caught:
        getattr(extension, operator)(**arguments)
    assert caught.value.operator == operator
    assert message in caught.value.error
    assert caught.value.shapes and "=" in caught.value.shapes
    assert (
        str(caught.value) == f"{operator} failed to launch with {caught.value.shapes}: {caught.value.error}"
    )


@pytest.mark.slow
@pytest.mark.damaged
@pytest.mark.parametrize("scratch", ({"scratch_bytes": 0}, {"scratch": 0}))
def test_too_little_scratch(emulated_extension, scratch) -> None:
    """Needs a device to know how much; the emulator's is enough."""
    sizes = {"batch": 1, "max_blocks": 4096, "dtype": 0, "kv_dtype": 0, **scratch}
    arguments = {**CALLS["paged_attention_decode"], **ENDING, **sizes}
    with pytest.raises(KernelLaunchError, match=r"scratch(_bytes)? is (0|null); expected"):
        emulated_extension.paged_attention_decode(**arguments)


@pytest.mark.parametrize(
    ("operator", "empty"),
    [
        ("rms_norm", {"num_rows": 0, "x": 0, "out": 0}),
        ("silu_and_mul", {"num_rows": 0, "x": 0, "out": 0}),
        ("sample_tokens", {"num_rows": 0, "logits": 0, "tokens": 0, "valid": 0}),
        ("apply_rope", {"num_tokens": 0, "q": 0, "k": 0, "positions": 0, "q_out": 0, "k_out": 0}),
        ("write_kv_cache", {"num_tokens": 0, "k": 0, "v": 0, "slot_mapping": 0}),
        ("wna16_linear", {"M": 0, "x": 0, "out": 0, "dtype": 0}),
        ("wna16_panels", {"M": 0, "x": 0, "panels": 0, "out": 0}),
        ("dequantize", {"N": 0, "qweight": 0, "scales": 0, "out": 0}),
        ("plan_paged_attention", {"batch": 0, "seq_lens": 0, "plan": 0}),
        ("paged_attention_decode", {"batch": 0, "q": 0, "out": 0, "lse": 0, "seq_lens": 0, "block_table": 0}),
    ],
)
def test_an_empty_problem_launches_nothing(extension, operator, empty) -> None:
    """Not even a driver is needed."""
    getattr(extension, operator)(**{**CALLS[operator], **ENDING, **empty})


def test_dtype_codes_are_those_of_the_launchers(extension) -> None:
    from qsun_kernels.backends.cuda import library

    for dtype, code in library.DTYPE_CODES.items():
        with pytest.raises(KernelLaunchError) as caught:
            extension.rms_norm(**{**CALLS["rms_norm"], **ENDING, "dtype": code, "hidden_size": 0})
        assert f"dtype={str(dtype).removeprefix('torch.')}" in caught.value.shapes
    assert set(library.DTYPE_CODES) == {torch.float32, torch.float16, torch.bfloat16}
