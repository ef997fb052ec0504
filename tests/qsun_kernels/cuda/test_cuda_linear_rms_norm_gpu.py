"""wna16_linear_rms_norm: the bits of the product and of the norm behind it, whoever makes them."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor

from qsun_kernels.backends import cuda
from qsun_kernels.backends.cuda import library
from qsun_kernels.quant import QuantSpec
from qsun_kernels.testing import inputs
from qsun_kernels.testing.judge import judge_wna16_linear

DTYPES = (torch.float16, torch.bfloat16)
EPS = 1e-5


def run(operator: str, *arguments: Any) -> Any:
    return cuda.IMPLEMENTATIONS[operator].run(*arguments)


def check_against_two_calls(x, packed, source, *, bias=None, batch_invariant=False) -> None:
    """The same bits once more, too; few tokens are also judged against float64."""
    weight = cuda.IMPLEMENTATIONS["wna16_linear"].prepare(packed, x.dtype)
    M, N = x.shape[0], packed.N
    residual = inputs.normal(source, (M, N), x.dtype, x.device)
    norm_weight = inputs.normal(source, (N,), x.dtype, x.device)
    with inputs.poisoned_outputs():
        norm, stream = run(
            "wna16_linear_rms_norm", x, weight, residual, norm_weight, EPS, bias, batch_invariant
        )
        expected = run("wna16_linear", x, weight, bias, residual, None, batch_invariant)
        again, _ = run("wna16_linear_rms_norm", x, weight, residual, norm_weight, EPS, bias, batch_invariant)
    if M < 16:
        judge_wna16_linear(stream, x, packed, bias=bias, residual=residual).require()
    assert torch.equal(stream, expected)
    assert torch.equal(norm, run("rms_norm", expected, norm_weight, EPS, None))
    assert torch.equal(norm, again)


@pytest.mark.parametrize("dtype", (torch.float32, *DTYPES), ids=str)
@pytest.mark.parametrize(("N", "K"), [(64, 128), (77, 300), (576, 200)])
def test_few_tokens_and_odd_sizes(kernels, N, K, dtype) -> None:
    source = inputs.generator(N)
    packed = inputs.packed_weight(
        source, N, K, QuantSpec(4, 64, False), scale_dtype=dtype, device=kernels.device
    )
    bias = inputs.normal(source, (N,), dtype, kernels.device)
    for M in (0, 1, 5):
        x = inputs.normal(source, (M, K), dtype, kernels.device)
        check_against_two_calls(x, packed, source, bias=bias)
        check_against_two_calls(x, packed, source, batch_invariant=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [4096, 5120, 8192, 16384, 576, 1000, 1004])
def test_products_whose_columns_are_split(N, dtype) -> None:
    """Rows of one block and of clusters, more rows than multiprocessors, rows for narrow loads alone."""
    device = torch.device("cuda", torch.cuda.current_device())
    source = inputs.generator(N)
    for K in (4096, 14336) if N == 4096 else (4096,):
        packed = inputs.packed_weight(source, N, K, QuantSpec(4, 128, True), scale_dtype=dtype, device=device)
        bias = inputs.normal(source, (N,), dtype, device)
        for M in (16, 17, 32, 48, 64, 128, 200, 300):
            x = inputs.normal(source, (M, K), dtype, device)
            check_against_two_calls(x, packed, source, bias=bias if M == 17 else None)


def add_parts(
    library_file: str,
    parts: Tensor,
    out: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_out: Tensor | None,
) -> int:
    """The blocks that had a row where the norm came with the sums, else 0."""
    blocks = ctypes.c_int(-1)
    tensors = (parts, bias, residual, norm_weight, out, norm_out)
    addresses = (ctypes.c_void_p(library.address(tensor)) for tensor in tensors)
    M, N = out.shape
    sizes = (ctypes.c_int64(M), ctypes.c_int64(N), parts.shape[0], ctypes.c_float(EPS))
    code = library.DTYPE_CODES[out.dtype]
    error = ctypes.CDLL(library_file).add_parts(*addresses, *sizes, code, ctypes.byref(blocks))
    assert error == 0
    return blocks.value


# N, M, and the blocks of a row's cluster on the emulated device, which has four multiprocessors. 0: no
# multiple of eight outputs, or too many threads for the blocks that share them evenly.
ROWS = [
    *[(4096, 1, 4), (4096, 2, 2), (4096, 5, 1), (576, 1, 2), (8, 3, 1), (1000, 1, 2), (5120, 1, 2)],
    *[(8192, 5, 2), (16384, 5, 4), (1004, 1, 0), (8200, 1, 0)],
]


@pytest.mark.slow
@pytest.mark.parametrize("order", ["forward", "reverse", "7"])
@pytest.mark.parametrize(("N", "M", "blocks"), ROWS)
def test_the_norm_in_the_launch_that_adds_parts(
    emulated_kernels, emulated_extension, monkeypatch, N, M, blocks, order
) -> None:
    """The sums as they are written down, in their order; the norm with the bits of rms_norm."""
    monkeypatch.setenv("QSUN_EMULATOR_ORDER", order)
    dtype = DTYPES[N % 16 == 0]
    source = inputs.generator(N)
    for splits in (2, 6, 7, 13):
        parts = inputs.normal(source, (splits, M, -(-N // 64) * 64), torch.float32)
        parts[..., N:] = torch.nan
        residual = inputs.normal(source, (M, N), dtype)
        bias = inputs.normal(source, (N,), dtype) if splits == 6 else None
        norm_weight = inputs.normal(source, (N,), dtype)

        expected = torch.zeros(M, N)
        for part in (*parts[..., :N], *(() if bias is None else (bias,)), residual):
            expected = expected + part.float()
        arguments = (emulated_extension.__file__, parts)
        plain = torch.full((M, N), torch.nan, dtype=dtype)
        assert add_parts(*arguments, plain, bias, residual, None, None) == 0
        assert torch.equal(plain, expected.to(dtype))

        stream, norm = (torch.full((M, N), torch.nan, dtype=dtype) for _ in range(2))
        assert add_parts(*arguments, stream, bias, residual, norm_weight, norm) == blocks
        assert torch.equal(stream, plain)
        if blocks == 0:
            assert norm.isnan().all()  # left to a launch of its own
        else:
            assert torch.equal(norm, run("rms_norm", plain, norm_weight, EPS, None))


@pytest.mark.slow
def test_the_norms_weight_is_read_while_the_parts_are_made(
    emulated_kernels, emulated_extension, guard
) -> None:
    """The weight early; parts and residual, which launches in front write, only when those have ended."""
    source, dtype = inputs.generator(0), torch.bfloat16
    parts = inputs.normal(source, (3, 2, 4096), torch.float32)
    residual, norm_weight = inputs.normal(source, (2, 4096), dtype), inputs.normal(source, (4096,), dtype)

    def add() -> tuple[Tensor, Tensor]:
        stream, norm = (torch.full((2, 4096), torch.nan, dtype=dtype) for _ in range(2))
        assert add_parts(emulated_extension.__file__, parts, stream, None, residual, norm_weight, norm) > 0
        return stream, norm

    expected = add()
    guard(parts)
    guard(residual)
    got = add()
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    guard(norm_weight)
    got = add()
    assert torch.equal(got[0], expected[0]) and got[1].isnan().all()
