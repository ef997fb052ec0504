"""`sample_tokens` in torch operations: a token a row, drawn on the device without waiting for it.

Same arguments, same results and the same order of things as the operator of this name; the noise is that of
`noise.py`.  A CUDA graph can hold it.  It sorts the vocabulary whether or not a row asks for top-k or top-p,
since nobody on the host may look; on a CPU, where looking costs nothing, it is left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qsun.engine.noise import gumbel_noise
from qsun_kernels.backends.problems import BackendName

__all__ = ["sample_tokens"]


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
    """Draw one token a row.

    logits: (B, V).  temperature, top_p, min_p: float32 (B,).  top_k: int32 (B,), 0 is off.  keys: int64 (B,).
    temperature 0 takes the most likely token.  Returns tokens int64 (B,), and valid bool (B,): False where
    the logits were not finite and the token, 0, means nothing.
    """
    # NaN propagates through the maximum; +inf or nothing but -inf shows there as well.
    highest = logits.amax(dim=-1, keepdim=True).float()
    valid = torch.isfinite(highest).squeeze(1)
    greedy = (temperature == 0)[:, None]
    scores = logits.float()
    if _any(~greedy):
        divisor = torch.where(greedy, 1.0, temperature[:, None]).double()
        # Subtracting first keeps a temperature near 0 from making the largest logits infinite, hence equal.
        scaled = ((scores - highest) / divisor).float()
        if _any(top_k > 0) or _any(top_p < 1):
            scaled = _keep_top(scaled, top_k[:, None], top_p[:, None].double())
        scaled = scaled.masked_fill(scaled < min_p[:, None].double().log().float(), float("-inf"))
        scores = torch.where(greedy, scores, scaled + gumbel_noise(keys, logits.shape[1]))
    return torch.where(valid, scores.argmax(dim=-1), 0), valid


def _any(condition: Tensor) -> bool:
    """Whether it holds anywhere; True on a device, which is not asked."""
    return condition.is_cuda or bool(condition.any())


def _keep_top(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Keep the top_k largest, and of these the fewest whose probabilities reach top_p; the rest is -inf."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    beyond = (rank >= top_k) & (top_k > 0)
    ordered = ordered.masked_fill(beyond, float("-inf"))
    probabilities = ordered.double().softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    # `before` of the first is 0 up to rounding, so at least one is always kept.
    dropped = (before >= top_p) & (rank > 0) & (top_p < 1) | beyond
    return logits.masked_fill(torch.empty_like(dropped).scatter_(1, order, dropped), float("-inf"))
