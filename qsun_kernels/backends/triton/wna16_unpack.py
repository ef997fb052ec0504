"""The words of a tile as 16-bit weights: (code - zero) * scale, rounded once.

Compiled, two codes at a time: a word shifted and masked holds two codes in its halves; with the bits of 128
(bfloat16) or 1024 (float16) or-ed in, a half is that number plus the code, and subtracting the number plus
the zero point leaves code - zero exactly. The multiplication rounds, and nothing else does. In bfloat16 there
is no room for codes of 8 bits beside such a number; they take the same way through float32, one at a time.
Interpreted, the same numbers by plain arithmetic.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton.language as tl

from qsun_kernels.backends.triton.numerics import INTERPRETED, device_function, round_float32


@lru_cache(maxsize=32)
def unpack_assembly(bits: int, dtype: torch.dtype, symmetric: bool) -> str:
    """PTX that turns a word into the 32 / bits weights of its codes.

    Operands: the weights, 16 bits each, in the order of `unpack_words`; the word; the pair of scales; for
    asymmetric weights the pair of zero points.
    """
    codes = 32 // bits
    word, scales, zeros = (f"${codes + i}" for i in range(3))
    lines = [
        ".reg .b32 pair, shifted, one, nothing, scale0, scale1, zero0, zero1;",
        ".reg .f32 low, high, center0, center1;",
        # Minus zero: adding it to a product changes nothing, the sign of a zero included.
        "mov.b32 nothing, 0x80008000;",
        f"prmt.b32 scale0, {scales}, 0, 0x1010;",
        f"prmt.b32 scale1, {scales}, 0, 0x3232;",
    ]
    suffix = "bf16x2" if dtype == torch.bfloat16 else "f16x2"
    if bits == 8 and dtype == torch.bfloat16:
        if symmetric:
            lines += ["mov.b32 center0, 0x4b000080;", "mov.b32 center1, 0x4b000080;"]
        else:
            for half, selector in enumerate(("0x7440", "0x7442")):
                lines += [f"prmt.b32 pair, {zeros}, 0x4b000000, {selector};", f"mov.b32 center{half}, pair;"]
    else:
        base, unit = (0x4300, 0x3F80) if dtype == torch.bfloat16 else (0x6400, 0x3C00)
        # The number to add: minus (128 or 1024, plus the zero point).
        negative = 0x8000 | base
        lines.append(f"mov.b32 one, {_twice(unit)};")
        if symmetric:
            middle = _twice(negative | 1 << (bits - 1))
            lines += [f"mov.b32 zero0, {middle};", f"mov.b32 zero1, {middle};"]
        else:
            lines += [
                f"or.b32 pair, {zeros}, {_twice(negative)};",
                "prmt.b32 zero0, pair, 0, 0x1010;",
                "prmt.b32 zero1, pair, 0, 0x3232;",
            ]
    for pair in range(codes // 2):
        half = pair % 2
        if bits == 8 and dtype == torch.bfloat16:
            for name, byte in (("low", 2 * pair), ("high", 2 * pair + 1)):
                lines += [
                    f"prmt.b32 shifted, {word}, 0x4b000000, 0x744{byte};",
                    f"mov.b32 {name}, shifted;",
                    f"sub.rn.f32 {name}, {name}, center{half};",
                ]
            lines.append("cvt.rn.bf16x2.f32 pair, high, low;")
        else:
            if bits == 8:
                lines.append(f"prmt.b32 pair, {word}, 0x64646464, 0x4{2 * pair + 1}4{2 * pair};")
            else:
                source = word
                if pair > 0:
                    lines.append(f"shr.u32 shifted, {word}, {bits * pair};")
                    source = "shifted"
                mask = _twice((1 << bits) - 1)
                # 0xea: (a & b) | c.
                lines.append(f"lop3.b32 pair, {source}, {mask}, {_twice(base)}, 0xea;")
            lines.append(f"fma.rn.{suffix} pair, pair, one, zero{half};")
        lines += [
            f"fma.rn.{suffix} pair, pair, scale{half}, nothing;",
            f"mov.b32 {{${2 * pair}, ${2 * pair + 1}}}, pair;",
        ]
    return "{\n" + "\n".join(lines) + "\n}"


def _twice(half: int) -> str:
    return f"{half << 16 | half:#010x}"


@device_function
def _unpack_interpreted(
    words: tl.tensor, scales: tl.tensor, zeros: tl.tensor, like: tl.tensor, BITS: tl.constexpr
) -> tl.tensor:
    """`unpack_words`, all codes at once: what the interpreter is slow at is the number of operations."""
    CODES: tl.constexpr = 32 // BITS
    number = tl.arange(0, CODES)
    shift = 8 * number if BITS == 8 else BITS * (number // 2) + 16 * (number % 2)
    half = 16 * (number // 2 % 2)
    code = (words.to(tl.uint32, bitcast=True)[:, :, None] >> shift) & ((1 << BITS) - 1)
    scale = (scales.to(tl.uint32, bitcast=True)[:, :, None] >> half) & 0xFFFF
    if like.dtype.element_ty == tl.bfloat16:
        scale = (scale << 16).to(tl.float32, bitcast=True)
    else:
        scale = scale.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    zero = 1 << (BITS - 1)
    if zeros is not None:
        zero = ((zeros.to(tl.uint32, bitcast=True)[:, :, None] >> half) & 0xFFFF).to(tl.float32)
    weight = round_float32((code.to(tl.float32) - zero) * scale, like)
    # The bits of a code's number, the lowest first.
    ROWS: tl.constexpr = words.shape[0]
    COLUMNS: tl.constexpr = words.shape[1]
    if BITS == 8:
        return tl.permute(tl.reshape(weight, (ROWS, COLUMNS, 2, 2)), (0, 1, 3, 2))
    elif BITS == 4:
        return tl.permute(tl.reshape(weight, (ROWS, COLUMNS, 2, 2, 2)), (0, 1, 4, 3, 2))
    else:
        return tl.permute(tl.reshape(weight, (ROWS, COLUMNS, 2, 2, 2, 2)), (0, 1, 5, 4, 3, 2))


@device_function
def _join_4(a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor) -> tl.tensor:
    return tl.join(tl.join(a, b), tl.join(c, d))


@device_function
def unpack_words(
    words: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    like: tl.tensor,
    BITS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
) -> tl.tensor:
    """The weights of `words` (I, J), with new last dimensions for the bits of a code's number in its word.

    The number is e + 2 (h_n + 2 (h_k + 2 (s % 2))) as far as `BITS` goes (see `wna16_layout`); e comes first.
    scales, zeros: int32 (I, J), the halves for h_n = 0 and 1; zeros None in the middle. like: a pointer to
    weights. Returns the dtype that it points to, interpreted float32.
    """
    CODES: tl.constexpr = 32 // BITS
    if INTERPRETED:
        return _unpack_interpreted(words, scales, zeros, like, BITS)
    elif zeros is None:
        t = tl.inline_asm_elementwise(
            ASSEMBLY,
            "=h," * CODES + "r,r",
            [words, scales],
            dtype=(like.dtype.element_ty,) * CODES,
            is_pure=True,
            pack=1,
        )
    else:
        t = tl.inline_asm_elementwise(
            ASSEMBLY,
            "=h," * CODES + "r,r,r",
            [words, scales, zeros],
            dtype=(like.dtype.element_ty,) * CODES,
            is_pure=True,
            pack=1,
        )
    if BITS == 8:
        return _join_4(t[0], t[1], t[2], t[3])
    elif BITS == 4:
        return tl.join(_join_4(t[0], t[1], t[2], t[3]), _join_4(t[4], t[5], t[6], t[7]))
    else:
        return tl.join(
            tl.join(_join_4(t[0], t[1], t[2], t[3]), _join_4(t[4], t[5], t[6], t[7])),
            tl.join(_join_4(t[8], t[9], t[10], t[11]), _join_4(t[12], t[13], t[14], t[15])),
        )
