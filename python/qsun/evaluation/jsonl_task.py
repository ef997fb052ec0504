"""Any JSON lines with answers: exact match or a regular expression."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from qsun.evaluation.items import EvaluationError, Item, Verdict, json_lines

Metric = Literal["exact", "regex"]

METRICS: tuple[Metric, ...] = get_args(Metric)


@dataclass(frozen=True, slots=True)
class JsonlTask:
    """Lines of {"prompt" or "messages", "answer"}, answer a string or a list of accepted ones.

    exact: the text is the answer, spaces at both ends and their number apart.  regex: the answer is a regular
    expression that is found in the text.
    """

    items: tuple[Item, ...]
    metric: Metric
    max_tokens: int
    name: str

    @classmethod
    def load(
        cls, path: Path, metric: Metric = "exact", *, max_tokens: int = 128, limit: int | None = None
    ) -> JsonlTask:
        """Raises EvaluationError naming the line that is no item."""
        if metric not in METRICS:
            raise EvaluationError(f"metric is {metric!r}, expected one of {METRICS}")
        items = []
        for number, (where, line) in enumerate(json_lines(path)):
            if limit is not None and number >= limit:
                break
            prompt = line.get("messages", line.get("prompt"))
            if not (isinstance(prompt, (str, list)) and prompt):
                raise EvaluationError(f"{where}: has no prompt, expected text or messages")
            answers = line.get("answer")
            answers = [answers] if isinstance(answers, str) else answers
            if not isinstance(answers, list) or not answers or not all(isinstance(a, str) for a in answers):
                raise EvaluationError(f"{where}: answer is {answers!r}, expected a string or a list of them")
            if metric == "regex":
                for pattern in answers:
                    try:
                        re.compile(pattern)
                    except re.error as error:
                        raise EvaluationError(
                            f"{where}: answer {pattern!r} is no regular expression ({error})"
                        ) from None
            items.append(Item(str(line.get("id", number)), prompt, answers))
        if len({item.id for item in items}) != len(items):
            raise EvaluationError(f"{path}: two lines have one id, expected distinct ones")
        return cls(tuple(items), metric, max_tokens, path.stem)

    def judge(self, item: Item, text: str) -> Verdict:
        """By the metric."""
        if self.metric == "regex":
            return Verdict(any(re.search(pattern, text) for pattern in item.reference))
        found = " ".join(text.split())
        return Verdict(any(found == " ".join(answer.split()) for answer in item.reference), found[:200])
