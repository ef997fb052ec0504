"""Running a batch of requests and showing their answers as they come: for `qsun generate` and the demo."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TextIO

from qsun.errors import RequestError

if TYPE_CHECKING:
    from qsun.core import FinishReason, SamplingParams
    from qsun.engine.engine import DecodeEngine
    from qsun.engine.intake import Prompt


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt for one model. shown: the text for a reader; prompt: what the engine gets."""

    model: str
    shown: str
    prompt: Prompt


@dataclass(slots=True)
class Answer:
    """What became of a question, growing while the engine runs."""

    request_id: str
    question: Question
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None

    @property
    def failed(self) -> bool:
        return self.finish_reason == "error"

    def to_json(self) -> str:
        """The answer as one line of JSON."""
        return json.dumps(
            {
                "request_id": self.request_id,
                "model": self.question.model,
                "prompt": self.question.shown,
                "text": self.text,
                "token_ids": self.token_ids,
                "finish_reason": self.finish_reason,
                "error": self.error,
            },
            ensure_ascii=False,
        )


@dataclass(frozen=True, slots=True)
class Pace:
    """How a batch went. prefill_s: until every request had its first token; decode_s: from there to the end.

    decode_steps, decode_tokens: engine steps in decode_s, and the tokens that they gave.
    """

    prefill_s: float
    decode_s: float
    tokens: int
    decode_steps: int
    decode_tokens: int


class Display(Protocol):
    """Where answers go."""

    def progress(self, answer: Answer, text: str) -> None:
        """`text` was added to an answer that goes on or has just ended."""

    def finished(self, answer: Answer) -> None:
        """The answer is complete, or failed."""


class JsonLines:
    """One JSON line for each answer, in the order in which they end."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout

    def progress(self, answer: Answer, text: str) -> None:
        pass

    def finished(self, answer: Answer) -> None:
        print(answer.to_json(), file=self._stream, flush=True)


class Plain:
    """Answers as text: a single one token by token, several each when it is complete."""

    def __init__(self, count: int, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._alone = count == 1

    def progress(self, answer: Answer, text: str) -> None:
        if self._alone and text:
            self._stream.write(text)
            self._stream.flush()

    def finished(self, answer: Answer) -> None:
        if answer.failed:
            if self._alone and answer.text:
                print(file=self._stream)
            print(
                f"qsun: {answer.request_id} ({answer.question.model}) failed: {answer.error}", file=sys.stderr
            )
        elif self._alone:
            print(file=self._stream, flush=True)
        else:
            print(
                f"[{answer.question.model}] {answer.question.shown}\n{answer.text}\n",
                file=self._stream,
                flush=True,
            )


class Live:
    """On a terminal: a line for each running answer, complete ones above (rich)."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live as RichLive

        self._console = Console(highlight=False)
        self._live = RichLive(console=self._console, refresh_per_second=12, transient=True)
        self._running: dict[str, Answer] = {}

    def __enter__(self) -> Live:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def progress(self, answer: Answer, text: str) -> None:
        self._running[answer.request_id] = answer
        self._draw()

    def finished(self, answer: Answer) -> None:
        from rich.text import Text

        self._running.pop(answer.request_id, None)
        title = Text.assemble((f"[{answer.question.model}] ", "bold cyan"), (answer.question.shown, "bold"))
        self._console.print(title)
        if answer.failed:
            self._console.print(Text(f"failed: {answer.error}", style="red"))
        else:
            self._console.print(Text(answer.text))
        self._console.print()
        self._draw()

    def _draw(self) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 1))
        room = max(20, self._console.width - 30)
        for answer in self._running.values():
            tail = " ".join(answer.text.split())[-room:]
            table.add_row(
                Text(f"[{answer.question.model}]", style="cyan"),
                Text(f"{len(answer.token_ids):4d}"),
                Text(tail),
            )
        self._live.update(table)


@contextmanager
def display_for(count: int, *, as_json: bool) -> Iterator[Display]:
    """The display that fits stdout: JSON lines when asked, live on a terminal with rich, else plain."""
    if as_json:
        yield JsonLines()
    elif count > 1 and sys.stdout.isatty() and _has_rich():
        with Live() as live:
            yield live
    else:
        yield Plain(count)


def _has_rich() -> bool:
    import importlib.util

    return importlib.util.find_spec("rich") is not None


def run(
    engine: DecodeEngine, questions: Sequence[Question], params: SamplingParams, display: Display
) -> tuple[Sequence[Answer], Pace]:
    """Submit every question at once and step the engine until all have ended.

    A question that the engine refuses becomes a failed answer; the others go on. An interrupt cancels all.
    """
    answers: dict[str, Answer] = {}
    for number, question in enumerate(questions):
        request_id = f"request-{number}"
        answer = answers[request_id] = Answer(request_id, question)
        try:
            engine.submit(question.prompt, model=question.model, params=params, request_id=request_id)
        except RequestError as error:
            answer.finish_reason, answer.error = "error", str(error)
            display.finished(answer)
    begin = time.perf_counter()
    all_started = begin
    decode_steps = decode_tokens = 0
    waiting = {key for key, answer in answers.items() if not answer.failed}
    try:
        while engine.has_work:
            outputs = engine.step()
            now = time.perf_counter()
            if waiting:
                waiting -= {out.request_id for out in outputs if out.token_ids or out.finish_reason}
                all_started = now
            else:
                decode_steps += 1
                decode_tokens += sum(len(out.token_ids) for out in outputs)
            for out in outputs:
                answer = answers[out.request_id]
                answer.text += out.text
                answer.token_ids.extend(out.token_ids)
                display.progress(answer, out.text)
                if out.finish_reason is not None:
                    answer.finish_reason, answer.error = out.finish_reason, out.error
                    display.finished(answer)
    except KeyboardInterrupt:
        for key, answer in answers.items():
            if answer.finish_reason is None:
                engine.cancel(key)
        raise
    end = time.perf_counter()
    tokens = sum(len(answer.token_ids) for answer in answers.values())
    return list(answers.values()), Pace(
        all_started - begin, end - all_started, tokens, decode_steps, decode_tokens
    )
