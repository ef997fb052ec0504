"""The CUDA backend: launchers on `_C`, the binding of libqsun. The only module that imports `_C`.

It imports without `_C` and without a GPU; `unavailable` then says what is missing. Launchers take arguments
that the operators have validated, allocate the outputs (and scratch, where a kernel needs some) with torch,
and pass addresses, sizes and the current stream on. They never synchronise, so CUDA graphs capture them.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qsun_kernels.backends.panels import BLOCK_COLUMNS, pack_panels
from qsun_kernels.backends.problems import (
    ApplyRopeProblem,
    DequantizeProblem,
    Implementation,
    LinearImplementation,
    LinearOperator,
    PagedAttentionDecodeProblem,
    PreparedWeight,
    RmsNormProblem,
    SiluAndMulProblem,
    Wna16GateUpSiluProblem,
    Wna16Problem,
    WriteKvCacheProblem,
)

if TYPE_CHECKING:
    from qsun_kernels.quant import PackedWeight

try:
    import qsun_kernels._C as _C
except ImportError as error:
    _import_error: ImportError | None = error
else:
    _import_error = None

__all__ = ["IMPLEMENTATIONS", "build_info", "covers", "unavailable"]

ROWS_LAYOUT = "cuda.rows"
"""(qweight, scales[, qzeros][, g_idx]) as in PackedWeight, for float32. The others: backends/panels.py."""

PANEL_DTYPES = (torch.float16, torch.bfloat16)
"""Activations that the tensor cores take."""

_GATHERED_BEFORE = 16
"""Above this many rows of x, act-order columns are gathered by a kernel of their own."""

_DTYPE_CODES: Mapping[torch.dtype, int] = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""qsun::DType in csrc/include/qsun/types.h."""

_BUILD_RECORD = Path(__file__).parent.parent / "_build_info.json"


# ---- what was built, and what can run it


def build_info() -> Mapping[str, object]:
    """How the library was built (archs, nvcc, host_compiler, revision, cuda_runtime); empty if it was not."""
    return {} if _import_error is not None else _C.build_info()


def _why_not_built() -> str:
    if not isinstance(_import_error, ModuleNotFoundError) or _import_error.name != "qsun_kernels._C":
        return f"the CUDA library does not load ({_import_error})"
    if not _BUILD_RECORD.exists():
        return "the CUDA library is not built (no build record: run `pip install .`)"
    record = json.loads(_BUILD_RECORD.read_text())
    if record["build"]:
        return f"the CUDA library was built, but not for Python {platform.python_version()}: reinstall"
    return f"the CUDA library is not built ({record['reason']})"


def covers(archs: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether machine code for one of `archs` runs on a GPU of compute capability (major, minor).

    "80" runs on every 8.x; "90a" (architecture-specific) on 9.0 alone; "100f" (family-specific) on 10.x.
    Source: CUDA C++ Programming Guide, "Binary Compatibility" and "Feature Set Compiler Targets".
    """
    for arch in archs:
        match = re.fullmatch(r"(\d+)(\d)([af]?)", arch)
        if match is None:
            continue
        built = (int(match[1]), int(match[2]))
        if built == capability or (match[3] != "a" and built[0] == capability[0] and built < capability):
            return True
    return False


def _refuse_capability(capability: tuple[int, int]) -> str | None:
    archs = _C.build_info()["archs"]
    if covers(archs, capability):
        return None
    built = ", ".join(f"sm_{arch}" for arch in archs)
    name = f"{capability[0]}{capability[1]}"
    return (
        f"the CUDA library is built for {built}, and this GPU is sm_{name}: "
        f"reinstall with QSUN_CUDA_ARCHS={'90a' if name == '90' else name}"
    )


def unavailable() -> str | None:
    """Why no kernel here can run on this machine; None when they can."""
    if _import_error is not None:
        return _why_not_built()
    if not torch.cuda.is_available():
        return f"no CUDA device is visible to torch {torch.__version__}"
    if torch.version.hip is not None:
        return f"torch {torch.__version__} is built for ROCm, expected a CUDA build"
    refusals = [
        _refuse_capability(torch.cuda.get_device_capability(index))
        for index in range(torch.cuda.device_count())
    ]
    return None if None in refusals else refusals[0]


def _refuse(device: torch.device, **dtypes: torch.dtype) -> str | None:
    """Why no kernel here runs on `device` with these dtypes (by argument name); None when they do."""
    if device.type != "cuda":
        return f"device is {device}, expected a CUDA device"
    for name, dtype in dtypes.items():
        if dtype not in _DTYPE_CODES:
            return f"{name} is {dtype}, expected one of {', '.join(map(str, _DTYPE_CODES))}"
    return _refuse_capability(torch.cuda.get_device_capability(device))


# ---- what launchers share


@lru_cache(maxsize=64)
def _device_props(index: int) -> _C.DeviceProps:
    return _C.device_info(index)


def _stream(index: int) -> int:
    """The handle of torch's current stream on device `index`."""
    # torch.cuda.current_stream() makes a Stream object of the same number, which costs more than a launch.
    return torch._C._cuda_getCurrentRawStream(index)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _rows(x: Tensor) -> Tensor:
    """x (..., H) as (rows, H), its rows contiguous: a view where the strides allow one."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _row_stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _always(text: str) -> Callable[[Any], str]:
    """A `describe` for an operator that has one kernel."""
    return lambda problem: text


# ---- wna16_linear, dequantize


def _supports_linear(problem: Wna16Problem | DequantizeProblem) -> str | None:
    return _refuse(problem.device, dtype=problem.dtype)


def _describe_linear(problem: Wna16Problem) -> str:
    if problem.dtype == torch.float32:
        gather = ", group by group index" if problem.has_g_idx else ""
        return (
            f"wna16_rows<{problem.bits} bits>: a warp streams two weight rows, up to 8 tokens at once{gather}"
        )
    gather = ", x gathered by column" if problem.has_g_idx else ""
    return f"panels of {problem.bits} bits: streamed for few tokens, wgmma for many on sm_90a{gather}"


def _supports_gate_up(problem: Wna16GateUpSiluProblem) -> str | None:
    if problem.dtype not in PANEL_DTYPES:
        return f"dtype is {problem.dtype}, expected one of {', '.join(map(str, PANEL_DTYPES))}"
    return _refuse(problem.device, dtype=problem.dtype)


def _describe_gate_up(problem: Wna16GateUpSiluProblem) -> str:
    return f"{_describe_linear(problem.linear)}; silu(gate) * up before the one rounding"


def _prepare(packed: PackedWeight, dtype: torch.dtype) -> PreparedWeight:
    if dtype not in PANEL_DTYPES:
        return PreparedWeight(packed.spec, packed.N, packed.K, dtype, "cuda", ROWS_LAYOUT, packed.tensors)
    return _prepare_panels(packed, dtype, "wna16_linear")


def _prepare_gate_up(packed: PackedWeight, dtype: torch.dtype) -> PreparedWeight:
    return _prepare_panels(packed, dtype, "wna16_gate_up_silu")


def _prepare_panels(packed: PackedWeight, dtype: torch.dtype, operator: LinearOperator) -> PreparedWeight:
    panels = pack_panels(packed, dtype, gate_up=operator == "wna16_gate_up_silu")
    return PreparedWeight(
        packed.spec, packed.N, packed.K, dtype, "cuda", panels.layout, panels.tensors, operator
    )


def _wna16_linear(
    x: Tensor,
    weight: PreparedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor | None,
    batch_invariant: bool = False,
) -> Tensor:
    """x (M, K) -> (M, N), into `out` when that is given."""
    if out is None:
        out = torch.empty((x.shape[0], weight.N), dtype=x.dtype, device=x.device)
    if weight.stored_layout == ROWS_LAYOUT:
        # The tile that a row of x is in does not change the order in which its products are added.
        _launch_rows(x, weight, bias, residual, out)
    else:
        _launch_panels(x, weight, bias, residual, out, batch_invariant)
    return out


def _wna16_gate_up_silu(x: Tensor, weight: PreparedWeight, out: Tensor | None) -> Tensor:
    """x (M, K) -> (M, N / 2), into `out` when that is given."""
    if out is None:
        out = torch.empty((x.shape[0], weight.N // 2), dtype=x.dtype, device=x.device)
    _launch_panels(x, weight, None, None, out, False)
    return out


def _launch_panels(
    x: Tensor,
    weight: PreparedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    batch_invariant: bool,
    config: _C.StreamConfig | None = None,
) -> None:
    """config: how to run the streaming kernel, for tests and tuning; by default the library chooses."""
    spec, panels = weight.spec, weight.tensors[0]
    perm = weight.tensors[1] if len(weight.tensors) == 2 else None
    if perm is not None and x.shape[0] > _GATHERED_BEFORE and not batch_invariant and config is None:
        # The copy engine, which feeds the kernel for many tokens, cannot gather.
        x, perm = _gathered(x, perm), None
    group = 32 if weight.stored_layout.endswith("32") else spec.group_size
    device = x.get_device()
    _C.wna16_panels(
        config,
        x.data_ptr(),
        panels.data_ptr(),
        _address(perm),
        _address(bias),
        _address(residual),
        out.data_ptr(),
        x.shape[0],
        weight.N,
        x.shape[1],
        panels.shape[1],
        x.stride(0),
        _row_stride(residual),
        out.stride(0),
        spec.bits,
        1 if group == "channel" else BLOCK_COLUMNS // group,
        not spec.symmetric,
        weight.operator == "wna16_gate_up_silu",
        batch_invariant,
        weight.is_prefetched,
        _DTYPE_CODES[x.dtype],
        device,
        _stream(device),
    )


def _gathered(x: Tensor, perm: Tensor) -> Tensor:
    """x with its columns as the weight stores them: (M, len(perm)), zero where perm is -1."""
    columns = torch.where(perm < 0, x.shape[1], perm)
    return torch.nn.functional.pad(x, (0, 1)).index_select(1, columns)


def _launch_rows(
    x: Tensor, weight: PreparedWeight, bias: Tensor | None, residual: Tensor | None, out: Tensor
) -> None:
    spec, tensors = weight.spec, weight.tensors
    qzeros = None if spec.symmetric else tensors[2]
    g_idx = tensors[-1] if len(tensors) == (3 if spec.symmetric else 4) else None
    device = x.get_device()
    _C.wna16_linear(
        x.data_ptr(),
        tensors[0].data_ptr(),
        tensors[1].data_ptr(),
        _address(qzeros),
        _address(g_idx),
        _address(bias),
        _address(residual),
        out.data_ptr(),
        x.shape[0],
        weight.N,
        weight.K,
        x.stride(0),
        _row_stride(residual),
        out.stride(0),
        spec.bits,
        -1 if spec.group_size == "channel" else spec.group_size,
        _DTYPE_CODES[x.dtype],
        device,
        _stream(device),
    )


def _dequantize(packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The weight as (N, K) of `dtype`."""
    spec = packed.spec
    out = torch.empty((packed.N, packed.K), dtype=dtype, device=packed.device)
    device = out.get_device()
    _C.dequantize(
        packed.qweight.data_ptr(),
        packed.scales.data_ptr(),
        _address(packed.qzeros),
        _address(packed.g_idx),
        out.data_ptr(),
        packed.N,
        packed.K,
        spec.bits,
        -1 if spec.group_size == "channel" else spec.group_size,
        _DTYPE_CODES[packed.scales.dtype],
        _DTYPE_CODES[dtype],
        device,
        _stream(device),
    )
    return out


# ---- paged_attention_decode, write_kv_cache


def _supports_attention(problem: PagedAttentionDecodeProblem) -> str | None:
    if problem.kv_dtype != problem.dtype:
        return f"kv_dtype is {problem.kv_dtype}, expected that of q ({problem.dtype})"
    if problem.head_dim % 8 or problem.head_dim > 256:
        return f"head_dim is {problem.head_dim}, expected a multiple of 8, at most 256"
    size = problem.block_size
    if not 8 <= size <= 65536 or size & (size - 1):
        return f"block_size is {size}, expected a power of two from 8 to 65536"
    return _refuse(problem.device, dtype=problem.dtype)


def _describe_attention(problem: PagedAttentionDecodeProblem) -> str:
    group = problem.num_q_heads // problem.num_kv_heads
    tile = 1 if group <= 1 else 4 if group <= 4 else 8
    return f"paged_attention_split: {tile} query heads a block, lengths cut by batch size, then combined"


@lru_cache(maxsize=4096)
def _scratch_bytes(
    batch: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    max_blocks: int,
    window: int,
    device: int,
) -> int:
    return _C.paged_attention_decode_scratch_bytes(
        batch, num_q_heads, num_kv_heads, head_dim, block_size, max_blocks, window, _device_props(device)
    )


def _paged_attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    softmax_scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """out (B, Hq, D) and lse (B, Hq)."""
    batch, num_q_heads, head_dim = q.shape
    num_blocks, num_kv_heads, block_size, _ = k_cache.shape
    max_blocks = block_table.shape[1]
    device = q.get_device()
    out = torch.empty((batch, num_q_heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, num_q_heads), dtype=torch.float32, device=q.device)
    if batch == 0:
        return out, lse
    last = -1 if window is None else window
    scratch_bytes = _scratch_bytes(
        batch, num_q_heads, num_kv_heads, head_dim, block_size, max_blocks, last, device
    )
    scratch = torch.empty(scratch_bytes // 4, dtype=torch.float32, device=q.device) if scratch_bytes else None
    _C.paged_attention_decode(
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        block_table.data_ptr(),
        seq_lens.data_ptr(),
        out.data_ptr(),
        lse.data_ptr(),
        _address(scratch),
        scratch_bytes,
        batch,
        num_q_heads,
        num_kv_heads,
        head_dim,
        num_blocks,
        block_size,
        max_blocks,
        q.stride(0),
        block_table.stride(0),
        last,
        softmax_scale,
        _DTYPE_CODES[q.dtype],
        device,
        _stream(device),
    )
    return out, lse


def _supports_write(problem: WriteKvCacheProblem) -> str | None:
    if problem.kv_dtype != problem.dtype:
        return f"kv_dtype is {problem.kv_dtype}, expected that of k and v ({problem.dtype})"
    return _refuse(problem.device, dtype=problem.dtype)


def _write_kv_cache(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    num_tokens, num_kv_heads, head_dim = k.shape
    device = k.get_device()
    _C.write_kv_cache(
        k.data_ptr(),
        v.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        slot_mapping.data_ptr(),
        num_tokens,
        num_kv_heads,
        head_dim,
        k_cache.shape[0],
        k_cache.shape[2],
        k.stride(0),
        v.stride(0),
        _DTYPE_CODES[k.dtype],
        device,
        _stream(device),
    )


# ---- the small operators of a decode step


def _supports_rms_norm(problem: RmsNormProblem) -> str | None:
    if problem.hidden_size < 1:
        return f"hidden_size is {problem.hidden_size}, expected at least 1"
    return _refuse(problem.device, dtype=problem.dtype)


def _describe_rms_norm(problem: RmsNormProblem) -> str:
    added = ", residual added in the same pass" if problem.has_residual else ""
    return f"rms_norm: a block a row{added}"


def _rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None
) -> Tensor | tuple[Tensor, Tensor]:
    rows = _rows(x)
    added = None if residual is None else _rows(residual)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    device = x.get_device()
    _C.rms_norm(
        rows.data_ptr(),
        _address(added),
        weight.data_ptr(),
        out.data_ptr(),
        _address(total),
        rows.shape[0],
        rows.shape[1],
        rows.stride(0),
        _row_stride(added),
        eps,
        _DTYPE_CODES[x.dtype],
        device,
        _stream(device),
    )
    return out if total is None else (out, total)


def _supports_silu_and_mul(problem: SiluAndMulProblem) -> str | None:
    if problem.size < 1:
        return f"size is {problem.size}, expected at least 1"
    return _refuse(problem.device, dtype=problem.dtype)


def _silu_and_mul(x: Tensor) -> Tensor:
    rows = _rows(x)
    size = x.shape[-1] // 2
    out = torch.empty((*x.shape[:-1], size), dtype=x.dtype, device=x.device)
    device = x.get_device()
    _C.silu_and_mul(
        rows.data_ptr(),
        out.data_ptr(),
        rows.shape[0],
        size,
        rows.stride(0),
        _DTYPE_CODES[x.dtype],
        device,
        _stream(device),
    )
    return out


def _supports_rope(problem: ApplyRopeProblem) -> str | None:
    if problem.head_dim % 2:
        return f"head_dim is {problem.head_dim}, expected an even number"
    return _refuse(problem.device, dtype=problem.dtype)


def _apply_rope(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor]:
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    device = q.get_device()
    _C.apply_rope(
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
        _DTYPE_CODES[q.dtype],
        device,
        _stream(device),
    )
    return q_out, k_out


IMPLEMENTATIONS: Mapping[str, Implementation] = MappingProxyType(
    {
        "wna16_linear": LinearImplementation(_supports_linear, _wna16_linear, _describe_linear, _prepare),
        "wna16_gate_up_silu": LinearImplementation(
            _supports_gate_up, _wna16_gate_up_silu, _describe_gate_up, _prepare_gate_up
        ),
        "dequantize": Implementation(
            _supports_linear, _dequantize, _always("dequantize: a thread rebuilds 8 weights")
        ),
        "paged_attention_decode": Implementation(
            _supports_attention, _paged_attention_decode, _describe_attention
        ),
        "write_kv_cache": Implementation(
            _supports_write,
            _write_kv_cache,
            _always("write_kv_cache: a thread copies 16 bytes of k and of v, or one element where unaligned"),
        ),
        "rms_norm": Implementation(_supports_rms_norm, _rms_norm, _describe_rms_norm),
        "silu_and_mul": Implementation(
            _supports_silu_and_mul,
            _silu_and_mul,
            _always("silu_and_mul: a thread 16 bytes of the output, or one element where unaligned"),
        ),
        "apply_rope": Implementation(
            _supports_rope, _apply_rope, _always("apply_rope: queries and keys in one launch")
        ),
    }
)
