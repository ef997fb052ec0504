"""Random numbers that depend on (seed, step, vocabulary index) and on nothing else.

A generator object gives a request other numbers when its place in the batch, the batch's size or the device
changes.  Here every number is computed by itself from its coordinates: the seed and the step are mixed to a
64-bit key on the host, as SplitMix64 mixes (Steele, Lea, Flood: "Fast splittable pseudorandom number
generators", OOPSLA 2014, fig. 16); from the key and the vocabulary index the operator `sample_tokens` makes
its noise on the device.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy
from numpy.typing import NDArray

from qsun_kernels.backends.reference.gumbel_noise import GAMMA, MIX_1, MIX_2, gumbel_noise, uniform_bits

__all__ = ["STATE_STEP", "gumbel_noise", "mix_states", "row_key", "row_state", "uniform_bits"]

UInt64Array: TypeAlias = NDArray[numpy.uint64]

_MASK = (1 << 64) - 1

STATE_STEP = GAMMA
"""What the state of a row grows by from one step to the next, modulo 2**64."""


def _signed(value: int) -> int:
    """The same 64 bits as two's complement, which is what an int64 tensor holds."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _mix(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * MIX_1) & _MASK
    value = ((value ^ (value >> 27)) * MIX_2) & _MASK
    return value ^ (value >> 31)


def row_key(seed: int, step: int) -> int:
    """The key of one draw, as a signed 64-bit integer.  step: tokens of the output so far."""
    return _signed(_mix(row_state(seed, step)))


def row_state(seed: int, step: int) -> int:
    """What `row_key` mixes, in [0, 2**64): each step adds `STATE_STEP` to it."""
    return (_mix(seed + GAMMA) + (step + 1) * GAMMA) & _MASK


def mix_states(states: UInt64Array, keys: UInt64Array, work: UInt64Array) -> None:
    """Write the keys of many rows' states; all are (B,), `work` is scratch.  As `row_key`, bit for bit."""
    numpy.copyto(keys, states)
    for shift, factor in ((30, MIX_1), (27, MIX_2)):
        numpy.right_shift(keys, numpy.uint64(shift), out=work)
        numpy.bitwise_xor(keys, work, out=keys)
        numpy.multiply(keys, numpy.uint64(factor), out=keys)
    numpy.right_shift(keys, numpy.uint64(31), out=work)
    numpy.bitwise_xor(keys, work, out=keys)
