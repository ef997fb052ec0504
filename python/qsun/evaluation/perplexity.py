"""How likely a served model finds given responses, computed by the layers and the cache that serve it.

The prompt goes through the prefill module and the response through the decode module, as after a preemption
the engine computes a response again: the same layers, the same low-bit weights, the same cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from qsun.core import FirstToken, ForwardContext, PrefillAttention, PrefillChunk
from qsun.kv_cache.format import KVFormat
from qsun.kv_cache.tensors import KVCache
from qsun.models.decoder import DecoderStack
from qsun.modules.decode import DecodeModule
from qsun.modules.prefill import PrefillModule
from qsun.training.batch import Example

BLOCK_SIZE = 16
TOKENS = 4096
"""Most positions in the cache at one time."""


@dataclass(frozen=True, slots=True)
class ResponseLoss:
    """total: -log p of the response in nats.  tokens: of it, its end included."""

    total: float
    tokens: int


def perplexity(losses: Sequence[ResponseLoss]) -> float:
    """exp of the mean of -log p over all tokens of all responses."""
    return math.exp(sum(loss.total for loss in losses) / sum(loss.tokens for loss in losses))


def response_losses(
    decode: DecodeModule,
    prefill: PrefillModule,
    examples: Sequence[Example],
    first_token: FirstToken,
    kv_format: KVFormat | None = None,
) -> list[ResponseLoss]:
    """-log p of each response, in the order of the examples.

    kv_format: how keys and values are kept; None is in the dtype of the decode module.
    Raises ValueError when an example is longer than the model is meant for.
    """
    longest = decode.config.max_position_embeddings
    for index, example in enumerate(examples):
        if example.num_positions > longest:
            raise ValueError(
                f"examples[{index}] has {example.num_positions} positions, expected at most {longest}"
            )
    found: list[ResponseLoss] = []
    with torch.inference_mode():
        for together in _batches(examples):
            found.extend(_batch_losses(decode, prefill.stack, together, first_token, kv_format))
    return found


def _batches(examples: Sequence[Example]) -> Iterator[list[Example]]:
    together: list[Example] = []
    tokens = 0
    for example in examples:
        if together and tokens + example.num_positions > TOKENS:
            yield together
            together, tokens = [], 0
        together.append(example)
        tokens += example.num_positions
    if together:
        yield together


def _batch_losses(
    decode: DecodeModule,
    prefill: DecoderStack,
    examples: Sequence[Example],
    first_token: FirstToken,
    kv_format: KVFormat | None,
) -> list[ResponseLoss]:
    blocks = [-(-example.num_positions // BLOCK_SIZE) for example in examples]
    cache = KVCache.allocate(decode.config, sum(blocks), BLOCK_SIZE, kv_format or decode.dtype, decode.device)
    first_blocks = [sum(blocks[:index]) for index in range(len(blocks))]
    shared = 1 if first_token == "decode" else 0
    cuts = [len(example.prompt) - shared for example in examples]
    spans = [
        [(0, cut) for cut in cuts],
        [(cut, e.num_positions) for cut, e in zip(cuts, examples, strict=True)],
    ]
    hidden: list[list[Tensor]] = [[] for _ in examples]
    for stack, parts in zip((prefill, decode.stack), spans, strict=True):
        states = _run(decode, stack, cache, examples, parts, first_blocks)
        for kept, rows in zip(hidden, states.split([end - begin for begin, end in parts]), strict=True):
            kept.append(rows)
    losses = []
    for example, kept in zip(examples, hidden, strict=True):
        # Prompt and response states in order of position; those from the last prompt token on predict.
        predicting = torch.cat(kept)[len(example.prompt) - 1 :]
        targets = torch.tensor(example.response, device=decode.device)
        total = functional.cross_entropy(decode.logits(predicting), targets, reduction="none")
        losses.append(ResponseLoss(float(total.double().sum()), len(example.response)))
    return losses


def _run(
    decode: DecodeModule,
    stack: DecoderStack,
    cache: KVCache,
    examples: Sequence[Example],
    spans: Sequence[tuple[int, int]],
    first_blocks: Sequence[int],
) -> Tensor:
    """Positions [begin, end) of each example through one stack, written to its own run of blocks."""
    device = decode.device
    tokens: list[int] = []
    positions, slots, chunks = [], [], []
    start = 0
    for example, (begin, end), block in zip(examples, spans, first_blocks, strict=True):
        if begin == end:
            continue
        tokens.extend((*example.prompt, *example.response)[begin:end])
        at = torch.arange(begin, end, device=device)
        positions.append(at)
        slots.append(at + block * BLOCK_SIZE)
        ids = torch.arange(block, block - (-end // BLOCK_SIZE), device=device)
        chunks.append(PrefillChunk(start, end - begin, begin, ids))
        start += end - begin
    if not chunks:
        return decode.embed_tokens.new_empty((0, decode.config.hidden_size))
    ctx = ForwardContext(torch.cat(positions), torch.cat(slots), PrefillAttention(tuple(chunks)))
    return stack.forward(decode.embed(torch.tensor(tokens, device=device)), ctx, cache)
