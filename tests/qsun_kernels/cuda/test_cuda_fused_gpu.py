"""The small operators of a decode step: the CUDA kernels, on a GPU and through the emulator."""

from __future__ import annotations

import pytest
import torch

from qsun_kernels.errors import KernelLaunchError
from qsun_kernels.testing import inputs
from qsun_kernels.testing.judge import judge_apply_rope, judge_rms_norm, judge_silu_and_mul

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDTHS = (*inputs.ODD_WIDTHS, 4096, 16384)


def spread(tensor: torch.Tensor, gap: int) -> torch.Tensor:
    """The same rows, `gap` NaN elements apart."""
    rows, width = tensor.shape
    space = torch.full((rows, width + gap), torch.nan, dtype=tensor.dtype, device=tensor.device)
    space[:, :width] = tensor
    return space[:, :width]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(kernels, dtype, width) -> None:
    for rows in kernels.pick(inputs.ODD_ROWS, (0, 1, 3)):
        source = inputs.generator(rows)
        x, residual = (inputs.normal(source, (rows, width), dtype, kernels.device) for _ in range(2))
        weight = inputs.normal(source, (width,), dtype, kernels.device)
        for gap in (0, 1, 8):
            with inputs.poisoned_outputs():
                alone = kernels.run("rms_norm", spread(x, gap), weight, 1e-5, None)
                both = kernels.run("rms_norm", spread(x, gap), weight, 1e-5, spread(residual, 2 * gap))
            if rows:
                judge_rms_norm(alone, x, weight, 1e-5).require()
                judge_rms_norm(both, x, weight, 1e-5, residual).require()
            else:
                assert alone.shape == both[0].shape == both[1].shape == (0, width)


@pytest.mark.parametrize(
    ("dtype", "std"),
    [
        (torch.float16, 2.0**13),
        (torch.float16, 2.0**-14),
        (torch.bfloat16, 2.0**60),
        (torch.float32, 2.0**-60),
    ],
)
def test_rms_norm_of_extreme_magnitudes(kernels, dtype, std) -> None:
    source = inputs.generator(8)
    x = (torch.randn(4, 320, generator=source).clamp(-3, 3) * std).to(dtype).to(kernels.device)
    weight = inputs.normal(source, (320,), dtype, kernels.device)
    judge_rms_norm(kernels.run("rms_norm", x, weight, 0.0, None), x, weight, 0.0).require()


def test_rms_norm_of_any_leading_dimensions(kernels) -> None:
    source = inputs.generator(2)
    x = inputs.normal(source, (3, 5, 2, 48), torch.float16, kernels.device)
    weight = inputs.normal(source, (48,), torch.float16, kernels.device)
    flat = kernels.run("rms_norm", x.view(-1, 48), weight, 1e-6, None)
    assert torch.equal(kernels.run("rms_norm", x, weight, 1e-6, None), flat.view(x.shape))
    turned = x.transpose(0, 1)
    assert torch.equal(
        kernels.run("rms_norm", turned, weight, 1e-6, None), flat.view(x.shape).transpose(0, 1)
    )
    assert torch.equal(kernels.run("rms_norm", x[0, 0, 0], weight, 1e-6, None), flat[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_silu_and_mul(kernels, dtype, width) -> None:
    for rows in kernels.pick(inputs.ODD_ROWS, (0, 1, 3)):
        x = inputs.normal(inputs.generator(rows), (rows, 2 * width), dtype, kernels.device, std=4.0)
        for gap in (0, 1, 8):
            with inputs.poisoned_outputs():
                got = kernels.run("silu_and_mul", spread(x, gap))
            judge_silu_and_mul(got, x).require()


def test_silu_and_mul_of_extreme_magnitudes(kernels) -> None:
    for dtype in DTYPES:
        gate = torch.tensor([-3e4, -100.0, -88.0, -1e-6, 0.0, 1e-6, 88.0, 100.0, 3e4], dtype=dtype)
        x = torch.cat((gate, torch.full_like(gate, 0.5))).to(kernels.device)
        judge_silu_and_mul(kernels.run("silu_and_mul", x), x).require()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", (2, 6, 16, 64, 80, 128, 256))
def test_apply_rope(kernels, dtype, head_dim) -> None:
    for tokens in inputs.ODD_ROWS:
        for num_q_heads, num_kv_heads in ((1, 1), (9, 3), (4, 4)):
            source = inputs.generator(tokens)
            q, k, _ = inputs.qkv_views(
                source, tokens, num_q_heads, num_kv_heads, head_dim, dtype, kernels.device
            )
            positions = torch.randint(40, (tokens,), generator=source).to(kernels.device)
            angles = torch.rand(40, head_dim // 2, generator=source) * 6.3
            cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1).to(kernels.device)
            with inputs.poisoned_outputs():
                got = kernels.run("apply_rope", q, k, positions, cos_sin)
            assert got[0].is_contiguous() and got[1].is_contiguous()
            if tokens:
                judge_apply_rope(got, q, k, positions, cos_sin).require()
            else:
                assert got[0].shape == q.shape and got[1].shape == k.shape


@pytest.mark.slow
@pytest.mark.damaged
@pytest.mark.parametrize("position", (-1, 40))
def test_a_position_past_the_table_traps(emulated_kernels, position) -> None:
    """On a GPU: test_cuda_traps_gpu.py."""
    kernels = emulated_kernels
    q = torch.ones(1, 2, 8)
    with pytest.raises(KernelLaunchError, match=r"apply_rope.*trap"):
        kernels.run("apply_rope", q, q, torch.tensor([position]), torch.ones(40, 8))
