"""sample_tokens: one token for every row of a decode batch, each row with its own parameters."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from qsun_kernels.backends.dispatch import launcher, requested_backend
from qsun_kernels.backends.problems import BackendName, SampleTokensProblem
from qsun_kernels.ops import checks
from qsun_kernels.ops.library import is_traced, refuse_gradient, register

__all__ = ["MAX_VOCABULARY", "sample_tokens"]

MAX_VOCABULARY = 2**22
"""Most columns: the integer masses of that many tokens still add up in 63 bits."""


def sample_tokens(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    keys: Tensor,
    *,
    backend: BackendName | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw one token a row: temperature, top-k, top-p (Holtzman et al., arXiv 1904.09751), min-p (Nguyen et
    al., arXiv 2407.01082), then the largest of scaled logit + Gumbel noise (Maddison et al., "A* sampling",
    2014, sec. 2).

    logits (B, V) float32, float16 or bfloat16, last dimension of stride 1, rows any distance apart.
    temperature float32 (B,), 0: the largest logit; top_k int32 (B,), 0: all; top_p float32 (B,), 1: all;
    min_p float32 (B,), 0: all. keys int64 (B,): the row's noise is `gumbel_noise` of its key
    (backends/reference/gumbel_noise.py), so equal keys draw alike. Among equals the lowest index goes first,
    everywhere.

    Returns tokens int64 (B,) and valid bool (B,): False, with token 0, where a row holds a NaN or +inf or
    nothing but -inf. Everything stays on the device: nothing waits, and a CUDA graph can hold the call.

    A row's token depends on nothing but its own logits, parameters and key. Every backend keeps the same
    tokens, bit for bit, and adds the same noise, but for about one value in 10^8 whose last bit differs
    because two float64 logarithms do; only where that value and another are that close can tokens differ.
    log(min_p) carries the same proviso. The specification is backends/reference/sample_tokens.py.

    Values are read on the device and cannot be refused: a temperature, top_k or min_p below 0 or NaN counts
    as 0, a top_p that is NaN as 1; a top_p of at most 0 and a min_p above 1 keep the likeliest alone.

    Raises TypeError or ValueError naming the argument, BackendUnavailable, RuntimeError if a gradient is
    wanted.
    """
    checks.floating("logits", logits)
    checks.rank("logits", logits, 2, "(B, V)")
    checks.rows("logits", logits)
    if not 1 <= logits.shape[1] <= MAX_VOCABULARY:
        raise ValueError(f"logits have shape {tuple(logits.shape)}, expected (B, V), V from 1 to 2**22")
    for name, value, dtype in (
        ("temperature", temperature, torch.float32),
        ("top_k", top_k, torch.int32),
        ("top_p", top_p, torch.float32),
        ("min_p", min_p, torch.float32),
        ("keys", keys, torch.int64),
    ):
        checks.beside(name, value, dtype, logits.device, "one value a row of logits")
        checks.shape(name, value, logits.shape[:1], "(B,)")
        checks.contiguous(name, value)
    refuse_gradient("sample_tokens", logits=logits, temperature=temperature, top_p=top_p, min_p=min_p)
    if is_traced(logits, temperature, top_k, top_p, min_p, keys):
        return cast(
            "tuple[Tensor, Tensor]",
            torch.ops.qsun.sample_tokens(logits, temperature, top_k, top_p, min_p, keys, backend=backend),
        )
    return _launch(logits, temperature, top_k, top_p, min_p, keys, backend=backend)


def _launch(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    keys: Tensor,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    run = launcher(
        requested_backend(backend), SampleTokensProblem, logits.shape[1], logits.dtype, logits.device
    )
    return cast("tuple[Tensor, Tensor]", run(logits, temperature, top_k, top_p, min_p, keys))


def _fake(logits: Tensor, *others: object, backend: str | None = None) -> tuple[Tensor, Tensor]:
    batch = logits.shape[:1]
    return logits.new_empty(batch, dtype=torch.int64), logits.new_empty(batch, dtype=torch.bool)


register(
    "sample_tokens(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, "
    "Tensor keys, *, str? backend=None) -> (Tensor, Tensor)",
    _launch,
    _fake,
)
