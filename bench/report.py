"""The tables of README.md and docs/, generated from recorded runs.

A block stands between `<!-- bench:NAME -->` and `<!-- /bench -->`, each on a line of its own; NAME is
SUITE-DEVICE, for example `wna16-h100`, and stands for bench/results/DEVICE/SUITE.json; SUITE-DEVICE:VIEW
for a further view of the same run (`views.FURTHER`), such as `wna16-h100:margins`, against its best peers and
the floor; accuracy and accuracy:paired for the accuracy study.
What is between the marks is overwritten.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qsun_bench import accuracy, attention_tables, results, tables, views
from qsun_bench.results import Record, ResultsError, Run

_BLOCK = re.compile(
    r"^(?P<open><!-- bench:(?P<name>[^\s>]+) -->)\n(?P<body>.*?)^(?P<close><!-- /bench -->)$",
    re.MULTILINE | re.DOTALL,
)
_MARK = re.compile(r"^<!-- (?:bench:\S+|/bench) -->$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Page:
    """A document with blocks: what it holds and what it should hold."""

    path: Path
    current: str
    expected: str

    @property
    def differs(self) -> bool:
        return self.current != self.expected


def pages(root: Path) -> Sequence[Page]:
    """README.md and every Markdown file under docs/ of `root` that has a block.

    Raises ResultsError for a block whose run is not recorded, or a mark without its partner.
    """
    found = []
    for path in _documents(root):
        text = path.read_text()
        if "<!-- bench:" in text or "<!-- /bench -->" in text:
            found.append(Page(path, text, regenerate(text, root, path)))
    return found


def _documents(root: Path) -> Iterator[Path]:
    if (root / "README.md").is_file():
        yield root / "README.md"
    yield from sorted((root / "docs").rglob("*.md"))


def regenerate(text: str, root: Path, path: Path) -> str:
    """`text` with every block replaced by what the recorded runs under `root` say."""
    blocks = list(_BLOCK.finditer(text))
    # Marks in code fences are examples, and an open one without its end would silently keep an old table.
    marks = len(_MARK.findall(text))
    if marks != 2 * len(blocks):
        raise ResultsError(
            f"{path}: {marks} marks make {len(blocks)} blocks, expected an end for every start"
        )

    def fill(found: re.Match[str]) -> str:
        body = render(found["name"], root, path)
        return f"{found['open']}\n{body}\n{found['close']}"

    return _BLOCK.sub(fill, text)


def render(name: str, root: Path, path: Path) -> str:
    """The body of one block."""
    recorded, _, view = name.partition(":")
    if recorded == "accuracy":
        if view not in accuracy.VIEWS:
            raise ResultsError(f"{path}: block bench:{name} asks for {view!r}, expected nothing or paired")
        return accuracy.markdown(accuracy.read(root), view)
    suite, _, device = recorded.rpartition("-")
    if view and view not in views.FURTHER:
        known = ", ".join(views.FURTHER)
        raise ResultsError(
            f"{path}: block bench:{name} asks for {view!r}, expected nothing or one of {known}"
        )
    source = root / results.RESULTS / device / f"{suite}.json"
    if not suite or not source.is_file():
        raise ResultsError(
            f"{path}: block bench:{name} needs {source.relative_to(root)}, which is not recorded"
        )
    run = results.parse(source.read_text(), str(source.relative_to(root)))
    if view:
        return f"{run.header.line()}\n\n{views.FURTHER[view](run)}"
    table = views.markdown(run)
    if table is None:
        has_rows = all("M" in r.fields for r in run.records)
        table = _by_rows(run) if has_rows else _by_case(attention_tables.of_values(run))
    return f"{run.header.line()}\n\n{table}"


def _cell(record: Record | None) -> str:
    if record is None:
        return ""
    if not record.ok or record.us is None:
        return "failed" if record.failed else "wrong"
    return f"{record.us:.1f}"


def _by_rows(run: Run) -> str:
    """Matrix products: a line a matrix and contender, a column an M, us; then the share of the bandwidth."""
    by_place = {(r.case.rpartition(".")[0], r.backend, r.fields["M"]): r for r in run.records}
    sizes = sorted({int(str(r.fields["M"])) for r in run.records})
    lines = []
    for matrix, backend in dict.fromkeys((m, b) for m, b, _ in by_place):
        found = [by_place.get((matrix, backend, M)) for M in sizes]
        first = next(r for r in found if r is not None)
        label = f"{matrix} ({first.fields['K']} x {first.fields['N']})"
        share = ""
        if found[0] is not None and found[0].ok and found[0].gb_s is not None:
            share = f"{found[0].gb_s / (run.header.read_tb_s * 1e3):.0%}"
        lines.append((label, backend, *map(_cell, found), share))
    columns = ("us", "by", *(f"M = {M}" for M in sizes), f"of read bandwidth at M = {sizes[0]}")
    return tables.markdown(columns, lines, text_columns=2)


def _by_case(run: Run) -> str:
    """Everything else: a line a case, a column a contender, us and the share of the read bandwidth.

    Where contenders plan, once a step for all layers, the time of that behind a plus.
    """
    backends = list(dict.fromkeys(record.backend for record in run.records))
    by_place = {(record.case, record.backend): record for record in run.records}
    lines = []
    for case in dict.fromkeys(record.case for record in run.records):
        cells = []
        for backend in backends:
            record = by_place.get((case, backend))
            text = _cell(record)
            if record is not None and record.ok and record.gb_s is not None:
                text += f" ({record.gb_s / (run.header.read_tb_s * 1e3):.0%})"
                if record.plan_us is not None:
                    text += f" + {record.plan_us:.1f}"
            cells.append(text)
        lines.append((case, *cells))
    planned = any(record.plan_us is not None for record in run.records)
    title = "us (share of read bandwidth)" + (" + plan, once a step" if planned else "")
    return tables.markdown((title, *backends), lines)
