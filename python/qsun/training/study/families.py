"""Three families of tasks: what is trained on, what is tested on, all from data that a package index has."""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from qsun.evaluation.bfcl import Bfcl, Problem, data_folder, load_problems
from qsun.evaluation.calls import mismatch, parse_calls
from qsun.evaluation.gsm8k import Gsm8k, solution_text
from qsun.evaluation.humaneval import REQUEST, HumanEval
from qsun.evaluation.items import Task, field_of, json_lines

FamilyName = Literal["tools", "maths", "code"]

FAMILIES: tuple[FamilyName, ...] = get_args(FamilyName)

Chat = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Family:
    """train: chats whose last message is the answer.  held: the same, never trained on, for their likelihood.

    task: the test, judged by its own metric.
    """

    train: list[Chat]
    held: list[Chat]
    task: Task


def load_family(
    name: FamilyName, *, gsm8k: Path, bfcl: Path | None = None, humaneval: Path | None = None
) -> Family:
    """gsm8k: a folder with train.jsonl and test.jsonl.  bfcl, humaneval: data; None is the packages'."""
    if name == "maths":
        return _maths(gsm8k)
    if name == "tools":
        return _tools(data_folder(bfcl))
    return _code(humaneval)


def load_task(
    name: FamilyName, *, gsm8k: Path, bfcl: Path | None = None, humaneval: Path | None = None
) -> Task:
    """The test of a family alone."""
    if name == "maths":
        return Gsm8k.load(gsm8k)
    if name == "tools":
        return Bfcl.load(data_folder(bfcl))
    return HumanEval.load(humaneval, allow_execution=True)


def _answered(prompt: Sequence[Mapping[str, str]], answer: str) -> Chat:
    return [*(dict(message) for message in prompt), {"role": "assistant", "content": answer}]


def _maths(folder: Path) -> Family:
    def chats(file: str) -> list[Chat]:
        return [
            _answered(
                [{"role": "user", "content": field_of(where, line, "question", str)}],
                solution_text(field_of(where, line, "answer", str)),
            )
            for where, line in json_lines(folder / file)
        ]

    return Family(chats("train.jsonl"), chats("test.jsonl"), Gsm8k.load(folder))


def _tools(folder: Path) -> Family:
    """Train on the live categories and on templates of their functions, test on simple_python and multiple.

    A problem that offers a function of the test, under whatever name that differs in case or marks only, is
    left out of training; so is one whose own answer the rules do not accept.
    """
    test = [p for category in ("simple_python", "multiple") for p in load_problems(folder, category)]
    tested = {_bare(f["name"]) for p in test for f in p.functions}
    pool = [
        p
        for category in ("live_simple", "live_multiple")
        for p in load_problems(folder, category)
        if not any(_bare(f["name"]) in tested for f in p.functions) and _accepts_itself(p)
    ]
    train = [_answered(p.prompt(), p.answer()) for p in pool]
    train += [_answered(p.prompt(), p.answer()) for p in _templates(pool)]
    held = [_answered(p.prompt(), p.answer()) for p in test if _accepts_itself(p)]
    return Family(train, held, Bfcl.load(folder))


def _bare(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _accepts_itself(problem: Problem) -> bool:
    try:
        return mismatch(parse_calls(problem.answer()), problem.functions, problem.wanted) is None
    except ValueError:
        return False


_WORDS = ("amber", "Lisbon", "weekly", "north", "Maria", "blue", "standard", "Kyoto", "premium", "draft")


def _templates(pool: Sequence[Problem], seed: int = 0) -> Iterator[Problem]:
    """For each distinct function with plain required parameters, a question that names values for them."""
    draw = random.Random(seed)
    seen: set[str] = set()
    for problem in pool:
        for function in problem.functions:
            name = function["name"]
            properties = function["parameters"].get("properties", {})
            required = list(function["parameters"].get("required", ()))
            kinds = [properties.get(p, {}).get("type") for p in required]
            if name in seen or not required or not all(k in _DRAWN for k in kinds):
                continue
            seen.add(name)
            values = {}
            for parameter, kind in zip(required, kinds, strict=True):
                choices = properties[parameter].get("enum")
                values[parameter] = draw.choice(choices) if choices else _DRAWN[kind](draw)
            named = ", ".join(f"{p.replace('_', ' ')} {v}" for p, v in values.items())
            purpose = str(function.get("description", name)).split(". ")[0].rstrip(".")
            yield Problem(
                f"template_{name}",
                ({"role": "user", "content": f"{purpose}. Use {named}."},),
                problem.functions,
                {name: {p: [v] for p, v in values.items()}},
            )


_DRAWN: Mapping[Any, Any] = {
    "string": lambda draw: draw.choice(_WORDS),
    "integer": lambda draw: draw.randrange(1, 500),
    "float": lambda draw: draw.randrange(1, 5000) / 10,
    "boolean": lambda draw: draw.random() < 0.5,
}


_LONGEST = 40
"""Lines of a function that is trained on."""


def _code(file: Path | None) -> Family:
    """Train on documented functions of Python's standard library, test on HumanEval."""
    task = HumanEval.load(file, allow_execution=True)
    asked = {item.reference["entry_point"] for item in task.items}
    functions = [f for f in library_functions() if f[0] not in asked]
    chats = [
        _answered(
            [{"role": "user", "content": f"{REQUEST}```python\n{head}```"}], f"```python\n{source}\n```"
        )
        for _, head, source in functions
    ]
    # Every twentieth, in an order that says nothing about the module.
    order = random.Random(0).sample(range(len(chats)), len(chats))
    held = {i for rank, i in enumerate(order) if rank % 20 == 0}
    return Family(
        [chat for i, chat in enumerate(chats) if i not in held],
        [chats[i] for i in sorted(held)],
        task,
    )


def library_functions(root: Path | None = None) -> list[tuple[str, str, str]]:
    """(name, signature with docstring, whole source) of the documented functions of the standard library.

    Modules, in order of their path, without tests; functions at the top of a module, each source once.
    root: another folder of modules.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    found: dict[str, tuple[str, str, str]] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if any(part in ("test", "tests", "site-packages", "idlelib", "lib2to3") for part in parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (OSError, ValueError, SyntaxError):
            continue
        lines = text.splitlines()
        for node in tree.body:
            if not isinstance(node, ast.FunctionDef) or node.decorator_list or not ast.get_docstring(node):
                continue
            assert node.end_lineno is not None
            head_end = node.body[0].end_lineno
            source = lines[node.lineno - 1 : node.end_lineno]
            if len(node.body) < 2 or not 4 <= len(source) <= _LONGEST or not "".join(source).isascii():
                continue
            head = "\n".join(lines[node.lineno - 1 : head_end]) + "\n"
            whole = "\n".join(source)
            found.setdefault(whole, (node.name, head, whole))
    return list(found.values())
