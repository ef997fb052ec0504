"""Where the backend runs, what it refuses, and how it fails."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
from qsun_kernels import BackendUnavailable, KernelLaunchError, QuantSpec, paged_attention_decode
from qsun_kernels.backends import triton as backend
from qsun_kernels.backends.problems import (
    ApplyRopeProblem,
    DequantizeProblem,
    PagedAttentionDecodeProblem,
    Problem,
    RmsNormProblem,
    SampleTokensProblem,
    SiluAndMulProblem,
    Wna16GateUpSiluProblem,
    Wna16LinearRmsNormProblem,
    Wna16Problem,
    WriteKvCacheProblem,
)
from qsun_kernels.backends.triton.wna16_linear import RowsConfig, prepare, wna16_linear
from qsun_kernels.testing import inputs

pytestmark = pytest.mark.triton

BF16 = torch.bfloat16


def problems(device: torch.device, dtype: torch.dtype = BF16) -> list[Problem]:
    weight = (4096, 4096, 4, 128, True, True, dtype, device)
    return [
        Wna16Problem(*weight),
        Wna16GateUpSiluProblem(*weight),
        Wna16LinearRmsNormProblem(*weight),
        DequantizeProblem(*weight),
        PagedAttentionDecodeProblem(32, 8, 128, 16, None, dtype, dtype, device),
        WriteKvCacheProblem(8, 128, 16, dtype, dtype, device),
        RmsNormProblem(4096, True, dtype, device),
        ApplyRopeProblem(32, 8, 128, dtype, device),
        SiluAndMulProblem(14336, dtype, device),
        SampleTokensProblem(128256, dtype, device),
    ]


def run_python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints; a variable given as "" is unset."""
    merged = {**os.environ, **environment}
    clean = {name: value for name, value in merged.items() if value or name == "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_it_runs_every_operator_here(device: torch.device) -> None:
    assert backend.unavailable() is None
    for problem in problems(device):
        implementation = backend.IMPLEMENTATIONS[problem.operator]
        assert implementation.supports(problem) is None
        line = implementation.describe(problem)
        assert (
            line.startswith(("wna16_rows_kernel", "wna16_linear_kernel", f"{problem.operator}_kernel"))
            and "\n" not in line
        )
    assert set(backend.IMPLEMENTATIONS) == {problem.operator for problem in problems(device)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_it_refuses_other_dtypes_by_name(device: torch.device, dtype: torch.dtype) -> None:
    for problem in problems(device, dtype):
        reason = backend.IMPLEMENTATIONS[problem.operator].supports(problem)
        assert reason is not None and f"dtype is {dtype}" in reason and "torch.bfloat16" in reason


def test_it_takes_caches_of_codes_and_refuses_others_by_name(device: torch.device) -> None:
    attention = PagedAttentionDecodeProblem(32, 8, 128, 16, None, BF16, torch.float8_e4m3fn, device, "tensor")
    write = WriteKvCacheProblem(8, 128, 16, BF16, torch.uint8, device, "token", 32, True, True, True)
    run = backend.IMPLEMENTATIONS
    assert run["paged_attention_decode"].supports(attention) is None
    assert run["write_kv_cache"].supports(write) is None
    assert (
        run["write_kv_cache"]
        .describe(write)
        .startswith("write_kv_cache_steps_kernel: norm, rope, rotation, quantisation and append")
    )
    for problem, says in (
        (replace(attention, kv_dtype=torch.int16), "kv_dtype is torch.int16"),
        (replace(attention, kv_scales="none"), "kv_scales is none, expected token or tensor"),
        (replace(write, kv_dtype=torch.float16), "kv_scales is token, expected none"),
        (replace(write, head_dim=66), "head_dim is 66, expected a multiple of 4"),
    ):
        reason = run[problem.operator].supports(problem)
        assert reason is not None and says in reason


def test_it_refuses_other_devices() -> None:
    for problem in problems(torch.device("meta")):
        reason = backend.IMPLEMENTATIONS[problem.operator].supports(problem)
        assert reason is not None and "device is meta" in reason and "CUDA" in reason


@pytest.mark.gpu
def test_compiled_kernels_refuse_the_cpu() -> None:
    reason = backend.IMPLEMENTATIONS["rms_norm"].supports(
        RmsNormProblem(64, False, BF16, torch.device("cpu"))
    )
    assert reason is not None and "device is cpu" in reason and "TRITON_INTERPRET=1" in reason


@pytest.mark.damaged
def test_a_head_that_is_too_wide_is_refused_with_both_values(device: torch.device) -> None:
    q = torch.zeros(1, 1, 320, device=device)
    cache = torch.zeros(1, 1, 16, 320, device=device)
    table, lengths = (torch.zeros(*shape, dtype=torch.int32, device=device) for shape in ((1, 1), (1,)))
    with pytest.raises(BackendUnavailable, match="head_dim is 320, expected at most 256"):
        paged_attention_decode(q, cache, cache, table, lengths, softmax_scale=1.0, backend="triton")


@pytest.mark.damaged
def test_a_failed_launch_names_operator_and_shapes(device: torch.device) -> None:
    packed = inputs.packed_weight(inputs.generator(0), 8, 64, QuantSpec(4, 32, True), device=device)
    x = torch.zeros(3, 64, device=device)
    config = RowsConfig(block_m=24, block_n=32, block_k=32, splits=1, num_warps=4, num_stages=1)
    with pytest.raises(KernelLaunchError, match=r"wna16_linear .* M=3 N=8 K=64 W4 g32 symmetric.*Triton 3"):
        wna16_linear(x, prepare(packed, torch.float32), config=config)


def test_without_gpu_and_interpreter_it_says_what_to_set() -> None:
    said = run_python(
        "from qsun_kernels.backends import triton; print(triton.unavailable())",
        TRITON_INTERPRET="",
        CUDA_VISIBLE_DEVICES="",
    )
    assert "no CUDA device" in said and "TRITON_INTERPRET=1" in said


def test_without_triton_it_imports_and_says_so() -> None:
    said = run_python(
        "import sys; sys.modules['triton'] = None\n"
        "from qsun_kernels.backends import triton\n"
        "print(dict(triton.IMPLEMENTATIONS), triton.unavailable())"
    )
    assert said.startswith("{} triton cannot be imported: ")


def test_an_interpreter_switched_on_too_late_is_refused() -> None:
    said = run_python(
        "import os, triton.language; os.environ['TRITON_INTERPRET'] = '1'\n"
        "from qsun_kernels.backends import triton\n"
        "print(triton.unavailable())",
        TRITON_INTERPRET="",
    )
    assert "changed after triton was imported" in said
