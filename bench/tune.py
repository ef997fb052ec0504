"""`qsun-bench tune wna16`: find the fastest right way to cut the Triton matmul's tiles, and write its table.

For each weight and number of tokens every candidate is checked, what is right is timed briefly, the fastest
few are timed as the suites time, and the first of those, by time, that also withstands stress is taken.
What there was no time for keeps its row of the table before.
"""

from __future__ import annotations

import math
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from qsun_bench import tables
from qsun_bench.cases.wna16 import DECODE_M
from qsun_bench.shapes import matrices
from qsun_bench.tune_candidates import candidates
from qsun_kernels.backends import triton as backend
from qsun_kernels.backends.triton import wna16_configs, wna16_tuned
from qsun_kernels.backends.triton.wna16_configs import TilesConfig

FILE_NAME = "wna16_tuned.py"
SOURCE = Path(wna16_tuned.__file__)

FINALISTS = 4
_NEIGHBOURS = 7
_INHERITING = (2, 4)
"""Numbers of tokens whose candidates are the fastest for 1 and for 8: nothing new is fastest between them."""

_OTHER_M = (1, 8, 16, 32, 64)
_OTHER_MATRICES = ("llama-3.1-8b.qkv", "llama-3.1-8b.gate_up")

Key = tuple[int, int, int, int]
"""bits, N, K, tokens."""

_HEADER = '''"""The fastest ways found to cut wna16_linear's tiles: written by measurement, not by hand.

{how}
"""

from __future__ import annotations

TUNED: tuple[tuple[int, int, int, int, tuple[int, int, int, int, int, int, int, int, int], float], ...] = (
    # bits, N, K, tokens, the fields of TilesConfig in order, microseconds
'''


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight (N, K) with codes of so many bits, and the numbers of tokens to tune it for."""

    bits: int
    N: int
    K: int
    tokens: tuple[int, ...]

    def __str__(self) -> str:
        return f"W{self.bits} {self.N}x{self.K}"


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the table: the configuration for a weight and a number of tokens, and its microseconds."""

    bits: int
    N: int
    K: int
    tokens: int
    config: TilesConfig
    us: float

    @property
    def key(self) -> Key:
        return self.bits, self.N, self.K, self.tokens


@dataclass(frozen=True, slots=True)
class Refusal:
    """A configuration that was not taken. wrong: it ran, and its result was wrong or did not repeat."""

    matrix: Matrix
    tokens: int
    config: TilesConfig
    reason: str
    wrong: bool

    def __str__(self) -> str:
        kind = "WRONG" if self.wrong else "refused"
        return f"{kind}: {self.matrix} M={self.tokens} {self.config}: {self.reason}"


class Trials(Protocol):
    """One matrix on a device. `check` and `stress` return None, or what is wrong with the result."""

    def check(self, tokens: int, config: TilesConfig) -> str | None:
        """One call with each of two copies of the weight, against float32 and against each other."""

    def stress(self, tokens: int, config: TilesConfig) -> str | None:
        """Calls with two weights in turn, in a graph, on a busy device."""

    def glance(self, tokens: int, config: TilesConfig) -> float:
        """Microseconds a call, quickly: to tell what need not be timed well."""

    def time(self, tokens: int, config: TilesConfig) -> float:
        """Microseconds a call, as the suites time."""


@dataclass(slots=True)
class Search:
    """What one matrix was found to need, as it is found: rows, refusals, and times by number of tokens."""

    matrix: Matrix
    rows: list[Row] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    times: dict[int, Mapping[TilesConfig, float]] = field(default_factory=dict)

    @property
    def unsolved(self) -> Sequence[int]:
        """The numbers of tokens for which nothing tried was right."""
        return sorted(self.times.keys() - {row.tokens for row in self.rows})

    def run(self, trials: Trials, processors: int, is_over: Callable[[], bool]) -> None:
        """Every number of tokens, until the time is over: what was begun then is left out, not half done."""
        for tokens in sorted(self.matrix.tokens, key=lambda M: (M in _INHERITING, M)):
            times: dict[TilesConfig, float] = {}
            for config in self._listed(tokens, processors):
                if is_over():
                    return
                us = self._attempt(tokens, config, trials.check, trials.glance)
                if us is not None:
                    times[config] = us
            self.times[tokens] = times
            fastest = self._fastest(tokens, trials)
            if fastest is not None:
                self.rows.append(fastest)

    def _listed(self, tokens: int, processors: int) -> Sequence[TilesConfig]:
        if tokens in _INHERITING and {1, 8} <= self.times.keys():
            near = [
                c for M in (1, 8) for c in sorted(self.times[M], key=self.times[M].__getitem__)[:_NEIGHBOURS]
            ]
            return [config for config in dict.fromkeys(near) if config.block_m == 8]
        return candidates(self.matrix.bits, tokens, self.matrix.N, self.matrix.K, processors)

    def _fastest(self, tokens: int, trials: Trials) -> Row | None:
        times = dict(self.times[tokens])
        # As a rule one round: another only when no finalist withstood.
        while times:
            final: dict[TilesConfig, float] = {}
            for config in sorted(times, key=times.__getitem__)[:FINALISTS]:
                del times[config]
                us = self._attempt(tokens, config, trials.stress, trials.time)
                if us is not None:
                    final[config] = us
            if final:
                config = min(final, key=final.__getitem__)
                m = self.matrix
                return Row(m.bits, m.N, m.K, tokens, config, final[config])
        return None

    def _attempt(
        self,
        tokens: int,
        config: TilesConfig,
        judge: Callable[[int, TilesConfig], str | None],
        clock: Callable[[int, TilesConfig], float],
    ) -> float | None:
        """The time of what is right; None, and a refusal, for anything else."""
        # What a compiler refuses (too much shared memory, too many registers) comes as any exception.
        try:
            wrong = judge(tokens, config)
            us = math.nan if wrong is not None else clock(tokens, config)
        except Exception as error:
            lines = str(error).strip().splitlines()
            said = f"{type(error).__name__}: {lines[0] if lines else ''}"
            self.refusals.append(Refusal(self.matrix, tokens, config, said, wrong=False))
            return None
        if wrong is not None:
            self.refusals.append(Refusal(self.matrix, tokens, config, wrong, wrong=True))
            return None
        return us


def plan(*, quick: bool) -> Sequence[Matrix]:
    """What is tuned, in the order of the table: W4 at seven matrices, then 2 and 8 bits at two of them.

    quick: the first matrix alone.
    """
    four = [_matrix(4, sizes.linears[name], DECODE_M) for sizes, name in matrices(["decode7"])]
    if quick:
        return four[:1]
    others = [
        _matrix(bits, sizes.linears[name], _OTHER_M)
        for bits in (2, 8)
        for sizes, name in matrices(_OTHER_MATRICES)
    ]
    return [*four, *others]


def _matrix(bits: int, sizes: tuple[int, int], tokens: tuple[int, ...]) -> Matrix:
    return Matrix(bits, *sizes, tokens)


def table_rows() -> Sequence[Row]:
    """The rows of the table in use."""
    measured = (us for *_, us in wna16_tuned.TUNED)
    return [Row(*row, us) for row, us in zip(wna16_configs.tuned(), measured, strict=True)]


def merged(new: Sequence[Row], old: Sequence[Row]) -> Sequence[Row]:
    """The new rows and those of the old whose place is still empty, in the order of the plan."""
    places = {(m.bits, m.N, m.K): i for i, m in enumerate(plan(quick=False))}
    rows = {row.key: row for row in (*old, *new)}
    return sorted(rows.values(), key=lambda row: (places.get(row.key[:3], len(places)), row.key))


def table_text(rows: Sequence[Row], how: str) -> str:
    """The text of the table's module. how: one sentence or more about the measurement, for its docstring."""
    lines = [_HEADER.format(how=textwrap.fill(how, 106))]
    for row in rows:
        fields = ", ".join(str(int(value)) for value in astuple(row.config))
        lines.append(f"    ({', '.join(map(str, row.key))}, ({fields}), {round(row.us, 2)}),\n")
    return "".join([*lines, ")\n"])


def why_not() -> str | None:
    """Why this machine cannot tune; None when it can."""
    if not torch.cuda.is_available():
        return f"no CUDA device is visible to torch {torch.__version__}, and tuning is timing on a GPU"
    if (reason := backend.unavailable()) is not None:
        return reason
    from qsun_kernels.backends.triton.launch import is_interpreted, refuse

    if is_interpreted():
        return "TRITON_INTERPRET is set, and the interpreter's times say nothing about the kernel's"
    return refuse(torch.device("cuda", torch.cuda.current_device()))


def tune(
    device: torch.device, budget: float, *, quick: bool, keep: Callable[[str], object]
) -> Iterator[Search]:
    """Tune on a CUDA device; each matrix as it is done.

    budget: seconds, compilation included, after which nothing further is tried.
    keep: gets the text of the whole table after each matrix that added to it.
    """
    from qsun_bench import tune_device
    from qsun_kernels.backends.triton.launch import multiprocessors

    begin = time.monotonic()
    processors = multiprocessors(device)
    todo = plan(quick=quick)
    tune_device.compile_ahead(
        [
            (matrix.bits, M, matrix.N, matrix.K, config)
            for matrix in todo
            for M in matrix.tokens
            for config in candidates(matrix.bits, M, matrix.N, matrix.K, processors)
        ],
        device,
        seconds=budget / 2,
    )
    old = table_rows()
    new: list[Row] = []
    # The largest say least that the others do not, and take longest.
    for matrix in sorted(todo, key=lambda m: m.N * m.K * m.bits):
        if time.monotonic() > begin + budget:
            return
        search = Search(matrix)
        try:
            trials = tune_device.DeviceTrials(matrix.bits, matrix.N, matrix.K, max(matrix.tokens), device)
        except torch.OutOfMemoryError:
            print(f"not tuned: {matrix}: the device has not enough memory", file=sys.stderr)
            continue
        search.run(trials, processors, lambda: time.monotonic() > begin + budget)
        del trials
        new += search.rows
        if search.rows:
            rows = merged(new, old)
            keep(
                table_text(rows, _how(tune_device.name(device), processors, len(rows) - len(new), len(rows)))
            )
        yield search
        if (lost := tune_device.why_lost(device)) is not None:
            print(f"not tuned further: {lost}", file=sys.stderr)
            return


def _how(device: str, processors: int, kept: int, rows: int) -> str:
    how = (
        f"Measured on one {device} ({processors} multiprocessors) with bfloat16 activations and symmetric "
        "groups of 128: replays of CUDA graphs over copies of the weight that overflow the L2 three times."
    )
    return f"{how} Not measured then: {kept} of the {rows} rows, kept from the table before." if kept else how


def show(searches: Sequence[Search]) -> None:
    """Print the microseconds by matrix and number of tokens, beside the table before."""
    before = {row.key: row for row in table_rows()}
    found = {row.key: row for search in searches for row in search.rows}
    lines = []
    for search in searches:
        m = search.matrix
        rows = [found.get((m.bits, m.N, m.K, M)) for M in DECODE_M]
        lines.append((str(m), *(_cell(row, before) for row in rows)))
    title = "us a call by M (*: another configuration than in the table before)"
    tables.show(title, ("matrix", *map(str, DECODE_M)), lines)
    ratios = [row.us / before[key].us for key, row in found.items() if key in before]
    if ratios:
        mean = statistics.geometric_mean(ratios)
        print(f"{len(ratios)} rows; geometric mean of their times over those of the table before: {mean:.3f}")


def _cell(row: Row | None, before: Mapping[Key, Row]) -> str:
    if row is None:
        return "-"
    old = before.get(row.key)
    return f"{row.us:.1f}{'' if old is not None and old.config == row.config else '*'}"
