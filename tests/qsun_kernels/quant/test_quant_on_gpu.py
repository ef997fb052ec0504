"""Quantising and reading on a GPU gives, bit for bit, what it gives on the CPU."""

from __future__ import annotations

import pytest
import torch

from qsun_kernels.quant import (
    InputStatistics,
    PackedWeight,
    QuantSpec,
    pack_codes,
    quantize_rtn,
    unpack_codes,
)
from qsun_kernels.quant.awq_search import AwqOptions, search_scale
from qsun_kernels.quant.formats import from_awq, from_compressed_tensors, from_gptq, to_compressed_tensors

pytestmark = pytest.mark.gpu
SPECS = [
    QuantSpec(bits, group, symmetric)
    for bits in (2, 3, 4, 8)
    for group in (32, "channel")
    for symmetric in (True, False)
]


def assert_same(on_gpu: PackedWeight, on_cpu: PackedWeight) -> None:
    assert on_gpu.device.type == "cuda" and len(on_gpu.tensors) == len(on_cpu.tensors)
    for a, b in zip(on_gpu.tensors, on_cpu.tensors, strict=True):
        assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("K", [1, 31, 64, 577])
def test_packing(bits, K, device):
    codes = torch.randint(0, 1 << bits, (9, K), dtype=torch.uint8)
    packed = pack_codes(codes.to(device), bits)
    assert torch.equal(packed.cpu(), pack_codes(codes, bits))
    assert torch.equal(unpack_codes(packed, bits, K).cpu(), codes)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounding_to_nearest(spec, scale_dtype, device):
    weight = torch.randn(70, 200) * torch.logspace(-7, 2, 200)
    weight[3] = 0
    on_cpu = quantize_rtn(weight, spec, scale_dtype=scale_dtype)
    on_gpu = quantize_rtn(weight.to(device), spec, scale_dtype=scale_dtype)
    assert_same(on_gpu.validate(), on_cpu)
    assert_same(on_cpu.to(device), on_cpu)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_compressed_tensors(spec, device):
    packed = quantize_rtn(torch.randn(13, 96), spec)
    tensors = to_compressed_tensors(packed.to(device))
    assert_same(from_compressed_tensors(tensors, spec), packed)


def test_awq_and_gptq(device):
    tensors = {
        "qweight": torch.randint(-(2**31), 2**31, (64, 4), dtype=torch.int32),
        "qzeros": torch.randint(-(2**31), 2**31, (2, 4), dtype=torch.int32),
        "scales": torch.rand(2, 32) + 0.5,
    }
    on_gpu = {name: tensor.to(device) for name, tensor in tensors.items()}
    spec = QuantSpec(4, 32, False)
    assert_same(from_awq(on_gpu, spec), from_awq(tensors, spec))
    tensors["qweight"] = tensors["qweight"].reshape(8, 32)
    tensors["g_idx"] = (torch.randperm(64) // 32).int()
    on_gpu = {name: tensor.to(device) for name, tensor in tensors.items()}
    for version in ("v1", "v2"):
        assert_same(from_gptq(on_gpu, spec, zeros=version), from_gptq(tensors, spec, zeros=version))


def test_activation_aware_scales(device):
    weight = torch.randn(48, 64)
    x = torch.randn(300, 64) * torch.logspace(-1, 1.5, 64)
    found = []
    for where in ("cpu", device):
        inputs = InputStatistics(64, max_samples=100, device=where)
        inputs.update(x.to(where))
        options = AwqOptions(steps=10, families=("activation",))
        found.append(search_scale([weight.to(where)], inputs, QuantSpec(4, 32, True), options=options))
    on_cpu, on_gpu = found
    assert on_gpu.scale.device.type == "cuda" and on_gpu.error < on_gpu.rtn_error
    assert on_gpu.error == pytest.approx(on_cpu.error, rel=1e-2)
