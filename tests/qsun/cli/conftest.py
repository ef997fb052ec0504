"""A tiny checkpoint with a tokenizer, a task and an adapterless copy of it, for the command line to load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass(frozen=True)
class Checkpoints:
    """base: the decoder. task: another model on it. other: a model of another shape."""

    base: Path
    task: Path
    other: Path


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    folder = tmp_path_factory.mktemp("cli")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    tokenizer.chat_template = TEMPLATE

    def save(name: str, seed: int, hidden: int) -> Path:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=264,
            hidden_size=hidden,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=256,
            bos_token_id=None,
            eos_token_id=256,
            tie_word_embeddings=True,
            initializer_range=0.2,
        )
        model = LlamaForCausalLM(config)
        if name == "task":
            # A fine-tune has the base's embedding: the decode module owns it.
            torch.manual_seed(1)
            model.model.embed_tokens.weight = LlamaForCausalLM(config).model.embed_tokens.weight
            model.tie_weights()
        model.to(torch.bfloat16).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        return folder / name

    return Checkpoints(save("base", 1, 64), save("task", 2, 64), save("other", 3, 128))
