"""Function calling: the single-call parts of the Berkeley Function-Calling Leaderboard."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qsun.evaluation.calls import mismatch, parse_calls
from qsun.evaluation.items import EvaluationError, Item, Verdict, field_of, json_lines

PACKAGE = "bfcl_eval"
CATEGORIES = ("simple_python", "multiple", "live_simple", "live_multiple")

INSTRUCTION = (
    "You call functions. Answer with one call of one of the functions below, in Python, with the name of "
    'every argument, as in [name(first=1, second="two")], and nothing else.\n\nFunctions:\n'
)


def data_folder(path: Path | None) -> Path:
    """Where the BFCL_v4_*.json files lie: a folder that was given, or that of the installed package.

    The package is not imported: only its data is wanted, not its dependencies.
    Raises EvaluationError saying how to install it.
    """
    if path is not None:
        return path
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise EvaluationError(
            f"the package {PACKAGE} is not installed, expected it for its data: "
            "install it by `pip install --no-deps bfcl-eval==2026.3.23`"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "data"


@dataclass(frozen=True, slots=True)
class Problem:
    """One entry of the benchmark.  wanted: {function: {parameter: accepted values}}."""

    id: str
    messages: tuple[Mapping[str, str], ...]
    functions: tuple[Mapping[str, Any], ...]
    wanted: Mapping[str, Mapping[str, Any]]

    def prompt(self) -> list[dict[str, str]]:
        """The chat: what functions there are, then the question."""
        functions = "\n".join(json.dumps(function) for function in self.functions)
        return [
            {"role": "system", "content": INSTRUCTION + functions},
            *({"role": m["role"], "content": m["content"]} for m in self.messages),
        ]

    def answer(self) -> str:
        """The first of the accepted calls, as a model should write it; optional parameters left out."""
        (name, parameters), *_ = self.wanted.items()
        order = {p: i for i, p in enumerate(self._properties(name))}
        chosen = {p: _first(values) for p, values in parameters.items() if "" not in values and values}
        required = self._required(name)
        chosen.update(
            {p: _first(v) for p, v in parameters.items() if p in required and p not in chosen and v}
        )
        arguments = ", ".join(f"{p}={chosen[p]!r}" for p in sorted(chosen, key=lambda p: order.get(p, 0)))
        return f"[{name}({arguments})]"

    def _described(self, name: str) -> Mapping[str, Any]:
        return next((f["parameters"] for f in self.functions if f["name"] == name), {})

    def _properties(self, name: str) -> Sequence[str]:
        return list(self._described(name).get("properties", {}))

    def _required(self, name: str) -> set[str]:
        return set(self._described(name).get("required", ()))


def _first(values: Sequence[Any]) -> Any:
    """The first accepted value; within dictionaries every value is a list of accepted ones."""
    value = next((v for v in values if v != ""), "")
    return _settle(value)


def _settle(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _first(inner) if isinstance(inner, list) else inner
            for key, inner in value.items()
            if not (isinstance(inner, list) and "" in inner)
        }
    if isinstance(value, list):
        return [_settle(v) for v in value]
    return value


def load_problems(folder: Path, category: str) -> list[Problem]:
    """The problems of one category with their accepted answers, in order.

    Raises EvaluationError naming the file and line that is damaged.
    """
    answers = {
        field_of(where, line, "id", str): field_of(where, line, "ground_truth", list)
        for where, line in json_lines(folder / "possible_answer" / f"BFCL_v4_{category}.json")
    }
    problems = []
    for where, line in json_lines(folder / f"BFCL_v4_{category}.json"):
        identity = field_of(where, line, "id", str)
        question = field_of(where, line, "question", list)
        functions = field_of(where, line, "function", list)
        if identity not in answers or len(answers[identity]) != 1:
            raise EvaluationError(f"{where}: {identity} has no single accepted call beside it, expected one")
        problem = Problem(
            identity, tuple(question[0] if question else ()), tuple(functions), answers[identity][0]
        )
        if not _sound(problem):
            raise EvaluationError(
                f"{where}: {identity} is no problem, expected messages with role and content, functions with "
                "name and parameters, and accepted values of one of the functions"
            )
        problems.append(problem)
    return problems


def _sound(problem: Problem) -> bool:
    """Whether all that a prompt and a verdict read is there."""
    try:
        described = {f["name"]: dict(f["parameters"]["properties"]) for f in problem.functions}
        ((name, parameters),) = problem.wanted.items()
        accepted = all(isinstance(values, list) for values in parameters.values())
        problem.prompt()
    except (KeyError, TypeError, ValueError, AttributeError):
        return False
    return bool(problem.messages) and accepted and name in described


@dataclass(frozen=True, slots=True)
class Bfcl:
    """Problems of some categories; right is one call that the AST rules accept."""

    items: tuple[Item, ...]
    name: str = "bfcl"
    max_tokens: int = 192

    @classmethod
    def load(
        cls, folder: Path | None, categories: Sequence[str] = CATEGORIES[:2], limit: int | None = None
    ) -> Bfcl:
        """limit: only the first so many problems of each category."""
        unknown = [c for c in categories if c not in CATEGORIES]
        if unknown or not categories:
            raise EvaluationError(f"categories is {list(categories)!r}, expected some of {CATEGORIES}")
        items = []
        for category in categories:
            for problem in load_problems(data_folder(folder), category)[:limit]:
                reference = {"functions": list(problem.functions), "wanted": dict(problem.wanted)}
                items.append(Item(problem.id, problem.prompt(), reference))
        return cls(tuple(items))

    def judge(self, item: Item, text: str) -> Verdict:
        """By the AST rules."""
        try:
            calls = parse_calls(text)
        except ValueError as error:
            return Verdict(False, str(error))
        reason = mismatch(calls, item.reference["functions"], item.reference["wanted"])
        return Verdict(reason is None, reason or "")
