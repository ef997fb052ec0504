"""What arrives at a server, and when: drawn from a seed, or read from a trace.

Arrivals are a Poisson process; models follow Zipf's law; lengths are lognormal through a median and a 95th
percentile, clipped. The defaults are those of the Azure 2023 conversation trace: prompts of 1020 and 4083
tokens, answers of 129 and 451. A lognormal has two parameters, so its mean is not the trace's: 1440 for 1155,
and 172 for 211. Records carry what was drawn.
"""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qsun_bench.popularity import zipf_shares
from qsun_bench.prefill_models import model_names
from qsun_bench.results import ResultsError

TRACE_FIELDS = ("arrival_s", "model", "prompt_tokens", "output_tokens")

# The standard normal distribution's 95th percentile.
_Z95 = 1.6448536269514722


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request: when it comes, in seconds from the start, for whom, and how long it is."""

    at_s: float
    model: str
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Lengths:
    """A lognormal distribution of tokens by its median and 95th percentile, clipped to [least, most]."""

    median: int
    p95: int
    least: int
    most: int

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.median <= self.p95 <= self.most:
            raise ValueError(
                f"lengths have median {self.median} and p95 {self.p95} between {self.least} and {self.most},"
                " expected 1 <= least <= median <= p95 <= most"
            )

    def draw(self, source: random.Random) -> int:
        """One length."""
        sigma = math.log(self.p95 / self.median) / _Z95
        tokens = round(self.median * math.exp(sigma * source.gauss(0.0, 1.0)))
        return min(max(tokens, self.least), self.most)


PROMPTS = Lengths(1020, 4083, 8, 8192)
OUTPUTS = Lengths(129, 451, 2, 1024)


def poisson(
    rate: float,
    duration_s: float,
    *,
    models: int,
    zipf: float,
    prompts: Lengths = PROMPTS,
    outputs: Lengths = OUTPUTS,
    seed: int = 0,
) -> Sequence[Arrival]:
    """Requests of `duration_s` seconds at `rate` a second; never none: the first is made to come.

    The n-th request is for the same model and of the same length at every rate: only times differ, so a curve
    over rates is one load made denser.
    """
    if not 0 < rate < math.inf:
        raise ValueError(f"rate is {rate}, expected requests a second above 0")
    if not 0 < duration_s < math.inf:
        raise ValueError(f"duration_s is {duration_s}, expected seconds above 0")
    clock, what = random.Random(f"times {seed}"), random.Random(f"requests {seed}")
    names, shares = model_names(models), zipf_shares(models, zipf)
    found = []
    # The gap before the first request is idle time that no server could use.
    at = 0.0
    while at < duration_s:
        (model,) = what.choices(names, shares)
        found.append(Arrival(at, model, prompts.draw(what), outputs.draw(what)))
        at += clock.expovariate(rate)
    return found


def read_trace(path: Path) -> Sequence[Arrival]:
    """Arrivals of a CSV file with a header or a JSONL file, with the fields TRACE_FIELDS, in order of time.

    Raises ResultsError naming the file, the line, and what is wrong in it.
    """
    found = []
    for line, row in _rows(path):
        where = f"{path}:{line}"
        missing = [name for name in TRACE_FIELDS if row.get(name) in (None, "")]
        if missing:
            raise ResultsError(f"{where} has no {', '.join(missing)}, expected {', '.join(TRACE_FIELDS)}")
        at = _number(row["arrival_s"], f"{where}: arrival_s", "seconds of at least 0")
        prompt, output = (
            _number(row[name], f"{where}: {name}", "a whole number of at least 1")
            for name in ("prompt_tokens", "output_tokens")
        )
        for name, value in (("prompt_tokens", prompt), ("output_tokens", output)):
            if value < 1 or value != int(value):
                raise ResultsError(f"{where}: {name} is {value:g}, expected a whole number of at least 1")
        found.append(Arrival(at, str(row["model"]), int(prompt), int(output)))
    if not found:
        raise ResultsError(f"{path} has no request, expected at least one")
    return sorted(found, key=lambda arrival: arrival.at_s)


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    text = path.read_text()
    if path.suffix == ".csv":
        reader = csv.DictReader(text.splitlines())
        for row in reader:
            yield reader.line_num, row
        return
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ResultsError(f"{path}:{number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ResultsError(f"{path}:{number} is {type(row).__name__}, expected an object")
        yield number, row


def _number(value: Any, where: str, expected: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise ResultsError(f"{where} is {value!r}, expected {expected}")
    return number
