"""Tiny random models saved by transformers, and the paged forward pass that is held against them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qsun.core import DecodeAttention, ForwardContext, PrefillAttention, PrefillChunk
from qsun.kv_cache.tensors import KVCache
from qsun.models.decoder import DecoderStack
from qsun.modules.decode import DecodeModule

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

# What every tiny model has unless a test says otherwise: 3 layers, 4 query heads on 2 KV heads.
COMMON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    # Larger than usual, so that logits are far apart and attention is far from uniform.
    "initializer_range": 0.2,
}

KINDS: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": LLAMA3_ROPE},
    "qwen2": {
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
    },
    "qwen3": {"head_dim": 32},
    "mistral": {"sliding_window": 8, "tie_word_embeddings": True},
}


@dataclass(frozen=True)
class TinyModel:
    """A checkpoint directory and the transformers model that it was saved from (float32, do not modify)."""

    path: Path
    hf: Any


def build_hf(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random transformers model; norms and biases are random too, for ones and zeros hide mistakes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **{**COMMON, **KINDS[kind], **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return model.to(dtype)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyModel]:
    """tiny("llama", seed=0, **config changes): the model, saved once a session."""
    made: dict[str, TinyModel] = {}

    def make(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> TinyModel:
        key = repr((kind, seed, dtype, sorted(changes.items())))
        if key not in made:
            model = build_hf(kind, seed, dtype, **changes)
            path = tmp_path_factory.mktemp(kind) / "model"
            model.save_pretrained(path)
            made[key] = TinyModel(path, model)
        return made[key]

    return make


class PagedSequence:
    """One sequence in a cache of scattered blocks, with not-a-number wherever nothing was written."""

    def __init__(self, decode: DecodeModule, length: int = 64, block_size: int = 4, seed: int = 0) -> None:
        self.decode = decode
        self.device = decode.device
        self.block_size = block_size
        blocks = -(-length // block_size)
        permutation = torch.randperm(2 * blocks, generator=torch.Generator().manual_seed(seed))
        self.block_ids = permutation[:blocks].to(self.device)
        self.cache = KVCache.allocate(decode.config, 2 * blocks, block_size, decode.dtype, self.device)
        for k_cache, v_cache in self.cache.layers:
            k_cache.fill_(torch.nan)
            v_cache.fill_(torch.nan)
        self.length = 0

    def slots(self, positions: Tensor) -> Tensor:
        return self.block_ids[positions // self.block_size] * self.block_size + positions % self.block_size

    def prefill(self, token_ids: Sequence[int], stack: DecoderStack | None = None) -> Tensor:
        """Logits (T, V) of a chunk of the prompt, through the decode module's stack or another."""
        start, end = self.length, self.length + len(token_ids)
        positions = torch.arange(start, end, device=self.device)
        blocks = self.block_ids[: -(-end // self.block_size)]
        chunk = PrefillChunk(start=0, length=end - start, context_len=start, block_ids=blocks)
        ctx = ForwardContext(positions, self.slots(positions), PrefillAttention((chunk,)))
        return self._run(token_ids, ctx, stack or self.decode.stack)

    def step(self, token_id: int) -> Tensor:
        """Logits (1, V) after one more token, through the decode path."""
        return self._run([token_id], self.step_context(), self.decode.stack)

    def step_context(self) -> ForwardContext:
        """The context of the next token on the decode path."""
        positions = torch.tensor([self.length], device=self.device)
        lengths = torch.tensor([self.length + 1], dtype=torch.int32, device=self.device)
        attention = DecodeAttention(self.block_ids.int()[None], lengths)
        return ForwardContext(positions, self.slots(positions), attention)

    def greedy(self, prompt: Sequence[int], count: int, stack: DecoderStack | None = None) -> list[int]:
        """`count` most likely tokens after the prompt."""
        tokens = [int(self.prefill(prompt, stack)[-1].argmax())]
        while len(tokens) < count:
            tokens.append(int(self.step(tokens[-1])[-1].argmax()))
        return tokens

    def _run(self, token_ids: Sequence[int], ctx: ForwardContext, stack: DecoderStack) -> Tensor:
        hidden = stack(self.decode.embed(torch.tensor(token_ids, device=self.device)), ctx, self.cache)
        self.length += len(token_ids)
        return self.decode.logits(hidden).cpu()


@pytest.fixture
def paged() -> type[PagedSequence]:
    """The class PagedSequence."""
    return PagedSequence
