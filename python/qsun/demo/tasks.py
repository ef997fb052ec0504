"""What the demo asks, and whom: its own prompts, and the task modules that lie in the examples folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qsun.cli.answers import Question
from qsun.modules.card import CARD_FILE, ModuleCard

BASE = "base"
PROMPTS_FILE = "prompts.txt"
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
class Task:
    """A prefill module. name: its folder's. prompts: what its author would ask it."""

    name: str
    path: Path
    prompts: tuple[str, ...]


def modules_folder() -> Path:
    """examples/prefill_modules of the working directory, else of the checkout that this package lies in."""
    return MODULES if MODULES.is_dir() else Path(__file__).resolve().parents[3] / MODULES


def find_tasks(folder: Path) -> Sequence[Task]:
    """The task modules of `folder`: every folder in it with a module card.

    A `prompts.txt` beside the card holds prompts for the module, one a line; without it, it gets two of the
    demo's own. Raises CheckpointError for a damaged card, ValueError for a folder called like the base model.
    """
    tasks = []
    for path in sorted(card.parent for card in folder.glob(f"*/{CARD_FILE}")):
        if path.name == BASE:
            raise ValueError(
                f"{path} is called {BASE!r}, expected another name: that one is the base model's"
            )
        ModuleCard.read(path)  # damage is told before anything is loaded
        prompts = path / PROMPTS_FILE
        lines = prompts.read_text(encoding="utf-8").splitlines() if prompts.is_file() else []
        tasks.append(Task(path.name, path, tuple(line.strip() for line in lines if line.strip())))
    return tasks


def questions_for(tasks: Sequence[Task]) -> Sequence[Question]:
    """The eight prompts to the base model and those of every task, as chats of one message."""
    pairs = [(BASE, text) for text in PROMPTS]
    pairs += [(task.name, text) for task in tasks for text in task.prompts or PROMPTS[:2]]
    return [Question(name, text, [{"role": "user", "content": text}]) for name, text in pairs]
