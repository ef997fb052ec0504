"""What `qsun-bench tune` does, by operator and backend."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from qsun_bench import option_types
from qsun_bench.commands import EXIT_OK, EXIT_WRONG, UsageError
from qsun_kernels.errors import BackendUnavailable

_MOST_SAID = 8


class _Refusal(Protocol):
    """What was not taken, for people. wrong: it ran, and its result was wrong."""

    @property
    def wrong(self) -> bool: ...


def add_tune(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The command's options."""
    tune = subparsers.add_parser("tune", help="find the fastest configurations of a kernel on this GPU")
    tuned = tune.add_subparsers(dest="operator", required=True, metavar="OPERATOR")
    matmul = tuned.add_parser(
        "wna16", help="how the low-bit matmul is cut, at seven matrices and many numbers of tokens"
    )
    matmul.set_defaults(run=tune_wna16)
    matmul.add_argument(
        "--backend",
        choices=("triton", "cuda"),
        default="triton",
        help="triton: the tiles of that kernel; cuda: the sweeps of csrc/wna16 and their table (triton)",
    )
    matmul.add_argument(
        "--budget",
        type=option_types.limit,
        default=400.0,
        metavar="SECONDS",
        help="try nothing further after that (400)",
    )
    matmul.add_argument("--quick", action="store_true", help="the smallest matrix alone")
    cuda = matmul.add_argument_group("with --backend cuda")
    cuda.add_argument(
        "--kernel",
        type=option_types.names,
        metavar="NAMES",
        help="of stream, gemm_sm90 and tiles_sm80, comma-separated (the first two: tiles_sm80 is for GPUs "
        "before sm_90, and timed as if this were one)",
    )
    cuda.add_argument(
        "--shape",
        "--shapes",
        type=option_types.shape_names,
        metavar="NAMES",
        help="models, sets or MODEL.MATRIX, comma-separated (decode7)",
    )
    cuda.add_argument(
        "--m", type=option_types.integers, default=(), help="only these numbers of tokens, comma-separated"
    )
    cuda.add_argument(
        "--bits", type=option_types.bits, default=(), help="of the weights: 2, 3, 4, 8, comma-separated (4)"
    )
    cuda.add_argument(
        "--chain",
        action="store_true",
        help="instead: the products of a decoder layer in the decode step, from what the sweeps hold",
    )
    where = matmul.add_mutually_exclusive_group()
    where.add_argument(
        "--out", type=Path, default=Path(), metavar="DIR", help="write the tables there (here)"
    )
    where.add_argument("--write", action="store_true", help="write over the tables in use")


def tune_wna16(arguments: argparse.Namespace) -> int:
    """Tune the low-bit matmul of one backend on this GPU and write its tables."""
    if arguments.backend == "cuda":
        return _tune_chain(arguments) if arguments.chain else _tune_cuda(arguments)
    for option in ("kernel", "shape", "m", "bits", "chain"):
        if getattr(arguments, option):
            raise UsageError(f"--{option}: expected only with --backend cuda")
    return _tune_triton(arguments)


def _tune_triton(arguments: argparse.Namespace) -> int:
    """Tune the Triton matmul on this GPU and write its table."""
    from qsun_bench import tune

    path = tune.SOURCE if arguments.write else arguments.out / tune.FILE_NAME
    if not arguments.write and path.resolve() == tune.SOURCE.resolve():
        raise UsageError(f"--out: {path} is the table in use, expected another folder, or --write")
    reason = tune.why_not()
    if reason is not None:
        raise BackendUnavailable("wna16_linear", "triton", reason)
    path.parent.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda", torch.cuda.current_device())
    searches = []
    for search in tune.tune(device, arguments.budget, quick=arguments.quick, keep=path.write_text):
        searches.append(search)
        print(f"{search.matrix}: {len(search.rows)} rows", file=sys.stderr)
        _say(search.refusals)
        for tokens in search.unsolved:
            print(f"WRONG: {search.matrix} M={tokens}: no configuration is right", file=sys.stderr)
    if not any(search.rows for search in searches):
        print("nothing was measured, nothing is written", file=sys.stderr)
        return EXIT_WRONG
    tune.show(searches)
    print(f"written to {path}")
    wrong = any(search.unsolved or any(r.wrong for r in search.refusals) for search in searches)
    return EXIT_WRONG if wrong else EXIT_OK


def _cuda_folder(arguments: argparse.Namespace) -> Path:
    """Where the sweeps go. Raises UsageError, or BackendUnavailable where nothing can be timed."""
    from qsun_bench import panel_ways, tune_panels_device

    panel_ways.table()
    folder: Path = panel_ways.SOURCE if arguments.write else arguments.out
    if not arguments.write and folder.resolve() == panel_ways.SOURCE:
        raise UsageError(f"--out: {folder} holds the tables in use, expected another folder, or --write")
    if (reason := tune_panels_device.why_not()) is not None:
        raise BackendUnavailable("wna16_linear", "cuda", reason)
    return folder


def _tune_cuda(arguments: argparse.Namespace) -> int:
    from qsun_bench import panel_ways, tune_panels, tune_panels_device

    kernels = arguments.kernel or panel_ways.SM90_KERNELS
    widths = arguments.bits or (panel_ways.table().MAIN_BITS,)
    for name in kernels:
        if name not in panel_ways.KERNELS:
            raise UsageError(f"--kernel: got {name!r}, expected some of {', '.join(panel_ways.KERNELS)}")
        if not set(widths) <= set(panel_ways.BITS[name]):
            raise UsageError(f"--bits: got {widths}, expected with {name} some of {panel_ways.BITS[name]}")
    shapes = arguments.shape or (("llama-3.1-8b.o",) if arguments.quick else ("decode7",))
    todo = tune_panels.plan(kernels, shapes, arguments.m, widths)
    if not todo:
        expected = ", ".join(f"{panel_ways.TOKENS[name]} for {name}" for name in kernels)
        raise UsageError(f"--m: got {', '.join(map(str, arguments.m))}, expected some of {expected}")
    folder = _cuda_folder(arguments)
    device = torch.device("cuda", torch.cuda.current_device())
    end = time.monotonic() + arguments.budget
    found: list[tune_panels.Found] = []
    written: Sequence[Path] = ()
    for one in tune_panels.tune(
        todo,
        tune_panels_device.machine(device),
        lambda cell, tokens: tune_panels_device.RowTrials(cell, tokens, device),
        lambda: time.monotonic() > end,
        folder if (folder / "gemm_sm90_sweep.txt").exists() else panel_ways.SOURCE,
    ):
        found.append(one)
        _say(one.refusals)
        if one.ways:
            written = tune_panels.write(folder, [one], tune_panels_device.where(device))
    tune_panels.show(found)
    if len(found) < len(todo):
        print(f"not measured: {len(todo) - len(found)} of {len(todo)} cells (--budget)", file=sys.stderr)
    if not written:
        print("nothing was measured, nothing is written", file=sys.stderr)
        return EXIT_WRONG
    print("written: " + ", ".join(map(str, written)))
    wrong = any(not one.ways or any(refusal.wrong for refusal in one.refusals) for one in found)
    return EXIT_WRONG if wrong else EXIT_OK


def _say(refusals: Sequence[_Refusal]) -> None:
    for refusal in sorted(refusals, key=lambda refusal: not refusal.wrong)[:_MOST_SAID]:
        print(refusal, file=sys.stderr)
    if len(refusals) > _MOST_SAID:
        print(f"and {len(refusals) - _MOST_SAID} more, WRONG first", file=sys.stderr)


def _tune_chain(arguments: argparse.Namespace) -> int:
    from qsun_bench import panel_ways, tune_chain, tune_layer_device, tune_panels, tune_panels_device

    for option in ("kernel", "shape", "bits"):
        if getattr(arguments, option):
            raise UsageError(f"--{option}: expected without --chain")
    tokens = arguments.m or (tune_chain.TOKENS[:1] if arguments.quick else tune_chain.TOKENS)
    if not set(tokens) <= set(tune_chain.TOKENS):
        raise UsageError(f"--m: got {tokens}, expected with --chain some of {tune_chain.TOKENS}")
    folder = _cuda_folder(arguments)
    device = torch.device("cuda", torch.cuda.current_device())
    source = folder if (folder / "gemm_sm90_sweep.txt").exists() else panel_ways.SOURCE
    texts = {kernel: (source / f"{kernel}_sweep.txt").read_text() for kernel in panel_ways.SM90_KERNELS}
    lines = tune_chain.sweep_lines(texts)
    end = time.monotonic() + arguments.budget
    trials = tune_layer_device.LayerTrials(device)
    machine, where = tune_panels_device.machine(device), tune_panels_device.where(device)
    path = folder / panel_ways.table().CHAIN
    folder.mkdir(parents=True, exist_ok=True)
    found, written = [], [path]
    for M in tokens:
        if time.monotonic() > end:
            print(f"not measured: M = {M} and what follows (--budget)", file=sys.stderr)
            break

        def around(product: str, launch: tune_chain.Launch, M: int = M) -> Sequence[tune_chain.Launch]:
            listed = panel_ways.candidates(launch[0], tune_chain.cell(product, M), machine)
            return tune_chain.near(launch, listed)

        start, tried = tune_chain.start(M, source), tune_chain.candidates(M, lines)
        one = tune_chain.descend(M, start, tried, trials, around, tune_chain.other_starts(M, source))
        found.append(one)
        for refusal in one.refusals:
            print(refusal, file=sys.stderr)
        old = path.read_text() if path.exists() else ""
        path.write_text(tune_chain.text([one], where, old))
        written = [path, *tune_panels.write(folder, [], where)]
    tune_chain.show(found)
    print("written: " + ", ".join(map(str, written)))
    return EXIT_OK
