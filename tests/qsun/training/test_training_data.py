"""From JSON lines to token ids, and what is said about lines that are none."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from qsun.checkpoint.tokenizer import load_tokenizer
from qsun.training.batch import Example
from qsun.training.data import DataError, load_examples
from qsun.training.order import DataOrder, cut_into_packs

LIMITS = {"max_length": 200, "vocab_size": 264}


@pytest.fixture(scope="module")
def tokenizer(bench):
    return load_tokenizer(bench.base)


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_a_chat_is_split_before_the_last_answer(tokenizer, tmp_path: Path) -> None:
    chat = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
    ]
    (example,), report = load_examples([write(tmp_path / "d.jsonl", {"messages": chat})], tokenizer, **LIMITS)
    # What the engine submits for the chat so far, and an answer that ends where the engine stops.
    assert tokenizer.decode(example.prompt) == "u:one<end>\na:two<end>\nu:three<end>\na:"
    assert tokenizer.decode(example.response) == "four<end>"
    ids = tokenizer.apply_chat_template(chat[:3], add_generation_prompt=True, return_dict=False)
    assert list(example.prompt) == list(ids)
    assert report.examples == 1 and report.response_tokens == len(example.response)


def test_prompts_with_responses(tokenizer, tmp_path: Path) -> None:
    file = write(
        tmp_path / "d.jsonl", {"prompt": "ab", "response": "c"}, "", {"prompt": [5, 6], "response": [7]}
    )
    examples, _ = load_examples([file], tokenizer, **LIMITS)
    assert tokenizer.decode(examples[0].prompt) == "ab"
    assert examples[0].response == (*tokenizer.encode("c"), 256)
    assert examples[1] == Example((5, 6), (7,))
    only_ids, _ = load_examples(
        [write(tmp_path / "i.jsonl", {"prompt": [5], "response": [7]})], None, **LIMITS
    )
    assert only_ids == [Example((5,), (7,))]


BAD = [
    ("{", "not JSON"),
    ("[]", "is a JSON list"),
    ({"prompt": "a"}, r"has the fields \['prompt'\]"),
    ({"prompt": "", "response": "b"}, "the prompt is empty"),
    ({"prompt": [5], "response": [999]}, r"the response has token 999, expected integers in 0\.\.263"),
    ({"prompt": [True], "response": [1]}, "the prompt has token True"),
    ({"messages": []}, '"messages" is no list of at least two'),
    (
        {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]},
        "last message is of",
    ),
    ({"messages": [{"role": "user"}, {"role": "assistant", "content": "b"}]}, "has no content"),
    ({"messages": [{"content": "a"}, {"role": "assistant", "content": "b"}]}, "has no role"),
    (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]},
        "the last message is empty",
    ),
]


@pytest.mark.damaged
@pytest.mark.parametrize(("row", "says"), BAD)
def test_a_damaged_line_is_named(tokenizer, tmp_path: Path, row, says: str) -> None:
    good = {"prompt": "a", "response": "b"}
    file = write(tmp_path / "d.jsonl", good, row, good)
    with pytest.raises(DataError, match=rf"d\.jsonl:2: .*{says}"):
        load_examples([file], tokenizer, **LIMITS)
    examples, report = load_examples([file], tokenizer, **LIMITS, on_bad_data="skip")
    assert len(examples) == 2 and len(report.bad) == 1 and report.bad[0].startswith(f"{file}:2: ")


@pytest.mark.damaged
def test_a_line_that_is_no_text_is_left_out_alone(tokenizer, tmp_path: Path) -> None:
    good = json.dumps({"prompt": "a\u2028", "response": "b"}, ensure_ascii=False).encode()
    file = tmp_path / "d.jsonl"
    file.write_bytes(good + b"\n" + b'{"prompt": "\xff", "response": "b"}\n' + good + b"\n")
    with pytest.raises(DataError, match=r"d\.jsonl:2: not JSON .*utf-8"):
        load_examples([file], tokenizer, **LIMITS)
    examples, report = load_examples([file], tokenizer, **LIMITS, on_bad_data="skip")
    assert len(examples) == 2 and report.bad[0].startswith(f"{file}:2: ")


@pytest.mark.damaged
def test_a_damaged_archive_is_named(tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl.gz"
    whole = gzip.compress(json.dumps({"prompt": "a", "response": "b" * 99}).encode())
    for damaged in (whole[:-12], b"x" + whole[1:], whole[:14] + b"\xff" * 8 + whole[22:]):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=r"d\.jsonl\.gz cannot be decompressed"):
            load_examples([file], tokenizer, **LIMITS)


def test_unknown_choices_are_named(tokenizer, tmp_path: Path) -> None:
    file = write(tmp_path / "d.jsonl", {"prompt": "a", "response": "b"})
    with pytest.raises(ValueError, match="on_bad_data is 'ignore'"):
        load_examples([file], tokenizer, **LIMITS, on_bad_data="ignore")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="on_long is 'cut'"):
        load_examples([file], tokenizer, **LIMITS, on_long="cut")  # type: ignore[arg-type]


def test_long_examples_are_counted(tokenizer, tmp_path: Path) -> None:
    rows = [{"prompt": "a" * 5, "response": "b" * n} for n in (3, 20)] + [
        {"prompt": "a" * 50, "response": "b"}
    ]
    file = write(tmp_path / "d.jsonl", *rows)
    examples, report = load_examples([file], tokenizer, max_length=10, vocab_size=264)
    assert (len(examples), report.dropped, report.truncated) == (1, 2, 0)
    examples, report = load_examples([file], tokenizer, max_length=10, vocab_size=264, on_long="truncate")
    assert (len(examples), report.dropped, report.truncated) == (2, 1, 1)
    assert examples[1].num_positions == 10 and len(examples[1].prompt) == 5
    with pytest.raises(DataError, match=r"no example is left \(0 damaged lines, 3 longer than 2\)"):
        load_examples([file], tokenizer, max_length=2, vocab_size=264)


def test_a_template_is_needed_for_chats(tokenizer, tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    file = write(tmp_path / "d.jsonl", chat)
    with pytest.raises(DataError, match="has no tokenizer"):
        load_examples([file], None, **LIMITS)
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = None
        with pytest.raises(DataError, match="has no chat template"):
            load_examples([file], tokenizer, **LIMITS)
        tokenizer.chat_template = "{{ raise_exception('no') }}"
        with pytest.raises(DataError, match="the chat template refuses it"):
            load_examples([file], tokenizer, **LIMITS)
        tokenizer.chat_template = "{{ messages|length }}"
        with pytest.raises(DataError, match="otherwise once it is answered"):
            load_examples([file], tokenizer, **LIMITS)
    finally:
        tokenizer.chat_template = template


def test_every_epoch_sees_every_example_once_in_an_order_of_its_own() -> None:
    order = DataOrder(10, 4, seed=3)
    assert order.steps_per_epoch == 3
    epochs = [[i for step in range(3) for i in order.step(3 * e + step)] for e in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 2 and epochs[0] != epochs[1]
    assert order.step(4) == DataOrder(10, 4, seed=3).step(4)
    assert [order.step(s) for s in range(3)] != [DataOrder(10, 4, seed=4).step(s) for s in range(3)]


def test_packs_hold_every_example_and_no_more_than_they_may() -> None:
    examples = [Example((1,) * n, (2,)) for n in (3, 30, 7, 12, 1, 9)]
    packs = cut_into_packs(examples, 20)
    assert sorted(e.num_positions for pack in packs for e in pack) == sorted(
        e.num_positions for e in examples
    )
    assert all(len(pack) == 1 or sum(e.num_positions for e in pack) <= 20 for pack in packs)
    assert len(packs[0]) == 1  # thirty tokens do not fit and are not cut
