"""Streaming text: whatever the pieces, their sum is the text, and nothing has to be taken back."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qsun.engine.detokenizer import TextStream

SPECIAL = 256


@pytest.fixture(scope="module")
def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that every character beyond ASCII takes several; 256 is a special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    by_byte = {symbol: byte for byte, symbol in enumerate(bytes_to_symbols())}
    assert sorted(by_byte) == alphabet
    backend = Tokenizer(models.BPE(vocab=by_byte, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    assert tokenizer.eos_token_id == SPECIAL
    return tokenizer


def bytes_to_symbols() -> list[str]:
    """GPT-2's printable stand-in for each byte value."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


@pytest.fixture(scope="module")
def words_tokenizer() -> PreTrainedTokenizerFast:
    """Words with a leading-space mark, of the kind that drops the space of a text's first word."""
    vocab = {word: number for number, word in enumerate(["▁the", "▁cat", "s", "▁sat", "▁", "<unk>"])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def stream(tokenizer, tokens, stop=(), prompt=(), **options) -> tuple[list[str], bool]:
    text = TextStream(tokenizer, prompt, tuple(stop))
    pieces = []
    for token in tokens:
        text.add(token, **options)
        pieces.append(text.take())
        if text.stopped:
            break
    pieces.append(text.finish())
    return pieces, text.stopped


def test_half_a_character_is_held_back(bytes_tokenizer) -> None:
    pieces, _ = stream(bytes_tokenizer, "aé€😀b".encode())
    assert pieces == ["a", "", "é", "", "", "€", "", "", "", "😀", "b", ""]


def test_an_unfinished_character_at_the_end_is_shown_as_one(bytes_tokenizer) -> None:
    pieces, _ = stream(bytes_tokenizer, "a😀".encode()[:-1])
    assert "".join(pieces) == "a\N{REPLACEMENT CHARACTER}" and pieces[:-1] == ["a", "", "", ""]


def test_garbage_bytes_do_not_block_what_follows(bytes_tokenizer) -> None:
    tokens = [0xFF] * 30 + list(b"text")
    pieces, _ = stream(bytes_tokenizer, tokens)
    assert "".join(pieces).endswith("text") and any(pieces[:20])


def test_replacement_characters_of_the_model_lose_nothing(bytes_tokenizer) -> None:
    text = "\N{REPLACEMENT CHARACTER}" * 5 + "😀" + "\N{REPLACEMENT CHARACTER}" * 2 + "é!"
    pieces, _ = stream(bytes_tokenizer, text.encode())
    assert "".join(pieces) == text and any(pieces[:12])


def test_tokens_without_text_are_not_decoded_over_and_over(bytes_tokenizer) -> None:
    decoded = []

    class Counting:
        def decode(self, ids, **options):
            decoded.append(len(ids))
            return bytes_tokenizer.decode(ids, **options)

    pieces, _ = stream(Counting(), [*b"a", *[SPECIAL] * 1000, *"é".encode()])
    assert "".join(pieces) == "aé" and max(decoded) < 100


def test_special_tokens_have_no_text(bytes_tokenizer) -> None:
    pieces, _ = stream(bytes_tokenizer, [*b"ab", SPECIAL, *b"c"])
    assert "".join(pieces) == "abc"


def test_the_space_before_the_first_word_survives(words_tokenizer) -> None:
    assert words_tokenizer.decode([1, 2, 3]) == "cats sat"
    pieces, _ = stream(words_tokenizer, [1, 2, 3], prompt=[0])
    assert pieces == [" cat", "s", " sat", ""]


def test_a_prompt_that_ends_within_a_character(bytes_tokenizer) -> None:
    prompt = "é".encode()[:1]
    pieces, _ = stream(bytes_tokenizer, list(b"ok"), prompt=prompt)
    assert "".join(pieces) == "ok"


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "two"], "one "),
        ("aaab", ["aab"], "a"),
        ("abcabd", ["abd"], "abc"),
        ("stop", ["stop"], ""),
        ("été", ["té"], "é"),
        ("x\n\ny", ["\n\n"], "x"),
    ],
)
def test_text_ends_before_the_first_stop_string(bytes_tokenizer, text, stop, expected) -> None:
    pieces, stopped = stream(bytes_tokenizer, text.encode(), stop)
    assert stopped and "".join(pieces) == expected


def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_none(bytes_tokenizer) -> None:
    pieces, stopped = stream(bytes_tokenizer, b"a<en<end!", ["<end>"])
    assert pieces == ["a", "", "", "", "<en", "", "", "", "<end!", ""] and not stopped


def test_a_held_back_beginning_is_delivered_at_the_end(bytes_tokenizer) -> None:
    pieces, stopped = stream(bytes_tokenizer, b"ab<e", ["<end>"])
    assert pieces == ["a", "b", "", "", "<e"] and not stopped


def test_stop_strings_before_min_tokens_are_passed_over(bytes_tokenizer) -> None:
    text = TextStream(bytes_tokenizer, (), ("ab",))
    for byte in b"abx":
        assert not text.add(byte, may_stop=False)
    assert not text.add(ord("a")) and text.add(ord("b"))
    assert text.finish() == "abx"


def test_random_text_is_the_sum_of_its_pieces(bytes_tokenizer) -> None:
    draw = random.Random(5)
    for _ in range(60):
        text = "".join(draw.choice("ab é€😀\n") for _ in range(30))
        stops = tuple("".join(draw.choice("ab é") for _ in range(draw.randrange(1, 4))) for _ in range(2))
        expected = min((text.split(stop)[0] for stop in stops), key=len)
        pieces, stopped = stream(bytes_tokenizer, text.encode(), stops)
        assert "".join(pieces) == expected
        assert stopped == (expected != text)
        assert "".join(stream(bytes_tokenizer, text.encode())[0]) == text


def test_without_a_tokenizer_there_is_no_text() -> None:
    assert stream(None, [1, 2, 3]) == (["", "", "", ""], False)
