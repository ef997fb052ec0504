"""A cache of codes: the engine against transformers with a cache that rounds its keys and values alike."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM

from qsun import DecodeEngine, SamplingParams
from qsun.engine.options import EngineOptions, kv_format_of
from qsun.errors import RequestError
from qsun.kv_cache.tensors import KVCache
from qsun.modules.decode import load_decode_module

KINDS = ("fp8", "int8", "int4")
TASKS = ("poet", "clerk", "cook")
NEW_TOKENS = 10
PARAMS = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
MARGIN = 0.02
"""Two logits closer than this may change places when one value is rounded to the code beside."""


def rounded(x: torch.Tensor, kind: str, is_key: bool) -> torch.Tensor:
    """What is left of heads (..., D) that were kept as codes."""
    if kind == "int4" and is_key:
        matrix = torch.ones(1, 1)
        while matrix.shape[0] < x.shape[-1]:
            matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
        matrix *= x.shape[-1] ** -0.5
        # q . k is the same for both rotated, so the codes of rotated keys are turned back.
        return codes_of(x @ matrix, kind) @ matrix
    return codes_of(x, kind)


def codes_of(x: torch.Tensor, kind: str) -> torch.Tensor:
    largest = {"fp8": 448.0, "int8": 127.0, "int4": 7.0}[kind]
    scale = x.abs().amax(-1, keepdim=True) / largest
    codes = (x / scale).to(torch.float8_e4m3fn).float() if kind == "fp8" else (x / scale).round()
    return codes * scale


class RoundingCache(DynamicCache):
    """Keeps what `rounded` leaves, and gives that to the attention, the newest tokens included."""

    def __init__(self, kind: str, config) -> None:
        super().__init__(config=config)
        self.kind = kind

    def update(self, key_states, value_states, *arguments, **named):
        key_states, value_states = (
            rounded(key_states, self.kind, True),
            rounded(value_states, self.kind, False),
        )
        return super().update(key_states, value_states, *arguments, **named)


class UndecidedAnswer(Exception):
    """Two tokens are nearly as good."""


@torch.no_grad()
def reference_answer(prefill, decode, prompt: list[int], kind: str | None) -> list[int]:
    """Greedy; the prefill model reads all but the last prompt token."""
    config = decode.config
    cache = DynamicCache(config=config) if kind is None else RoundingCache(kind, config)
    if len(prompt) > 1:
        prefill.model(torch.tensor([prompt[:-1]]), past_key_values=cache, use_cache=True)
    tokens, token = [], prompt[-1]
    while len(tokens) < NEW_TOKENS:
        logits = decode(torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits[0, -1]
        best = logits.topk(2)
        if float(best.values[0] - best.values[1]) < MARGIN:
            raise UndecidedAnswer
        token = int(best.indices[0])
        tokens.append(token)
    return tokens


def draw_cases(
    tiny, kind: str, count: int, seed: int, longest: int = 40
) -> list[tuple[str, list[int], list[int]]]:
    """(model, prompt, answer), a third of the prompts with a common beginning."""
    source, cases = random.Random(seed), []
    while len(cases) < count:
        model = TASKS[len(cases) % 3]
        beginning = [5, 6, 7, 8] * 4 if len(cases) % 3 == 0 else []
        prompt = beginning + [source.randrange(256) for _ in range(source.randrange(1, longest))]
        try:
            cases.append((model, prompt, reference_answer(tiny.tasks[model], tiny.base, prompt, kind)))
        except UndecidedAnswer:
            continue
    return cases


def codes_engine(
    make_engine, decode_module, kind: str, *, blocks: int = 400, swap: int = 0, **options
) -> DecodeEngine:
    block_size = options.get("block_size", 4)
    kv_format = kv_format_of(kind, decode_module.dtype, decode_module.config.head_dim)
    block_bytes = KVCache.block_bytes(decode_module.config, block_size, kv_format)
    return make_engine(
        kv_cache_dtype=kind, memory=blocks * block_bytes, swap_memory=swap * block_bytes, **options
    )


def ask(engine: DecodeEngine, cases) -> list[list[int]]:
    completions = engine.generate(
        [prompt for _, prompt, _ in cases], model=[model for model, _, _ in cases], params=PARAMS
    )
    assert [c.error for c in completions if c.error is not None] == []
    return [list(c.token_ids) for c in completions]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("options", "happened"),
    [
        (dict(max_batch_size=3), ("prefix_hit_tokens",)),
        (dict(prefill_chunk=5, block_size=3, prefix_reuse=False), ()),
        (dict(blocks=24, swap=200), ("swaps",)),
        (dict(blocks=24), ("rebuilds",)),
    ],
    ids=["roomy", "chunks", "swapped", "rebuilt"],
)
def test_answers_are_those_of_a_cache_that_rounds_alike(
    make_engine, decode_module, tiny, kind, options, happened
) -> None:
    cases = draw_cases(tiny, kind, 9, seed=4)
    engine = codes_engine(make_engine, decode_module, kind, **options)
    assert ask(engine, cases) == [answer for _, _, answer in cases]
    stats = engine.stats()
    assert all(getattr(stats, name) > 0 for name in happened), stats


def test_the_codes_matter(tiny) -> None:
    """The reference of these tests is another one than that of a cache of values."""
    different = 0
    for model, prompt, answer in draw_cases(tiny, "int4", 6, seed=4):
        try:
            different += reference_answer(tiny.tasks[model], tiny.base, prompt, None) != answer
        except UndecidedAnswer:
            continue
    assert different >= 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_swapped_cache_gives_the_same_tokens(make_engine, decode_module, kind) -> None:
    """Drawn at random, so that a code that changed on the way would show in any of many tokens."""
    source = random.Random(8)
    prompts = [[source.randrange(256) for _ in range(source.randrange(4, 30))] for _ in range(8)]
    params = [SamplingParams(temperature=1.0, seed=i, max_tokens=30, ignore_eos=True) for i in range(8)]
    answers = []
    for blocks in (400, 30):
        engine = codes_engine(make_engine, decode_module, kind, blocks=blocks, swap=400, prefix_reuse=False)
        answers.append([c.token_ids for c in engine.generate(prompts, model="poet", params=params)])
        assert bool(engine.stats().swaps) == (blocks == 30)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("kind", KINDS)
def test_given_kv_becomes_the_codes_of_local_kv(make_engine, decode_module, tiny, reference, kind) -> None:
    engine = codes_engine(make_engine, decode_module, kind)
    for _, prompt, answer in (case for case in draw_cases(tiny, kind, 6, seed=5) if case[0] == "cook"):
        k, v = kv_of_a_rounding_prefill(tiny.tasks["cook"], prompt[:-1], kind)
        engine.submit_kv(
            prompt, k, v, prompt[-1], model="cook", fingerprint=engine._registry.get("cook").fingerprint,
            params=PARAMS,
        )  # fmt: skip
        tokens = []
        while engine.has_work:
            for output in engine.step():
                assert output.error is None
                tokens += output.token_ids
        assert tokens == answer
    assert engine.stats().prefill_tokens == 0


@torch.no_grad()
def kv_of_a_rounding_prefill(model, prompt: list[int], kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values as they come to a cache of codes: each layer has read the rounded ones of its own."""
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Watching(RoundingCache):
        def update(self, key_states, value_states, *arguments, **named):
            kept.append((key_states[0].transpose(0, 1), value_states[0].transpose(0, 1)))
            return super().update(key_states, value_states, *arguments, **named)

    model.model(torch.tensor([prompt]), past_key_values=Watching(kind, model.config), use_cache=True)
    return torch.stack([k for k, _ in kept]), torch.stack([v for _, v in kept])


@pytest.mark.damaged
def test_given_kv_has_the_dtype_of_the_module(make_engine, decode_module) -> None:
    engine = codes_engine(make_engine, decode_module, "int8")
    config = decode_module.config
    k = torch.zeros(config.num_layers, 2, config.num_kv_heads, config.head_dim, dtype=torch.int8)
    with pytest.raises(RequestError, match=r"k has dtype torch.int8, expected torch.float32"):
        engine.submit_kv(
            [1, 2, 3], k, k, 3, model="cook", fingerprint=engine._registry.get("cook").fingerprint
        )


def test_the_plan_counts_scales_and_the_report_names_the_format(make_engine, decode_module) -> None:
    config = decode_module.config
    sizes = {}
    for kind in ("auto", *KINDS):
        engine = make_engine(kv_cache_dtype=kind, memory=100_000)
        engine.prepare()
        cache = engine._book.workspace.kv_cache
        sizes[kind] = cache.bytes_per_block
        assert cache.num_blocks == 100_000 // cache.bytes_per_block
        assert engine.stats().kv_bytes == cache.nbytes
        named = "float32" if kind == "auto" else "int4, rotated" if kind == "int4" else kind
        assert f"KV as {named};" in engine.explain()
    heads = 2 * config.num_layers * config.num_kv_heads * 4
    assert sizes == {
        "auto": heads * 16 * 4, "fp8": heads * (16 + 4), "int8": heads * (16 + 4), "int4": heads * (8 + 4)
    }  # fmt: skip


@pytest.mark.damaged
def test_heads_of_another_width_are_refused_at_once(tiny) -> None:
    config = copy.deepcopy(tiny.base.config)
    config.head_dim = 24
    path = tiny.paths["base"].parent / "wide"
    LlamaForCausalLM(config).save_pretrained(path)
    decode = load_decode_module(path, bits=16, dtype=torch.float32, device="cpu")
    with pytest.raises(
        ValueError, match=r"kv_cache_dtype is 'int4', .* head_dim is 24; expected a power of two"
    ):
        DecodeEngine(decode, None, EngineOptions(kv_cache_dtype="int4"))
    DecodeEngine(decode, None, EngineOptions(kv_cache_dtype="int8"))


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graphs", ["on", "off"])
@pytest.mark.parametrize("kind", KINDS)
def test_answers_on_a_gpu(tiny, kind, cuda_graphs) -> None:
    """Sums of another order may move a value to the code beside, and an answer with it, but hardly ever."""
    cases = draw_cases(tiny, kind, 12, seed=4)
    engine = DecodeEngine.from_pretrained(
        tiny.paths["base"], bits=16, dtype=torch.float32, device="cuda", memory="8MiB", prefill_chunk=16,
        kv_cache_dtype=kind, cuda_graphs=cuda_graphs,
    )  # fmt: skip
    for name in TASKS:
        engine.add_model(name, tiny.paths[name])
    right = [got == answer for got, (_, _, answer) in zip(ask(engine, cases), cases, strict=True)]
    assert sum(right) >= 10
