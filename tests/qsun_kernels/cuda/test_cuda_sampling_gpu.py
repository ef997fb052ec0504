"""sample_tokens: the CUDA kernel, on a GPU and through the emulator, token for token as the reference."""

from __future__ import annotations

import pytest
import torch

from qsun_kernels import sample_tokens
from qsun_kernels.testing import inputs
from qsun_kernels.testing.judge import judge_sample_tokens

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = (1, 2, 7, 33, 512, 1025, 2049)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [*SIZES, pytest.param(9001, marks=pytest.mark.exhaustive)])
def test_tokens(kernels, dtype, size) -> None:
    for rows in kernels.pick((0, 1, 3, 16, 64), (0, 1, 18)):
        arguments = inputs.sampling_inputs(inputs.generator(size + rows), rows, size, dtype, kernels.device)
        with inputs.poisoned_outputs():
            got = kernels.run("sample_tokens", *arguments)
        judge_sample_tokens(got, *arguments).require()
        again = kernels.run("sample_tokens", *arguments)
        assert torch.equal(got[0], again[0]) and torch.equal(got[1], again[1])


@pytest.mark.parametrize("std", [0.01, 40.0])
def test_flat_and_steep_rows(kernels, std) -> None:
    """Thousands of tokens in one bin of the first pass; and all but a few without any mass."""
    for dtype in (torch.float32, torch.bfloat16):
        arguments = inputs.sampling_inputs(inputs.generator(1), 18, 5000, dtype, kernels.device, std=std)
        judge_sample_tokens(kernels.run("sample_tokens", *arguments), *arguments).require()


@pytest.mark.parametrize(
    "size", [49152, *(pytest.param(s, marks=pytest.mark.exhaustive) for s in (128256, 151936, 600_001))]
)
def test_whole_vocabularies(kernels, size) -> None:
    """The last is too long for shared memory: it is read again for each pass."""
    rows = kernels.pick(64, 6)
    dtype = torch.float32 if size % 2 == 0 else torch.float16
    arguments = inputs.sampling_inputs(inputs.generator(size), rows, size, dtype, kernels.device)
    judge_sample_tokens(kernels.run("sample_tokens", *arguments), *arguments).require()


@pytest.mark.slow
@pytest.mark.parametrize("emulated_kernels", [1], indirect=True)
@pytest.mark.parametrize("size", [33, 9001, 60_001])
def test_tokens_without_clusters(emulated_kernels, size) -> None:
    """Compute capability 8.0: a block a row, which the largest does not fit."""
    for dtype in DTYPES:
        arguments = inputs.sampling_inputs(inputs.generator(size), 18, size, dtype)
        judge_sample_tokens(emulated_kernels.run("sample_tokens", *arguments), *arguments).require()


def test_a_row_does_not_depend_on_the_batch(kernels) -> None:
    arguments = inputs.sampling_inputs(inputs.generator(9), 64, 3001, torch.float32, kernels.device)
    tokens, valid = kernels.run("sample_tokens", *arguments)
    for row in range(0, 64, kernels.pick(1, 9)):
        alone = kernels.run("sample_tokens", *(one[row : row + 1] for one in arguments))
        assert (alone[0].item(), alone[1].item()) == (tokens[row].item(), valid[row].item())


def test_equals_are_parted_by_their_index(kernels) -> None:
    """Twenty values, so that every cut falls among equals, in rows that begin anywhere."""
    source = inputs.generator(4)
    for size in (700, 4099):
        logits = torch.randint(0, 20, (24, size), generator=source).to(torch.float16) / 4
        top_k = torch.arange(24, dtype=torch.int32) * (size // 30)
        top_p = torch.where(torch.arange(24) % 2 == 0, 1.0, torch.rand(24, generator=source))
        rest = (torch.zeros(24), torch.arange(24) * 7919)
        arguments = [one.to(kernels.device) for one in (logits, torch.ones(24), top_k, top_p, *rest)]
        judge_sample_tokens(kernels.run("sample_tokens", *arguments), *arguments).require()


@pytest.mark.parametrize(
    "top_p", [0.95, *(pytest.param(p, marks=pytest.mark.exhaustive) for p in (0.5, 0.9, 0.999))]
)
def test_what_is_kept_is_all_drawn_and_nothing_else(kernels, top_p) -> None:
    """Many keys on one row: the tokens that come up are those that the reference keeps."""
    from qsun_kernels.backends.reference.sample_tokens import filtered

    draws = kernels.pick(512 * 40, 512)
    x = inputs.normal(inputs.generator(6), (1, 40), torch.float32, std=0.5)
    columns = [
        torch.tensor([value], dtype=dtype) for value, dtype in ((24, torch.int32), (top_p, torch.float32))
    ]
    kept = filtered(x - x.amax(), *columns, torch.zeros(1))[0].isfinite().nonzero()[:, 0].tolist()
    many = (torch.ones(1), *columns, torch.zeros(1))
    arguments = [x.expand(draws, -1), *(one.expand(draws).contiguous() for one in many), torch.arange(draws)]
    tokens, _ = kernels.run("sample_tokens", *(one.to(kernels.device) for one in arguments))
    assert set(tokens.tolist()) <= set(kept)
    if kernels.is_gpu:
        assert set(tokens.tolist()) == set(kept)


@pytest.mark.gpu
def test_backends_agree_on_a_gpu() -> None:
    for size in (5000, 128256):
        arguments = inputs.sampling_inputs(inputs.generator(size), 32, size, torch.bfloat16, "cuda")
        for backend in ("cuda", "triton", "torch"):
            judge_sample_tokens(sample_tokens(*arguments, backend=backend), *arguments).require()
