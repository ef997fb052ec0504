"""From logits to tokens, for a whole batch in which every row has its own parameters.

The order is min_tokens mask, penalties (repetition over prompt and output as in CTRL, Keskar et al. 2019,
sec. 4.1; frequency and presence over the output), then the operator `sample_tokens`: temperature, top-k,
top-p, min-p, draw.  Its noise depends on the request's seed, its step and the vocabulary index only.  So a
request's draw does not depend on which others are in the batch, as long as its logits do not.

Among equally likely tokens the lowest index goes first, everywhere.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from qsun.core import SamplingParams, TokenLogprobs
from qsun.engine.noise import row_key
from qsun_kernels import sample_tokens

__all__ = ["SampledTokens", "SamplerRow", "modify_logits", "needs_host", "sample"]


@dataclass(frozen=True, slots=True)
class SamplerRow:
    """What the sampler has to know of one request.

    tokens: prompt, then output.
    end_ids: token ids that would end it, kept from being drawn before min_tokens.
    """

    params: SamplingParams
    seed: int
    tokens: Items[int]
    num_prompt: int
    end_ids: Collection[int] = ()

    @property
    def step(self) -> int:
        """Tokens of the output so far."""
        return len(self.tokens) - self.num_prompt


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """One entry a row.  valid: False where the logits were not finite, so that the token means nothing."""

    token_ids: list[int]
    valid: list[bool]
    logprobs: list[TokenLogprobs | None]


def sample(logits: Tensor, rows: Items[SamplerRow]) -> SampledTokens:
    """Draw one token a row.

    logits: float32 (B, V), not changed.  rows: B of them.
    Raises ValueError when the numbers of rows differ.
    """
    if logits.dim() != 2 or logits.shape[0] != len(rows):
        raise ValueError(f"logits have shape {tuple(logits.shape)}, expected ({len(rows)}, vocabulary)")
    if not rows:
        return SampledTokens([], [], [])
    scores = modify_logits(logits, rows)
    tokens, valid = sample_tokens(scores, *_settings(rows, logits.device))
    # One copy to the host, which is also where the step waits for the device.
    token_ids, finite = torch.stack([tokens, valid.long()]).tolist()
    return SampledTokens(token_ids, [bool(f) for f in finite], _logprobs(logits, token_ids, rows))


def modify_logits(logits: Tensor, rows: Items[SamplerRow]) -> Tensor:
    """Logits after the min_tokens mask and the penalties; the same tensor where no row asks for either."""
    masked = [
        (index, token)
        for index, row in enumerate(rows)
        if row.step < row.params.min_tokens
        for token in row.end_ids
    ]
    penalised = [index for index, row in enumerate(rows) if _penalised(row.params)]
    if not masked and not penalised:
        return logits
    logits = logits.clone()
    if penalised:
        index = torch.tensor(penalised, device=logits.device)
        logits.index_copy_(0, index, _penalise(logits[index], [rows[i] for i in penalised]))
    if masked:
        at_row, at_token = zip(*masked, strict=True)
        where = torch.tensor([at_row, at_token], device=logits.device).unbind()
        logits[where] = float("-inf")
    return logits


def needs_host(params: SamplingParams, num_output: int) -> bool:
    """Whether the host has to draw a request's next token: all tokens so far decide, or logits are asked for.

    num_output: tokens of the output so far.
    """
    return _penalised(params) or params.logprobs is not None or num_output < params.min_tokens


def _penalised(params: SamplingParams) -> bool:
    neutral = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
    return neutral != (1.0, 0.0, 0.0)


def _penalise(logits: Tensor, rows: Items[SamplerRow]) -> Tensor:
    """Logits (R, V) after the rows' penalties.

    Tokens are counted on the device: a prompt is long, and this is done again for every token of the answer.
    """
    settings = [
        (row.params.repetition_penalty, row.params.presence_penalty, row.params.frequency_penalty)
        for row in rows
    ]
    factor, presence, frequency = torch.tensor(settings, device=logits.device)[:, :, None].unbind(dim=1)
    output = _counts([row.tokens[row.num_prompt :] for row in rows], logits)
    # A factor of 1 changes nothing, so where nobody repeats at a price the prompts are not looked at.
    if any(row.params.repetition_penalty != 1.0 for row in rows):
        seen = _counts([row.tokens for row in rows], logits) > 0
        repeated = torch.where(logits > 0, logits / factor, logits * factor)
        logits = torch.where(seen, repeated, logits)
    return logits - (presence * (output > 0) + frequency * output)


def _counts(tokens: Items[Items[int]], like: Tensor) -> Tensor:
    """How often each token is in each list, int32 of the shape of `like`, (len(tokens), V)."""
    counts = torch.zeros_like(like, dtype=torch.int32)
    size = like.shape[1]
    flat = [torch.tensor(part, dtype=torch.int64) + row * size for row, part in enumerate(tokens)]
    at = torch.cat(flat).to(like.device)
    one = torch.ones((), dtype=torch.int32, device=like.device)
    counts.view(-1).index_put_((at,), one, accumulate=True)
    return counts


def _settings(rows: Items[SamplerRow], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """temperature, top_k, top_p, min_p and keys of the rows, as `sample_tokens` takes them."""
    shares = [(0.0 if p.greedy else p.temperature, p.top_p, p.min_p) for p in (row.params for row in rows)]
    temperature, top_p, min_p = torch.tensor(shares, dtype=torch.float32).T.contiguous().to(device).unbind()
    most = torch.iinfo(torch.int32).max  # more than any vocabulary: all of it
    counts = [min(row.params.top_k, most) for row in rows]
    top_k = torch.tensor(counts, dtype=torch.int32, device=device)
    keys = torch.tensor([row_key(row.seed, row.step) for row in rows], device=device)
    return temperature, top_k, top_p, min_p, keys


def _logprobs(logits: Tensor, token_ids: list[int], rows: Items[SamplerRow]) -> list[TokenLogprobs | None]:
    wanted = [index for index, row in enumerate(rows) if row.params.logprobs is not None]
    answer: list[TokenLogprobs | None] = [None] * len(rows)
    if not wanted:
        return answer
    index = torch.tensor(wanted, device=logits.device)
    logprobs = logits[index].log_softmax(dim=-1)
    chosen = torch.tensor([[token_ids[i]] for i in wanted], device=logits.device)
    chosen_logprobs = logprobs.gather(1, chosen).squeeze(1).tolist()
    most = min(max(rows[i].params.logprobs or 0 for i in wanted), logits.shape[1])
    # Not topk, which takes equals in any order.
    ordered, order = logprobs.sort(dim=-1, descending=True, stable=True)
    top_values, top_ids = ordered[:, :most].tolist(), order[:, :most].tolist()
    for at, row_index in enumerate(wanted):
        count = rows[row_index].params.logprobs or 0
        pairs = zip(top_ids[at][:count], top_values[at][:count], strict=True)
        answer[row_index] = TokenLogprobs(token_ids[row_index], chosen_logprobs[at], tuple(pairs))
    return answer
