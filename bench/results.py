"""Recorded runs: their format, where they lie, and what a run must be to be recorded.

    bench/results/DEVICE/SUITE.json
    {"header": {device, commit, date, torch, triton, cuda, command, read_tb_s},
     "records": [{op, case, backend, us, bytes, error, ok, ...fields of the problem}]}

us: median microseconds, null when the result was wrong and nothing was timed. bytes: algorithmic bytes.
error: the largest error against float64 as a multiple of what is tolerated (1 is the limit), null when
nothing came out. ok: whether the result was right. read_tb_s: the read-only bandwidth of the device in the
same run, TB/s. note: only where there is one: why a result was wrong or did not come, or what a peer's figure
was taken with. plan_us: only where there is one: microseconds of what is done once a step for all layers
(sharing attention out); us is without it. measured: only where there are some: further figures of the run by
name (percentiles, memory, a breakdown); like us they are results, and no part of the problem.
"""

from __future__ import annotations

import datetime
import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch

from qsun_bench.cases import Json

RESULTS = Path("bench") / "results"
_HEADER_TYPES: Mapping[str, tuple[type, ...]] = {
    "device": (str,),
    "commit": (str,),
    "date": (str,),
    "torch": (str,),
    "triton": (str, type(None)),
    "cuda": (str, type(None)),
    "command": (str,),
    "read_tb_s": (float, int),
}
_RECORD_TYPES: Mapping[str, tuple[type, ...]] = {
    "op": (str,),
    "case": (str,),
    "backend": (str,),
    "us": (float, int, type(None)),
    "bytes": (int,),
    "error": (float, int, type(None)),
    "ok": (bool,),
}


class ResultsError(ValueError):
    """A results file that cannot be read, or a run that may not be recorded."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a run was made with; the fields of the file's header."""

    device: str
    commit: str
    date: str
    torch: str
    triton: str | None
    cuda: str | None
    command: str
    read_tb_s: float

    def line(self) -> str:
        """Everything on one line, for the top of a table."""
        versions = f"torch {self.torch}, triton {self.triton or 'none'}, CUDA {self.cuda or 'none'}"
        read = f"reads at {self.read_tb_s:.3g} TB/s"
        return f"{self.device}, {read}; {versions}; commit {self.commit}; {self.date}; `{self.command}`"


@dataclass(frozen=True, slots=True)
class Record:
    """One contender on one case; `fields` are the problem's. note, plan_us, measured: see the module."""

    op: str
    case: str
    backend: str
    us: float | None
    bytes: int
    error: float | None
    ok: bool
    fields: Mapping[str, Json] = field(default_factory=dict)
    note: str = ""
    plan_us: float | None = None
    measured: Mapping[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether nothing came out that could be judged, as opposed to something wrong."""
        return not self.ok and self.error is None

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for records of the same contender on the same problem, in whatever file."""
        return (self.op, self.case, self.backend, json.dumps(dict(self.fields), sort_keys=True))

    @property
    def gb_s(self) -> float | None:
        """Algorithmic bytes over time, GB/s."""
        return None if self.us is None else self.bytes / self.us * 1e-3


@dataclass(frozen=True, slots=True)
class Run:
    """A header and its records: the content of one results file."""

    header: Header
    records: tuple[Record, ...]

    def to_json(self) -> str:
        """The file's text: the header, then one record a line, so that a diff shows what changed."""
        rows = []
        for record in self.records:
            row = {name: getattr(record, name) for name in _RECORD_TYPES} | dict(record.fields)
            if record.plan_us is not None:
                row["plan_us"] = record.plan_us
            if record.measured:
                row["measured"] = dict(record.measured)
            if record.note:
                row["note"] = record.note
            rows.append("    " + json.dumps(row))
        header = json.dumps(asdict(self.header))
        body = ",\n".join(rows)
        return f'{{\n  "header": {header},\n  "records": [\n{body}\n  ]\n}}\n'


def parse(text: str, source: str) -> Run:
    """A run from the text of a results file; ResultsError naming `source` and what is wrong in it."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ResultsError(f"{source} is not JSON: {error}") from None
    if not isinstance(data, dict) or set(data) != {"header", "records"}:
        raise ResultsError(f"{source}: expected an object with the keys header and records")
    header = _checked(data["header"], _HEADER_TYPES, f"{source}: header", extra=False)
    if not isinstance(data["records"], list):
        raise ResultsError(f"{source}: records is {type(data['records']).__name__}, expected a list")
    records = []
    for i, row in enumerate(data["records"]):
        checked = _checked(row, _RECORD_TYPES, f"{source}: records[{i}]", extra=True)
        if checked["ok"] and not (isinstance(checked["us"], (int, float)) and checked["us"] > 0):
            raise ResultsError(f"{source}: records[{i}].us is {checked['us']!r}, expected a positive time")
        note = checked.pop("note", "")
        if not isinstance(note, str):
            raise ResultsError(f"{source}: records[{i}].note is {note!r}, expected str")
        plan_us = checked.pop("plan_us", None)
        if plan_us is not None and not (isinstance(plan_us, (int, float)) and plan_us > 0):
            raise ResultsError(f"{source}: records[{i}].plan_us is {plan_us!r}, expected a positive time")
        measured = checked.pop("measured", {})
        if not isinstance(measured, dict):
            raise ResultsError(f"{source}: records[{i}].measured is {measured!r}, expected an object")
        fields = {name: value for name, value in checked.items() if name not in _RECORD_TYPES}
        known = {name: checked[name] for name in _RECORD_TYPES}
        records.append(Record(**known, fields=fields, note=note, plan_us=plan_us, measured=measured))
    return Run(Header(**header), tuple(records))


def _checked(
    value: object, types: Mapping[str, tuple[type, ...]], where: str, *, extra: bool
) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ResultsError(f"{where} is {type(value).__name__}, expected an object")
    for name, allowed in types.items():
        if name not in value:
            raise ResultsError(f"{where} has no {name}")
        got = value[name]
        # bool is an int in Python; a time of `true` is not a time.
        if not isinstance(got, allowed) or (isinstance(got, bool) and bool not in allowed):
            expected = " or ".join("null" if t is type(None) else t.__name__ for t in allowed)
            raise ResultsError(f"{where}.{name} is {got!r}, expected {expected}")
    unknown = set(value) - set(types)
    if unknown and not extra:
        raise ResultsError(f"{where} has the unknown keys {sorted(unknown)}")
    return cast(dict[str, Any], value)


def git(*arguments: str, cwd: Path | None = None) -> str | None:
    """The output of a git command, None when it fails or there is no git."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=cwd, check=False)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def load(name: str) -> Run:
    """A run from PATH, or from REVISION:PATH as git names a file of a revision.

    Raises ResultsError when there is no such file or it does not hold a run.
    """
    path = Path(name)
    if path.is_file():
        return parse(path.read_text(), name)
    if ":" in name:
        revision, _, inside = name.partition(":")
        text = git("show", f"{revision}:{inside}")
        if text is None:
            raise ResultsError(f"{name}: git shows no file {inside!r} at revision {revision!r}")
        return parse(text, name)
    raise ResultsError(f"{name}: no such file, expected PATH or REVISION:PATH of a results file")


def device_text(device: torch.device) -> str:
    """What the run was made on, with the number of threads where that decides the figure."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({_cpu_model()}, {torch.get_num_threads()} threads)"


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else "unknown model"


def device_folder(device: torch.device) -> str:
    """DEVICE of the results path: cpu, h100, h200, a100, ... : the model, without its memory and maker."""
    if device.type != "cuda":
        return "cpu"
    words = re.findall(r"[a-z0-9]+", torch.cuda.get_device_name(device).lower())
    return next((w for w in words if re.fullmatch(r"[a-z]+\d+[a-z]*", w)), "-".join(words))


def header(device: torch.device, command: str, read_bytes_s: float, commit: str | None) -> Header:
    """The header of a run made now. commit: None means the checkout's, `-dirty` when it was changed."""
    try:
        triton: str | None = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    return Header(
        device=device_text(device),
        commit=commit or current_commit(),
        date=datetime.date.today().isoformat(),
        torch=torch.__version__,
        triton=triton,
        cuda=torch.version.cuda if device.type == "cuda" else None,
        command=command,
        read_tb_s=round(read_bytes_s * 1e-12, 4),
    )


def current_commit() -> str:
    """The short commit of the checkout around the working directory, `unknown` outside one."""
    commit = git("rev-parse", "--short=12", "HEAD")
    if commit is None:
        return "unknown"
    return commit.strip() + ("-dirty" if changed_files() else "")


def changed_files() -> Sequence[str]:
    """Files of the checkout that differ from its commit, results themselves aside: they name their commit."""
    listed = git("status", "--porcelain", "--", ":/", f":(top,exclude){RESULTS.as_posix()}")
    return [line[3:] for line in (listed or "").splitlines()]


def recordable_commit(stated: str | None) -> tuple[Path, str]:
    """(root of the sources, commit) of a run that may be recorded.

    stated: a commit given by the caller, for a copy of the sources that carries no git.
    Raises ResultsError when the checkout differs from its commit, or when there is neither a checkout nor a
    stated commit: a figure whose code cannot be found again is worth nothing.
    """
    top = git("rev-parse", "--show-toplevel")
    if top is not None:
        if stated is not None:
            raise ResultsError("commit is stated, expected it only where there is no git checkout to ask")
        changed = changed_files()
        if changed:
            raise ResultsError(
                f"the checkout differs from its commit in {len(changed)} files ({', '.join(changed[:3])}"
                f"{', ...' if len(changed) > 3 else ''}), expected a clean one: commit first"
            )
        return Path(top.strip()), current_commit()
    if stated is None:
        raise ResultsError(
            "this is no git checkout, expected one, or the commit of these sources by --commit"
        )
    if not re.fullmatch(r"[0-9a-f]{7,40}", stated):
        raise ResultsError(f"commit is {stated!r}, expected 7 to 40 hexadecimal digits")
    if not RESULTS.is_dir():
        raise ResultsError(
            f"there is no {RESULTS} here, expected the root of the sources as working directory"
        )
    return Path.cwd(), stated[:12]


def write(run: Run, path: Path) -> None:
    """Write a run where `path` says, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(run.to_json())
