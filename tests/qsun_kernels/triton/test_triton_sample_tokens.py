"""sample_tokens through Triton, token for token as the reference."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from qsun_kernels import sample_tokens
from qsun_kernels.testing import inputs
from qsun_kernels.testing.judge import judge_sample_tokens

pytestmark = pytest.mark.triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("size", [1, 2, 33, 577])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens(device: torch.device, dtype: torch.dtype, size: int) -> None:
    rows = 64 if device.type == "cuda" else 16
    arguments = inputs.sampling_inputs(inputs.generator(size), rows, size, dtype, device)
    with inputs.poisoned_outputs():
        got = sample_tokens(*arguments, backend="triton")
    judge_sample_tokens(got, *arguments).require()


def test_rows_of_several_blocks(device: torch.device) -> None:
    """Six of them, so that the interpreter gets there: greedy, free, and one filter each."""
    arguments = inputs.sampling_inputs(inputs.generator(2), 6, 9001, torch.bfloat16, device)
    judge_sample_tokens(sample_tokens(*arguments, backend="triton"), *arguments).require()


def test_equals_are_parted_by_their_index(device: torch.device) -> None:
    source = inputs.generator(4)
    logits = (torch.randint(0, 9, (12, 300), generator=source) / 4).to(device)
    top_k = torch.arange(12, dtype=torch.int32, device=device) * 20
    top_p = torch.rand(12, generator=source).to(device)
    rest = (torch.zeros(12, device=device), torch.arange(12, device=device) * 7919)
    arguments = (logits, torch.ones(12, device=device), top_k, top_p, *rest)
    judge_sample_tokens(sample_tokens(*arguments, backend="triton"), *arguments).require()


def test_no_rows(device: torch.device) -> None:
    arguments = inputs.sampling_inputs(inputs.generator(0), 0, 9, torch.float16, device)
    tokens, valid = sample_tokens(*arguments, backend="triton")
    assert tokens.shape == valid.shape == (0,)
