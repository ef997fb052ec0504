"""Random numbers that depend on (seed, step, vocabulary index) and on nothing else.

A generator object gives a request other numbers when its place in the batch, the batch's size or the device
changes.  Here every number is computed by itself from its coordinates: the seed and the step are mixed to a
64-bit key on the host, the key and the vocabulary index to 64 bits on the device, in integer arithmetic that
wraps alike everywhere.  The mixing is SplitMix64's (Steele, Lea, Flood: "Fast splittable pseudorandom number
generators", OOPSLA 2014, fig. 16), so a row is a SplitMix64 stream that starts at its key.

The bits are the same on every device; the two logarithms that make a Gumbel variable of them are taken in
float64 and rounded to float32, which hides the last bit in which the devices' log may differ, but for rare
roundings.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["STATE_STEP", "gumbel_noise", "mix_states", "row_key", "row_state", "uniform_bits"]

UInt64Array: TypeAlias = NDArray[numpy.uint64]

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB

STATE_STEP = _GAMMA
"""What the state of a row grows by from one step to the next, modulo 2**64."""


def _signed(value: int) -> int:
    """The same 64 bits as two's complement, which is what an int64 tensor holds."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _mix(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK
    return value ^ (value >> 31)


def row_key(seed: int, step: int) -> int:
    """The key of one draw, as a signed 64-bit integer.  step: tokens of the output so far."""
    return _signed(_mix(row_state(seed, step)))


def row_state(seed: int, step: int) -> int:
    """What `row_key` mixes, in [0, 2**64): each step adds `STATE_STEP` to it."""
    return (_mix(seed + _GAMMA) + (step + 1) * _GAMMA) & _MASK


def mix_states(states: UInt64Array, keys: UInt64Array, work: UInt64Array) -> None:
    """Write the keys of many rows' states; all are (B,), `work` is scratch.  As `row_key`, bit for bit."""
    numpy.copyto(keys, states)
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        numpy.right_shift(keys, numpy.uint64(shift), out=work)
        numpy.bitwise_xor(keys, work, out=keys)
        numpy.multiply(keys, numpy.uint64(factor), out=keys)
    numpy.right_shift(keys, numpy.uint64(31), out=work)
    numpy.bitwise_xor(keys, work, out=keys)


def _shifted(bits: Tensor, count: int) -> Tensor:
    """Logical right shift: int64's own `>>` copies the sign down."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def uniform_bits(keys: Tensor, size: int) -> Tensor:
    """int64 (B, size): 64 random bits for each row key (int64 (B,)) and index."""
    counters = torch.arange(1, size + 1, dtype=torch.int64, device=keys.device) * _signed(_GAMMA)
    bits = keys[:, None] + counters
    bits ^= _shifted(bits, 30)
    bits *= _signed(_MIX_1)
    bits ^= _shifted(bits, 27)
    bits *= _signed(_MIX_2)
    bits ^= _shifted(bits, 31)
    return bits


def gumbel_noise(keys: Tensor, size: int) -> Tensor:
    """float32 (B, size): independent standard Gumbel variables, -log(-log(u)).

    u is the middle of one of 2**52 equal parts of (0, 1), so it is neither 0 nor 1 and the noise is finite.
    """
    uniform = _shifted(uniform_bits(keys, size), 12).double().add_(0.5).mul_(2.0**-52)
    return uniform.log_().neg_().log_().neg_().float()
