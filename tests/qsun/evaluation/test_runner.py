"""Answers through the engine: kept as they come, not asked twice, judged, summarised."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qsun import DecodeEngine, SamplingParams
from qsun.engine.options import EngineOptions, kv_format_of
from qsun.evaluation.items import EvaluationError, Item, Verdict, json_lines
from qsun.evaluation.perplexity import perplexity, response_losses
from qsun.evaluation.runner import (
    ANSWERS,
    SUMMARY,
    GivenAnswer,
    answer_items,
    evaluate,
    judge_answers,
    read_answers,
    verdict_lines,
    wilson_interval,
)
from qsun.modules.decode import load_decode_module
from qsun.modules.prefill import load_prefill_module
from qsun.training.batch import Example

PARAMS = SamplingParams(temperature=0.0, max_tokens=5)


class Even:
    """Right is an answer whose text says so; the tiny model has no tokenizer, so its text is empty."""

    name = "even"
    max_tokens = 5

    def __init__(self, items) -> None:
        self.items = items

    def judge(self, item: Item, text: str) -> Verdict:
        return Verdict(item.reference, "by number")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("eval") / "base"
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, bos_token_id=None, eos_token_id=2,
        tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def engine(base) -> DecodeEngine:
    engine = DecodeEngine.from_pretrained(base, bits=16, dtype=torch.float32, memory="4MiB", max_batch_size=4)
    engine.add_model("one")
    engine.add_model("two")
    return engine


def items(count: int) -> list[Item]:
    return [Item(str(n), [3 + n, 4, 5], n % 2 == 0) for n in range(count)]


def test_every_model_is_asked_every_item(engine, tmp_path: Path) -> None:
    summary = evaluate(engine, Even(items(6)), ["one", "two"], tmp_path, in_flight=5)
    assert summary["models"]["one"]["answered"] == 6 and summary["models"]["one"]["correct"] == 3
    assert json.loads((tmp_path / SUMMARY).read_text())["task"] == "even"
    given = read_answers(tmp_path / ANSWERS)
    assert len(given) == 12
    for n in range(6):
        expected = engine.generate([3 + n, 4, 5], model="one", params=PARAMS)[0]
        assert given["one", str(n)].token_ids == expected.token_ids == given["two", str(n)].token_ids
    lines = list(verdict_lines(tmp_path))
    assert len(lines) == 12 and {line["detail"] for line in lines} == {"by number"}


def test_an_interrupted_evaluation_goes_on(engine, tmp_path: Path) -> None:
    seen = []
    first = answer_items(
        engine, ["one"], items(9), tmp_path, PARAMS, in_flight=2,
        progress=lambda done, total: seen.append(done), should_stop=lambda: len(seen) >= 3,
    )  # fmt: skip
    assert 3 <= len(first) < 9 and not engine.has_work
    with (tmp_path / ANSWERS).open("a") as file:
        file.write('{"model": "one", "item": "8", "te')  # the process was killed while it wrote
    asked = []
    submit = engine.submit
    engine.submit = lambda *args, **more: asked.append(args) or submit(*args, **more)  # type: ignore
    both = answer_items(engine, ["one"], items(9), tmp_path, PARAMS)
    assert len(both) == 9 and len(asked) == 9 - len(first)
    assert len((tmp_path / ANSWERS).read_text().splitlines()) == 9
    (tmp_path / ANSWERS).write_text('{"model": 1\n{}\n')
    with pytest.raises(EvaluationError, match=r"answers\.jsonl:1 is no answer"):
        read_answers(tmp_path / ANSWERS)


def test_answers_of_another_run_are_not_taken_for_this_one(engine, tmp_path: Path) -> None:
    evaluate(engine, Even(items(2)), ["one"], tmp_path, identity={"decoder": "a", "model one": "x"})
    # More items and more models are the same run.
    evaluate(engine, Even(items(3)), ["one", "two"], tmp_path, identity={"decoder": "a", "model two": "y"})
    other = Even([Item("1", [7, 7], True)])
    longer = Even(items(2))
    longer.max_tokens = 6
    for task, identity, says in (
        (Even(items(2)), {"decoder": "b"}, "decoder is 'a' there and 'b' now"),
        (Even(items(2)), {"model one": "z"}, "model one is 'x' there"),
        (other, {}, "prompt of item 1 is"),
        (longer, {}, "max_tokens is 5 there and 6 now"),
    ):
        with pytest.raises(EvaluationError, match=rf"run\.json is of another run: {says}"):
            evaluate(engine, task, ["one"], tmp_path, identity=identity)
    assert len(read_answers(tmp_path / ANSWERS)) == 6
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(EvaluationError, match=r"run\.json cannot be read"):
        evaluate(engine, Even(items(2)), ["one"], tmp_path)


def test_an_answer_may_hold_any_character(tmp_path: Path) -> None:
    answers = [
        GivenAnswer("one", str(n), text, (1,), "stop") for n, text in enumerate(("a\u2028b\x85\r\nc", "d"))
    ]
    (tmp_path / ANSWERS).write_text("".join(a.to_json() + "\n" for a in answers), encoding="utf-8")
    assert list(read_answers(tmp_path / ANSWERS).values()) == answers
    task = Even(items(2))
    judge_answers(task, ["one"], {(a.model, a.item): a for a in answers}, tmp_path)
    assert len(list(verdict_lines(tmp_path))) == 2
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({"prompt": "a\u2028b"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [line for _, line in json_lines(file)] == [{"prompt": "a\u2028b"}]


def test_a_refused_item_is_wrong_and_the_others_are_answered(engine, tmp_path: Path) -> None:
    bad = [Item("long", [3] * 80, True), Item("alien", [500], True), *items(2)]
    summary = evaluate(engine, Even(bad), ["one"], tmp_path)["models"]["one"]
    assert summary == {**summary, "answered": 4, "failed": 2, "correct": 1}
    details = {line["item"]: line["detail"] for line in verdict_lines(tmp_path)}
    assert "80" in details["long"] and "500" in details["alien"]


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
@pytest.mark.parametrize("first_token", ["decode", "prefill"])
def test_perplexity_is_that_of_the_tokens_that_are_drawn(
    base, engine, first_token: str, kv_cache_dtype: str
) -> None:
    """The engine's own log-probabilities of a greedy answer, against the teacher-forced ones."""
    decode = load_decode_module(base, bits=16, dtype=torch.float32, device="cpu")
    other = DecodeEngine(decode, None, EngineOptions(kv_cache_dtype=kv_cache_dtype))
    other.add_model("task", None, first_token=first_token)
    prompts = [[5], [9, 8, 7], list(range(10, 45))]
    examples, expected = [], []
    for prompt in prompts:
        params = SamplingParams(temperature=0.0, max_tokens=9, logprobs=0, ignore_eos=True)
        answer = other.generate(prompt, model="task", params=params)[0]
        examples.append(Example(tuple(prompt), answer.token_ids))
        expected.append(-sum(step.logprob for step in answer.logprobs))
    module = load_prefill_module("task", None, base_path=base, decode=decode)
    kv_format = kv_format_of(kv_cache_dtype, torch.float32, decode.config.head_dim)
    losses = response_losses(decode, module, examples, first_token, kv_format)  # type: ignore[arg-type]
    assert [loss.total for loss in losses] == pytest.approx(expected, rel=1e-4)
    assert perplexity(losses) == pytest.approx(math.exp(sum(expected) / 27), rel=1e-4)
    with pytest.raises(ValueError, match=r"examples\[0\] has 70 positions, expected at most 64"):
        response_losses(decode, module, [Example((3,) * 70, (4,))], "decode")


def test_the_interval_of_a_share() -> None:
    low, high = wilson_interval(8, 10)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Newcombe 1998, by hand
    assert wilson_interval(0, 5)[0] == 0 and wilson_interval(5, 5)[1] == 1
    assert wilson_interval(0, 0) is None
