"""What an evaluation asks and what it makes of the answers."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qsun.errors import QsunError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qsun.engine.intake import Prompt


class EvaluationError(QsunError):
    """The items of a task cannot be had; the message names file and line."""


@dataclass(frozen=True, slots=True)
class Item:
    """id: unique in its task.  prompt: what the engine gets.  reference: what its task judges by."""

    id: str
    prompt: Prompt
    reference: Any


@dataclass(frozen=True, slots=True)
class Verdict:
    """detail: what was found in the answer, or why it is wrong."""

    correct: bool
    detail: str = ""


class Task(Protocol):
    """name: of the task.  items: what is asked.  max_tokens: of an answer."""

    @property
    def name(self) -> str: ...

    @property
    def items(self) -> Sequence[Item]: ...

    @property
    def max_tokens(self) -> int: ...

    def judge(self, item: Item, text: str) -> Verdict:
        """Whether the text of an answer is right."""


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", object) of every line that is not empty; a file that ends in .gz is decompressed.

    Raises EvaluationError naming the line that is no JSON object.
    """
    try:
        stored = path.read_bytes()
        text = (gzip.decompress(stored) if path.suffix == ".gz" else stored).decode()
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise EvaluationError(f"{path} cannot be read ({error}), expected JSON lines") from None
    # Not splitlines: JSON may hold the other characters that it takes for the end of a line.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise EvaluationError(f"{where} is not JSON ({error}), expected an object") from None
        if not isinstance(value, dict):
            raise EvaluationError(f"{where} is a JSON {type(value).__name__}, expected an object")
        yield where, value


def field_of(where: str, value: dict[str, Any], name: str, kind: type) -> Any:
    """A field of a line.  Raises EvaluationError naming it when it is missing or of another type."""
    found = value.get(name)
    if not isinstance(found, kind):
        raise EvaluationError(f"{where}: {name} is {found!r}, expected a {kind.__name__}")
    return found
