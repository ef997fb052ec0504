"""Asking every model every item through one engine, and keeping each answer as soon as there is one.

FOLDER/answers.jsonl holds a line for every (model, item) that was answered; what is in it is not asked again.
FOLDER/run.json tells what was asked of what, so that answers of another run are not taken for this one's.
FOLDER/items.jsonl holds the verdicts and summary.json the shares, both made anew from the answers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsun.core import SamplingParams
from qsun.errors import RequestError
from qsun.evaluation.items import EvaluationError, Item, Task

if TYPE_CHECKING:
    from qsun.engine.engine import DecodeEngine
    from qsun.engine.intake import Prompt

ANSWERS, RUN, VERDICTS, SUMMARY = "answers.jsonl", "run.json", "items.jsonl", "summary.json"

Key = tuple[str, str]
"""Model and item."""


@dataclass(frozen=True, slots=True)
class GivenAnswer:
    """error: why the request failed, when it did."""

    model: str
    item: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    error: str | None = None

    def to_json(self) -> str:
        """One line."""
        return json.dumps(
            {
                "model": self.model,
                "item": self.item,
                "text": self.text,
                "token_ids": list(self.token_ids),
                "finish_reason": self.finish_reason,
                "error": self.error,
            },
            ensure_ascii=False,
        )


def read_answers(path: Path) -> dict[Key, GivenAnswer]:
    """The answers of a file, by model and item; a half-written last line counts as none.

    Raises EvaluationError naming any other line that is damaged.
    """
    if not path.is_file():
        return {}
    # Not splitlines: an answer may hold the other characters that it takes for the end of a line.
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    found: dict[Key, GivenAnswer] = {}
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
            answer = GivenAnswer(
                value["model"], value["item"], value["text"], tuple(value["token_ids"]),
                value["finish_reason"], value["error"],
            )  # fmt: skip
        except (ValueError, KeyError, TypeError) as error:
            raise EvaluationError(f"{path}:{number} is no answer ({error!r}), expected one a line") from None
        found[answer.model, answer.item] = answer
    return found


def answer_items(
    engine: DecodeEngine,
    models: Sequence[str],
    items: Sequence[Item],
    folder: Path,
    params: SamplingParams,
    *,
    in_flight: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[Key, GivenAnswer]:
    """Ask what was not answered yet, all models in one batch, and append every answer to the folder's file.

    in_flight: most requests submitted at one time, by default four batches.
    should_stop: asked after each step; True leaves the unfinished requests for another time.
    Returns all answers there are.  A request that fails is an answer with an error, and is wrong.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ANSWERS
    given = read_answers(path)
    _drop_partial_line(path)
    waiting = [(m, item) for item in items for m in models if (m, item.id) not in given]
    total = len(items) * len(models)
    done = total - len(waiting)
    waiting.reverse()
    room = in_flight or 4 * engine.options.max_batch_size
    running: dict[str, _Running] = {}
    with path.open("a", encoding="utf-8") as file:

        def keep(answer: GivenAnswer) -> None:
            nonlocal done
            given[answer.model, answer.item] = answer
            file.write(answer.to_json() + "\n")
            file.flush()
            done += 1
            progress(done, total)

        while waiting or running:
            while waiting and len(running) < room:
                model, item = waiting.pop()
                try:
                    request_id = engine.submit(item.prompt, model=model, params=params)
                except RequestError as error:
                    keep(GivenAnswer(model, item.id, "", (), "error", str(error)))
                    continue
                running[request_id] = _Running(model, item.id, [], [])
            for output in engine.step():
                request = running.get(output.request_id)
                if request is None:
                    continue
                request.text.append(output.text)
                request.tokens.extend(output.token_ids)
                if output.finish_reason is not None:
                    del running[output.request_id]
                    keep(
                        GivenAnswer(
                            request.model,
                            request.item,
                            "".join(request.text),
                            tuple(request.tokens),
                            output.finish_reason,
                            output.error,
                        )
                    )
            if should_stop():
                for request_id in running:
                    engine.cancel(request_id)
                engine.step()
                break
    return given


@dataclass(slots=True)
class _Running:
    model: str
    item: str
    text: list[str]
    tokens: list[int]


def _drop_partial_line(path: Path) -> None:
    """Cut a last line that was never finished, so that the next one starts on a line of its own."""
    if path.is_file():
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):
            path.write_bytes(content[: content.rfind(b"\n") + 1])


def judge_answers(
    task: Task, models: Sequence[str], given: Mapping[Key, GivenAnswer], folder: Path
) -> dict[str, Any]:
    """Judge every answer, write items.jsonl and summary.json, and return the summary."""
    by_id = {item.id: item for item in task.items}
    correct: dict[str, list[bool]] = {model: [] for model in models}
    failed = dict.fromkeys(models, 0)
    with (folder / VERDICTS).open("w", encoding="utf-8") as file:
        for (model, item_id), answer in given.items():
            if model not in correct or item_id not in by_id:
                continue
            verdict = task.judge(by_id[item_id], answer.text)
            if answer.error is not None:
                verdict = replace(verdict, correct=False, detail=answer.error)
                failed[model] += 1
            correct[model].append(verdict.correct)
            line = {
                "model": model,
                "item": item_id,
                "correct": verdict.correct,
                "detail": verdict.detail,
                "finish_reason": answer.finish_reason,
                "tokens": len(answer.token_ids),
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    summary = {
        "task": task.name,
        "items": len(by_id),
        "models": {
            model: {
                "answered": len(found),
                "failed": failed[model],
                "correct": sum(found),
                "share": sum(found) / len(found) if found else None,
                "interval_95": wilson_interval(sum(found), len(found)),
            }
            for model, found in correct.items()
        },
    }
    (folder / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float] | None:
    """The 95 % score interval of a share (Wilson 1927); None without trials."""
    if trials == 0:
        return None
    share = successes / trials
    scale = 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / scale
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


def evaluate(
    engine: DecodeEngine,
    task: Task,
    models: Sequence[str],
    folder: Path,
    *,
    identity: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Answer and judge greedily; options are those of `answer_items`.

    identity: what else, beside task and prompts, the answers of the folder depend on, such as the decoder and
    the fingerprint of each model.  Raises EvaluationError when the folder holds answers of another run.
    """
    prompts = {f"prompt of item {item.id}": _digest(item.prompt) for item in task.items}
    continue_run(folder, {"task": task.name, "max_tokens": task.max_tokens, **(identity or {}), **prompts})
    params = SamplingParams(temperature=0.0, max_tokens=task.max_tokens)
    given = answer_items(engine, models, task.items, folder, params, **options)
    return judge_answers(task, models, given, folder)


def _digest(prompt: Prompt) -> str:
    return sha256(json.dumps(prompt).encode()).hexdigest()[:16]


def continue_run(folder: Path, facts: Mapping[str, Any]) -> None:
    """Add the facts of a run to its folder.

    A later call may ask more models or items.  Raises EvaluationError naming a fact that was another before.
    """
    path = folder / RUN
    stored = {}
    if path.is_file():
        try:
            stored = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise EvaluationError(f"{path} cannot be read ({error}), expected the facts of a run") from None
    for name, value in facts.items():
        if name in stored and stored[name] != value:
            raise EvaluationError(
                f"{path} is of another run: {name} is {stored[name]!r} there and {value!r} now, expected "
                "equality (choose another folder)"
            )
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({**stored, **facts}, indent=1) + "\n", encoding="utf-8")
    partial.rename(path)


def verdict_lines(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of items.jsonl."""
    with (folder / VERDICTS).open(encoding="utf-8", newline="\n") as file:
        for line in file:
            yield json.loads(line)
