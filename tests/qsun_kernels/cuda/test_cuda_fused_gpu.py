"""The small operators of a decode step: the CUDA kernels, on a GPU and through the emulator."""

from __future__ import annotations

import ctypes

import pytest
import torch

from qsun_kernels.backends import cuda
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


@pytest.mark.slow
@pytest.mark.parametrize("order", ("forward", "reverse", "3"))
@pytest.mark.parametrize("size", (64, 33))
@pytest.mark.parametrize("operator", ("rms_norm", "silu_and_mul", "apply_rope"))
def test_nothing_is_read_before_the_producers_have_ended(
    emulated_kernels, emulated_extension, guard, monkeypatch, operator, size, order
) -> None:
    """By vectors (64) and by elements: any argument may be what the kernel in front writes."""
    monkeypatch.setenv("QSUN_EMULATOR_ORDER", order)
    source, dtype = inputs.generator(size), torch.bfloat16
    x, residual = (inputs.normal(source, (3, 2 * size), dtype) for _ in range(2))
    q, k, _ = inputs.qkv_views(source, 3, 4, 2, 2 * size, dtype)
    arguments = {
        "rms_norm": (x, inputs.normal(source, (2 * size,), dtype), 1e-5, residual),
        "silu_and_mul": (x,),
        "apply_rope": (q, k, torch.tensor([9, 0, 4]), torch.rand(10, 2 * size, generator=source)),
    }[operator]
    expected = results_of(emulated_kernels, operator, *arguments)
    for argument in arguments:
        for row in argument if isinstance(argument, torch.Tensor) else ():
            guard(row)
    got = results_of(emulated_kernels, operator, *arguments)
    assert all(torch.equal(one, right) for one, right in zip(got, expected, strict=True))
    # And the kernel behind it may begin at once.
    assert ctypes.CDLL(emulated_extension.__file__).triggered_before_wait() == 1


def results_of(kernels, operator, *arguments) -> tuple[torch.Tensor, ...]:
    result = kernels.run(operator, *arguments)
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", (1, 64))
def test_a_chain_of_launches_that_overlap(device, tokens) -> None:
    """Each reads what the one in front writes, many times in one graph, whose inputs change."""
    run = {name: implementation.run for name, implementation in cuda.IMPLEMENTATIONS.items()}
    source, dtype, heads, head_dim = inputs.generator(tokens), torch.bfloat16, 32, 128
    hidden = heads * head_dim
    weight = inputs.normal(source, (2 * hidden,), dtype, device)
    positions = torch.randint(40, (tokens,), generator=source).to(device)
    cos_sin = torch.rand(40, head_dim, generator=source).to(device)
    wait = torch.cuda.synchronize

    def chain(x: torch.Tensor, between=lambda: None) -> torch.Tensor:
        for _ in range(25):
            normed = run["rms_norm"](x, weight, 1e-5, None)
            between()
            gated = run["silu_and_mul"](normed).view(tokens, heads, head_dim)
            between()
            q, k = run["apply_rope"](gated, gated, positions, cos_sin)
            between()
            x = torch.cat((q.view(tokens, hidden), k.view(tokens, hidden)), dim=1)
            between()
        return x

    contents = [inputs.normal(source, (tokens, 2 * hidden), dtype, device) for _ in range(4)]
    expected = [chain(x, wait) for x in contents]
    x = contents[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(x)
    for _ in range(5):
        for content, right in zip(contents, expected, strict=True):
            x.copy_(content)
            graph.replay()
            wait()
            assert torch.equal(captured, right)
