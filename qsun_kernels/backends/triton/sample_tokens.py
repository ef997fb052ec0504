"""One token a row: the largest logit, or a draw after temperature, top-k, top-p and min-p.

distance = (max x - x) / temperature                    float32, rounded once each
place    = (bits of the distance, index)                the order of the tokens, the likeliest first

One program a row, which reads the row again for every pass. Where the order is to be cut is found by
bisection: a pass adds up the counts (top-k) or masses (top-p) of all tokens up to a place, first over the
bits of the distance, then, where equal tokens are to be parted, over the index. That is up to 31 and 22
passes, where the CUDA kernel takes three or four with histograms, for which Triton has no shared memory to
offer; rows that ask for neither skip them. All sums are of integers.

Masses and noise are those of the reference, backends/reference/sample_tokens.py and gumbel_noise.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qsun_kernels.backends.problems import Implementation, SampleTokensProblem
from qsun_kernels.backends.triton.launch import Launching, next_power_of_two, refuse
from qsun_kernels.backends.triton.numerics import device_function, load_float32, loop_bound

MAX_BLOCK = 4096

INFINITE = tl.constexpr(0x7F800000)
"""The bits of an infinite distance: never drawn."""

GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
MIX_2 = tl.constexpr(0x94D049BB133111EB)
"""SplitMix64 (Steele, Lea, Flood, OOPSLA 2014, fig. 16)."""


@device_function
def _distance(
    row: tl.tensor,
    column: tl.tensor,
    V: tl.tensor,
    highest: tl.tensor,
    temperature: tl.tensor,
) -> tl.tensor:
    mask = column < V
    x = tl.where(mask, load_float32(row + column, mask), float("-inf"))
    return tl.div_rn(highest - x, temperature)


@device_function
def _relative_mass(
    distance: tl.tensor,
) -> tl.tensor:
    """About 2**40 exp(-distance) as int64; the steps of `relative_mass` of the reference."""
    fixed = (tl.minimum(distance, 31.0) * 134217728.0).to(tl.uint32)
    exponent = tl.umulhi(fixed, tl.full(fixed.shape, 1549082005, tl.uint32))
    fraction = exponent << 7
    power = tl.full(fixed.shape, 2016033, tl.uint32)
    power = 19732393 - tl.umulhi(power, fraction)
    power = 118712300 - tl.umulhi(power, fraction)
    power = 515765849 - tl.umulhi(power, fraction)
    power = 1488511653 - tl.umulhi(power, fraction)
    power = 2147483487 - tl.umulhi(power, fraction)
    return (power.to(tl.int64) << 9) >> (exponent >> 25).to(tl.int64)


@device_function
def _sum_up_to(
    row: tl.tensor,
    V: tl.tensor,
    highest: tl.tensor,
    temperature: tl.tensor,
    key: tl.tensor,
    index: tl.tensor,
    last_key: tl.tensor,
    last_index: tl.tensor,
    MASS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Count, or mass if MASS, of the tokens up to (key, index) that are not past (last_key, last_index)."""
    total = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, loop_bound(V), BLOCK):
        column = start + tl.arange(0, BLOCK)
        distance = _distance(row, column, V, highest, temperature)
        bits = distance.to(tl.int32, bitcast=True)
        held = (bits < key) | ((bits == key) & (column <= index))
        held &= (bits < last_key) | ((bits == last_key) & (column <= last_index))
        held &= bits < INFINITE
        one = _relative_mass(distance) if MASS else tl.full((BLOCK,), 1, tl.int64)
        total += tl.where(held, one, 0)
    return tl.sum(total, axis=0)


@device_function
def _last_kept(
    row: tl.tensor,
    V: tl.tensor,
    highest: tl.tensor,
    temperature: tl.tensor,
    wanted: tl.tensor,
    last_key: tl.tensor,
    last_index: tl.tensor,
    MASS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The place up to which count or mass first reach `wanted`, no later than (last_key, last_index)."""
    low = tl.zeros((), tl.int32)
    high = last_key
    while low < high:
        middle = low + (high - low) // 2
        reached = _sum_up_to(row, V, highest, temperature, middle, V, last_key, last_index, MASS, BLOCK)
        is_enough = reached >= wanted
        high = tl.where(is_enough, middle, high)
        low = tl.where(is_enough, low, middle + 1)
    key = low
    low = tl.zeros((), tl.int32)
    high = tl.where(key == last_key, last_index, V - 1)
    # Where the tokens before the last of those equals do not suffice, all of them stay.
    reached = _sum_up_to(row, V, highest, temperature, key - 1, V, last_key, last_index, MASS, BLOCK)
    equals = _sum_up_to(row, V, highest, temperature, key, V, last_key, last_index, MASS, BLOCK) - reached
    one = tl.zeros((), tl.int64) + 1
    if MASS:
        one = _relative_mass(key.to(tl.float32, bitcast=True))
    low = tl.where(reached + equals - one < wanted, high, low)
    while low < high:
        middle = low + (high - low) // 2
        reached = _sum_up_to(row, V, highest, temperature, key, middle, last_key, last_index, MASS, BLOCK)
        is_enough = reached >= wanted
        high = tl.where(is_enough, middle, high)
        low = tl.where(is_enough, low, middle + 1)
    return key, low


@device_function
def _uniform_bits(
    key: tl.tensor,
    column: tl.tensor,
) -> tl.tensor:
    bits = key + (column.to(tl.uint64) + 1) * GAMMA
    bits = (bits ^ (bits >> 30)) * MIX_1
    bits = (bits ^ (bits >> 27)) * MIX_2
    return bits ^ (bits >> 31)


@device_function
def _gumbel(
    bits: tl.tensor,
) -> tl.tensor:
    uniform = ((bits >> 12).to(tl.float64) + 0.5) * 2.220446049250313e-16
    return (-tl.log(-tl.log(uniform))).to(tl.float32)


@triton.jit
def sample_tokens_kernel(
    logits: tl.tensor,  # (rows, V), rows `stride` apart
    temperatures: tl.tensor,  # (rows,), as all that follow
    top_ks: tl.tensor,
    top_ps: tl.tensor,
    min_ps: tl.tensor,
    keys: tl.tensor,
    tokens: tl.tensor,
    valid: tl.tensor,
    V: tl.tensor,
    stride: tl.tensor,
    BLOCK: tl.constexpr,  # a power of two
) -> None:
    place = tl.program_id(0)
    row = logits + place.to(tl.int64) * stride

    # The maximum
    most = tl.full((BLOCK,), float("-inf"), tl.float32)
    at = tl.zeros((BLOCK,), tl.int32)
    is_nan = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, loop_bound(V), BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < V
        x = tl.where(mask, load_float32(row + column, mask), float("-inf"))
        is_nan |= (x != x).to(tl.int32)
        at = tl.where(x > most, column, at)
        most = tl.where(x > most, x, most)
    highest = tl.max(most, axis=0)
    token = tl.min(tl.where(most == highest, at, V), axis=0)
    is_finite = (highest > float("-inf")) & (highest < float("inf")) & (tl.max(is_nan, axis=0) == 0)

    temperature = tl.load(temperatures + place)
    if is_finite & (temperature > 0):
        temperature = tl.minimum(temperature, 3.4028234663852886e38)
        last_key = tl.zeros((), tl.int32) + (INFINITE - 1)
        last_index = tl.zeros((), tl.int32) + (V - 1)
        top_k = tl.load(top_ks + place)
        if (top_k > 0) & (top_k < V):
            last_key, last_index = _last_kept(
                row, V, highest, temperature, top_k.to(tl.int64), last_key, last_index, False, BLOCK
            )
        top_p = tl.load(top_ps + place)
        if top_p < 1:
            total = _sum_up_to(
                row, V, highest, temperature, last_key, last_index, last_key, last_index, True, BLOCK
            )
            wanted = tl.ceil(total.to(tl.float64) * top_p.to(tl.float64))
            wanted = tl.where(wanted > 1, wanted, 1).to(tl.int64)
            last_key, last_index = _last_kept(
                row, V, highest, temperature, wanted, last_key, last_index, True, BLOCK
            )
        min_p = tl.load(min_ps + place)
        if min_p > 0:
            farthest = 0.0 - tl.log(tl.minimum(min_p, 1.0).to(tl.float64)).to(tl.float32)
            farthest = farthest.to(tl.int32, bitcast=True)
            last_index = tl.where(farthest < last_key, V - 1, last_index)
            last_key = tl.minimum(farthest, last_key)

        # The draw; float64 logarithms only for blocks with a token that could still win
        key = tl.load(keys + place).to(tl.uint64, bitcast=True)
        best = tl.full((BLOCK,), float("-inf"), tl.float32)
        best_at = tl.zeros((BLOCK,), tl.int32)
        bound = float("-inf")
        for start in range(0, loop_bound(V), BLOCK):
            column = start + tl.arange(0, BLOCK)
            distance = _distance(row, column, V, highest, temperature)
            bits = distance.to(tl.int32, bitcast=True)
            held = (bits < last_key) | ((bits == last_key) & (column <= last_index))
            random = _uniform_bits(key, column)
            # At least the noise: -log(-log(u)) <= -log(1 - u), and the high half of ~bits is 1 - u, rounded
            # down. 0.001 covers the rounding.
            rest = (4294967295 - (random >> 32).to(tl.int64)).to(tl.float32)
            upper = tl.where(rest > 0, 22.1817 - tl.log(tl.maximum(rest, 1.0)), 64.0) - distance
            if tl.max(tl.where(held, upper, float("-inf")), axis=0) >= bound:
                score = tl.where(held, _gumbel(random) - distance, float("-inf"))
                best_at = tl.where(score > best, column, best_at)
                best = tl.where(score > best, score, best)
                bound = tl.max(best, axis=0)
        token = tl.min(tl.where(best == bound, best_at, V), axis=0)

    tl.store(tokens + place, tl.where(is_finite, token, 0).to(tl.int64))
    tl.store(valid + place, is_finite.to(tl.uint8))


def sample_tokens(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, keys: Tensor
) -> tuple[Tensor, Tensor]:
    """logits (B, V), the rest (B,) -> tokens int64 (B,), valid bool (B,)."""
    rows, V = logits.shape
    tokens = torch.empty((rows,), dtype=torch.int64, device=logits.device)
    valid = torch.empty((rows,), dtype=torch.uint8, device=logits.device)
    if rows > 0:
        block = min(MAX_BLOCK, next_power_of_two(V))
        shapes = f"rows={rows} vocab_size={V} dtype={logits.dtype}"
        with Launching("sample_tokens", logits.device, lambda: shapes):
            sample_tokens_kernel[(rows,)](
                logits,
                temperature,
                top_k,
                top_p,
                min_p,
                keys,
                tokens,
                valid,
                V,
                logits.stride(0),
                BLOCK=block,
                num_warps=min(16, max(1, block // 256)),
            )
    return tokens, valid.view(torch.bool)


def supports(problem: SampleTokensProblem) -> str | None:
    """None when the kernel runs the problem, else why not."""
    return refuse(problem.device, dtype=problem.dtype)


def describe(problem: SampleTokensProblem) -> str:
    """Which kernel it would be."""
    return "sample_tokens_kernel: one program a row, cut by bisection"


SAMPLE_TOKENS = Implementation(supports, sample_tokens, describe)
