"""What each command of `qsun-bench` does."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from qsun_bench import compare, report, results, tables
from qsun_bench.cases import Selection, Suite, suites
from qsun_bench.results import ResultsError, Run
from qsun_kernels.errors import BackendUnavailable
from qsun_kernels.testing.timing import read_bandwidth

if TYPE_CHECKING:
    from collections.abc import Callable

    from qsun_kernels.quant import Bits, GroupSize

EXIT_OK = 0
EXIT_WRONG = 1
EXIT_USAGE = 2
EXIT_INPUT = 3
EXIT_UNAVAILABLE = 4


class UsageError(ValueError):
    """Arguments that are right one by one and make no sense together."""


def _selection(arguments: argparse.Namespace) -> Selection:
    return Selection(
        device=arguments.device,
        shapes=arguments.shape,
        batches=arguments.batch,
        contexts=arguments.context,
        bits=arguments.bits,
        group_size=arguments.group_size,
        symmetric=not arguments.asymmetric,
        dtype=arguments.dtype,
        smoke=arguments.smoke,
    )


def list_cases(arguments: argparse.Namespace) -> int:
    """Every suite: who can run it here, and its cases."""
    from qsun_bench.contenders import contenders

    selection = _selection(arguments)
    for suite in suites().values():
        cases = suite.cases(selection)
        rows = []
        for contender in contenders(suite.op):
            reasons = [contender.available(case, selection.device) for case in cases]
            able = f"{reasons.count(None)} of {len(cases)} cases"
            refused = "; ".join(dict.fromkeys(reason for reason in reasons if reason))
            rows.append((contender.name, able + (f" ({refused})" if refused else "")))
        title = f"{suite.name}: {suite.summary}, on {selection.device}"
        tables.show(title, ("contender", "runs"), rows, text_columns=2)
        tables.show("", ("case", "bytes"), [(case.name, f"{case.bytes:,}") for case in cases])
        print()
    print("decode: time per output token of the whole decode step; see qsun-bench decode --help")
    return EXIT_OK


def run_suite(arguments: argparse.Namespace) -> int:
    """Check and time the cases of one operator."""
    from qsun_bench.contenders import Contender, contenders
    from qsun_bench.measure import measure

    suite: Suite = arguments.suite
    selection = _selection(arguments)
    recording = _recording(arguments)
    cases = suite.cases(selection)
    chosen: Sequence[Contender] = contenders(suite.op)
    if arguments.backend:
        known = {contender.name: contender for contender in chosen}
        named = arguments.backend.split(",")
        for name in named:
            if name not in known:
                raise UsageError(f"--backend: got {name!r}, expected some of {', '.join(known)}")
        chosen = [known[name] for name in named]
        for contender in chosen:
            reasons = [contender.available(case, selection.device) for case in cases]
            if all(reasons):
                raise BackendUnavailable(suite.op, contender.name, str(reasons[0]))
    header = _header(arguments, recording)
    outcomes = []
    with _progress(len(cases) * len(chosen)) as advance:
        for outcome in measure(cases, chosen, selection.device, seconds=arguments.seconds):
            outcomes.append(outcome)
            advance(f"{outcome.case.name} {outcome.contender}")
    order = {case.name: i for i, case in enumerate(cases)}
    records = sorted(
        (outcome.record for outcome in outcomes if outcome.record is not None),
        key=lambda record: order[record.case],
    )
    for note in dict.fromkeys(f"{o.contender}: {o.note}" for o in outcomes if o.record is None):
        print(f"not run: {note}", file=sys.stderr)
    for outcome in outcomes:
        if outcome.record is not None and not outcome.record.ok:
            print(f"WRONG: {outcome.case.name} {outcome.contender}: {outcome.note}", file=sys.stderr)
    return _finish(Run(header, tuple(records)), suite.name, suite.baseline, arguments, recording)


def run_decode(arguments: argparse.Namespace) -> int:
    """Time the whole decode step."""
    from qsun_bench.decode import BASELINE, NAME, Request, decode_records, sizes_and_layers

    if arguments.layers is not None and arguments.model is not None:
        raise UsageError("--layers: a checkpoint has the layers it has, expected --shape with it")
    if arguments.dtype == torch.float32:
        raise UsageError("--dtype: the step is judged against float32, expected bfloat16 or float16")
    recording = _recording(arguments)
    request = Request(
        device=arguments.device,
        shape=arguments.shape,
        model=arguments.model,
        layers=arguments.layers,
        batches=arguments.batch,
        contexts=arguments.context,
        tokens=arguments.tokens,
        bits=arguments.bits,
        group_size=arguments.group_size,
        symmetric=not arguments.asymmetric,
        dtype=arguments.dtype,
        backend=arguments.backend,
        smoke=arguments.smoke,
    )
    if request.model is None:
        try:
            sizes_and_layers(request)
        except ValueError as error:
            raise UsageError(f"--layers: {error}") from None
    header = _header(arguments, recording)
    records = []
    for record, note in decode_records(request):
        if record is None:
            print(f"not run: {note}", file=sys.stderr)
        else:
            records.append(record)
            if not record.ok:
                print(f"WRONG: {record.case} {record.backend}: {note}", file=sys.stderr)
    return _finish(Run(header, tuple(records)), NAME, BASELINE, arguments, recording)


def _recording(arguments: argparse.Namespace) -> tuple[Path, str] | None:
    """(root, commit) when the run is to be recorded: asked before anything is timed."""
    if arguments.record:
        return results.recordable_commit(arguments.commit)
    if arguments.commit is not None:
        raise UsageError("--commit: expected only with --record")
    return None


def _header(arguments: argparse.Namespace, recording: tuple[Path, str] | None) -> results.Header:
    command = shlex.join(["qsun-bench", *arguments.argv])
    return results.header(
        arguments.device, command, read_bandwidth(arguments.device), recording[1] if recording else None
    )


def _finish(
    run: Run,
    suite: str,
    baseline: str,
    arguments: argparse.Namespace,
    recording: tuple[Path, str] | None,
) -> int:
    to_stdout = arguments.json is not None and str(arguments.json) == "-"
    tables.show_run(run, baseline, sys.stderr if to_stdout else sys.stdout)
    if to_stdout:
        print(run.to_json(), end="")
    elif arguments.json is not None:
        results.write(run, arguments.json)
    if arguments.plot is not None:
        from qsun_bench import plots

        plots.save(run, arguments.plot)
    if recording is not None:
        folder = results.device_folder(arguments.device)
        path = recording[0] / results.RESULTS / folder / f"{suite}.json"
        results.write(run, path)
        print(f"recorded in {path}", file=sys.stderr)
    return EXIT_OK if all(record.ok for record in run.records) else EXIT_WRONG


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal, nothing in a pipe."""
    import importlib.util

    if not sys.stderr.isatty() or importlib.util.find_spec("rich") is None:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda text: progress.update(task, advance=1, description=text)


def compare_runs(arguments: argparse.Namespace) -> int:
    """Two recorded runs side by side."""
    before, after = results.load(arguments.before), results.load(arguments.after)
    if before.header.device != after.header.device:
        print(
            f"qsun-bench: the runs are of different devices: {before.header.device}; {after.header.device}",
            file=sys.stderr,
        )
    compared = compare.pairs(before, after)
    print(f"A: {before.header.line()}\nB: {after.header.line()}")
    tables.show("", ("case", "backend", "A us", "B us", "A / B"), compare.rows(compared), text_columns=2)
    mean = compare.geometric_mean(compared)
    if mean is not None:
        print(f"geometric mean of A / B: {mean:.3f} (above 1: B is faster)")
    if arguments.fail_above is not None:
        worse = compare.worse(compared, arguments.fail_above)
        for pair in worse:
            print(f"worse: {' '.join(pair.name)}", file=sys.stderr)
        return EXIT_WRONG if worse else EXIT_OK
    return EXIT_OK


def write_report(arguments: argparse.Namespace) -> int:
    """Regenerate the marked blocks, or check them."""
    root = arguments.root
    if root is None:
        top = results.git("rev-parse", "--show-toplevel")
        root = Path(top.strip()) if top is not None else Path.cwd()
    if not (root / results.RESULTS).parent.is_dir():
        raise ResultsError(f"{root} has no bench/, expected the root of the sources (--root)")
    changed = [page for page in report.pages(root) if page.differs]
    for page in changed:
        if arguments.check:
            print(f"{page.path.relative_to(root)} differs from the recorded runs: run `qsun-bench report`")
        else:
            page.path.write_text(page.expected)
            print(f"rewrote the tables of {page.path.relative_to(root)}")
    return EXIT_WRONG if arguments.check and changed else EXIT_OK


def explain_wna16(arguments: argparse.Namespace) -> int:
    """Which kernel each backend would use for one matrix product, and what it must read."""
    from qsun_bench.cases.wna16 import Wna16Case
    from qsun_kernels.ops.explain import explain_rows
    from qsun_kernels.quant import QuantSpec

    group = arguments.group_size or (128 if arguments.K % 128 == 0 else 64)
    spec = QuantSpec(cast("Bits", arguments.bits), cast("GroupSize", group), not arguments.asymmetric)
    case = Wna16Case("explain", arguments.M, arguments.N, arguments.K, spec, arguments.dtype)
    rows = [(row.backend, row.status, row.detail) for row in explain_rows(case.problem(arguments.device))]
    title = f"{case.op} M={case.M} N={case.N} K={case.K} {spec} {arguments.dtype} on {arguments.device}"
    tables.show(title, ("backend", "", "kernel"), rows, text_columns=3)
    dense = (case.N * case.K + case.M * (case.N + case.K)) * arguments.dtype.itemsize
    flops = 2 * case.M * case.N * case.K
    print(f"reads and writes {case.bytes:,} bytes, {dense / case.bytes:.2f} times fewer than dense;")
    print(f"{flops:,} floating point operations, {flops / case.bytes:.1f} a byte")
    speed = read_bandwidth(arguments.device)
    print(f"at the {speed * 1e-12:.3g} TB/s that {arguments.device} reads: {case.bytes / speed * 1e6:.1f} us")
    return EXIT_OK
