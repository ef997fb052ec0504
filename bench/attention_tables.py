"""What a run of attention says beside its times: codes against values, groups, block sizes, Triton and CUDA.

Every comparison is of one contender with itself, or of two on one case, within one run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Final, TextIO

from qsun_bench import tables
from qsun_bench.margins import Table, geometric_mean
from qsun_bench.results import Record, Run

_OP: Final = "paged_attention_decode"
# Below, launches weigh as much as reading.
_LARGE_BYTES: Final = 100_000_000


def belongs(run: Run) -> bool:
    """Whether it is a run of attention."""
    return any(record.op == _OP for record in run.records)


def of_values(run: Run) -> Run:
    """The cases whose cache holds values, which peers take; all of a run that has no such case."""
    kept = tuple(record for record in run.records if not _is_coded(record))
    return Run(run.header, kept) if kept else run


def codes(run: Run) -> Table | None:
    """Caches of codes against the cache of values at the same case."""
    values = {_key(record, "kv_dtype"): record for record in run.records if not _is_coded(record)}
    rows: dict[str, dict[str, Record]] = {}
    kinds: dict[str, None] = {}
    for record in run.records:
        if record.op == _OP and _is_coded(record):
            kind = str(record.fields["kv_dtype"])
            kinds[kind] = None
            rows.setdefault(_key(record, "kv_dtype"), {})[kind] = record
    if not rows:
        return None
    lines = []
    for key, by_kind in rows.items():
        base = values.get(key)
        first = next(iter(by_kind.values()))
        kind = str(first.fields["kv_dtype"])
        case = base.case if base is not None else first.case.replace(f".{kind}", "")
        cells = [_against(by_kind.get(name), base, run.header.read_tb_s) for name in kinds]
        lines.append((case, first.backend, _timed(base, run.header.read_tb_s), *cells))
    dtypes = dict.fromkeys(str(record.fields.get("dtype")) for record in run.records if record.op == _OP)
    title = "codes against values in us (times as fast, share of the read bandwidth)"
    return Table(title, ("", "by", "/".join(dtypes), *kinds), lines, text_columns=2)


def groups(run: Run) -> Table | None:
    """The same KV under more query heads: us, and over the time of the smallest group."""
    return _sweep(run, "q_heads", "query heads over the same keys and values in us (over the fewest heads)")


def blocks(run: Run) -> Table | None:
    """The same KV in blocks of other sizes: us, and over the time of the smallest blocks."""
    return _sweep(run, "block_size", "blocks of the cache in us (over the smallest blocks)")


def triton(run: Run) -> Table | None:
    """Triton's kernels over CUDA's, where both were right, at cases that read much."""
    by_place = {(record.case, record.backend): record for record in run.records if record.op == _OP}
    lines, ratios = [], []
    for case in dict.fromkeys(case for case, _ in by_place):
        ours, other = by_place.get((case, "cuda")), by_place.get((case, "triton"))
        if ours is None or other is None or ours.bytes < _LARGE_BYTES:
            continue
        ratio = _ratio(other, ours)
        if ratio is None or ours.us is None or other.us is None:
            continue
        ratios.append(ratio)
        size = f"{ours.bytes / 1e6:.0f}"
        lines.append((case, size, f"{ours.us:.1f}", f"{other.us:.1f}", f"{ratio:.2f}"))
    if not lines:
        return None
    mean = geometric_mean(ratios)
    lines.append(("geometric mean", "", "", "", "" if mean is None else f"{mean:.2f}"))
    lines.append(("largest", "", "", "", f"{max(ratios):.2f}"))
    title = f"Triton against CUDA in us, cases of {_LARGE_BYTES / 1e6:.0f} MB and more"
    return Table(title, ("", "MB", "cuda", "triton", "triton / cuda"), lines)


def show(run: Run, stream: TextIO) -> None:
    """Print those that the run has cases for."""
    for table in (make(run) for make in (codes, groups, blocks, triton)):
        if table is not None:
            print(file=stream)
            tables.show(table.title, table.columns, table.rows, stream, text_columns=table.text_columns)


def _is_coded(record: Record) -> bool:
    return record.fields.get("kv_dtype") != record.fields.get("dtype")


def _key(record: Record, without: str) -> str:
    """Equal for records of one contender whose problems differ in one field alone."""
    fields = {name: value for name, value in record.fields.items() if name != without}
    return json.dumps([record.op, record.backend, fields], sort_keys=True)


def _ratio(record: Record | None, base: Record | None) -> float | None:
    """Time over time; None unless both were right."""
    if record is None or base is None or not (record.ok and base.ok):
        return None
    return None if record.us is None or base.us is None else record.us / base.us


def _broken(record: Record) -> str:
    return "failed" if record.failed else "wrong"


def _share(record: Record, read_tb_s: float) -> str:
    return "" if record.gb_s is None else f"{record.gb_s / (read_tb_s * 1e3):.0%}"


def _timed(record: Record | None, read_tb_s: float) -> str:
    if record is None:
        return ""
    if not record.ok or record.us is None:
        return _broken(record)
    return f"{record.us:.1f} ({_share(record, read_tb_s)})"


def _against(record: Record | None, base: Record | None, read_tb_s: float) -> str:
    ratio = _ratio(record, base)
    if record is None or record.us is None or ratio is None:
        return _timed(record, read_tb_s)
    return f"{record.us:.1f} ({1 / ratio:.2f}x, {_share(record, read_tb_s)})"


def _sweep(run: Run, field: str, title: str) -> Table | None:
    """Cases that differ in one field alone: a line a value of it, a column a contender."""
    families: dict[str, dict[int, dict[str, Record]]] = {}
    for record in run.records:
        value = record.fields.get(field)
        if record.op == _OP and isinstance(value, int):
            of_all = json.dumps({n: v for n, v in record.fields.items() if n != field}, sort_keys=True)
            families.setdefault(of_all, {}).setdefault(value, {})[record.backend] = record
    swept = [family for family in families.values() if len(family) > 1]
    backends = list(dict.fromkeys(name for family in swept for by in family.values() for name in by))
    lines = [line for family in swept for line in _family(family, backends)]
    return Table(title, (field.replace("_", " "), "", *backends), lines, text_columns=2) if lines else None


def _family(family: Mapping[int, Mapping[str, Record]], backends: Sequence[str]) -> Sequence[tuple[str, ...]]:
    bases: dict[str, Record] = {}
    lines = []
    for value in sorted(family):
        cells = []
        for backend in backends:
            record = family[value].get(backend)
            if record is None:
                cells.append("")
            elif not record.ok or record.us is None:
                cells.append(_broken(record))
            else:
                base = bases.setdefault(backend, record)
                cells.append(f"{record.us:.1f} ({_ratio(record, base):.2f})")
        lines.append((str(value), next(iter(family[value].values())).case, *cells))
    return lines
