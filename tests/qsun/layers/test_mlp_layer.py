"""The gated feed-forward layer in one call and in two, and the residual in whoever adds it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from qsun.layers.linear import DenseLinear, QuantLinear, SplitLinear
from qsun.layers.mlp import GatedMLP, GateUpSilu
from qsun.layers.norm import RMSNorm
from qsun.models import build
from qsun.models.build import Placement, build_gate_up, build_linear
from qsun.models.weights import Projection
from qsun_kernels import BackendUnavailable, PackedWeight, QuantSpec, dequantize
from qsun_kernels.backends.problems import Wna16GateUpSiluProblem
from qsun_kernels.quant import quantize_rtn

PLACEMENT = Placement(torch.float32, torch.device("cpu"))
SPEC = QuantSpec(4, 32, True)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed(N: int, K: int = 64, seed: int = 0, spec: QuantSpec = SPEC) -> PackedWeight:
    return quantize_rtn(random(N, K, seed=seed), spec)


def dense(part: Projection) -> torch.Tensor:
    return dequantize(part.weight, torch.float32) if isinstance(part.weight, PackedWeight) else part.weight


def written_out(x: torch.Tensor, gate: Projection, up: Projection, down: Projection) -> torch.Tensor:
    parts = [x.double() @ dense(part).double().T for part in (gate, up)]
    for index, part in enumerate((gate, up)):
        if part.bias is not None:
            parts[index] += part.bias.double()
    return (functional.silu(parts[0]) * parts[1]) @ dense(down).double().T


CASES = {
    "one low-bit matrix": (Projection(packed(96, seed=1)), Projection(packed(96, seed=2)), GateUpSilu),
    "dense": (Projection(random(96, 64, seed=1)), Projection(random(96, 64, seed=2)), DenseLinear),
    "biases": (
        Projection(packed(96, seed=1), random(96)),
        Projection(packed(96, seed=2), random(96, seed=4)),
        QuantLinear,
    ),
    "two specs": (
        Projection(packed(96, seed=1)),
        Projection(packed(96, seed=2, spec=QuantSpec(8, 32, True))),
        SplitLinear,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_layer_equals_the_formula(case) -> None:
    gate, up, kind = CASES[case]
    down = Projection(packed(64, 96, seed=3))
    mlp = GatedMLP(build_gate_up([gate, up], PLACEMENT), build_linear([down], PLACEMENT))
    assert type(mlp.gate_up) is kind and mlp.gate_up.N == 192 and mlp.gate_up.K == 64
    assert mlp.gate_up.nbytes > 0
    x = random(5, 64, seed=5)
    torch.testing.assert_close(mlp(x).double(), written_out(x, gate, up, down), rtol=1e-4, atol=1e-3)


def test_a_backend_without_the_fused_kernel_computes_it_in_two(monkeypatch) -> None:
    """As the CUDA library for float32: the weight stays with the backend that multiplies."""
    gate, up, _ = CASES["one low-bit matrix"]
    fused = build_gate_up([gate, up], PLACEMENT)
    right = build.select

    def without(problem, requested=None):
        if isinstance(problem, Wna16GateUpSiluProblem):
            raise BackendUnavailable(problem.operator, "torch", "it has no such kernel")
        return right(problem, requested)

    monkeypatch.setattr(build, "select", without)
    plain = build_gate_up([gate, up], PLACEMENT)
    assert isinstance(fused, GateUpSilu) and isinstance(plain, QuantLinear)
    down = build_linear([Projection(packed(64, 96, seed=3))], PLACEMENT)
    x = random(3, 64, seed=5)
    assert torch.equal(GatedMLP(fused, down)(x), GatedMLP(plain, down)(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_residual_in_the_matmul_is_rounded_once(dtype) -> None:
    """Never further from the exact sum than product and sum rounded one after the other."""
    part = Projection(packed(64, seed=3))
    layer = build_linear([part], Placement(dtype, torch.device("cpu")))
    assert isinstance(layer, QuantLinear)
    x, residual = random(50, 64, seed=5).to(dtype), random(50, 64, seed=6).to(dtype) * 8
    weight = dequantize(part.weight.with_scales(dtype), torch.float32)
    exact = x.double() @ weight.double().T + residual.double()
    _, stream = layer.end_block(x, residual, RMSNorm(random(64).to(dtype), 1e-6))
    fused = (stream.double() - exact).norm()
    apart = ((layer(x) + residual).double() - exact).norm()
    assert fused <= apart * 1.05
