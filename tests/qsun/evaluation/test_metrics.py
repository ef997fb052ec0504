"""What counts as a right answer: numbers, calls, programs."""

from __future__ import annotations

import gzip
import json
import os
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest

from qsun.evaluation.bfcl import Bfcl, Problem
from qsun.evaluation.calls import mismatch, parse_calls
from qsun.evaluation.gsm8k import Gsm8k, final_number, solution_text
from qsun.evaluation.humaneval import HumanEval, code_of
from qsun.evaluation.items import EvaluationError
from qsun.evaluation.jsonl_task import JsonlTask
from qsun.evaluation.sandbox import Limits, run_program


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 + 4 = 7 apples.\n#### 7", 7),
        ("#### 1,234", 1234),
        ("#### $1,234.50", Decimal("1234.5")),
        ("The answer is 42.", 42),
        ("first #### 1 then #### 2", 2),
        ("#### -5", -5),
        ("He pays $18.00.", 18),
        ("1.5 hours, or 90 minutes", 90),
        ("#### 10 dollars for 3 days", 10),
        ("#### nothing, though 12 came before", 12),
        ("costs .5", Decimal("0.5")),
        ("20% of 50", 50),
        ("it takes 10-15", 15),
        ("loses -$3", -3),
        ("no digits at all", None),
        ("", None),
    ],
)
def test_the_final_number_of_an_answer(text: str, number) -> None:
    assert final_number(text) == (None if number is None else Decimal(number))


def test_gsm8k_compares_numbers_not_spellings(tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl"
    row = {"question": "How many?", "answer": "2*9=<<2*9=18>>18 in all\n#### 18"}
    file.write_text(json.dumps(row) + "\n\n" + json.dumps(row) + "\n")
    task = Gsm8k.load(tmp_path, limit=1)
    (item,) = task.items
    assert task.judge(item, "so 18.00 it is").correct and task.judge(item, "#### 18").correct
    assert not task.judge(item, "#### 18\n#### 19").correct
    assert task.judge(item, "none").detail == "no number"
    assert solution_text(row["answer"]) == "2*9=18 in all\n#### 18"
    file.write_text('{"question": "q", "answer": "no number"}\n')
    with pytest.raises(EvaluationError, match=r"test\.jsonl:1: answer has no number"):
        Gsm8k.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("f(a=1)", [("f", {"a": 1})]),
        ("[f(a=1, b='x')]", [("f", {"a": 1, "b": "x"})]),
        ("```python\n[g.h.f(b=2, a=1)]\n```", [("g.h.f", {"a": 1, "b": 2})]),
        ("Sure:\n```\nf()\n```\nDone.", [("f", {})]),
        ("[f(a=1), f(a=2)]", [("f", {"a": 1}), ("f", {"a": 2})]),
        ("f(a=[1, -2.5, None], b={'k': (1, 2)})", [("f", {"a": [1, -2.5, None], "b": {"k": (1, 2)}})]),
        ("f(a=g(b=1))", [("f", {"a": "g(b=1)"})]),
        ("f(a=city, b=true, c=True)", [("f", {"a": "city", "b": True, "c": True})]),
    ],
)
def test_calls_are_read(text: str, calls) -> None:
    assert parse_calls(text) == calls


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("I cannot help.", "not a call"),
        ("f(1)", "without a name"),
        ("f(**x)", r"\*\* argument"),
        ("1 + 2", "is no call"),
        ("f(a=1", "not a call"),
        ("", "not a call"),
        ("(" * 5000, "not a call"),
        ("f(a=" + "-" * 1500 + "1)", "not a call"),
    ],
)
def test_what_is_no_call_is_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_calls(text)


FUNCTION = {
    "name": "book",
    "parameters": {
        "type": "dict",
        "required": ["city", "nights"],
        "properties": {
            "city": {"type": "string"},
            "nights": {"type": "integer"},
            "price": {"type": "float"},
            "quiet": {"type": "boolean"},
            "guests": {"type": "array", "items": {"type": "string"}},
            "sizes": {"type": "array", "items": {"type": "integer"}},
            "room": {"type": "dict"},
            "span": {"type": "tuple", "items": {"type": "integer"}},
        },
    },
}
WANTED = {
    "book": {
        "city": ["New York, NY", "NYC"],
        "nights": [3],
        "price": [99.5, 100, ""],
        "quiet": [True, ""],
        "guests": [["Ann", "Bob-Lee"], ""],
        "sizes": [[1, 2], ""],
        "room": [{"view": ["sea", "Lake"], "floor": [2, ""]}, ""],
        "span": [[1, 2], ""],
    }
}


@pytest.mark.parametrize(
    ("call", "why"),
    [
        ("book(city='NYC', nights=3)", None),
        ("book(nights=3, city='NYC')", None),
        ("book(city='new york ny', nights=3)", None),
        ("book(city='New-York/NY.', nights=3)", None),
        ("book(city='Boston', nights=3)", "city: 'Boston' is not among"),
        ("book(city='NYC')", "nights is missing"),
        ("book(city='NYC', nights=3.0)", "nights: 3.0 is a float, expected a integer"),
        ("book(city='NYC', nights='3')", "nights: '3' is a str"),
        ("book(city='NYC', nights=True)", "nights: True is a bool"),
        ("book(city='NYC', nights=4)", "nights: 4 is not among"),
        ("book(city='NYC', nights=3, price=100)", None),
        ("book(city='NYC', nights=3, price='100')", "price: '100' is a str"),
        ("book(city='NYC', nights=3, quiet=True)", None),
        ("book(city='NYC', nights=3, quiet=1)", "quiet: 1 is a int"),
        ("book(city='NYC', nights=3, guests=['ann', 'Bob Lee'])", None),
        ("book(city='NYC', nights=3, guests=['Bob-Lee', 'Ann'])", "guests: .* is not among"),
        ("book(city='NYC', nights=3, guests=[1, 2])", "guests: .* is not among"),
        ("book(city='NYC', nights=3, guests=[])", None),
        ("book(city='NYC', nights=3, sizes=[1, 2])", None),
        ("book(city='NYC', nights=3, sizes=[1, '2'])", "sizes: .* is not among"),
        ("book(city='NYC', nights=3, room={'view': 'SEA'})", None),
        ("book(city='NYC', nights=3, room={'view': 'sea', 'floor': 2})", None),
        ("book(city='NYC', nights=3, room={'floor': 2})", "room: .* is not among"),
        ("book(city='NYC', nights=3, room={'view': 'sea', 'bed': 1})", "room: .* is not among"),
        ("book(city='NYC', nights=3, span=(1, 2))", None),
        ("book(city='NYC', nights=3, colour='red')", "colour is unexpected"),
        ("hotel.book(city='NYC', nights=3)", "the function is hotel.book, expected book"),
        ("[book(city='NYC', nights=3), book(city='NYC', nights=3)]", "2 calls, expected 1"),
    ],
)
def test_calls_are_judged_as_the_benchmark_does(call: str, why: str | None) -> None:
    import re

    found = mismatch(parse_calls(call), [FUNCTION], WANTED)
    assert found is None if why is None else found is not None and re.match(why, found)


def test_elements_have_the_type_of_the_description() -> None:
    sizes = {"type": "array", "items": {"type": "integer"}}
    function = {"name": "f", "parameters": {"properties": {"x": sizes}, "required": ["x"]}}
    for call, right in (("f(x=[1, 2])", True), ("f(x=[1, '2'])", False), ("f(x=[1, 2.0])", False)):
        found = mismatch(parse_calls(call), [function], {"f": {"x": [[1, 2]]}})
        assert (found is None) == right
        assert right or found.endswith("has elements of another type than int")


def test_a_problem_accepts_its_own_answer(tmp_path: Path) -> None:
    entry = {"id": "x_0", "question": [[{"role": "user", "content": "Book!"}]], "function": [FUNCTION]}
    answer = {"id": "x_0", "ground_truth": [WANTED]}
    (tmp_path / "possible_answer").mkdir()
    (tmp_path / "BFCL_v4_multiple.json").write_text(json.dumps(entry) + "\n")
    (tmp_path / "possible_answer" / "BFCL_v4_multiple.json").write_text(json.dumps(answer) + "\n")
    task = Bfcl.load(tmp_path, ["multiple"])
    (item,) = task.items
    problem = Problem("x_0", (entry["question"][0][0],), (FUNCTION,), WANTED)
    assert problem.answer() == "[book(city='New York, NY', nights=3)]"
    assert task.judge(item, problem.answer()).correct
    assert not task.judge(item, "no").correct
    assert item.prompt[0]["role"] == "system" and '"name": "book"' in item.prompt[0]["content"]
    with pytest.raises(EvaluationError, match="categories is"):
        Bfcl.load(tmp_path, ["parallel"])
    (tmp_path / "possible_answer" / "BFCL_v4_multiple.json").write_text("{}\n")
    with pytest.raises(EvaluationError, match=r"multiple\.json:1: id is None"):
        Bfcl.load(tmp_path, ["multiple"])
    for damage in ({"question": []}, {"question": [[{"role": "user"}]]}, {"function": [{"name": "book"}]}):
        damaged = {**entry, **damage}
        (tmp_path / "BFCL_v4_multiple.json").write_text(json.dumps(damaged) + "\n")
        (tmp_path / "possible_answer" / "BFCL_v4_multiple.json").write_text(json.dumps(answer) + "\n")
        with pytest.raises(EvaluationError, match=r"multiple\.json:1: x_0 is no problem"):
            Bfcl.load(tmp_path, ["multiple"])


def test_the_data_of_the_benchmark_accepts_its_answers() -> None:
    """Where the package is there: the first accepted call of every test problem is right."""
    import importlib.util

    from qsun.evaluation.bfcl import data_folder, load_problems

    if importlib.util.find_spec("bfcl_eval") is None:
        pytest.skip("the package bfcl_eval is not installed")
    for category in ("simple_python", "multiple"):
        for problem in load_problems(data_folder(None), category):
            assert mismatch(parse_calls(problem.answer()), problem.functions, problem.wanted) is None


PROMPT = 'from typing import List\n\n\ndef add(a: int, b: int) -> int:\n    """Add."""\n'
TEST = "def check(candidate):\n    assert candidate(2, 3) == 5\n"


@pytest.mark.parametrize(
    ("answer", "correct"),
    [
        ("    return a + b\n", True),
        ("```python\ndef add(a, b):\n    return a + b\n```", True),
        ("Here:\n```python\nimport math\n\ndef add(a, b) -> List:\n    return a + b\n```\nEnjoy", True),
        ("```python\ndef add(a, b):\n    return a - b\n```", False),
        ("```python\ndef plus(a, b):\n    return a + b\n```", False),
        ("    while True: pass\n", False),
        ("    import sys; sys.exit(0)\n", False),
        ("    import os; os._exit(0)\n", False),
        ("", False),
        ("    return a + b\n\nif __name__ == '__main__':\n    input()\n", True),
    ],
)
def test_humaneval_runs_the_tests(tmp_path: Path, answer: str, correct: bool) -> None:
    problem = {"task_id": "T/0", "prompt": PROMPT, "entry_point": "add", "test": TEST}
    file = tmp_path / "problems.jsonl.gz"
    file.write_bytes(gzip.compress((json.dumps(problem) + "\n").encode()))
    with pytest.raises(EvaluationError, match="--allow-code-execution"):
        HumanEval.load(file, allow_execution=False)
    task = HumanEval.load(file, allow_execution=True)
    limited = replace(task, limits=Limits(seconds=1.0))
    verdict = limited.judge(task.items[0], answer)
    assert verdict.correct == correct, verdict
    with pytest.raises(EvaluationError, match="--allow-code-execution"):
        replace(task, allow_execution=False).judge(task.items[0], answer)


def test_a_definition_replaces_the_unfinished_one() -> None:
    code = code_of(PROMPT, "add", "```python\ndef add(a, b):\n    return 0\n```")
    assert code.count("def add") == 1 and code.startswith("from typing import List")


def test_programs_are_limited() -> None:
    limits = Limits(seconds=2.0, memory=256 << 20, file_bytes=1 << 16)
    assert run_program("x = 1", limits).finished
    assert "MemoryError" in run_program("x = bytearray(1 << 30)", limits).detail
    assert not run_program("open('f', 'wb').write(b'x' * (1 << 20))", limits).finished
    assert "Too many open files" in run_program("f = [open('/dev/null') for _ in range(99)]", limits).detail
    assert "not done after" in run_program("import time; time.sleep(60)", limits).detail
    assert "ZeroDivisionError" in run_program("print('half a line', end=''); 1 / 0", limits).detail
    assert run_program("print('half a line', end='')", limits).finished
    assert run_program("print('x' * (1 << 22))", limits).finished  # nobody reads, or keeps, what is printed
    assert not run_program("import sys; sys.stderr.write('x' * (1 << 22))", limits).finished
    if os.geteuid() != 0:  # root is not held to a number of processes
        assert "unavailable" in run_program("import os; os.fork()", limits).detail
    # Nothing of this process's environment is passed on, and standard input is empty.
    source = """
import os, sys
assert set(os.environ) <= {'PATH', 'LANG', 'HOME', 'LC_CTYPE'}
assert not sys.stdin.read()
"""
    assert run_program(source, limits).finished


def test_any_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    chat = [{"role": "user", "content": "b"}]
    rows = [{"prompt": "a", "answer": "Paris"}, {"messages": chat, "answer": ["x", "y"]}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = JsonlTask.load(file)
    assert task.judge(task.items[0], "  Paris\n").correct and not task.judge(task.items[0], "paris").correct
    assert task.judge(task.items[1], "y").correct
    regex = JsonlTask.load(file, "regex")
    assert regex.judge(regex.items[0], "it is Paris.").correct
    for bad, says in (
        ('{"answer": "x"}', "has no prompt"),
        ('{"prompt": "p"}', "answer is None"),
        ("[1]", "is a JSON list"),
        ("{", "is not JSON"),
    ):
        file.write_text(bad + "\n")
        with pytest.raises(EvaluationError, match=rf"mine\.jsonl:1.*{says}"):
            JsonlTask.load(file)
    file.write_text('{"prompt": "p", "answer": "("}\n')
    with pytest.raises(EvaluationError, match="no regular expression"):
        JsonlTask.load(file, "regex")
