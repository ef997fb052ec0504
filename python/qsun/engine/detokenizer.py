"""Text from tokens as they come: no half characters, and nothing that a stop string might take back."""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Protocol

__all__ = ["TextStream", "Tokenizer"]

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Prompt tokens decoded along with the first new ones: some tokenizers drop the space before the first word.
_CONTEXT = 6
# Tokens held back for one unfinished character.  UTF-8 needs 4 bytes; whatever is longer is no text, or
# holds replacement characters of its own.
_MOST_HELD = 8
# Of those, tokens that may belong to a character that is still to come.
_MOST_UNFINISHED = 3
# Tokens without any text, such as special ones, that are decoded over and over with those after them.
_MOST_SILENT = 64


class Tokenizer(Protocol):
    """What is needed of a transformers tokenizer."""

    def decode(
        self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> str: ...


class TextStream:
    """The text of one request.

    Tokens go in by `add`; `take` returns what has become certain since the last call, `finish` the rest.  All
    that they returned, joined, is the text; it never reaches into the first stop string that was found.

    tokenizer: None gives no text at all.
    """

    def __init__(self, tokenizer: Tokenizer | None, prompt: Items[int], stop: tuple[str, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._longest_stop = max(map(len, stop), default=0)
        self._ids = list(prompt[-_CONTEXT:])
        if self._decode(0).endswith(_REPLACEMENT):
            self._ids.clear()  # a prompt that ends within a character is no context to decode after
        # ids[start:] are decoded; ids[start:read], whose text is `_before`, are already in `_text`.
        self._start, self._read = 0, len(self._ids)
        self._spoken = len(self._ids)  # behind the last token that brought text
        self._before = self._decode(0)
        self._text = ""
        self._taken = 0
        self._search_from = 0
        self.stopped = False

    def add(self, token: int, *, may_stop: bool = True) -> bool:
        """Take in a token.  Returns True when its text completes a stop string.

        may_stop: False passes over stop strings that begin within this token or before.
        """
        assert not self.stopped
        self._ids.append(token)
        self._text += self._new_text(hold=True)
        if not may_stop:
            self._search_from = len(self._text)
        elif self._stop:
            self._look_for_stop()
        return self.stopped

    def take(self) -> str:
        """Text that is certain by now and was not returned before."""
        return self._take(len(self._text) - self._held())

    def finish(self) -> str:
        """The rest of the text.  What was held back for an unfinished character becomes U+FFFD."""
        if not self.stopped:
            self._text += self._new_text(hold=False)
        return self._take(len(self._text))

    def give_up(self) -> None:
        """Decode no more, after an error: `finish` then returns what there is."""
        self._tokenizer = None

    def _take(self, end: int) -> str:
        text = self._text[self._taken : end]
        self._taken = max(self._taken, end)
        return text

    def _decode(self, start: int, end: int | None = None) -> str:
        ids = self._ids[start:end]
        if self._tokenizer is None or not ids:
            return ""
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _new_text(self, *, hold: bool) -> str:
        if self._tokenizer is None or self._read == len(self._ids):
            return ""
        text, end = self._decode(self._start), len(self._ids)
        if hold and text.endswith(_REPLACEMENT):
            if end - self._read < _MOST_HELD:
                return ""
            text, end = self._without_unfinished(text)
        # Of bytes some tokenizers make other text once more of them follow; what was told stays told.
        revised = not text.startswith(self._before)
        new = self._decode(self._read, end) if revised else text[len(self._before) :]
        if new:
            # The tokens just read become the context, without which a word may lose its leading space.
            self._start = self._read
            self._before = self._decode(self._start, end)
            self._spoken = end
        elif end - self._spoken > _MOST_SILENT:
            del self._ids[self._spoken :]
            end = self._spoken
        self._read = end
        return new

    def _without_unfinished(self, text: str) -> tuple[str, int]:
        """Cut `text`, of the tokens from start on, before a character that may be unfinished.

        Returns what is left and the end of its tokens.  Where a cut splits no character, the parts' texts are
        the whole's.
        """
        for count in range(_MOST_UNFINISHED, 0, -1):
            end = len(self._ids) - count
            left = self._decode(self._start, end)
            if left + self._decode(end) == text:
                return left, end
        return text, len(self._ids)

    def _look_for_stop(self) -> None:
        found = [at for stop in self._stop if (at := self._text.find(stop, self._search_from)) >= 0]
        if found:
            self._text = self._text[: min(found)]
            self.stopped = True
        else:
            self._search_from = max(self._search_from, len(self._text) - self._longest_stop + 1)

    def _held(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        if self.stopped or not self._stop:
            return 0
        for length in range(min(self._longest_stop - 1, len(self._text) - self._search_from), 0, -1):
            tail = self._text[-length:]
            if any(stop.startswith(tail) for stop in self._stop):
                return length
        return 0
