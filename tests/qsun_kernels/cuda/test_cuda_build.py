"""The built binding on any machine: its facts, refused arguments, errors without a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qsun_kernels.errors import KernelLaunchError

NO_DRIVER = re.compile(r"cudaError(InsufficientDriver|NoDevice|NotSupported|StubLibrary)")


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


# ---- refused arguments

ADDRESS = 4096


def call(addresses: str, **values: float) -> dict[str, float]:
    """Arguments that pass every check: an address for each of the names, and values."""
    return {**dict.fromkeys(addresses.split(), ADDRESS), **values}


CALLS = {
    "rms_norm": call(
        "x weight out", residual=0, residual_out=0, num_rows=2, hidden_size=64, x_stride=64,
        residual_stride=0, eps=0, prefetch_weight=False,
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
        max_positions=100, q_stride=256, k_stride=128, v_stride=128, splits=0, split_stride=0, eps=1e-6,
        rotate=True, kv_dtype=4, kv_scales=2, settled=False,
    ),
    "wna16_linear": call(
        "x qweight scales out", qzeros=0, g_idx=0, bias=0, residual=0, M=2, N=32, K=64, x_stride=64,
        residual_stride=0, out_stride=32, bits=4, group_size=32,
    ),
    "wna16_panels": call(
        "x panels out", config=None, bias=0, residual=0, norm_weight=0, norm_out=0, squares=0, x_squares=0,
        norm_eps=0.0, x_eps=0.0, scratch=0, scratch_bytes=0, M=2, N=32,
        K=64, column_blocks=1, x_stride=64, residual_stride=0, out_stride=32, bits=4, groups_per_block=1,
        has_zeros=False, gate_up=False, in_layer=False, batch_invariant=False, leaves_sums=False,
        prefetch_weights=True,
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
# wna16_panels with a norm that it leaves, and with one that was left
LEFT = {"norm_weight": ADDRESS, "norm_out": ADDRESS, "squares": ADDRESS, "dtype": 2}
TAKEN = {"x_squares": ADDRESS, "x_eps": 1e-5, "dtype": 2}
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
    ("wna16_panels", {"column_blocks": 2**23 + 1}, "column_blocks is 8388609; expected at most 8388608"),
    ("wna16_panels", {"N": 33, "gate_up": True}, "N is 33; expected a multiple of 2"),
    ("wna16_panels", {"bias": ADDRESS, "gate_up": True}, "bias is given; expected null with gate_up"),
    ("wna16_panels", {"residual": ADDRESS, "gate_up": True}, "residual is given; expected null with gate_up"),
    ("wna16_panels", {"x": 0}, "x is null"),
    *(
        (
            "wna16_panels",
            {"leaves_sums": True, **behind},
            "leaves_sums is yes with gate_up, bias, residual or a norm; "
            "expected no where something follows the sums",
        )
        for behind in ({"gate_up": True}, {"bias": ADDRESS}, {"residual": ADDRESS}, LEFT, TAKEN)
    ),
    ("wna16_panels", {"panels": 0}, "panels is null"),
    ("wna16_panels", {"panels": 4104}, "panels is misaligned; expected an address divisible by 16"),
    ("wna16_panels", {"out": 0}, "out is null"),
    ("wna16_panels", {"norm_weight": ADDRESS}, "norm_out is null; expected null exactly when norm_weight is"),
    (
        "wna16_panels",
        {**LEFT, "norm_weight": 0, "norm_out": 0},
        "squares is given; expected null",
    ),
    (
        "wna16_panels",
        {**LEFT, "dtype": 1},
        "squares is given with dtype float16; expected null",
    ),
    ("wna16_panels", {**LEFT, "M": 17}, "squares is given with M=17; expected null above 16 tokens"),
    (
        "wna16_panels",
        {**LEFT, "batch_invariant": True},
        "expected null with batch_invariant",
    ),
    ("wna16_panels", {**LEFT, "gate_up": True}, "norm_weight is given; expected null with gate_up"),
    ("wna16_panels", {**LEFT, "squares": 4098}, "squares is misaligned; expected an address divisible by 4"),
    ("wna16_panels", {**TAKEN, "dtype": 1}, "x_squares is given with dtype float16; expected null but for"),
    ("wna16_panels", {**TAKEN, "M": 17}, "x_squares is given with M=17; expected null above 16 tokens"),
    (
        "wna16_panels",
        {**TAKEN, "x_squares": 4100},
        "x_squares is misaligned",
    ),
    ("wna16_panels", {**TAKEN, "K": 96}, "K is 96; expected a multiple of 64"),
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
    ("write_kv_cache", {"splits": -1}, "splits is -1; expected at least 0"),
    (
        "write_kv_cache",
        {"splits": 2, "dtype": 0},
        "dtype is float32; expected float16 or bfloat16 where sums are to be added",
    ),
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


def test_every_operator_fails_under_its_own_name_without_a_gpu(extension) -> None:
    """Also where the first thing that fails is the question what device this is."""
    script = """
import json, sys
from qsun_kernels import _C
from qsun_kernels.errors import KernelLaunchError
for operator, arguments in json.loads(sys.argv[1]).items():
    try:
        getattr(_C, operator)(**arguments)
    except KernelLaunchError as error:
        print(error.operator, error.shapes, error.error, sep="|")
"""
    calls = json.dumps({operator: {**values, **ENDING} for operator, values in CALLS.items()})
    done = subprocess.run(
        [sys.executable, "-c", script, calls], capture_output=True, text=True, env=hidden_gpus(), check=False
    )
    assert done.returncode == 0, done.stderr
    for operator, line in zip(CALLS, done.stdout.splitlines(), strict=True):
        name, shapes, error = line.split("|")
        # wna16_linear's own kernel is for float32, which is asked first.
        expected = "float32" if operator == "wna16_linear" else NO_DRIVER
        assert name == operator and "=" in shapes and re.search(expected, error), line


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
