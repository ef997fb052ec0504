"""A kernel that only reads: the bandwidth every other kernel is measured against.

No operator of torch fits: a copy writes as much as it reads, a fill reads nothing, and a floating point
reduction is limited by its adds and its second pass, which would make a share of the bandwidth look better
than it is. The kernel here is the least that proves every byte was read: 16-byte loads, eight a loop, one
integer add a word, one 4-byte store a thread. It is kept as PTX, which the driver itself compiles, so the
figure needs no compiler and no built extension.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

_THREADS = 512
_LOADS = 8
_VECTOR_BYTES = 16


@dataclass(frozen=True, slots=True)
class ReadPattern:
    """How the threads walk over the buffer; which one is fastest differs from chip to chip.

    blocks_per_sm: of 512 threads each.
    block_contiguous: the eight loads of a loop are neighbours of the block's own (64 KiB a block and loop),
    else
        the whole grid reads one row of vectors after the other.
    """

    blocks_per_sm: int
    block_contiguous: bool


PATTERNS = tuple(ReadPattern(blocks, contiguous) for contiguous in (True, False) for blocks in (1, 2, 4))


def _ptx() -> str:
    """The kernel: thread t of block b adds up vectors b * block_stride + t + i * load_stride, i in 0..7.

    Then those `step` further on, and so forth up to `vectors`, a multiple of step.
    """
    registers = [tuple(f"%v{4 * i + j}" for j in range(4)) for i in range(_LOADS)]
    body = []
    for i, vector in enumerate(registers):
        body.append(f"  ld.global.L1::no_allocate.v4.u32 {{{', '.join(vector)}}}, [%address];")
        if i + 1 < _LOADS:
            body.append("  add.u64 %address, %address, %stride;")
    for vector in registers:
        body.extend(f"  add.u32 %sum, %sum, {word};" for word in vector)
    return f"""
.version 7.4
.target sm_80
.address_size 64
.visible .entry stream_read(
  .param .u64 base, .param .u64 vectors, .param .u64 sums, .param .u32 block_stride, .param .u32 load_stride)
{{
  .reg .pred %done;
  .reg .u32 %block, %blocks, %thread, %threads, %total, %sum, %between, %apart;
  .reg .u32 %v<{4 * _LOADS}>;
  .reg .u64 %index, %count, %step, %stride, %address, %base, %out, %offset, %wide;
  ld.param.u64 %base, [base];
  ld.param.u64 %count, [vectors];
  ld.param.u64 %out, [sums];
  ld.param.u32 %between, [block_stride];
  ld.param.u32 %apart, [load_stride];
  mov.u32 %block, %ctaid.x;
  mov.u32 %blocks, %nctaid.x;
  mov.u32 %thread, %tid.x;
  mov.u32 %threads, %ntid.x;
  cvt.u64.u32 %wide, %thread;
  mul.wide.u32 %index, %block, %between;
  add.u64 %index, %index, %wide;
  mul.wide.u32 %offset, %block, %threads;
  add.u64 %offset, %offset, %wide;
  mul.lo.u32 %total, %blocks, %threads;
  mul.wide.u32 %step, %total, {_LOADS};
  mul.wide.u32 %stride, %apart, {_VECTOR_BYTES};
  mov.u32 %sum, 0;
loop:
  setp.ge.u64 %done, %index, %count;
  @%done bra finish;
  mul.lo.u64 %address, %index, {_VECTOR_BYTES};
  add.u64 %address, %address, %base;
{chr(10).join(body)}
  add.u64 %index, %index, %step;
  bra loop;
finish:
  mul.lo.u64 %offset, %offset, 4;
  add.u64 %out, %out, %offset;
  st.global.u32 [%out], %sum;
  ret;
}}
"""


@lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(what: str, status: int) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        reason = text.value.decode() if text.value else "unknown error"
        raise RuntimeError(f"stream_read: {what} failed: {reason} (CUDA error {status})")


@lru_cache(maxsize=8)
def _function(device_index: int) -> ctypes.c_void_p:
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    with torch.cuda.device(device_index):
        torch.cuda.synchronize()  # makes torch's context the current one
        status = _driver().cuModuleLoadData(ctypes.byref(module), _ptx().encode())
        _check("loading the kernel", status)
        _check("looking it up", _driver().cuModuleGetFunction(ctypes.byref(function), module, b"stream_read"))
    return function


def granule_bytes(device: torch.device) -> int:
    """The buffer size that every pattern of `StreamRead` needs a multiple of, in bytes."""
    multiprocessors = int(torch.cuda.get_device_properties(device).multi_processor_count)
    most = max(pattern.blocks_per_sm for pattern in PATTERNS)
    return multiprocessors * most * _THREADS * _LOADS * _VECTOR_BYTES


class StreamRead:
    """One pass over a buffer, ready to launch.

    buffer: contiguous int32 on CUDA, 16-byte aligned, a multiple of `granule_bytes` long.
    sums: int32, one a thread. After `launch` they add up, modulo 2**32, to the sum of the buffer's words.

    Raises ValueError for another buffer, RuntimeError when the driver refuses the kernel.
    """

    def __init__(self, buffer: Tensor, pattern: ReadPattern) -> None:
        granule = granule_bytes(buffer.device)
        if buffer.dtype != torch.int32 or not buffer.is_contiguous() or buffer.data_ptr() % _VECTOR_BYTES:
            raise ValueError(
                f"buffer is {buffer.dtype} with strides {buffer.stride()}, "
                "expected contiguous, 16-byte aligned int32"
            )
        if buffer.nbytes == 0 or buffer.nbytes % granule:
            raise ValueError(f"buffer has {buffer.nbytes} bytes, expected a positive multiple of {granule}")
        self.buffer = buffer
        self._device_index = buffer.get_device()
        self._function = _function(self._device_index)
        properties = torch.cuda.get_device_properties(buffer.device)
        self._blocks = int(properties.multi_processor_count) * pattern.blocks_per_sm
        threads = self._blocks * _THREADS
        self._block_stride, self._load_stride = _THREADS, threads
        if pattern.block_contiguous:
            self._block_stride, self._load_stride = _LOADS * _THREADS, _THREADS
        self.sums = torch.zeros(threads, dtype=torch.int32, device=buffer.device)

    def launch(self) -> None:
        """Enqueue the pass on the current stream."""
        values = (
            ctypes.c_uint64(self.buffer.data_ptr()),
            ctypes.c_uint64(self.buffer.nbytes // _VECTOR_BYTES),
            ctypes.c_uint64(self.sums.data_ptr()),
            ctypes.c_uint32(self._block_stride),
            ctypes.c_uint32(self._load_stride),
        )
        arguments = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        stream = ctypes.c_void_p(torch.cuda.current_stream(self._device_index).cuda_stream)
        with torch.cuda.device(self._device_index):
            status = _driver().cuLaunchKernel(
                self._function, self._blocks, 1, 1, _THREADS, 1, 1, 0, stream, arguments, None
            )
        _check(f"reading {self.buffer.nbytes} bytes", status)
