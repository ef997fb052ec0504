"""Answers in pairs: what the base's own prefill module and a task's module make of the same prompt."""

from __future__ import annotations

import sys
import textwrap
from typing import TextIO

from qsun.cli.answers import Answer


class Pairs:
    """Prints a prompt with both answers once both are complete.

    Two answers are a pair when they answer the same prompt, whichever ends first; the base's comes first.
    """

    def __init__(self, base: str, stream: TextIO | None = None) -> None:
        self._base = base
        self._stream = stream or sys.stdout
        self._waiting: dict[str, Answer] = {}

    def progress(self, answer: Answer, text: str) -> None:
        """Nothing is shown before a pair is complete."""

    def finished(self, answer: Answer) -> None:
        """Keep the first of a pair, print with the second."""
        other = self._waiting.pop(answer.question.shown, None)
        if other is None:
            self._waiting[answer.question.shown] = answer
            return
        pair = (answer, other) if answer.question.model == self._base else (other, answer)
        print(answer.question.shown, file=self._stream)
        for one in pair:
            body = f"failed: {one.error}" if one.failed else one.text.strip()
            print(f"  [{one.question.model}]", file=self._stream)
            print(textwrap.indent(body, "    "), file=self._stream)
        print(file=self._stream, flush=True)
