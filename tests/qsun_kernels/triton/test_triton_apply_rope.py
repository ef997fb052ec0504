"""apply_rope through Triton against complex float64, at the precision of torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from qsun_kernels import RopeParameters, apply_rope, rope_cache
from qsun_kernels.testing import inputs
from qsun_kernels.testing.judge import judge_apply_rope

pytestmark = pytest.mark.triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def angles(source: torch.Generator, positions: int, head_dim: int, device: torch.device) -> Tensor:
    """A table of random angles, so that a wrong position or pair shows."""
    angle = torch.rand(positions, head_dim // 2, generator=source) * 6.3
    return torch.cat((angle.cos(), angle.sin()), dim=-1).to(device)


HEADS_AND_WIDTHS = [((1, 1), 2), ((3, 1), 6), ((4, 2), 64), ((9, 3), 80), ((33, 3), 20), ((1, 1), 4098)]


@pytest.mark.parametrize(("heads", "head_dim"), HEADS_AND_WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_and_widths(
    device: torch.device, dtype: torch.dtype, heads: tuple[int, int], head_dim: int
) -> None:
    source = inputs.generator(head_dim)
    q, k, _ = inputs.qkv_views(source, 3, *heads, head_dim, dtype, device)
    positions = torch.tensor([5, 0, 12], device=device)
    table = angles(source, 13, head_dim, device)
    with inputs.poisoned_outputs():
        got = apply_rope(q, k, positions, table, backend="triton")
    assert got[0].is_contiguous() and got[1].is_contiguous()
    judge_apply_rope(got, q, k, positions, table).require()
    again = apply_rope(q, k, positions, table, backend="triton")
    assert torch.equal(got[0], again[0]) and torch.equal(got[1], again[1])


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_tokens(device: torch.device, tokens: int) -> None:
    source = inputs.generator(tokens)
    q, k, _ = inputs.qkv_views(source, tokens, 4, 2, 16, torch.float32, device)
    positions = torch.arange(tokens, device=device).flip(0)
    table = rope_cache(RopeParameters(theta=1e4), 16, 8, device)
    got = apply_rope(q, k, positions, table, backend="triton")
    assert got[0].shape == q.shape and got[1].shape == k.shape
    if tokens:
        judge_apply_rope(got, q, k, positions, table).require()


@pytest.mark.gpu
def test_model_size(device: torch.device) -> None:
    source = inputs.generator(9)
    q, k, _ = inputs.qkv_views(source, 500, 32, 8, 128, torch.bfloat16, device)
    positions = torch.randint(0, 4096, (500,), generator=source).to(device)
    table = angles(source, 4096, 128, device)
    judge_apply_rope(apply_rope(q, k, positions, table, backend="triton"), q, k, positions, table).require()
