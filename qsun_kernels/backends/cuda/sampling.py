"""sample_tokens on the CUDA library."""

from __future__ import annotations

import torch
from torch import Tensor

from qsun_kernels.backends.cuda import library
from qsun_kernels.backends.problems import SampleTokensProblem


def supports_sampling(problem: SampleTokensProblem) -> str | None:
    return library.refuse(problem.device, dtype=problem.dtype)


def describe_sampling(problem: SampleTokensProblem) -> str:
    index = problem.device.index
    config = library.binding.choose_sample_tokens(
        problem.vocab_size,
        library.DTYPE_CODES[problem.dtype],
        library.device_props(torch.cuda.current_device() if index is None else index),
    )
    share = "kept in shared memory" if config.staged else "read again for each pass"
    return f"sample_tokens: {config.blocks} blocks a row, {share}; cut by histograms, no sort"


def sample_tokens(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, keys: Tensor
) -> tuple[Tensor, Tensor]:
    num_rows, vocab_size = logits.shape
    tokens = torch.empty((num_rows,), dtype=torch.int64, device=logits.device)
    valid = torch.empty((num_rows,), dtype=torch.bool, device=logits.device)
    device = logits.get_device()
    library.binding.sample_tokens(
        logits.data_ptr(),
        temperature.data_ptr(),
        top_k.data_ptr(),
        top_p.data_ptr(),
        min_p.data_ptr(),
        keys.data_ptr(),
        tokens.data_ptr(),
        valid.data_ptr(),
        num_rows,
        vocab_size,
        logits.stride(0),
        library.DTYPE_CODES[logits.dtype],
        device,
        library.stream(device),
    )
    return tokens, valid
