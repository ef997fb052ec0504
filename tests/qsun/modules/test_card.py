"""The module card: written, read, and refused when it is damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qsun.errors import CheckpointError
from qsun.models.hf_config import model_config_from_hf
from qsun.modules.card import CARD_FILE, DecoderFingerprint, ModuleCard

RAW = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "rope_theta": 10000,
}
FINGERPRINT = DecoderFingerprint.of(model_config_from_hf(RAW, "x"), "sha256:tok", "sha256:base")


@pytest.fixture
def card(tmp_path) -> Path:
    ModuleCard("poet", "prefill", FINGERPRINT, {"steps": 100}, "sha256:stored").write(tmp_path)
    return tmp_path / CARD_FILE


def test_round_trip(card):
    read = ModuleCard.read(card.parent)
    assert read == ModuleCard("poet", "prefill", FINGERPRINT, {"steps": 100}, "sha256:stored")
    assert set(json.loads(card.read_text())) == {
        "format",
        "name",
        "first_token",
        "decoder",
        "training",
        "embed_tokens",
    }


def test_no_card(tmp_path):
    assert ModuleCard.read(tmp_path) is None


def test_numbers_compare_by_value():
    """10000 and 10000.0 are one rotary base."""
    other = DecoderFingerprint.of(
        model_config_from_hf({**RAW, "rope_theta": 1e4}, "x"), "sha256:tok", "sha256:base"
    )
    assert FINGERPRINT.differences(other) == ()


def test_differences_tell_both_values():
    other = DecoderFingerprint.of(
        model_config_from_hf({**RAW, "vocab_size": 100}, "x"), "sha256:b", "sha256:c"
    )
    assert FINGERPRINT.differences(other) == (
        ("vocab_size", 96, 100),
        ("tokenizer", "sha256:tok", "sha256:b"),
        ("base", "sha256:base", "sha256:c"),
    )
    assert [field for field, _, _ in FINGERPRINT.differences(other, base=False)] == [
        "vocab_size",
        "tokenizer",
    ]


def test_an_unknown_tokenizer_disagrees_with_none():
    unknown = DecoderFingerprint.of(model_config_from_hf(RAW, "x"), None, "sha256:base")
    assert unknown.differences(FINGERPRINT) == () == FINGERPRINT.differences(unknown)


DAMAGE = {
    "version 2": ({"format": 2}, "format is 2, expected 1"),
    "version true": ({"format": True}, "format is True, expected 1"),
    "no version": ({"format": ...}, "format is None, expected 1"),
    "no name": ({"name": ...}, "name is missing, expected a string"),
    "convention": ({"first_token": "both"}, "first_token is 'both', expected 'decode' or 'prefill'"),
    "no convention": ({"first_token": ...}, "first_token is missing, expected a string"),
    "decoder a list": ({"decoder": []}, r"decoder is \[\], expected an object"),
    "no decoder": ({"decoder": ...}, "decoder is missing, expected an object"),
    "training text": ({"training": "long"}, "training is 'long', expected an object"),
    "digest a number": ({"embed_tokens": 5}, "embed_tokens is 5, expected a string"),
}
DECODER_DAMAGE = {
    "no heads": ({"num_kv_heads": ...}, "num_kv_heads is missing, expected an integer from 1"),
    "heads text": ({"num_kv_heads": "2"}, "num_kv_heads is '2', expected an integer"),
    "rope text": ({"rope": "default"}, "rope is 'default', expected an object"),
    "no base": ({"base": ...}, "base is missing, expected a string"),
    "tokenizer a number": ({"tokenizer": 3}, "tokenizer is 3, expected a string"),
}


def change(content: dict, changes: dict) -> dict:
    return {key: value for key, value in {**content, **changes}.items() if value is not ...}


@pytest.mark.damaged
@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_cards_are_named(card, case):
    changes, message = DAMAGE[case]
    card.write_text(json.dumps(change(json.loads(card.read_text()), changes)))
    with pytest.raises(CheckpointError, match=f"{CARD_FILE}: {message}"):
        ModuleCard.read(card.parent)


@pytest.mark.damaged
@pytest.mark.parametrize("case", DECODER_DAMAGE)
def test_damaged_fingerprints_are_named(card, case):
    changes, message = DECODER_DAMAGE[case]
    content = json.loads(card.read_text())
    card.write_text(json.dumps({**content, "decoder": change(content["decoder"], changes)}))
    with pytest.raises(CheckpointError, match=f"{CARD_FILE}: decoder: {message}"):
        ModuleCard.read(card.parent)


@pytest.mark.damaged
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_a_card_that_is_no_json_object(card, content):
    card.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{CARD_FILE} .*expected a"):
        ModuleCard.read(card.parent)
