"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168): grade-school word problems with one number as the answer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

from qsun.evaluation.items import EvaluationError, Item, Verdict, field_of, json_lines

MARK = "####"
# A minus behind a digit or a letter is a hyphen, or takes away.
_NUMBER = re.compile(r"(?:(?<!\w)-)?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_NOTE = re.compile(r"<<[^>]*>>")


def final_number(text: str) -> Decimal | None:
    """The number behind the last "####", else the last number in the text; None when there is none.

    Commas, a dollar sign and a full stop at the end belong to the spelling: "$1,234.00." is 1234.
    """
    _, mark, tail = text.rpartition(MARK)
    behind = _NUMBER.findall(tail) if mark else []
    found = behind[:1] if behind else _NUMBER.findall(text)[-1:]
    if not found:
        return None
    try:
        return Decimal(found[0].replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None


def solution_text(answer: str) -> str:
    """A reference solution as a model should write it: without the calculator's notes."""
    return _NOTE.sub("", answer)


@dataclass(frozen=True, slots=True)
class Gsm8k:
    """The problems of a file of {"question", "answer"} lines; exact match of the final number."""

    items: tuple[Item, ...]
    name: str = "gsm8k"
    max_tokens: int = 320

    @classmethod
    def load(cls, path: Path, limit: int | None = None) -> Gsm8k:
        """path: the file, or a folder with test.jsonl.  limit: only the first so many problems."""
        file = path / "test.jsonl" if path.is_dir() else path
        items = []
        for number, (where, line) in enumerate(json_lines(file)):
            if limit is not None and number >= limit:
                break
            question = field_of(where, line, "question", str)
            reference = final_number(field_of(where, line, "answer", str))
            if reference is None:
                raise EvaluationError(f"{where}: answer has no number, expected one behind {MARK}")
            items.append(Item(str(number), [{"role": "user", "content": question}], str(reference)))
        return cls(tuple(items))

    def judge(self, item: Item, text: str) -> Verdict:
        """Equal as numbers: 18 is 18.00."""
        found = final_number(text)
        if found is None:
            return Verdict(False, "no number")
        return Verdict(found == Decimal(item.reference), str(found))
