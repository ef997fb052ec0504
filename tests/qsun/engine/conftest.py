"""Tiny random models, made once a session, and the reference that the engine is held against."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qsun import DecodeEngine
from qsun.engine.options import EngineOptions
from qsun.engine.registry import Model
from qsun.kv_cache.tensors import KVCache
from qsun.modules.decode import DecodeModule, load_decode_module
from qsun.modules.prefill import PrefillModule, load_prefill_module

VOCABULARY = 300
EOS = 256
TASKS = ("poet", "clerk", "cook")


def tiny_config(**changes) -> LlamaConfig:
    values = dict(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        rope_theta=10000.0,
        bos_token_id=None,
        eos_token_id=EOS,
        tie_word_embeddings=False,
        # Larger than usual: greedy answers of a nearly linear model would all be alike.
        initializer_range=0.2,
    )
    return LlamaConfig(**{**values, **changes})


def perturbed(model: LlamaForCausalLM, seed: int, strength: float = 0.05) -> LlamaForCausalLM:
    """A "fine-tune": every decoder weight moved, embedding and lm_head as they were."""
    tuned = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.model.layers.parameters():
            scale = strength if parameter.dim() == 2 else 0.2
            parameter += torch.randn(parameter.shape, generator=generator) * scale
    return tuned


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; 256 ends a text; a chat template of its own."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    symbols = [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]
    backend = Tokenizer(BPE(vocab={symbol: byte for byte, symbol in enumerate(symbols)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role[0] }}:{{ message.content }};{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    return tokenizer


@dataclass(frozen=True)
class TinyModels:
    """A base and its tasks: as transformers models, and as checkpoint directories."""

    base: LlamaForCausalLM
    tasks: dict[str, LlamaForCausalLM]
    paths: dict[str, Path]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> TinyModels:
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(20)
    base = LlamaForCausalLM(tiny_config()).eval()
    tasks = {name: perturbed(base, seed) for seed, name in enumerate(TASKS, start=1)}
    tokenizer = byte_tokenizer()
    paths = {}
    for name, model in {"base": base, **tasks}.items():
        paths[name] = folder / name
        model.save_pretrained(paths[name])
        tokenizer.save_pretrained(paths[name])
    return TinyModels(base, tasks, paths)


@pytest.fixture(scope="session")
def decode_module(tiny) -> DecodeModule:
    """The base in float32, not quantised: what transformers computes too."""
    return load_decode_module(tiny.paths["base"], bits=16, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="session")
def modules(tiny, decode_module) -> dict[str, PrefillModule]:
    """The tasks' prefill modules and the base's own, loaded once; they hold no state."""
    paths = {**{name: tiny.paths[name] for name in TASKS}, "base": None}
    return {
        name: load_prefill_module(name, path, base_path=tiny.paths["base"], decode=decode_module)
        for name, path in paths.items()
    }


@pytest.fixture
def make_engine(tiny, modules, decode_module):
    """An engine over the tiny base in float32 with all tasks; keywords are engine options.

    blocks, swap_blocks: sizes of cache and swap space in blocks.
    """

    def make(
        *,
        models=(*TASKS, "base"),
        first_token="decode",
        tokenizer=True,
        blocks=1000,
        swap_blocks=0,
        block_size=4,
        **options,
    ) -> DecodeEngine:
        config = decode_module.config
        bytes_per_block = KVCache.block_bytes(config, block_size, torch.float32)
        options.setdefault("memory", blocks * bytes_per_block)
        options.setdefault("swap_memory", swap_blocks * bytes_per_block)
        options["block_size"] = block_size
        engine = DecodeEngine(
            decode_module, byte_tokenizer() if tokenizer else None, EngineOptions(**options)
        )
        for name in models:
            module = modules[name]
            engine._registry.add(Model(name, module.fingerprint, first_token, module))
        return engine

    return make


# Two logits closer than this may change places with the order of additions: neither token is wrong.
SMALLEST_MARGIN = 2e-4


class Undecided(Exception):
    """A greedy reference whose next token is a matter of rounding: no test for exactness."""


def decided_argmax(logits: torch.Tensor) -> int:
    """The largest of logits (V,), unless the second is as good."""
    (first, second), (token, _) = (part.tolist() for part in logits.topk(2))
    if first - second < SMALLEST_MARGIN:
        raise Undecided(f"margin {first - second}")
    return token


@torch.no_grad()
def sun_reference(
    prefill, decode, prompt: list[int], new_tokens: int, first_token: str = "decode", eos: int | None = EOS
) -> list[int]:
    """SUN by transformers alone: the prefill model's KV goes into the decode model; greedy.

    "decode": the prefill model reads all but the last prompt token, the decode model reads that one.
    "prefill": the prefill model reads all; its logits, by the decode model's lm_head, give the first token.
    """
    cache = DynamicCache(config=decode.config)
    output: list[int] = []
    if first_token == "prefill":
        hidden = prefill.model(
            torch.tensor([prompt]), past_key_values=cache, use_cache=True
        ).last_hidden_state
        output.append(decided_argmax(decode.lm_head(hidden[0, -1])))
    elif len(prompt) > 1:
        prefill.model(torch.tensor([prompt[:-1]]), past_key_values=cache, use_cache=True)
    token = output[-1] if output else prompt[-1]
    while len(output) < new_tokens and not (output and output[-1] == eos):
        logits = decode(torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits
        token = decided_argmax(logits[0, -1])
        output.append(token)
    return output


@torch.no_grad()
def transformers_greedy(model, prompt: list[int], new_tokens: int) -> list[int]:
    """What transformers' own generate answers."""
    ids = torch.tensor([prompt])
    answer = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = answer.sequences[0, len(prompt) :].tolist()
    assert [decided_argmax(step[0]) for step in answer.logits] == tokens
    return tokens


@torch.no_grad()
def transformers_kv(model, prompt: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys (rotated) and values of a prompt by transformers, each (num_layers, T, num_kv_heads, head_dim)."""
    cache = DynamicCache(config=model.config)
    model.model(torch.tensor([prompt]), past_key_values=cache, use_cache=True)
    k = torch.stack([layer.keys[0].transpose(0, 1) for layer in cache.layers])
    v = torch.stack([layer.values[0].transpose(0, 1) for layer in cache.layers])
    return k, v


def decided_cases(seed: int, count: int, longest: int, answer, beginning=()) -> tuple[list, list]:
    """`count` random prompts of fewer than `longest` tokens and their `answer(prompt)`, none undecided."""
    draw = random.Random(seed)
    prompts, answers = [], []
    while len(prompts) < count:
        prompt = [*beginning, *(draw.randrange(256) for _ in range(draw.randrange(1, longest)))]
        try:
            answers.append(answer(prompt))
        except Undecided:
            continue
        prompts.append(prompt)
    return prompts, answers


@pytest.fixture(scope="session")
def reference() -> SimpleNamespace:
    """The references as a fixture, for tests import no conftest."""
    return SimpleNamespace(
        sun=sun_reference,
        greedy=transformers_greedy,
        kv=transformers_kv,
        cases=decided_cases,
        eos=EOS,
        vocabulary=VOCABULARY,
    )
