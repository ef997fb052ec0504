"""Checked mode: indices that lie on the device are looked at before a kernel follows them.

Lengths, block ids, slots and positions are in device memory, where the host can look only by waiting. That
they lie inside their tensors is therefore the caller's contract: at an index outside, the CUDA kernels end in
a trap, which costs the process its CUDA context and names nothing, and other backends may read what is not
theirs. With ``QSUN_CHECK=1`` in the environment when this package is imported, `paged_attention_decode` and
`write_kv_cache` wait for the device at every call and raise `CacheIndexError`, which names the first index
outside. Of a call with a plan its seq_lens are looked at, which are the lengths that the plan holds.

Waiting is not possible while a CUDA graph is captured, and a replay runs no Python: there the mode raises
`CapturedCallError` rather than leave a replay unchecked.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from qsun_kernels.errors import CacheIndexError, CapturedCallError

__all__ = ["ENABLED", "ENVIRONMENT_VARIABLE", "check_attended", "check_written"]

ENVIRONMENT_VARIABLE = "QSUN_CHECK"


def is_asked_for(text: str | None) -> bool:
    """What the environment variable says; ValueError for what it may not hold."""
    if text not in (None, "", "0", "1"):
        raise ValueError(
            f"environment variable {ENVIRONMENT_VARIABLE} is {text!r}, expected '1', '0' or none"
        )
    return text == "1"


ENABLED = is_asked_for(os.environ.get(ENVIRONMENT_VARIABLE))
"""Read once: a call would pay more for asking the environment than for its launch."""


def check_attended(block_table: Tensor, seq_lens: Tensor, num_blocks: int, block_size: int) -> None:
    """Every length fits the block table, and the blocks of its tokens are in the cache.

    block_table int32 (B, max_blocks), seq_lens int32 (B,). Entries past a request's length may hold anything.
    Raises CacheIndexError or CapturedCallError.
    """
    operator = "paged_attention_decode"
    _refuse_capture(operator, seq_lens.device)
    lengths = seq_lens.long()
    max_blocks = block_table.shape[1]
    limit = max_blocks * block_size
    found = _first((lengths < 0) | (lengths > limit))
    if found is not None:
        (request,) = found
        expected = f"0 to {limit} (max_blocks * block_size): the cached tokens of request {request}"
        raise CacheIndexError(operator, "seq_lens", found, int(lengths[request]), expected)
    starts = torch.arange(max_blocks, device=lengths.device) * block_size
    outside = (block_table < 0) | (block_table >= num_blocks)
    found = _first(outside & (starts < lengths[:, None]))
    if found is not None:
        request, column = found
        position = column * block_size
        expected = (
            f"0 to {num_blocks - 1} (num_blocks is {num_blocks}): the block of position {position} of "
            f"request {request}, which has {int(lengths[request])} tokens"
        )
        raise CacheIndexError(operator, "block_table", found, int(block_table[request, column]), expected)


def check_written(
    slot_mapping: Tensor, num_blocks: int, block_size: int, positions: Tensor | None, max_positions: int
) -> None:
    """Every slot is in the cache or negative, and every position is in the table of angles.

    slot_mapping, positions: int64 (T,). Raises CacheIndexError or CapturedCallError.
    """
    operator = "write_kv_cache"
    _refuse_capture(operator, slot_mapping.device)
    slots = num_blocks * block_size
    found = _first(slot_mapping >= slots)
    if found is not None:
        expected = f"at most {slots - 1} (num_blocks * block_size is {slots}), or negative to skip the token"
        raise CacheIndexError(operator, "slot_mapping", found, int(slot_mapping[found]), expected)
    if positions is None:
        return
    found = _first((positions < 0) | (positions >= max_positions))
    if found is not None:
        expected = f"0 to {max_positions - 1}, a row of cos_sin"
        raise CacheIndexError(operator, "positions", found, int(positions[found]), expected)


def _refuse_capture(operator: str, device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise CapturedCallError(operator, ENVIRONMENT_VARIABLE)


def _first(wrong: Tensor) -> tuple[int, ...] | None:
    """The first place that holds True, in the order of memory; waits for the device."""
    places = wrong.nonzero()
    return tuple(places[0].tolist()) if len(places) else None
