"""`qsun-bench tune wna16 --backend cuda --chain`: the best ways of a layer's products in the decode step.

What runs before a launch decides how much of its weight can be read early: a ring of stages in shared memory
fits beside the running kernel only where that one leaves room. So the products of a decoder layer are timed
where they run, in layers with attention, the write to the cache and the norms. One product at a time takes
each of its candidates while the others stay, then what is near the fastest of them; the fastest stays, until
a round changes nothing. What is found is timed against the start once more, in turn, so that a list of lucky
timings does not win.
"""

from __future__ import annotations

import re
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from qsun_bench import panel_ways, tables
from qsun_bench.panel_ways import SM90_KERNELS, Cell, Kernel, Way
from qsun_bench.shapes import SHAPES

MODEL = "llama-3.1-8b"
PRODUCTS = ("qkv", "o", "gate_up", "down")
"""Of a layer, in the order in which they run."""

TOKENS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)

CONTEXT = 1024
"""Tokens that each row of the step attends to."""

_ROUNDS, _PASSES = 3, 3
_GAIN = 0.003
"""Of the chain's time that a change must bring: less is within the noise of a timing."""

_LEAST_US = 0.01
"""What a time is rounded to in the table of choices."""

Launch = tuple[Kernel, Way]
Chain = Mapping[str, Launch]
"""Of each product: by which kernel, and how. A product that is absent is left out of the chain."""


class ChainTrials(Protocol):
    """The products of several layers, whose weights overflow the cache, on a device."""

    def time(self, M: int, chain: Chain) -> float:
        """Microseconds a layer in which of the products those in `chain` run."""


@dataclass(frozen=True, slots=True)
class ChainFound:
    """What was found for a number of tokens.

    before, after: microseconds of a layer with the launches of the table and with the best ones found.
    best: of each product and kernel the best way, and what the product adds to the chain with it, us.
    refusals: what could not be launched, in words.
    """

    M: int
    before: float
    after: float
    chain: Chain
    best: Mapping[tuple[str, Kernel], tuple[Way, float]]
    refusals: Sequence[str]


def cell(product: str, M: int) -> Cell:
    """The weight of a product of the layer."""
    N, K = SHAPES[MODEL].linears[product]
    return Cell(K, N, M)


def candidates(M: int, lines: Mapping[tuple[Kernel, Cell], Sequence[Way]]) -> Mapping[str, Sequence[Launch]]:
    """Of each product the launches worth trying: those that the sweeps kept for M tokens, and of the same
    kernel those for the next fewer and the next more tokens.
    """
    found: dict[str, Sequence[Launch]] = {}
    for product in PRODUCTS:
        launches: dict[Launch, None] = {}
        for kernel in SM90_KERNELS:
            measured = sorted(
                one.M for by, one in lines if by == kernel and one.matrix == cell(product, M).matrix
            )
            if M not in measured:
                continue
            at = measured.index(M)
            for tokens in (M, *measured[max(at - 1, 0) : at], *measured[at + 1 : at + 2]):
                launches |= dict.fromkeys((kernel, way) for way in lines[kernel, cell(product, tokens)])
        found[product] = list(launches)
    return found


def start(M: int, folder: Path) -> Chain:
    """What the library launches by the table made from `folder`."""
    return {product: _faster(cell(product, M), folder) for product in PRODUCTS}


def other_starts(M: int, folder: Path) -> Sequence[Chain]:
    """Other places to begin at: what is launched for the next fewer and the next more tokens, and all
    products by one kernel, where it was measured: only the streaming one leaves norms to the next product.
    """
    at = TOKENS.index(M)
    found = [start(tokens, folder) for tokens in (*TOKENS[max(at - 1, 0) : at], *TOKENS[at + 1 : at + 2])]
    for kernel in SM90_KERNELS:
        measured = {product: _measured(kernel, cell(product, M), folder) for product in PRODUCTS}
        chain = {product: (kernel, one[0]) for product, one in measured.items() if one is not None}
        if len(chain) == len(PRODUCTS):
            found.append(chain)
    return found


def _faster(place: Cell, folder: Path) -> Launch:
    found: list[tuple[float, Launch]] = []
    for kernel in SM90_KERNELS:
        if (measured := _measured(kernel, place, folder)) is not None:
            way, us = measured
            found.append((us, (kernel, way)))
    return min(found, key=lambda one: one[0])[1]


def _measured(kernel: Kernel, place: Cell, folder: Path) -> tuple[Way, float] | None:
    """The table's entry of a matrix for the next number of tokens."""
    entries: Mapping[tuple[tuple[int, int], int], tuple[Way, float]]
    entries = panel_ways.table().chosen(kernel, folder)
    least = min((M for matrix, M in entries if matrix == place.matrix and M >= place.M), default=None)
    return None if least is None else entries[place.matrix, least]


def sweep_lines(texts: Mapping[Kernel, str]) -> Mapping[tuple[Kernel, Cell], Sequence[Way]]:
    """The ways that sweeps hold, by kernel and cell, in their order."""
    found: dict[tuple[Kernel, Cell], list[Way]] = {}
    for kernel, text in texts.items():
        for line in text.splitlines():
            if not line.startswith("#"):
                *sizes, _ = line.split()
                K, N, M, *way = map(int, sizes)
                found.setdefault((kernel, Cell(K, N, M)), []).append(tuple(way))
    return found


def near(launch: Launch, listed: Sequence[Way]) -> Sequence[Launch]:
    """Of the ways listed for its kernel those that differ in at most one number, the stages not counted."""
    kernel, way = launch
    counted = [i for i, name in enumerate(panel_ways.fields(kernel)) if name != "stages"]
    return [(kernel, other) for other in listed if sum(other[i] != way[i] for i in counted) <= 1]


def descend(
    M: int,
    start: Chain,
    tried: Mapping[str, Sequence[Launch]],
    trials: ChainTrials,
    around: Callable[[str, Launch], Sequence[Launch]] = lambda product, launch: (),
    others: Sequence[Chain] = (),
) -> ChainFound:
    """Coordinate descent over the candidates of each product and what is `around` its best.

    It begins at `start`, which is what is launched so far, or at one of `others` that is faster: where no
    product's launch can change alone, four may together.
    """
    refusals: dict[str, None] = {}

    def time(chain: Chain, product: str | None = None) -> float | None:
        # What the library refuses comes as any exception; it is said and left out.
        try:
            return trials.time(M, chain)
        except Exception as error:
            what = f"M={M}, another place to begin at"
            if product is not None:
                what = f"{product} M={M} {panel_ways.in_words(*chain[product])}"
            said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            refusals[f"refused: {what}: {said}"] = None
            return None

    def timed(chain: Chain, product: str) -> dict[Launch, float]:
        """The times of what is worth trying for a product while the others stay."""
        found = {chain[product]: trials.time(M, chain)}
        waiting, best = list(tried[product]), None
        while waiting:
            for launch in waiting:
                if launch not in found and (us := time({**chain, product: launch}, product)) is not None:
                    found[launch] = us
            last, best = best, min(found, key=found.__getitem__)
            waiting = (
                [] if best == last else [launch for launch in around(product, best) if launch not in found]
            )
        return found

    chain, fastest = dict(start), trials.time(M, start)
    for other in others:
        us = time(other)
        if us is not None and us < fastest * (1 - _GAIN):
            chain, fastest = dict(other), us
    times: dict[str, dict[Launch, float]] = {}
    for _ in range(_ROUNDS):
        changed = False
        for product in PRODUCTS:
            found = times[product] = timed(chain, product)
            best = min(found, key=found.__getitem__)
            if found[best] < found[chain[product]] * (1 - _GAIN):
                chain[product], changed = best, True
        if not changed:
            break
    passes = [(trials.time(M, start), trials.time(M, chain)) for _ in range(_PASSES)]
    before, now = (statistics.median(each) for each in zip(*passes, strict=True))
    if now >= before:
        chain, now = dict(start), before
    adds: dict[tuple[str, Kernel], tuple[Way, float]] = {}
    for product in PRODUCTS:
        without = trials.time(M, {name: launch for name, launch in chain.items() if name != product})
        taken, way = chain[product]
        us = max(_LEAST_US, now - without)
        adds[product, taken] = way, us
        for kernel in SM90_KERNELS:
            own = {way: us for (by, way), us in times[product].items() if by == kernel}
            if own and kernel != taken:
                # Slower than the chain's own choice, whatever the noise says: the table takes the faster.
                way = min(own, key=own.__getitem__)
                adds[product, kernel] = way, max(own[way] - without, us + _LEAST_US)
    return ChainFound(M, before, now, chain, adds, list(refusals))


def text(found: Sequence[ChainFound], where: str, old: str = "") -> str:
    """The file that the table of choices reads. where: device and date. old: the file before, whose lines of
    other numbers of tokens stay.
    """
    about = (
        f"The products of a {MODEL} layer ({', '.join(PRODUCTS)}) timed in the decode step: kernel K N M way "
        f"us. us: what the product adds to a layer, with attention to {CONTEXT} tokens a row. Of each kernel "
        "the way that was best while the other products had theirs. W4, bfloat16, groups of 128, symmetric; "
        "CUDA-graph replays with programmatic dependent launch over layers that overflow the L2 three times, "
        "random data."
    )
    lines = textwrap.wrap(about, 110, initial_indent="# ", subsequent_indent="# ")
    measured = {one.M for one in found}
    M = 0
    for line in old.splitlines():
        if not line.startswith("#"):
            M = int(line.split()[3])
        elif (heading := re.match(r"# M = (\d+):", line)) is not None:
            M = int(heading[1])
        else:
            continue
        if M not in measured:
            lines.append(line)
    for one in found:
        lines.append(
            f"# M = {one.M}: {one.before:.2f} us a layer by the table before, {one.after:.2f} now. {where}."
        )
        for (product, kernel), (way, us) in one.best.items():
            place = cell(product, one.M)
            lines.append(" ".join(map(str, (kernel, place.K, place.N, place.M, *way))) + f" {us:.3f}")
    return "\n".join([*lines, ""])


def show(found: Sequence[ChainFound]) -> None:
    """Print what a layer costs, and which launches it takes."""
    rows = []
    for one in found:
        for i, product in enumerate(PRODUCTS):
            kernel, way = one.chain[product]
            first = (str(one.M), f"{one.before:.2f}", f"{one.after:.2f}") if i == 0 else ("", "", "")
            adds = one.best[product, kernel][1]
            rows.append((*first, product, f"{adds:.2f}", panel_ways.in_words(kernel, way)))
    columns = ("M", "us before", "us now", "product", "adds", "launch")
    tables.show(f"a {MODEL} layer in the decode step", columns, rows, text_columns=0)
