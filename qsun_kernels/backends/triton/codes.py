"""The codes of a packed weight, from the bit stream of its rows to exact float32 numbers.

A code c becomes 2**23 + c by becoming the low mantissa bits of that number, and c - zero by subtracting
2**23 + zero: both are exact, and no integer is converted, which the hardware does at a quarter of the speed.
"""

from __future__ import annotations

import triton.language as tl

from qsun_kernels.backends.triton.numerics import device_function


@device_function
def load_codes(
    rows: tl.tensor,
    chunk: tl.tensor,
    n_mask: tl.tensor,
    W: tl.tensor,
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """2**23 + code of the columns of one chunk, float32 (BLOCK_N, BLOCK_K), with code 0 outside the weight.

    rows: (BLOCK_N, 1) addresses of the first word of each row. n_mask: (BLOCK_N, 1) rows that exist. W: words
    a row. chunk: columns [chunk * BLOCK_K, (chunk + 1) * BLOCK_K); BLOCK_K is a multiple of 32.

    Each word is loaded once and halved again and again: joining w and w >> 16 puts two halves side by side in
    a new last dimension, and so on down to single codes. The thread that loaded a word ends up with all of
    its codes, in order. 32 codes of 3 bits are 3 words: 16 of them come out of words 0 and 1 side by side, 16
    out of words 1 and 2.
    """
    if BITS == 3:
        first = 3 * (chunk * (BLOCK_K // 32) + tl.arange(0, BLOCK_K // 32)[None, :])
        word_0 = tl.load(rows + first, mask=n_mask & (first < W), other=0).to(tl.uint32, bitcast=True)
        word_1 = tl.load(rows + first + 1, mask=n_mask & (first + 1 < W), other=0).to(tl.uint32, bitcast=True)
        word_2 = tl.load(rows + first + 2, mask=n_mask & (first + 2 < W), other=0).to(tl.uint32, bitcast=True)
        low = word_0.to(tl.uint64) | (word_1.to(tl.uint64) << 32)
        high = word_1.to(tl.uint64) | (word_2.to(tl.uint64) << 32)
        codes = tl.join(low, high >> 16)
        codes = tl.join(codes, codes >> 24).to(tl.uint32)
        codes = tl.join(codes, codes >> 12)
        codes = tl.join(codes, codes >> 6)
        codes = tl.join(codes, codes >> 3)
    else:
        WORDS: tl.constexpr = BLOCK_K * BITS // 32
        word = chunk * WORDS + tl.arange(0, WORDS)[None, :]
        codes = tl.load(rows + word, mask=n_mask & (word < W), other=0).to(tl.uint32, bitcast=True)
        codes = tl.join(codes, codes >> 16)
        codes = tl.join(codes, codes >> 8)
        if BITS <= 4:
            codes = tl.join(codes, codes >> 4)
        if BITS == 2:
            codes = tl.join(codes, codes >> 2)
    codes = tl.reshape(codes & ((1 << BITS) - 1), (BLOCK_N, BLOCK_K))
    return (codes | 0x4B000000).to(tl.float32, bitcast=True)


@device_function
def minus_zero(
    codes: tl.tensor, qzeros: tl.tensor, index: tl.tensor, mask: tl.tensor, BITS: tl.constexpr
) -> tl.tensor:
    """code - zero from 2**23 + code, exactly; zeros at `index` of qzeros, or in the middle without it."""
    # Both branches return: a compiled function goes on after the `return` of a constant `if`.
    if qzeros is None:
        return codes - (8388608.0 + (1 << (BITS - 1)))
    else:
        return codes - (8388608.0 + tl.load(qzeros + index, mask=mask, other=0).to(tl.float32))
