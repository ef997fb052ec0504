"""Random numbers that depend on a key and the vocabulary index and on nothing else.

A generator object gives a request other numbers when its place in the batch, the batch's size or the device
changes.  Here every number is computed by itself from its coordinates: the key of the row and the vocabulary
index are mixed to 64 bits, in integer arithmetic that wraps alike everywhere.  The mixing is SplitMix64's
(Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014, fig. 16), so a row is a
SplitMix64 stream that starts at its key.

The bits are the same on every device.  The two logarithms that make a Gumbel variable of them are taken in
float64, where implementations differ by a unit in the last place, and rounded to float32, which hides that
for all but about one value in 10^8: such a value differs by one unit in its last place.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["GAMMA", "MIX_1", "MIX_2", "gumbel_noise", "uniform_bits"]

GAMMA = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB


def _signed(value: int) -> int:
    """The same 64 bits as two's complement, which is what an int64 tensor holds."""
    return value - (1 << 64) if value >> 63 else value


def _shifted(bits: Tensor, count: int) -> Tensor:
    """Logical right shift: int64's own `>>` copies the sign down."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def uniform_bits(keys: Tensor, size: int) -> Tensor:
    """int64 (B, size): 64 random bits for each row key (int64 (B,)) and index."""
    counters = torch.arange(1, size + 1, dtype=torch.int64, device=keys.device) * _signed(GAMMA)
    bits = keys[:, None] + counters
    bits ^= _shifted(bits, 30)
    bits *= _signed(MIX_1)
    bits ^= _shifted(bits, 27)
    bits *= _signed(MIX_2)
    bits ^= _shifted(bits, 31)
    return bits


def gumbel_noise(keys: Tensor, size: int) -> Tensor:
    """float32 (B, size): independent standard Gumbel variables, -log(-log(u)), for row keys int64 (B,).

    u is the middle of one of 2**52 equal parts of (0, 1), so it is neither 0 nor 1 and the noise is finite.
    """
    uniform = _shifted(uniform_bits(keys, size), 12).double().add_(0.5).mul_(2.0**-52)
    return uniform.log_().neg_().log_().neg_().float()
