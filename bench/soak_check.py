"""Is an answer right? Asked of the two modules themselves, one request at a time, without an engine.

A prompt goes through its own prefill module and the answer through the decode module, each in one pass over a
cache that nobody shares: no scheduler, no block table, no graph, no neighbour in the batch. The answer's own
tokens are fed, so that every one of them is judged, also behind one that was wrong.

Sums that are added up in another order round otherwise, and of two logits that are as good as equal either
may win. A token is right when its logit lies at most `tolerance` standard deviations of all logits below the
largest. Of random logits about one lies within a fourth of a standard deviation of the largest, so a token
that was drawn from another model's KV passes about as often as a guess.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qsun.core import ForwardContext, PrefillAttention, PrefillChunk
from qsun.engine.options import kv_format_of
from qsun.engine.runner import running
from qsun.kv_cache.block_tables import blocks_for
from qsun.kv_cache.tensors import KVCache
from qsun.models.decoder import DecoderStack
from qsun.modules.decode import DecodeModule
from qsun.modules.prefill import PrefillModule
from qsun_bench.engine_models import BLOCK_SIZE
from qsun_bench.engine_suites import KvDtype
from qsun_kernels.backends.problems import BackendName

TOLERANCE: Mapping[torch.dtype, float] = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.2}
"""By the dtype of the activations, in standard deviations of the logits.

Logits are of that dtype too: around the largest of 128,000, neighbours in bfloat16 are 0.03 apart.
"""
_OF_CODES = 2.0
"""Times the tolerance with a cache of codes: a key that rounds the other way moves a logit further."""


def tolerance_of(dtype: torch.dtype, kv: KvDtype) -> float:
    """How far below the largest logit that of a right token may lie."""
    return TOLERANCE[dtype] * (1.0 if kv == "auto" else _OF_CODES)


@dataclass(frozen=True, slots=True)
class Reference:
    """The modules, and a cache for one request of at most `context` tokens."""

    decode: DecodeModule
    prefills: Mapping[str, PrefillModule]
    kv_cache: KVCache
    backend: BackendName | None

    @classmethod
    def create(
        cls,
        decode: DecodeModule,
        prefills: Sequence[PrefillModule],
        *,
        context: int,
        kv: KvDtype,
        backend: BackendName | None,
    ) -> Reference:
        """A cache of the same kind as the engine's."""
        config = decode.config
        kv_format = kv_format_of(kv, decode.dtype, config.head_dim)
        blocks = blocks_for(context, BLOCK_SIZE)
        cache = KVCache.allocate(config, blocks, BLOCK_SIZE, kv_format, decode.device)
        return cls(decode, {prefill.name: prefill for prefill in prefills}, cache, backend)

    def gaps(self, model: str, prompt: Sequence[int], answer: Sequence[int]) -> list[float]:
        """For every token of an answer, how far its logit lies below the largest, in standard deviations."""
        if not answer:
            return []
        prefill = self.prefills[model]
        with running(None, self.backend):
            if prefill.first_token == "prefill":
                hidden = [self._pass(prefill.stack, prompt, 0)[-1:]]
                read = list(answer[:-1])
            else:
                self._pass(prefill.stack, prompt[:-1], 0)
                hidden = []
                read = [prompt[-1], *answer[:-1]]
            first = len(prompt) + len(answer) - 1 - len(read)
            hidden.append(self._pass(self.decode.stack, read, first))
            logits = self.decode.logits(torch.cat(hidden)).float()
            told = torch.tensor(answer, device=logits.device)[:, None]
            below = logits.amax(dim=-1) - logits.gather(1, told).squeeze(1)
            found: list[float] = (below / logits.std(dim=-1)).tolist()
        return found

    def _pass(self, stack: DecoderStack, tokens: Sequence[int], first: int) -> Tensor:
        """Hidden states (T, H) of tokens at positions from `first` on, whose KV is written on the way."""
        device = self.decode.device
        ids = torch.tensor(list(tokens), dtype=torch.int64, device=device)
        if not len(ids):
            return self.decode.embed(ids)
        end = first + len(ids)
        positions = torch.arange(first, end, device=device)
        blocks = torch.arange(blocks_for(end, BLOCK_SIZE), device=device)
        chunk = PrefillChunk(0, len(ids), first, blocks)
        # Block i holds positions from i * BLOCK_SIZE on, so that a position is its own slot.
        ctx = ForwardContext(positions, positions, PrefillAttention((chunk,)))
        return stack.forward(self.decode.embed(ids), ctx, self.kv_cache)
