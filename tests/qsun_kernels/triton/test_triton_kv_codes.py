"""Codes in Triton: the assembly that unpacks them, by an evaluator of its few instructions, byte by byte."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton")
from qsun_kernels.backends.triton.kv_codes import assembly

pytestmark = pytest.mark.triton


def halves(word: int, dtype: torch.dtype) -> torch.Tensor:
    bits = torch.tensor([word & 0xFFFF, word >> 16], dtype=torch.int32).to(torch.int16)
    return bits.view(dtype)


def joined(pair: torch.Tensor) -> int:
    low, high = (int(bits) & 0xFFFF for bits in pair.view(torch.int16).tolist())
    return high << 16 | low


def evaluated(ptx: str, word: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """The pairs of numbers that the assembly makes of a word of four bytes."""
    outputs = 2 if "$4" not in ptx else 4
    registers = {f"${outputs}": word}

    def value(operand: str) -> int:
        return registers[operand] if operand in registers else int(operand, 0)

    for line in filter(None, (line.strip() for line in ptx.strip("{}\n").splitlines())):
        name, rest = line.rstrip(";").split(maxsplit=1)
        if name == ".reg":
            continue
        target, *operands = re.split(r",\s*", rest)
        got = [value(operand) for operand in operands]
        if name == "mov.b32":
            registers[target] = got[0]
        elif name == "and.b32":
            registers[target] = got[0] & got[1]
        elif name == "xor.b32":
            registers[target] = got[0] ^ got[1]
        elif name == "shr.u32":
            registers[target] = got[0] >> got[1]
        elif name == "prmt.b32":
            source = got[0] | got[1] << 32
            chosen = [source >> 8 * (got[2] >> 4 * i & 7) & 0xFF for i in range(4)]
            registers[target] = int.from_bytes(chosen, "little")
        elif name in ("fma.rn.bf16x2", "fma.rn.f16x2"):
            a, b, c = (halves(one, dtype).double() for one in got)
            registers[target] = joined((a * b + c).to(dtype))
        else:
            raise AssertionError(f"no such instruction here: {line}")
    return [halves(registers[f"${i}"], dtype).float() for i in range(outputs)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_byte_of_int8(dtype: torch.dtype) -> None:
    ptx = assembly("int8", dtype)
    for byte in range(256):
        four = [byte, (byte + 1) % 256, 255 - byte, (byte * 7) % 256]
        numbers = torch.cat(evaluated(ptx, int.from_bytes(four, "little"), dtype)).tolist()
        assert numbers == [b - 256 if b > 127 else b for b in four]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_byte_of_int4(dtype: torch.dtype) -> None:
    ptx = assembly("int4", dtype)
    for byte in range(256):
        four = [byte, (byte + 1) % 256, 255 - byte, (byte * 7) % 256]
        pairs = evaluated(ptx, int.from_bytes(four, "little"), dtype)
        assert torch.cat(pairs[:2]).tolist() == [b % 16 - 8 for b in four]
        assert torch.cat(pairs[2:]).tolist() == [b // 16 - 8 for b in four]


def test_only_integer_codes_of_16_bit_numbers_take_assembly() -> None:
    assert assembly("float8", torch.bfloat16) == assembly("numbers", torch.bfloat16) == ""
    assert assembly("int8", torch.float32) == ""
