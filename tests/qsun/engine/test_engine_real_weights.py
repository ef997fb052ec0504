"""The engine on real weights, SmolLM2-135M-Instruct in float32, against transformers.

Ties. Two computations of one logit differ in their last bits, so where two tokens are almost as likely,
either may win. Let e be the largest error of the reference's logits, float32 against float64, over the
prompts in `SAMPLE`. By the rule of `qsun_kernels.testing.tolerances`, which a test here holds the engine to,
the engine's logits are wrong by at most 2e. If the reference prefers token a to token b by m, a is ahead of b
by at least m - 2e in exact logits; if the engine prefers b, by at most 4e. So a difference with m <= 6e is a
tie, and one with m > 6e an error. The same holds for two runs of the engine that choose a and b.

The reference reads what the engine answered in one forward pass: an answer is the greedy one when each of its
tokens is the most likely one after those before it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM

from qsun import DecodeEngine, SamplingParams
from qsun.checkpoint.tokenizer import load_tokenizer
from qsun.engine.options import EngineOptions
from qsun.engine.statistics import EngineStats
from qsun.kv_cache.tensors import KVCache
from qsun.layers.linear import Linear, QuantLinear
from qsun.layers.mlp import GateUpSilu
from qsun.modules.decode import DecodeModule, load_decode_module
from qsun.modules.prefill import PrefillModule, load_prefill_module
from qsun_kernels import QuantSpec, dequantize
from qsun_kernels.quant import quantize_rtn
from qsun_kernels.testing.tolerances import compare

pytestmark = [
    pytest.mark.slow,
    pytest.mark.real_weights,
    # One worker loads the models, once.
    pytest.mark.xdist_group("real_weights"),
]

NEW_TOKENS = 64
BLOCK_SIZE = 4
MIXED_TOKENS = 24
SPEC = QuantSpec(4, 64, True)
# The prompts, by number, whose logits are computed in float64 too: the shortest and the longest among them.
SAMPLE = (0, 1, 6, 9, 14)
# About ten times what float32 costs this model: an error beyond it is a mistake in the reference or the
# oracle, and would make ties of true differences.
LARGEST_ERROR = 5e-4

DOCUMENT = (
    "The harbour of the old town faces north, so the winter storms come straight in. For two hundred "
    "years the fishermen pulled their boats up on the beach every evening. Then, in 1887, the "
    "council borrowed money and built a wall of granite blocks, each as heavy as six horses. The "
    "wall was finished in the summer of 1893, and the first large storm came in October. It broke "
    "over the wall for three days. When it was over, two of the blocks had moved by the width of a "
    "hand, and not one boat was lost. Since then the engineer, a quiet woman called Agnes Thorne, "
    "has had a street, a school and a kind of fish soup named after her. "
)
CHATS = (
    "What is the capital of France?",
    "Write a haiku about rain.",
    "List three uses of copper.",
    "Why do cats purr? Answer in one sentence.",
    "Translate into French: the bread is on the table.",
    "If a train goes 60 km in 40 minutes, how fast is it in km per hour?",
    DOCUMENT + "When was the wall finished?",
    DOCUMENT + "Who was Agnes Thorne, and why is there a soup named after her?",
    "Write a Python function that returns the n-th Fibonacci number.",
)
TEXTS = (
    "The",
    "1, 2, 3, 4,",
    "Once upon a time",
    "def quicksort(values):\n",
    "The chemical symbol of gold is",
    "Il était une fois une petite fille qui",
    "| planet | moons |\n|---|---|\n| Earth | 1 |\n| Mars |",
    "Dear Sir or Madam,\n\nI am writing to you about the bicycle that I bought in your shop last week.",
    "In the beginning there was only the sea. The wind had nobody to talk to, and so it talked to the waves.",
    DOCUMENT,
    DOCUMENT + "Every year in October the town",
)


class ExactRotary(nn.Module):
    """Rotary angles in float32, which models are trained with, and their cosines and sines in float64."""

    def __init__(self, inverse_frequencies: Tensor) -> None:
        super().__init__()
        self.inverse_frequencies = inverse_frequencies.float()

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = (position_ids[..., None].float() * self.inverse_frequencies).double()
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def in_float64(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A copy that computes in float64 throughout: as it is, transformers' norms and cosines stay float32."""

    def exact_norm(norm: nn.Module) -> nn.RMSNorm:
        exact = nn.RMSNorm(norm.weight.shape[0], eps=norm.variance_epsilon, dtype=torch.float64)
        exact.weight.data.copy_(norm.weight)
        return exact

    exact = copy.deepcopy(model).double()
    for layer in exact.model.layers:
        layer.input_layernorm = exact_norm(layer.input_layernorm)
        layer.post_attention_layernorm = exact_norm(layer.post_attention_layernorm)
    exact.model.norm = exact_norm(exact.model.norm)
    exact.model.rotary_emb = ExactRotary(model.model.rotary_emb.inv_freq)
    return exact


@torch.no_grad()
def sun_logits(
    prefill: LlamaForCausalLM, decode: LlamaForCausalLM, prompt: list[int], answer: list[int]
) -> Tensor:
    """SUN by transformers: logits (len(answer), V) from which each token of an answer would be chosen.

    The prefill model writes the KV of all but the last prompt token; the decode model reads that one and the
    answer.
    """
    cache = DynamicCache(config=decode.config)
    if len(prompt) > 1:
        prefill.model(torch.tensor([prompt[:-1]]), past_key_values=cache, use_cache=True)
    read = torch.tensor([[prompt[-1], *answer[:-1]]])
    return decode(read, past_key_values=cache, use_cache=True).logits[0]


@torch.no_grad()
def greedy_by_generate(
    model: LlamaForCausalLM, prompts: list[list[int]]
) -> tuple[list[list[int]], list[Tensor]]:
    """transformers' own generate, all prompts in one batch: answers, and the logits (T, V) of each."""
    width = max(map(len, prompts))
    padded = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.generate(
        padded,
        attention_mask=mask,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[:, width:].tolist(), list(torch.stack(out.logits, dim=1))


def most_likely(logits: list[Tensor]) -> list[list[int]]:
    """The tokens that rows of logits (T, V) would choose, answer by answer."""
    return [rows.argmax(dim=-1).tolist() for rows in logits]


def find_tie(answer: list[int], expected: list[int], logits: Tensor, bound: float) -> str | None:
    """Where and how two greedy answers part at a tie; None when they are equal.

    logits: (T, V) by the reference, which read what both have in common.  AssertionError when they part where
    the logits of the two tokens are further apart than `bound`.  What follows a tie is not compared.
    """
    for place, (got, wanted) in enumerate(zip(answer, expected, strict=True)):
        if got != wanted:
            gap = abs(logits[place, wanted].item() - logits[place, got].item())
            assert gap <= bound, (
                f"token {place} is {got}, expected {wanted}: their logits are {gap:.3g} apart, "
                f"at a tie at most {bound:.3g}"
            )
            return f"token {place}: {got} or {wanted}, logits {gap:.3g} apart"
    return None


def count_ties(
    record_property, answers: list[list[int]], expected: list[list[int]], logits: list[Tensor], bound: float
) -> int:
    """Hold answers to what is expected; print and record the ties."""
    cases = zip(answers, expected, logits, strict=True)
    ties = [tie for case in cases if (tie := find_tie(*case, bound)) is not None]
    print(f"{len(answers)} answers, {len(ties)} ties within {bound:.3g}:", *ties, sep="\n  ")
    record_property("ties", len(ties))
    record_property("tie_bound", bound)
    return len(ties)


@dataclass(frozen=True)
class Real:
    """The weights, as transformers reads them and as the engine does, and what is asked of them.

    exact: the base in float64.  path: of the GGUF file.
    """

    path: Path
    prompts: list[list[int]]
    base: LlamaForCausalLM
    exact: LlamaForCausalLM
    prefill: PrefillModule
    decode: DecodeModule


@pytest.fixture(scope="module")
def real(smollm2_gguf) -> Real:
    pytest.importorskip("gguf")
    tokenizer = load_tokenizer(smollm2_gguf)
    prompts = [tokenizer.encode(text) for text in TEXTS]
    for text in CHATS:
        chat = [{"role": "user", "content": text}]
        prompts.append(tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"])
    prompts.sort(key=len)
    assert len(prompts) == 20 and len(prompts[0]) == 1 and 180 <= len(prompts[-1]) <= 220
    # Short and long in turns, so that all lengths meet in one batch.
    prompts[1::2] = reversed(prompts[1::2])
    stored = AutoModelForCausalLM.from_pretrained(
        str(smollm2_gguf.parent), gguf_file=smollm2_gguf.name, dtype=torch.float32
    )
    # A model that remembers to come from GGUF refuses to be saved.
    del stored.config.quantization_config
    base = LlamaForCausalLM(stored.config).eval()
    base.load_state_dict(stored.state_dict())
    base.generation_config.eos_token_id = None  # every answer has all its tokens, like the engine's
    decode = load_decode_module(smollm2_gguf, bits=16, dtype=torch.float32, device="cpu")
    prefill = load_prefill_module("base", None, base_path=smollm2_gguf, decode=decode)
    return Real(smollm2_gguf, prompts, base, in_float64(base), prefill, decode)


@pytest.fixture(scope="module")
def quantised(real) -> DecodeModule:
    return load_decode_module(
        real.path, bits=SPEC.bits, group_size=SPEC.group_size, dtype=torch.float32, device="cpu"
    )


@pytest.fixture(scope="module")
def dequantised(real) -> LlamaForCausalLM:
    """The base as transformers reads it, with what 4-bit codes of its projections stand for."""
    model = copy.deepcopy(real.base)
    for name, module in model.model.layers.named_modules():
        if isinstance(module, nn.Linear):
            assert name.endswith("_proj")
            module.weight.data = dequantize(quantize_rtn(module.weight.data, SPEC), torch.float32)
    return model


def make_engine(
    decode: DecodeModule, modules: dict[str, PrefillModule], *, blocks: int, swap_blocks: int, **options
) -> DecodeEngine:
    """An engine over loaded modules; cache and swap space in blocks."""
    block_bytes = KVCache.block_bytes(decode.config, BLOCK_SIZE, torch.float32)
    memory = dict(memory=blocks * block_bytes, swap_memory=swap_blocks * block_bytes, block_size=BLOCK_SIZE)
    engine = DecodeEngine(decode, None, EngineOptions(**memory, **options))
    for name, module in modules.items():
        engine.add_model(name, module)
    return engine


def run_greedy(
    engine: DecodeEngine, prompts: list[list[int]], model: str | list[str], new_tokens: int
) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    completions = engine.generate(prompts, model=model, params=params)
    assert [c.error for c in completions if c.error is not None] == []
    return [list(c.token_ids) for c in completions]


def recorded_logits(engine: DecodeEngine, prompts: list[list[int]]) -> list[list[Tensor]]:
    """A list for each prompt, to which the engine's decode steps add the logits (V,) of its next token."""
    engine.prepare()
    rows: dict[tuple[int, ...], list[Tensor]] = {tuple(prompt): [] for prompt in prompts}
    runner = engine._open_book().workspace.runner
    decode = runner.decode

    def decode_and_record(sequences):
        step = decode(sequences)
        for sequence, row in step.members:
            if sequence.request.prompt_token_ids in rows:
                rows[sequence.request.prompt_token_ids].append(step.logits[row].float().clone())
        return step

    runner.decode = decode_and_record
    return list(rows.values())


@dataclass(frozen=True)
class Run:
    """A run of the engine over all prompts, with preemptions, and what the reference says to it.

    logits: (T, V) of each answer by the reference.  got, plain, exact: logits of the sample, one answer after
    the other, by the engine's own decode steps, by the reference, and in float64.
    """

    answers: list[list[int]]
    stats: EngineStats
    expected: list[list[int]]
    logits: list[Tensor]
    got: Tensor
    plain: Tensor
    exact: Tensor

    @cached_property
    def error(self) -> float:
        """The largest error of the reference's logits."""
        error = (self.plain.double() - self.exact).abs().max().item()
        assert 0 < error < LARGEST_ERROR
        return error

    @property
    def tie_bound(self) -> float:
        return 6 * self.error


def run_of(
    decode: DecodeModule,
    real: Real,
    refer: Callable[[list[list[int]]], tuple[list[list[int]], list[Tensor]]],
    exact_decode: LlamaForCausalLM,
) -> Run:
    """refer: from the engine's answers to the reference's, and its logits."""
    # Complete, the 20 requests have 2,366 tokens; there is room for 960, in the swap space for 128.
    engine = make_engine(decode, {"base": real.prefill}, blocks=240, swap_blocks=32, prefill_chunk=100)
    rows = recorded_logits(engine, [real.prompts[i] for i in SAMPLE])
    answers = run_greedy(engine, real.prompts, "base", NEW_TOKENS)
    expected, logits = refer(answers)
    got, plain, exact = [], [], []
    for i, engine_rows in zip(SAMPLE, rows, strict=True):
        assert len(engine_rows) == NEW_TOKENS, "a decode step for each token, whatever the preemptions"
        # As far as both have read the same: the token after a difference is the first that differs in that.
        same = next((n for n in range(NEW_TOKENS) if answers[i][n] != expected[i][n]), NEW_TOKENS - 1) + 1
        got.append(torch.stack(engine_rows[:same]))
        plain.append(logits[i][:same])
        exact.append(sun_logits(real.exact, exact_decode, real.prompts[i], answers[i])[:same])
    return Run(answers, engine.stats(), expected, logits, torch.cat(got), torch.cat(plain), torch.cat(exact))


@pytest.fixture(scope="module")
def plain_run(real) -> Run:
    """The decoder as it is, against transformers' generate."""
    return run_of(real.decode, real, lambda _: greedy_by_generate(real.base, real.prompts), real.exact)


@pytest.fixture(scope="module")
def quantised_run(real, quantised, dequantised) -> Run:
    """The decoder in 4 bits with the base's own prefill module, against SUN by transformers."""

    def refer(answers: list[list[int]]) -> tuple[list[list[int]], list[Tensor]]:
        logits = [
            sun_logits(real.base, dequantised, prompt, answer)
            for prompt, answer in zip(real.prompts, answers, strict=True)
        ]
        return most_likely(logits), logits

    return run_of(quantised, real, refer, in_float64(dequantised))


@pytest.fixture(params=["plain_run", "quantised_run"])
def run(request) -> Run:
    return request.getfixturevalue(request.param)


def test_20_prompts_64_tokens_equal_transformers(run, record_property) -> None:
    for name in ("swaps", "rebuilds", "rebuilt_tokens", "prefix_hit_tokens"):
        assert getattr(run.stats, name) > 0, f"{name}: the run did not test what it is for"
    assert run.stats.mean_batch > 2 and run.stats.blocks_in_use == run.stats.swap_blocks_in_use == 0
    assert {len(answer) for answer in run.answers} == {NEW_TOKENS}
    ties = count_ties(record_property, run.answers, run.expected, run.logits, run.tie_bound)
    # Gaps so small are rare; were they not, the bound would be hiding something.
    assert ties <= 2


def test_logits_of_the_engine_are_as_good_as_those_of_transformers(run) -> None:
    comparison = compare("logits of the decode steps", run.got, run.exact, run.plain)
    print(comparison.report)
    comparison.require()


def test_a_prompt_read_by_the_decode_module_would_be_noticed(real, dequantised, quantised_run) -> None:
    """The naive variant of SUN, for which the quantised decoder prefills too."""
    noticed = 0
    for i in SAMPLE:
        answer = quantised_run.answers[i]
        logits = sun_logits(dequantised, dequantised, real.prompts[i], answer)
        try:
            find_tie(answer, logits.argmax(dim=-1).tolist(), logits, quantised_run.tie_bound)
        except AssertionError:
            noticed += 1
    # One prompt of the sample has a single token, and nothing to prefill.
    assert noticed == len(SAMPLE) - 1


def test_the_tie_rule_tells_ties_from_errors(plain_run) -> None:
    answer, bound = plain_run.answers[1], plain_run.tie_bound
    logits = plain_run.logits[1].clone()
    assert find_tie(answer, answer, logits, bound) is None
    other = [*answer[:40], answer[40] ^ 1, *answer[41:]]
    logits[40, other[40]] = logits[40, answer[40]] - 0.9 * bound
    # After the tie anything goes.
    tie = find_tie(answer, [*other[:41], *([0] * 23)], logits, bound)
    assert tie is not None and tie.startswith(f"token 40: {answer[40]} or {other[40]}, ")
    logits[40, other[40]] = logits[40, answer[40]] - 1.1 * bound
    with pytest.raises(AssertionError, match=f"token 40 is {answer[40]}, expected {other[40]}"):
        find_tie(answer, other, logits, bound)


def test_the_decode_module_holds_the_rounded_weights(quantised, dequantised) -> None:
    """Bit for bit, each projection at its place in the matrices that the engine made of several."""

    def held(linear: Linear | GateUpSilu) -> Tensor:
        assert isinstance(linear, (QuantLinear, GateUpSilu)) and linear.weight.layout == "torch.dense"
        return linear.weight.tensors[0]

    config = quantised.config
    heads = [config.q_size, config.kv_size, config.kv_size]
    for layer, theirs in zip(quantised.stack.layers, dequantised.model.layers, strict=True):
        q, k, v = held(layer.attention.qkv).split(heads)
        gate, up = held(layer.mlp.gate_up).chunk(2)
        for ours, module in (
            (q, theirs.self_attn.q_proj),
            (k, theirs.self_attn.k_proj),
            (v, theirs.self_attn.v_proj),
            (held(layer.attention.o), theirs.self_attn.o_proj),
            (gate, theirs.mlp.gate_proj),
            (up, theirs.mlp.up_proj),
            (held(layer.mlp.down), theirs.mlp.down_proj),
        ):
            assert torch.equal(ours, module.weight)


def with_noise(base: LlamaForCausalLM, folder: Path) -> LlamaForCausalLM:
    """A full fine-tune: every other layer's matrices moved by a fifth of their size.  Saved in `folder`."""
    model = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(5)
    for layer in model.model.layers[::2]:
        for weight in layer.parameters():
            if weight.dim() == 2:
                noise = torch.randn(weight.shape, generator=generator)
                weight.data += noise * (0.2 * weight.data.std())
    model.save_pretrained(folder)
    return model


def with_adapter(base: LlamaForCausalLM, folder: Path) -> LlamaForCausalLM:
    """A LoRA adapter by peft, neither of its factors zero, merged by peft.  Saved in `folder`."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"])
    torch.manual_seed(6)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder, save_embedding_layers=False)
    return model.merge_and_unload()


@pytest.fixture(scope="module")
def tasks(real, quantised, tmp_path_factory) -> dict[str, tuple[LlamaForCausalLM, PrefillModule]]:
    """Three tasks for transformers and for the engine: the base, a full checkpoint and an adapter."""
    made = {"base": (real.base, real.prefill)}
    for name, make in (("noise", with_noise), ("adapter", with_adapter)):
        folder = tmp_path_factory.mktemp(name)
        model = make(real.base, folder)
        made[name] = (
            model.eval(),
            load_prefill_module(name, folder, base_path=real.path, decode=quantised),
        )
    return made


def test_three_prefill_modules_in_one_batch_each_get_what_they_get_alone(
    real, quantised, dequantised, tasks, quantised_run, record_property
) -> None:
    modules = {name: module for name, (_, module) in tasks.items()}
    # The same prompts for every task: nothing but provenance keeps their KV apart.
    questions = [prompt for prompt in real.prompts if 30 < len(prompt) < 60][:4]
    cases = [(name, prompt) for prompt in questions for name in tasks]
    names, prompts = [name for name, _ in cases], [prompt for _, prompt in cases]
    engine = make_engine(quantised, modules, blocks=100, swap_blocks=24, prefill_chunk=100)
    together = run_greedy(engine, prompts, names, MIXED_TOKENS)
    stats = engine.stats()
    assert stats.preemptions > 0 and stats.mean_batch > 4

    alone = []
    for name, prompt in cases:
        own = make_engine(quantised, {name: modules[name]}, blocks=100, swap_blocks=0)
        alone += run_greedy(own, [prompt], name, MIXED_TOKENS)
    logits = [
        sun_logits(tasks[name][0], dequantised, prompt, answer)
        for (name, prompt), answer in zip(cases, together, strict=True)
    ]
    bound = quantised_run.tie_bound  # the same decoder, reading KV of like size
    assert count_ties(record_property, together, alone, logits, bound) <= 1
    assert count_ties(record_property, together, most_likely(logits), logits, bound) <= 1
    # The tasks are tasks: to each prompt, each answers in its own way.
    for first in range(0, len(cases), len(tasks)):
        assert len({tuple(answer) for answer in alone[first : first + len(tasks)]}) == len(tasks)
