"""The engine's settings, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from qsun.core import FirstToken
from qsun.engine.memory import parse_memory
from qsun.engine.runner import GraphMode
from qsun.kv_cache.format import CODES, VALUES, KVFormat
from qsun_kernels.backends.problems import BACKENDS, BackendName

__all__ = ["EngineOptions", "Overlap", "kv_format_of"]

Overlap = Literal["auto", "on", "off"]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Everything about an engine but its weights.

    kv_cache_dtype: "auto" is the decode module's own; or a 16- or 32-bit dtype; or "fp8", "int8", "int4":
        keys and values are kept as codes of 8 or 4 bits with a float32 scale for each head of a token.
        "int4" rotates keys and queries by a Hadamard matrix, so it needs a head_dim that is a power of two.
    max_batch_size: most requests that are computed at one time.
    max_model_len: most tokens of prompt and answer together; None is what model and cache allow.  Where it is
        more than the cache holds, a request that asks for more than that is refused.
    block_size: tokens in a block of the cache.
    memory: of the KV cache: bytes, "2GiB", or a fraction of the device memory that is free when the cache is
        made; None is 0.9 on a GPU and at most 1 GiB on a CPU.
    swap_memory: host memory for preempted requests: bytes or "2GiB"; 0 for none.
    prefill_chunk: most prompt tokens that are computed in one step; they are of one model.
    first_token: the convention of modules that state none.
    backend: of every operator; None is the best there is for each.
    prefix_reuse: whether requests of one model share the KV of common beginnings, which a decode step then
        reads once for all of them, as far as `plan_paged_attention` can.
    overlap: whether the host prepares a step while the device computes the one before, so that what a step
        gained is told by the next call of `step`; "auto" is on a GPU only.

    Raises ValueError naming the field.
    """

    kv_cache_dtype: torch.dtype | str = "auto"
    max_batch_size: int = 64
    max_model_len: int | None = None
    block_size: int = 16
    memory: int | float | str | None = None
    swap_memory: int | str | None = None
    prefill_chunk: int = 512
    first_token: FirstToken = "decode"
    backend: BackendName | None = None
    cuda_graphs: GraphMode = "auto"
    prefix_reuse: bool = True
    overlap: Overlap = "auto"

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "block_size", "prefill_chunk"):
            _at_least(name, getattr(self, name), 1)
        if self.max_model_len is not None:
            _at_least("max_model_len", self.max_model_len, 2)
        for name, value in (("memory", self.memory), ("swap_memory", self.swap_memory)):
            if value is not None:
                parse_memory(value, name)
        _one_of("first_token", self.first_token, get_args(FirstToken))
        _one_of("cuda_graphs", self.cuda_graphs, get_args(GraphMode))
        _one_of("overlap", self.overlap, get_args(Overlap))
        _one_of("backend", self.backend, (None, *BACKENDS))
        _cache_dtype(self.kv_cache_dtype)


def kv_format_of(kv_cache_dtype: torch.dtype | str, own: torch.dtype, head_dim: int) -> KVFormat:
    """How the cache of a module keeps its keys and values; "auto" is the module's own dtype.

    own: dtype of the module, in which keys and values come to a cache of codes.
    Raises ValueError for "int4" with heads that cannot be rotated.
    """
    dtype = _cache_dtype(kv_cache_dtype)
    if dtype is None:
        return KVFormat.of(own)
    if dtype in VALUES:
        return KVFormat.of(dtype)
    rotates = dtype == CODES["int4"]
    if rotates and head_dim & (head_dim - 1):
        # 4-bit keys that are not rotated ruin models: a warning would be overlooked.
        raise ValueError(
            f"kv_cache_dtype is {kv_cache_dtype!r}, which rotates heads, and the model's head_dim is"
            f" {head_dim}; expected a power of two, or another kv_cache_dtype, such as 'int8' or 'fp8'"
        )
    return KVFormat(dtype, own, rotates)


def _cache_dtype(kv_cache_dtype: torch.dtype | str) -> torch.dtype | None:
    """None for "auto".  Names such as "bfloat16" are understood."""
    if kv_cache_dtype == "auto":
        return None
    if isinstance(kv_cache_dtype, str):
        dtype = CODES.get(kv_cache_dtype) or getattr(torch, kv_cache_dtype, None)
        is_known = kv_cache_dtype in CODES or dtype in VALUES
    else:
        dtype = kv_cache_dtype
        is_known = dtype in VALUES
    if not is_known:
        names = ", ".join(map(repr, ("auto", *CODES)))
        raise ValueError(f"kv_cache_dtype must be one of {names} or {VALUES}, got {kv_cache_dtype!r}")
    assert isinstance(dtype, torch.dtype)
    return dtype


def _at_least(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
