"""Vocabularies read from tokenizer files are those of transformers, and damage is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE, Unigram, WordLevel, WordPiece
from transformers import PreTrainedTokenizerFast

from qsun.checkpoint.tokenizer import check_vocabulary, load_tokenizer, read_vocabulary
from qsun.errors import CheckpointError

MODELS = {
    "bpe": lambda: BPE({"a": 0, "b": 1, "ab": 2, "<unk>": 3}, [("a", "b")], unk_token="<unk>"),
    "word level": lambda: WordLevel({"one": 0, "two": 2, "<unk>": 1}, unk_token="<unk>"),
    "word piece": lambda: WordPiece({"one": 0, "##s": 1, "<unk>": 2}, unk_token="<unk>"),
    "unigram": lambda: Unigram([("<unk>", 0.0), ("▁a", -1.0), ("b", -2.0)], unk_id=0),
}


@pytest.mark.parametrize("kind", MODELS)
def test_vocabulary_is_that_of_transformers(tmp_path, kind):
    tokenizer = Tokenizer(MODELS[kind]())
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.add_tokens(["extra", "ünï"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(tmp_path)
    expected = load_tokenizer(tmp_path).get_vocab()
    assert "<|end|>" in expected and "ünï" in expected
    assert read_vocabulary(tmp_path) == {token_id: token for token, token_id in expected.items()}


def test_no_tokenizer(tmp_path):
    assert read_vocabulary(tmp_path) is None


def test_padding_rows_are_ordinary():
    check_vocabulary({0: "a", 9: "b"}, 10, "x")
    check_vocabulary({0: "a"}, 10, "x")
    check_vocabulary({}, 10, "x")
    with pytest.raises(
        CheckpointError, match=r"x: the tokenizer has token 'b' with id 9, expected ids below vocab_size 9"
    ):
        check_vocabulary({0: "a", 9: "b"}, 9, "x")


DAMAGE = {
    "garbage": (b"\x00", "is not JSON"),
    "a list": (b"[]", "holds a JSON list, expected an object"),
    "no model": ({"added_tokens": []}, "model is missing, expected an object"),
    "no vocabulary": ({"model": {"type": "BPE"}}, "model.vocab is 'NoneType', expected an object or a list"),
    "id a text": (
        {"model": {"vocab": {"a": "0"}}},
        "token 'a' has id '0', expected a string and an id from 0",
    ),
    "negative id": ({"model": {"vocab": {"a": -1}}}, "token 'a' has id -1, expected"),
    "id true": ({"model": {"vocab": {"a": True}}}, "token 'a' has id True, expected"),
    "token a number": ({"model": {"vocab": [[3, 0.5]]}}, "token 3 has id 0, expected a string"),
    "one id twice": ({"model": {"vocab": {"a": 0, "b": 0}}}, "id 0 is 'a' and 'b', expected one token an id"),
    "added token a text": (
        {"model": {"vocab": {}}, "added_tokens": ["x"]},
        "added_tokens is 'x', expected a list of",
    ),
    "added tokens a number": (
        {"model": {"vocab": {}}, "added_tokens": 5},
        "added_tokens is 5, expected a list of",
    ),
    "added token takes an id": (
        {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 0, "content": "b"}]},
        "id 0 is 'a' and 'b', expected one token an id",
    ),
}


@pytest.mark.damaged
@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_tokenizers_are_named(tmp_path, case):
    content, message = DAMAGE[case]
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(CheckpointError, match=f"tokenizer.json.*{message}"):
        read_vocabulary(tmp_path)


@pytest.mark.damaged
def test_what_transformers_cannot_read_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere does not exist, expected a checkpoint directory"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    Path(tmp_path / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(
        CheckpointError, match=r"has no tokenizer that transformers can read .*expected tokenizer files"
    ):
        load_tokenizer(tmp_path)


@pytest.mark.damaged
def test_code_of_a_checkpoint_is_neither_run_nor_asked_about(tmp_path, monkeypatch):
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}})
    )
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')\n")
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run it"))
    with pytest.raises(CheckpointError, match="has no tokenizer that transformers can read"):
        load_tokenizer(tmp_path)
