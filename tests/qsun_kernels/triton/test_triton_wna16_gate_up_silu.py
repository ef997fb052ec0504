"""wna16_gate_up_silu through Triton against float64, at the precision of torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from qsun_kernels import QuantSpec, prepare_gate_up, wna16_gate_up_silu
from qsun_kernels.quant import PackedWeight
from qsun_kernels.testing import inputs
from qsun_kernels.testing.judge import judge_wna16_gate_up_silu

pytestmark = [
    pytest.mark.triton,
    # numpy, of sums with infinities and NaN.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def problem(
    device: torch.device,
    M: int,
    N: int,
    K: int,
    spec: QuantSpec,
    dtype: torch.dtype,
    *,
    act_order: bool = False,
) -> tuple[Tensor, PackedWeight]:
    """x and the weight [gate; up]."""
    source = inputs.generator(M + N)
    packed = inputs.packed_weight(source, N, K, spec, act_order=act_order, device=device).with_scales(dtype)
    return inputs.normal(source, (M, K), dtype, device, std=2.0), packed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act-order"])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 64), (4, 128), (8, "channel")])
def test_every_width_of_codes(
    device: torch.device, bits: int, group_size: int | str, act_order: bool, dtype: torch.dtype
) -> None:
    spec = QuantSpec(bits, group_size, symmetric=bits == 4)
    x, packed = problem(device, 3, 74, 173, spec, dtype, act_order=act_order)
    prepared = prepare_gate_up(packed, dtype=dtype, backend="triton")
    assert (prepared.backend, prepared.operator) == ("triton", "wna16_gate_up_silu")
    with inputs.poisoned_outputs():
        got = wna16_gate_up_silu(x, prepared)
    judge_wna16_gate_up_silu(got, x, packed).require()
    assert torch.equal(got, wna16_gate_up_silu(x, prepared))


@pytest.mark.parametrize(("N", "K"), [(2, 1), (66, 31), (128, 128)])
@pytest.mark.parametrize("M", [0, 1, 2, 17, 33])
def test_shapes(device: torch.device, M: int, N: int, K: int) -> None:
    x, packed = problem(device, M, N, K, QuantSpec(4, 32, False), torch.bfloat16)
    got = wna16_gate_up_silu(x, prepare_gate_up(packed, dtype=torch.bfloat16, backend="triton"))
    judge_wna16_gate_up_silu(got, x, packed).require()


def test_leading_dimensions_strides_and_out(device: torch.device) -> None:
    dtype = torch.float16
    x, packed = problem(device, 6, 40, 64, QuantSpec(4, 32, True), dtype)
    prepared = prepare_gate_up(packed, dtype=dtype, backend="triton")
    expected = wna16_gate_up_silu(x, prepared)
    assert wna16_gate_up_silu(x.new_empty(2, 0, 64), prepared).shape == (2, 0, 20)
    assert torch.equal(wna16_gate_up_silu(x.view(2, 3, 64), prepared), expected.view(2, 3, 20))
    wide = torch.full((6, 100), torch.nan, dtype=dtype, device=device)
    wide[:, :64] = x
    out = torch.full((6, 20), torch.nan, dtype=dtype, device=device)
    assert wna16_gate_up_silu(wide[:, :64], prepared, out=out) is out
    assert torch.equal(out, expected)


def test_nan_stays_in_its_row(device: torch.device) -> None:
    x, packed = problem(device, 4, 34, 50, QuantSpec(4, 32, False), torch.float16)
    prepared = prepare_gate_up(packed, dtype=torch.float16, backend="triton")
    clean = wna16_gate_up_silu(x, prepared)
    x[1, 49] = torch.nan
    got = wna16_gate_up_silu(x, prepared)
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2, 3]], clean[[0, 2, 3]])


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_model_sizes(device: torch.device, dtype: torch.dtype, M: int) -> None:
    x, packed = problem(device, M, 28672, 4096, QuantSpec(4, 128, True), dtype)
    prepared = prepare_gate_up(packed, dtype=dtype, backend="triton")
    got = wna16_gate_up_silu(x, prepared)
    columns = torch.randperm(14336, generator=inputs.generator(M))[:512].to(device)
    judge_wna16_gate_up_silu(got, x, packed, columns=columns).require()
