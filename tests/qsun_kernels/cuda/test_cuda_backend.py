"""backends/cuda/ on any machine: why it cannot run, what it supports, what it would run."""

from __future__ import annotations

import json

import pytest
import torch

from qsun_kernels.backends import cuda
from qsun_kernels.backends.cuda import library
from qsun_kernels.backends.problems import (
    BACKENDS,
    ApplyRopeProblem,
    DequantizeProblem,
    PagedAttentionDecodeProblem,
    RmsNormProblem,
    SampleTokensProblem,
    SiluAndMulProblem,
    Wna16GateUpSiluProblem,
    Wna16LinearRmsNormProblem,
    Wna16Problem,
    WriteKvCacheProblem,
)

GPU = torch.device("cuda", 0)
HALF = torch.float16


@pytest.mark.parametrize(
    ("archs", "capability", "expected"),
    [
        (("80",), (8, 0), True),
        (("80",), (8, 6), True),  # machine code runs on later minor versions
        (("80",), (8, 9), True),
        (("86",), (8, 0), False),
        (("80",), (9, 0), False),  # and on no other major version
        (("90a",), (9, 0), True),
        (("90",), (9, 0), True),
        (("100a",), (10, 3), False),  # architecture-specific code runs on its own architecture alone
        (("100f",), (10, 3), True),
        (("100",), (12, 0), False),
        (("80", "90a"), (9, 0), True),
        (("80", "90a"), (10, 0), False),
        ((), (8, 0), False),
        (("emulator",), (8, 0), False),
    ],
)
def test_covers(archs, capability, expected) -> None:
    assert cuda.covers(archs, capability) is expected


def pretend(monkeypatch, *, capability=(9, 0), archs=("80", "90a"), devices=1) -> None:
    """A machine with GPUs of `capability` and a library built for `archs`."""

    real = getattr(library, "binding", None)

    class Binding:
        def build_info(self):
            return {"archs": archs}

        def __getattr__(self, name):
            return getattr(real, name)

    def h100(index):
        return real.DeviceProps(
            compute_major=9,
            compute_minor=0,
            sm_count=132,
            shared_memory_per_block=232448,
            l2_bytes=50 << 20,
        )

    monkeypatch.setattr(library, "device_props", h100)
    capabilities = capability if isinstance(capability, list) else [capability] * devices
    monkeypatch.setattr(library, "_import_error", None)
    monkeypatch.setattr(library, "binding", Binding(), raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: capabilities[torch.device("cuda", device).index]
        if isinstance(device, int)
        else capabilities[device.index or 0]
    )  # fmt: skip


def test_unavailable_without_the_library(monkeypatch, tmp_path) -> None:
    record = tmp_path / "_build_info.json"
    monkeypatch.setattr(library, "_BUILD_RECORD", record)
    missing = ModuleNotFoundError("No module named 'qsun_kernels._C'", name="qsun_kernels._C")
    monkeypatch.setattr(library, "_import_error", missing)
    assert "no build record" in cuda.unavailable()
    record.write_text(json.dumps({"build": False, "reason": "built with QSUN_CUDA=off"}))
    assert cuda.unavailable() == "the CUDA library is not built (built with QSUN_CUDA=off)"
    record.write_text(json.dumps({"build": True, "reason": "QSUN_CUDA=auto"}))
    assert "not for Python" in cuda.unavailable()
    monkeypatch.setattr(library, "_import_error", ImportError("libqsun.so: cannot open shared object file"))
    assert cuda.unavailable() == (
        "the CUDA library does not load (libqsun.so: cannot open shared object file)"
    )
    assert cuda.build_info() == {}


def test_unavailable_without_a_gpu(monkeypatch) -> None:
    pretend(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.unavailable() == f"no CUDA device is visible to torch {torch.__version__}"


def test_unavailable_for_another_architecture(monkeypatch) -> None:
    pretend(monkeypatch, capability=(12, 0))
    assert cuda.unavailable() == (
        "the CUDA library is built for sm_80, sm_90a, and this GPU is sm_120: "
        "reinstall with QSUN_CUDA_ARCHS=120"
    )
    pretend(monkeypatch, capability=(9, 0), archs=("80",))
    assert "this GPU is sm_90: reinstall with QSUN_CUDA_ARCHS=90a" in cuda.unavailable()
    pretend(monkeypatch, capability=(9, 0))
    assert cuda.unavailable() is None
    # One GPU that it can use is enough; the other is refused problem by problem.
    pretend(monkeypatch, capability=[(7, 5), (8, 0)])
    assert cuda.unavailable() is None
    other = RmsNormProblem(64, False, HALF, torch.device("cuda", 0))
    assert "this GPU is sm_75" in cuda.IMPLEMENTATIONS["rms_norm"].supports(other)


SUPPORTED = [
    Wna16LinearRmsNormProblem(17, 33, 3, "channel", False, True, HALF, GPU),
    Wna16LinearRmsNormProblem(17, 33, 4, 32, True, False, torch.float32, GPU),
    Wna16GateUpSiluProblem(34, 33, 4, 64, False, True, HALF, GPU),
    Wna16Problem(17, 33, 3, "channel", False, True, HALF, GPU),
    DequantizeProblem(17, 33, 2, 32, True, False, torch.float32, GPU),
    PagedAttentionDecodeProblem(9, 3, 80, 16, None, HALF, HALF, GPU),
    PagedAttentionDecodeProblem(64, 1, 256, 8, 4096, torch.bfloat16, torch.bfloat16, GPU),
    WriteKvCacheProblem(3, 5, 7, torch.float32, torch.float32, GPU),
    WriteKvCacheProblem(3, 1000, 16, HALF, HALF, GPU),  # a copy of any width
    WriteKvCacheProblem(3, 7, 7, HALF, torch.float32, GPU),
    WriteKvCacheProblem(3, 512, 16, HALF, torch.int8, GPU, "token", 9, True, True, True),
    WriteKvCacheProblem(3, 12, 16, HALF, torch.uint8, GPU, "token"),
    WriteKvCacheProblem(3, 64, 16, torch.float32, torch.float8_e4m3fn, GPU, "tensor"),
    RmsNormProblem(1, True, HALF, GPU),
    ApplyRopeProblem(9, 3, 6, HALF, GPU),
    SiluAndMulProblem(1, HALF, GPU),
    SampleTokensProblem(1, torch.float32, GPU),
]


@pytest.mark.parametrize("problem", SUPPORTED, ids=lambda problem: problem.operator)
def test_supported_problems(monkeypatch, problem) -> None:
    is_built = bool(cuda.build_info())
    pretend(monkeypatch)
    implementation = cuda.IMPLEMENTATIONS[problem.operator]
    assert implementation.supports(problem) is None
    if problem.operator in ("paged_attention_decode", "sample_tokens") and not is_built:
        pytest.skip("which kernel would run only the CUDA library knows")
    description = implementation.describe(problem)
    assert description and "\n" not in description


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (RmsNormProblem(64, False, HALF, torch.device("cpu")), "device is cpu, expected a CUDA device"),
        (
            RmsNormProblem(64, False, torch.float64, GPU),
            "dtype is torch.float64, expected one of torch.float32",
        ),
        (RmsNormProblem(0, False, HALF, GPU), "hidden_size is 0, expected at least 1"),
        (SiluAndMulProblem(0, HALF, GPU), "size is 0, expected at least 1"),
        (SampleTokensProblem(9, torch.float64, GPU), "dtype is torch.float64, expected one of torch.float32"),
        (ApplyRopeProblem(4, 2, 63, HALF, GPU), "head_dim is 63, expected an even number"),
        (
            WriteKvCacheProblem(3, 64, 16, HALF, torch.float8_e4m3fn, GPU),
            "kv_scales is none, a cache of torch.float8_e4m3fn has token or tensor",
        ),
        (
            WriteKvCacheProblem(3, 64, 16, HALF, torch.int16, GPU, "token"),
            "kv_dtype is torch.int16, expected one of torch.float32, torch.float16, torch.bfloat16, "
            "torch.float8_e4m3fn, torch.int8, torch.uint8",
        ),
        (
            WriteKvCacheProblem(3, 520, 16, HALF, torch.int8, GPU, "token"),
            "head_dim is 520, expected at most 512 of torch.float16",
        ),
        (
            WriteKvCacheProblem(3, 6, 16, HALF, torch.uint8, GPU, "token"),
            "head_dim is 6, expected a multiple of 4 for 4-bit codes",
        ),
        (
            WriteKvCacheProblem(3, 8, 16, HALF, HALF, GPU, "none", 4, rotate=True),
            "head_dim is 8, expected at least 16 of torch.float16 to rotate",
        ),
        (
            WriteKvCacheProblem(3, 7, 16, HALF, HALF, GPU, rope=True),
            "head_dim is 7, expected an even number",
        ),
        (
            PagedAttentionDecodeProblem(8, 2, 100, 16, None, HALF, HALF, GPU),
            "head_dim is 100, expected a multiple of 8, at most 256",
        ),
        (
            PagedAttentionDecodeProblem(8, 2, 512, 16, None, HALF, HALF, GPU),
            "head_dim is 512, expected a multiple of 8, at most 256",
        ),
        (
            PagedAttentionDecodeProblem(8, 2, 64, 24, None, HALF, HALF, GPU),
            "block_size is 24, expected a power of two from 8 to 65536",
        ),
        (
            PagedAttentionDecodeProblem(8, 2, 64, 16, None, HALF, torch.bfloat16, GPU),
            "kv_dtype is torch.bfloat16, expected that of q (torch.float16)",
        ),
        (Wna16Problem(8, 8, 4, 32, True, False, torch.int8, GPU), "dtype is torch.int8, expected one of"),
        (
            Wna16LinearRmsNormProblem(8, 8, 4, 32, True, False, torch.float64, GPU),
            "dtype is torch.float64, expected one of",
        ),
        (
            Wna16GateUpSiluProblem(8, 8, 4, 32, True, False, torch.float32, GPU),
            "dtype is torch.float32, expected one of torch.float16, torch.bfloat16",
        ),
    ],
)
def test_refused_problems(monkeypatch, problem, reason) -> None:
    pretend(monkeypatch)
    assert reason in cuda.IMPLEMENTATIONS[problem.operator].supports(problem)


def test_every_operator_is_there() -> None:
    assert {problem.operator for problem in SUPPORTED} == set(cuda.IMPLEMENTATIONS)


@pytest.mark.gpu
@pytest.mark.parametrize("problem", SUPPORTED, ids=lambda problem: problem.operator)
def test_a_gpu_takes_the_preferred_backend_by_itself(problem) -> None:
    from qsun_kernels.backends.dispatch import passed_over, select

    assert passed_over("cuda", problem) is None
    assert select(problem, "cuda").backend == "cuda"
    assert select(problem).backend == BACKENDS[0]
