"""Codes to and from the canonical bit stream.

Row n of a packed weight is one little-endian bit stream: code k occupies bits [k*bits, (k+1)*bits) and bit b
of the stream is bit b % 32 of word b // 32. 3-bit codes therefore cross bytes and words:

    bits   0  3  6  9  12 ...          byte 0           byte 1            byte 2
          | c0 | c1 | c2 | c3 | ...    c0 c1 c2[0:2]    c2[2] c3 c4 c5[0]  c5[1:3] c6 c7

Working on bytes instead of words keeps every intermediate at one byte a code and never overflows: the
smallest run of codes that ends on a byte is 4, 8, 2, 1 codes in 1, 3, 1, 1 bytes for 2, 3, 4, 8 bits.
Torch runs on little-endian hosts only, so four bytes viewed as int32 are the word of the stream.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qsun_kernels.quant.spec import SUPPORTED_BITS


def _check_bits(bits: int) -> None:
    if isinstance(bits, bool) or bits not in SUPPORTED_BITS:
        raise ValueError(f"bits is {bits!r}, expected one of {SUPPORTED_BITS}")


def _run(bits: int) -> tuple[int, int]:
    """(codes, bytes) of the smallest run of codes that ends on a byte boundary."""
    codes = math.lcm(bits, 8) // bits
    return codes, codes * bits // 8


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into rows of a little-endian bit stream.

    codes: uint8 (N, K), each below 2**bits, any K.
    Returns int32 (N, ceil(K*bits/32)), contiguous; the bits after the last code are zero.
    Raises TypeError for another dtype, ValueError for another rank, width, or a code that does not fit.
    """
    _check_bits(bits)
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes has dtype {codes.dtype}, expected torch.uint8")
    if codes.dim() != 2:
        raise ValueError(f"codes has shape {tuple(codes.shape)}, expected (N, K)")
    if bits < 8 and codes.numel() and int(codes.max()) >= 1 << bits:
        largest, limit = int(codes.max()), (1 << bits) - 1
        raise ValueError(f"codes reach {largest}, expected at most {limit} for {bits} bits")
    N, K = codes.shape
    num_bytes = 4 * (-(-K * bits // 32))
    run_codes, run_bytes = _run(bits)
    runs = -(-num_bytes // run_bytes)
    if runs * run_codes != K:
        codes = torch.nn.functional.pad(codes, (0, runs * run_codes - K))
    codes = codes.reshape(N, runs, run_codes)
    stream = torch.zeros(N, runs, run_bytes, dtype=torch.uint8, device=codes.device)
    for i in range(run_codes):
        byte, shift = divmod(i * bits, 8)
        stream[:, :, byte] |= codes[:, :, i] << shift
        if shift + bits > 8:
            stream[:, :, byte + 1] |= codes[:, :, i] >> (8 - shift)
    # A single row is contiguous whatever its stride, and only a copy gives it the stride that the view needs.
    return stream.reshape(N, runs * run_bytes)[:, :num_bytes].flatten().view(torch.int32).view(N, -1)


def unpack_codes(qweight: Tensor, bits: int, K: int) -> Tensor:
    """Read K codes a row back from the bit stream; the inverse of `pack_codes`.

    qweight: int32 (N, ceil(K*bits/32)).
    Returns uint8 (N, K), contiguous.
    Raises TypeError for another dtype, ValueError for a shape that does not hold K codes a row.
    """
    _check_bits(bits)
    if qweight.dtype != torch.int32:
        raise TypeError(f"qweight has dtype {qweight.dtype}, expected torch.int32")
    words = -(-K * bits // 32)
    if qweight.dim() != 2 or qweight.shape[1] != words:
        raise ValueError(
            f"qweight has shape {tuple(qweight.shape)}, "
            f"expected (N, {words}) for K = {K} codes of {bits} bits"
        )
    N = qweight.shape[0]
    run_codes, run_bytes = _run(bits)
    stream = qweight.contiguous().view(torch.uint8)
    runs = -(-K // run_codes)
    if stream.shape[1] < runs * run_bytes:
        stream = torch.nn.functional.pad(stream, (0, runs * run_bytes - stream.shape[1]))
    stream = stream[:, : runs * run_bytes].reshape(N, runs, run_bytes)
    codes = torch.empty(N, runs, run_codes, dtype=torch.uint8, device=qweight.device)
    mask = (1 << bits) - 1
    for i in range(run_codes):
        byte, shift = divmod(i * bits, 8)
        code = stream[:, :, byte] >> shift
        if shift + bits > 8:
            code = code | (stream[:, :, byte + 1] << (8 - shift))
        codes[:, :, i] = code & mask
    return codes.reshape(N, runs * run_codes)[:, :K].contiguous()
