"""wna16_linear_rms_norm is wna16_linear onto a stream and rms_norm behind it: bits, views, backends."""

from __future__ import annotations

import pytest
import torch

from qsun_kernels import (
    BackendUnavailable,
    QuantSpec,
    prepare_weight,
    rms_norm,
    use_backend,
    wna16_linear,
    wna16_linear_rms_norm,
)
from qsun_kernels.backends.dispatch import select
from qsun_kernels.backends.problems import Wna16LinearRmsNormProblem
from qsun_kernels.testing import inputs

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EPS = 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize(("N", "K"), [(1, 1), (24, 64), (77, 130)])
def test_bits_are_those_of_the_two_operators(N, K, has_bias, dtype, device: torch.device) -> None:
    source = inputs.generator(N)
    packed = inputs.packed_weight(source, N, K, QuantSpec(4, 32, False), device=device).with_scales(dtype)
    weight = prepare_weight(packed, dtype=dtype)
    norm_weight, bias = (inputs.normal(source, (N,), dtype, device) for _ in range(2))
    bias = bias if has_bias else None
    for M in (0, 1, 5):
        x = inputs.normal(source, (M, K), dtype, device)
        residual = inputs.normal(source, (M, N), dtype, device)
        kept = residual.clone()
        for invariant in (False, True):
            norm, stream = wna16_linear_rms_norm(
                x, weight, residual, norm_weight, eps=EPS, bias=bias, batch_invariant=invariant
            )
            expected = wna16_linear(x, weight, bias, residual, batch_invariant=invariant)
            assert torch.equal(stream, expected)
            assert torch.equal(norm, rms_norm(expected, norm_weight, eps=EPS))
        assert torch.equal(residual, kept)


def test_by_hand() -> None:
    """x @ W.T = (3, 0), the stream (3, 4): a mean square of 12.5."""
    packed = inputs.packed_weight(inputs.generator(0), 2, 32, QuantSpec(4, 32, True))
    weight = prepare_weight(packed, dtype=torch.float32)
    residual = torch.tensor([[3.0, 4.0]])
    norm, stream = wna16_linear_rms_norm(
        torch.zeros(1, 32), weight, residual, torch.tensor([1.0, 2.0]), eps=0.0
    )
    assert torch.equal(stream, residual)
    assert norm[0].tolist() == pytest.approx([3 / 12.5**0.5, 8 / 12.5**0.5], rel=1e-6)


def test_views_and_shapes(device: torch.device) -> None:
    source = inputs.generator(1)
    packed = inputs.packed_weight(source, 24, 64, QuantSpec(4, 32, True), device=device)
    weight = prepare_weight(packed.with_scales(torch.float32), dtype=torch.float32)
    norm_weight = inputs.normal(source, (24,), torch.float32, device)
    x = inputs.normal(source, (2, 3, 100), torch.float32, device)[..., 4:68]
    residual = inputs.normal(source, (2, 3, 40), torch.float32, device)[..., :24]
    norm, stream = wna16_linear_rms_norm(x, weight, residual, norm_weight, eps=EPS)
    assert norm.shape == stream.shape == (2, 3, 24) and norm.is_contiguous() and stream.is_contiguous()
    rows = wna16_linear_rms_norm(
        x.reshape(6, 64).contiguous(), weight, residual.reshape(6, 24), norm_weight, eps=EPS
    )
    assert torch.equal(norm.view(6, 24), rows[0]) and torch.equal(stream.view(6, 24), rows[1])
    one = wna16_linear_rms_norm(x[0, 0], weight, residual[0, 0], norm_weight, eps=EPS, batch_invariant=True)
    assert one[0].shape == one[1].shape == (24,)


def test_the_weight_decides_the_backend() -> None:
    packed = inputs.packed_weight(inputs.generator(0), 8, 32, QuantSpec(4, 32, True))
    weight = prepare_weight(packed, dtype=torch.float32, backend="torch")
    arguments = (torch.ones(1, 32), weight, torch.ones(1, 8), torch.ones(8))
    with use_backend("cuda"):
        norm, _ = wna16_linear_rms_norm(*arguments, eps=EPS)
    assert torch.equal(norm, wna16_linear_rms_norm(*arguments, eps=EPS, backend="torch")[0])


def test_a_problem_has_the_answers_of_its_parts() -> None:
    problem = Wna16LinearRmsNormProblem(64, 32, 4, 32, True, False, torch.float64, torch.device("cpu"))
    assert (problem.linear.N, problem.norm.hidden_size, problem.norm.has_residual) == (64, 64, False)
    with pytest.raises(BackendUnavailable, match=r"wna16_linear_rms_norm.*dtype"):
        select(problem, "torch")
