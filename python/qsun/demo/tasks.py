"""What the demo asks, and whom: its own prompts, and the task modules that lie in the examples folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qsun.cli.answers import Question
from qsun.evaluation.items import EvaluationError, field_of, json_lines
from qsun.modules.card import CARD_FILE, ModuleCard

BASE = "base"
PROMPTS_FILE = "prompts.jsonl"
MODULES = Path("examples") / "prefill_modules"
PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about the sea.",
    "List three uses of copper.",
    "What is the difference between a cat and a dog?",
    "Give me a simple recipe for tomato soup.",
    "Who wrote Romeo and Juliet, and what is it about?",
    "What should I pack for a day of hiking?",
)


@dataclass(frozen=True, slots=True)
class TaskPrompt:
    """shown: the text for a reader. messages: the chat that the module was trained to answer."""

    shown: str
    messages: tuple[dict[str, str], ...]


@dataclass(frozen=True, slots=True)
class Task:
    """A prefill module. name: its folder's. prompts: what its author would ask it."""

    name: str
    path: Path
    prompts: tuple[TaskPrompt, ...]


def modules_folder() -> Path:
    """examples/prefill_modules of the working directory, else of the checkout that this package lies in."""
    return MODULES if MODULES.is_dir() else Path(__file__).resolve().parents[3] / MODULES


def find_tasks(folder: Path) -> Sequence[Task]:
    """The task modules of `folder`: every folder in it with a module card.

    A `prompts.jsonl` beside the card holds prompts for the module, one a line: {"shown", "messages"}; without
    it, it gets two of the demo's own. Raises CheckpointError for a damaged card, EvaluationError for a
    damaged line of prompts, ValueError for a folder called like the base model.
    """
    tasks = []
    for path in sorted(card.parent for card in folder.glob(f"*/{CARD_FILE}")):
        if path.name == BASE:
            raise ValueError(
                f"{path} is called {BASE!r}, expected another name: that one is the base model's"
            )
        ModuleCard.read(path)  # damage is told before anything is loaded
        prompts = path / PROMPTS_FILE
        tasks.append(Task(path.name, path, tuple(_prompts(prompts) if prompts.is_file() else ())))
    return tasks


def _prompts(path: Path) -> Iterator[TaskPrompt]:
    for where, line in json_lines(path):
        messages = field_of(where, line, "messages", list)
        for message in messages:
            if not isinstance(message, dict) or set(message) != {"role", "content"}:
                raise EvaluationError(
                    f"{where}: messages holds {message!r}, expected objects with role and content"
                )
        yield TaskPrompt(field_of(where, line, "shown", str), tuple(messages))


def questions_for(tasks: Sequence[Task]) -> Sequence[Question]:
    """Every task's prompts, each to the base module and to the task's; without tasks, eight to the base."""
    if not tasks:
        return [_question(BASE, prompt) for prompt in _general(PROMPTS)]
    return [
        _question(model, prompt)
        for task in tasks
        for prompt in task.prompts or _general(PROMPTS[:2])
        for model in (BASE, task.name)
    ]


def _general(texts: Sequence[str]) -> tuple[TaskPrompt, ...]:
    return tuple(TaskPrompt(text, ({"role": "user", "content": text},)) for text in texts)


def _question(model: str, prompt: TaskPrompt) -> Question:
    return Question(model, prompt.shown, list(prompt.messages))
