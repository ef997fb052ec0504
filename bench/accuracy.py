"""The accuracy study as tables and a plot: what bench/results/accuracy.json holds, for README and docs.

The file is written by `python -m qsun.training.study collect`; a block named accuracy stands for its arms,
accuracy:paired for the comparisons between them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qsun_bench import tables
from qsun_bench.results import RESULTS, ResultsError

FILE = Path(RESULTS) / "accuracy.json"
VIEWS = ("", "paired")

_FAMILIES = {"tools": "function calling", "maths": "GSM8K", "code": "HumanEval"}
_ARMS = {
    "base": "base, untrained",
    "full": "full fine-tuning",
    "lora": "LoRA on the whole model",
    "naive": "naive: fully fine-tuned prefill module, base decodes",
    "sun": "SUN",
    "sun-prefill": 'SUN, first token by the prefill module ("prefill")',
    "sun-lora": "SUN, pairs (LoRA)",
    "full-awq4": "full fine-tuning, then AWQ to 4 bits",
    "qsun-ptq4": "SUN module, decoder of 4 bits",
    "qsun4": "QSUN: trained against 4 bits",
    "qsun4-gptq": "QSUN: trained against 4 bits by GPTQ",
    "qsun4-lora": "QSUN, pairs, 4 bits",
    "full-awq3": "full fine-tuning, then AWQ to 3 bits",
    "qsun-ptq3": "SUN module, decoder of 3 bits",
    "qsun3": "QSUN: trained against 3 bits",
    "qsun3-gptq": "QSUN: trained against 3 bits by GPTQ",
    "full-awq2": "full fine-tuning, then AWQ to 2 bits",
    "qsun-ptq2": "SUN module, decoder of 2 bits",
    "qsun2": "QSUN: trained against 2 bits",
    "qsun2-gptq": "QSUN: trained against 2 bits by GPTQ",
}


def read(root: Path) -> Mapping[str, Any]:
    """The recorded study under `root`. Raises ResultsError when it is missing or damaged."""
    path = root / FILE
    try:
        content: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for part in ("header", "arms", "comparisons"):
            content[part]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResultsError(
            f"{FILE} cannot be read ({error!r}), expected what `study collect` wrote"
        ) from None
    return content


def markdown(study: Mapping[str, Any], view: str) -> str:
    """The study for a document. view: "" for the arms, "paired" for the comparisons."""
    table = _paired(study["comparisons"]) if view == "paired" else _arms(study["arms"])
    return f"{_line(study['header'])}\n\n{table}"


def _line(header: Mapping[str, Any]) -> str:
    versions = f"torch {', '.join(header['torch'])}; {', '.join(header['dtype'])}"
    return (
        f"{', '.join(header['devices'])}; {versions}; commit {header['commit']}; {header['date']}; "
        f"`{header['command']}`. {header['note']}"
    )


def _families(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [family for family in _FAMILIES if any(row["family"] == family for row in rows)]


def _arms(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line an arm; for each family the share of right answers with its interval, and the loss."""
    by_place = {(row["family"], row["arm"]): row for row in rows}
    families = _families(rows)
    lines = []
    for arm, label in _ARMS.items():
        found = [by_place.get((family, arm)) for family in families]
        if any(found):
            lines.append((label, *(_share(row) for row in found), *(_loss(row) for row in found)))
    items = {family: next(r["items"] for r in rows if r["family"] == family) for family in families}
    columns = (
        "right answers, % (95 % interval), and nats a token of given responses",
        *(f"{_FAMILIES[f]} ({items[f]})" for f in families),
        *(f"nats, {_FAMILIES[f]}" for f in families),
    )
    return tables.markdown(columns, lines)


def _share(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    low, high = row["interval_95"]
    return f"{row['share'] * 100:.1f} ({low * 100:.1f}-{high * 100:.1f})"


def _loss(row: Mapping[str, Any] | None) -> str:
    return "" if row is None else f"{row['loss']:.3f}"


def _paired(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line a comparison; for each family the difference in points, with interval and p, and in loss."""
    by_place = {(row["family"], row["a"], row["b"]): row for row in rows}
    families = _families(rows)
    lines = []
    for a, b in dict.fromkeys((row["a"], row["b"]) for row in rows):
        found = [by_place.get((family, a, b)) for family in families]
        lines.append((f"{a} - {b}", *map(_difference, found), *map(_loss_difference, found)))
    columns = (
        "points (95 % interval), p",
        *(_FAMILIES[f] for f in families),
        *(f"nats, {_FAMILIES[f]}" for f in families),
    )
    return tables.markdown(columns, lines)


def _difference(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    low, high = row["interval_95"]
    return f"{row['difference'] * 100:+.1f} ({low * 100:+.1f} to {high * 100:+.1f}), {_p(row['p'])}"


def _loss_difference(row: Mapping[str, Any] | None) -> str:
    return "" if row is None else f"{row['loss_difference']:+.3f}, {_p(row['loss_p'])}"


def _p(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.1g}"


def plot(study: Mapping[str, Any], path: Path) -> None:
    """Share of right answers of every arm, a panel a family. Raises ResultsError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ResultsError(
            "matplotlib is not installed, expected it for plots: pip install matplotlib"
        ) from None
    rows = study["arms"]
    families = _families(rows)
    by_place = {(row["family"], row["arm"]): row for row in rows}
    arms = [arm for arm in reversed(_ARMS) if any((family, arm) in by_place for family in families)]
    figure = Figure(figsize=(4 * len(families) + 3, 0.32 * len(arms) + 1), layout="constrained")
    panels = figure.subplots(1, len(families), sharey=True, squeeze=False)[0]
    for panel, family in zip(panels, families, strict=True):
        for height, arm in enumerate(arms):
            row = by_place.get((family, arm))
            if row is None:
                continue
            low, high = (100 * edge for edge in row["interval_95"])
            panel.plot([low, high], [height, height], color="0.6", zorder=1)
            panel.scatter([100 * row["share"]], [height], s=24, zorder=2)
            seeds = [100 * share for share in row["share_by_seed"]]
            panel.scatter(seeds, [height] * len(seeds), s=8, color="0.3", zorder=3)
        panel.set_title(_FAMILIES[family])
        panel.set_xlabel("right answers, %")
        panel.set_xlim(left=0)
        panel.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(arms)), [_ARMS[arm] for arm in arms])
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
