"""The small operators of a decode step on the CUDA library."""

from __future__ import annotations

import torch
from torch import Tensor

from qsun_kernels.backends.cuda import library
from qsun_kernels.backends.problems import ApplyRopeProblem, RmsNormProblem, SiluAndMulProblem


def supports_rms_norm(problem: RmsNormProblem) -> str | None:
    if problem.hidden_size < 1:
        return f"hidden_size is {problem.hidden_size}, expected at least 1"
    return library.refuse(problem.device, dtype=problem.dtype)


def describe_rms_norm(problem: RmsNormProblem) -> str:
    added = ", residual added in the same pass" if problem.has_residual else ""
    return f"rms_norm: a block a row{added}"


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, prefetch_weight: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    rows = library.rows(x)
    added = None if residual is None else library.rows(residual)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    device = x.get_device()
    library.binding.rms_norm(
        rows.data_ptr(),
        library.address(added),
        weight.data_ptr(),
        out.data_ptr(),
        library.address(total),
        rows.shape[0],
        rows.shape[1],
        rows.stride(0),
        library.row_stride(added),
        eps,
        prefetch_weight,
        library.DTYPE_CODES[x.dtype],
        device,
        library.stream(device),
    )
    return out if total is None else (out, total)


def supports_silu_and_mul(problem: SiluAndMulProblem) -> str | None:
    if problem.size < 1:
        return f"size is {problem.size}, expected at least 1"
    return library.refuse(problem.device, dtype=problem.dtype)


def silu_and_mul(x: Tensor) -> Tensor:
    rows = library.rows(x)
    size = x.shape[-1] // 2
    out = torch.empty((*x.shape[:-1], size), dtype=x.dtype, device=x.device)
    device = x.get_device()
    library.binding.silu_and_mul(
        rows.data_ptr(),
        out.data_ptr(),
        rows.shape[0],
        size,
        rows.stride(0),
        library.DTYPE_CODES[x.dtype],
        device,
        library.stream(device),
    )
    return out


def supports_rope(problem: ApplyRopeProblem) -> str | None:
    if problem.head_dim % 2:
        return f"head_dim is {problem.head_dim}, expected an even number"
    return library.refuse(problem.device, dtype=problem.dtype)


def apply_rope(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor]:
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    device = q.get_device()
    library.binding.apply_rope(
        q.data_ptr(),
        k.data_ptr(),
        positions.data_ptr(),
        cos_sin.data_ptr(),
        q_out.data_ptr(),
        k_out.data_ptr(),
        num_tokens,
        num_q_heads,
        num_kv_heads,
        head_dim,
        q.stride(0),
        k.stride(0),
        cos_sin.shape[0],
        library.DTYPE_CODES[q.dtype],
        device,
        library.stream(device),
    )
    return q_out, k_out
