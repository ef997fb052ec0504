"""Runs of the suites of wna16_formats as tables: each against what it is held to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TextIO

from qsun_bench import margins, tables
from qsun_bench.cases.wna16_formats import FORMATS, Format
from qsun_bench.margins import Table
from qsun_bench.results import Record, Run
from qsun_bench.variants import OURS, SM80
from qsun_kernels.backends.problems import BACKENDS


def formats(run: Run) -> Sequence[Table]:
    """Each format's time over that of the first, by matrix and number of tokens; * where it is above its
    target. Empty when the run has no two formats.
    """
    found: dict[tuple[str, str, int], Record] = {}
    for record in run.records:
        kind = format_of(record)
        if kind is not None and record.backend == _first_of_ours(run):
            matrix = f"{record.case.split('.w')[0]} ({record.fields['K']} x {record.fields['N']})"
            found[matrix, kind.name, int(str(record.fields["M"]))] = record
    kinds = [kind for kind in FORMATS if any(name == kind.name for _, name, _ in found)]
    if len(kinds) < 2:
        return ()
    sizes = sorted({M for *_, M in found})
    rows = []
    for matrix in dict.fromkeys(matrix for matrix, *_ in found):
        base = {M: found.get((matrix, FORMATS[0].name, M)) for M in sizes}
        for kind in kinds:
            cells = [_held(found.get((matrix, kind.name, M)), base[M], kind, M) for M in sizes]
            rows.append((matrix, kind.name, *cells, _target(kind)))
    title = f"time over that of {FORMATS[0].name} (us); *: above the target"
    return [Table(title, ("", "format", *(f"M = {M}" for M in sizes), "target"), rows, text_columns=2)]


def format_of(record: Record) -> Format | None:
    """Which of FORMATS a record is of."""
    own = {name: record.fields.get(name) for name in ("bits", "group_size", "symmetric", "dtype")}
    for kind in FORMATS:
        named = {
            "bits": kind.spec.bits,
            "group_size": kind.spec.group_size,
            "symmetric": kind.spec.symmetric,
            "dtype": str(kind.dtype).removeprefix("torch."),
        }
        if own == named and bool(record.fields.get("act_order")) == kind.act_order:
            return kind
    return None


def _first_of_ours(run: Run) -> str | None:
    names = {record.backend for record in run.records}
    return next((name for name in BACKENDS if name in names), None)


def _held(record: Record | None, base: Record | None, kind: Format, M: int) -> str:
    if record is None:
        return ""
    if not record.ok or record.us is None:
        return "failed" if record.failed else "wrong"
    if kind is FORMATS[0] or base is None or not base.ok or base.us is None:
        return f"({record.us:.1f})"
    ratio = record.us / base.us
    is_above = ratio > kind.most and (kind.most_up_to is None or kind.most_up_to >= M)
    return f"{ratio:.2f}{'*' if is_above else ''} ({record.us:.1f})"


def _target(kind: Format) -> str:
    if kind is FORMATS[0]:
        return ""
    return f"{kind.most:.2f}" + ("" if kind.most_up_to is None else f" to M = {kind.most_up_to}")


def steps(run: Run) -> Sequence[Table]:
    """How the time jumps where a tile of tokens overflows."""
    return [table for table in margins.build(run) if table.title == margins.STEPS]


def sm80(run: Run) -> Sequence[Table]:
    """Each peer's time over that of the variant for GPUs before sm_90, by matrix and number of tokens."""
    peers = dict.fromkeys(record.backend for record in run.records if record.backend not in OURS)
    ours = {record.case: record for record in run.records if record.backend == SM80}
    if not ours:
        return ()
    sizes = sorted({int(str(record.fields["M"])) for record in ours.values()})
    built = []
    for peer in peers:
        found = {
            (record.case.rpartition(".")[0], int(str(record.fields["M"]))): (record, ours[record.case])
            for record in run.records
            if record.backend == peer and record.case in ours
        }
        rows = [
            (matrix, *(_over(found.get((matrix, M))) for M in sizes))
            for matrix in dict.fromkeys(matrix for matrix, _ in found)
        ]
        built.append(Table(f"{peer} / {SM80} (us of the latter)", ("", *(f"M = {M}" for M in sizes)), rows))
    return built


def _over(pair: tuple[Record, Record] | None) -> str:
    if pair is None:
        return ""
    peer, ours = pair
    if not ours.ok or ours.us is None:
        return "failed" if ours.failed else "wrong"
    if not peer.ok or peer.us is None:
        return f"({ours.us:.1f})"
    return f"{peer.us / ours.us:.2f} ({ours.us:.1f})"


VIEWS: Mapping[str, Callable[[Run], Sequence[Table]]] = {"formats": formats, "steps": steps, "sm80": sm80}
"""By the name that a block of a document asks for them."""


def show(run: Run, stream: TextIO) -> None:
    """Print what a run says of formats and of the variant; nothing where it says nothing."""
    for table in (*formats(run), *sm80(run)):
        print(file=stream)
        tables.show(table.title, table.columns, table.rows, stream, text_columns=table.text_columns)


def markdown(run: Run, view: str) -> str:
    """One of VIEWS for a document."""
    return "\n\n".join(
        f"{table.title}:\n\n{tables.markdown(table.columns, table.rows, text_columns=table.text_columns)}"
        for table in VIEWS[view](run)
    )
