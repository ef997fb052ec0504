"""Token for token: the engine against transformers, whatever the batch, the chunks and the cache."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from qsun import DecodeEngine, SamplingParams

THREE = ("poet", "clerk", "cook")
GREEDY = SamplingParams(temperature=0, max_tokens=64)


def answers(engine, prompts, model, params=GREEDY) -> list[list[int]]:
    completions = engine.generate(prompts, model=model, params=params)
    assert [c.error for c in completions if c.error is not None] == []
    return [list(c.token_ids) for c in completions]


@pytest.fixture(scope="module")
def cases_20x64(tiny, reference):
    """20 prompts of mixed lengths, ten of them with a common beginning, and what transformers answers."""

    def answer(prompt):
        return reference.greedy(tiny.base, prompt, 64)

    prompts, expected = reference.cases(1, 10, 60, answer)
    more_prompts, more_expected = reference.cases(3, 10, 30, answer, beginning=[7, 8, 9] * 12)
    return prompts + more_prompts, expected + more_expected


@pytest.mark.parametrize(
    ("options", "happened"),
    [
        (dict(), ()),
        (
            dict(blocks=70, prefill_chunk=24, max_batch_size=12),
            ("rebuilds", "prefix_hit_tokens", "rebuilt_tokens"),
        ),
        (
            dict(blocks=70, prefill_chunk=24, max_batch_size=12, swap_blocks=400),
            ("swaps", "prefix_hit_tokens"),
        ),
        (
            dict(blocks=64, prefill_chunk=5, block_size=3, swap_blocks=20),
            ("swaps", "rebuilds", "prefix_hit_tokens", "rebuilt_tokens", "evictions"),
        ),
        (dict(blocks=200, prefill_chunk=1000, block_size=1, prefix_reuse=False), ("rebuilds",)),
    ],
    ids=["roomy", "rebuild", "swap", "swap-and-rebuild", "blocks-of-one"],
)
def test_20_prompts_64_tokens_equal_transformers(make_engine, cases_20x64, options, happened) -> None:
    prompts, expected = cases_20x64
    engine = make_engine(**options)
    if engine.options.prefix_reuse:
        # The beginning is in the cache before the batch comes, so that its ten prompts can find it.
        answers(engine, prompts[-1], "base", SamplingParams(temperature=0, max_tokens=1))
    assert answers(engine, prompts, "base") == expected
    stats = engine.stats()
    for name in happened:
        assert getattr(stats, name) > 0, f"{name}: the case did not test what it is for"
    assert stats.blocks_in_use == stats.swap_blocks_in_use == stats.running == stats.waiting == 0
    assert stats.blocks_cached == 0 or engine.options.prefix_reuse
    assert stats.mean_batch > 1.5


@pytest.fixture(scope="module", params=["decode", "prefill"])
def cases_of_three_tasks(request, tiny, reference):
    """(convention, models, prompts, answers) of 12 requests, four for each of three tasks."""
    cases = [
        reference.cases(
            seed, 4, 30, lambda p, m=model: reference.sun(tiny.tasks[m], tiny.base, p, 24, request.param)
        )
        for seed, model in enumerate(THREE)
    ]
    prompts = [cases[i % 3][0][i // 3] for i in range(12)]
    expected = [cases[i % 3][1][i // 3] for i in range(12)]
    return request.param, [THREE[i % 3] for i in range(12)], prompts, expected


@pytest.mark.parametrize(
    "options", [{}, dict(blocks=40, prefill_chunk=10, swap_blocks=15)], ids=["roomy", "tight"]
)
def test_three_tasks_in_one_batch_equal_sun_by_transformers(
    make_engine, cases_of_three_tasks, options
) -> None:
    first_token, models, prompts, expected = cases_of_three_tasks
    engine = make_engine(first_token=first_token, **options)
    params = SamplingParams(temperature=0, max_tokens=24)
    assert answers(engine, prompts, models, params) == expected
    if options:
        assert engine.stats().preemptions > 0
    # The tasks are tasks: to most prompts each answers otherwise than the base.
    base = answers(make_engine(first_token=first_token), prompts, "base", params)
    assert sum(a != b for a, b in zip(expected, base, strict=True)) >= 9


def test_a_mixed_batch_gives_each_request_what_it_gets_alone(make_engine, cases_of_three_tasks) -> None:
    """With sampling too: seeds are the requests' own."""
    first_token, models, prompts, _ = cases_of_three_tasks
    params = [
        SamplingParams(temperature=0.9, top_p=0.95, seed=i, max_tokens=16, repetition_penalty=1.1)
        for i in range(len(prompts))
    ]
    together = answers(
        make_engine(blocks=40, prefill_chunk=16, first_token=first_token), prompts, models, params
    )
    alone = [
        answers(make_engine(first_token=first_token), prompt, model, own)[0]
        for prompt, model, own in zip(prompts, models, params, strict=True)
    ]
    assert together == alone


def test_prefill_by_the_base_is_the_ordinary_model_under_both_conventions(
    make_engine, tiny, reference
) -> None:
    prompts, expected = reference.cases(6, 6, 20, lambda p: reference.greedy(tiny.base, p, 12))
    params = SamplingParams(temperature=0, max_tokens=12)
    for first_token in ("decode", "prefill"):
        assert answers(make_engine(first_token=first_token), prompts, "base", params) == expected


def test_prefix_hits_do_not_change_an_answer(make_engine, tiny, reference) -> None:
    engine = make_engine()
    (prompt,), poet = reference.cases(
        7, 1, 60, lambda p: reference.sun(tiny.tasks["poet"], tiny.base, p, 8), beginning=[3] * 20
    )
    params = SamplingParams(temperature=0, max_tokens=8)
    assert answers(engine, prompt, "poet", params) == poet
    before = engine.stats()
    assert answers(engine, prompt, "poet", params) == poet
    after = engine.stats()
    full_blocks = (len(prompt) - 1) // 4 * 4
    assert after.prefix_hit_tokens - before.prefix_hit_tokens == full_blocks
    assert after.prefill_tokens - before.prefill_tokens == len(prompt) - 1 - full_blocks
    # Another task with the same prompt finds nothing.
    assert answers(engine, prompt, "cook", params) == [
        reference.sun(tiny.tasks["cook"], tiny.base, prompt, 8)
    ]
    assert engine.stats().prefix_hit_tokens == after.prefix_hit_tokens


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 9])
@pytest.mark.parametrize("first_token", ["decode", "prefill"])
def test_prompts_around_the_edge_of_a_block(make_engine, tiny, reference, length, first_token) -> None:
    engine = make_engine(first_token=first_token)
    prompt = [11] * length
    params = SamplingParams(temperature=0, max_tokens=6)
    expected = reference.sun(tiny.tasks["clerk"], tiny.base, prompt, 6, first_token)
    for _ in range(2):  # the second time from the prefix index
        assert answers(engine, [prompt, [*prompt, 9]], "clerk", params)[0] == expected


def test_the_longest_answer_fits_the_cache_exactly(make_engine, tiny, reference) -> None:
    (prompt,), (expected,) = reference.cases(
        9, 1, 3, lambda p: reference.sun(tiny.tasks["poet"], tiny.base, p, 32 - len(p), eos=None), [5] * 8
    )
    engine = make_engine(blocks=8, max_model_len=32)
    params = SamplingParams(temperature=0, max_tokens=500, ignore_eos=True)
    (completion,) = engine.generate(prompt, model="poet", params=params)
    assert completion.finish_reason == "length" and list(completion.token_ids) == expected


SHAPE = dict(
    vocab_size=200,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
    tie_word_embeddings=False,
    initializer_range=0.2,
)
ARCHITECTURES = {
    "mistral with a window": lambda: MistralForCausalLM(MistralConfig(sliding_window=9, **SHAPE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
    "llama 3 rope, tied": lambda: LlamaForCausalLM(
        LlamaConfig(
            **{**SHAPE, "tie_word_embeddings": True},
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        )
    ),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_through_chunks_and_preemptions(tmp_path, reference, architecture) -> None:
    torch.manual_seed(4)
    model = ARCHITECTURES[architecture]().eval()
    model.save_pretrained(tmp_path)
    draw = random.Random(0)
    beginnings = [[draw.randrange(200) for _ in range(draw.randrange(3, 30))] for _ in range(6)]
    cases = [
        reference.cases(seed, 1, 5, lambda p: reference.greedy(model, [t % 200 for t in p], 20), beginning)
        for seed, beginning in enumerate(beginnings)
    ]
    prompts = [[token % 200 for token in prompt] for (prompt,), _ in cases]
    engine = DecodeEngine.from_pretrained(
        tmp_path, bits=16, dtype=torch.float32, device="cpu", block_size=4, memory="48KiB", prefill_chunk=7
    )
    engine.add_model("own")
    params = SamplingParams(temperature=0, max_tokens=20)
    assert answers(engine, prompts, "own", params) == [answer for _, (answer,) in cases]
    assert engine.stats().preemptions > 0
