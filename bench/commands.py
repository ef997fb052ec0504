"""What each command of `qsun-bench` does."""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, cast

from qsun_bench import compare, report, results, tables, views
from qsun_bench.cases import Case, Selection, Suite, suites
from qsun_bench.results import ResultsError, Run
from qsun_bench.termination import Terminated, termination_raises
from qsun_kernels.errors import BackendUnavailable
from qsun_kernels.testing.timing import read_bandwidth

if TYPE_CHECKING:
    from collections.abc import Callable

    from qsun_bench.contenders import Contender
    from qsun_kernels.quant import Bits, GroupSize

EXIT_OK = 0
EXIT_WRONG = 1
EXIT_USAGE = 2
EXIT_INPUT = 3
EXIT_UNAVAILABLE = 4


class UsageError(ValueError):
    """Arguments that are right one by one and make no sense together."""


def _cases(arguments: argparse.Namespace, suite: Suite) -> Sequence[Case]:
    """The suite's cases for every combination of what is given as a list, each once."""
    if arguments.act_order and "channel" in arguments.group_size:
        raise UsageError("--act-order: one group a row leaves no order, expected --group-size 32, 64 or 128")
    found: dict[Case, None] = {}
    for bits, group_size, dtype in itertools.product(arguments.bits, arguments.group_size, arguments.dtype):
        selection = Selection(
            device=arguments.device,
            shapes=arguments.shape,
            batches=arguments.batch,
            contexts=arguments.context,
            bits=bits,
            group_size=group_size,
            symmetric=not arguments.asymmetric,
            act_order=arguments.act_order,
            dtype=dtype,
            smoke=arguments.smoke,
            kv=arguments.kv_dtype,
            block_sizes=arguments.block_size,
            heads=arguments.heads,
        )
        found.update(dict.fromkeys(suite.cases(selection)))
    if len({case.name for case in found}) != len(found):
        raise UsageError(f"--dtype: {suite.name} names its cases without it, expected one dtype at a time")
    return list(found)


def list_cases(arguments: argparse.Namespace) -> int:
    """Every suite: who can run it here, and its cases."""
    from qsun_bench.contenders import contenders

    for suite in suites().values():
        cases = _cases(arguments, suite)
        rows = []
        for contender in contenders(suite.op, suite.variants):
            reasons = [contender.available(case, arguments.device) for case in cases]
            able = f"{reasons.count(None)} of {len(cases)} cases"
            refused = "; ".join(dict.fromkeys(reason for reason in reasons if reason))
            rows.append((contender.name, able + (f" ({refused})" if refused else "")))
        title = f"{suite.name}: {suite.summary}, on {arguments.device}"
        tables.show(title, ("contender", "runs"), rows, text_columns=2)
        tables.show("", ("case", "bytes"), [(case.name, f"{case.bytes:,}") for case in cases])
        print()
    print("decode: time per output token of the whole decode step; see qsun-bench decode --help")
    print(
        "serve: several models under load, shared decode against a batch a model; see qsun-bench serve --help"
    )
    print("soak: an engine under random requests for a long time; see qsun-bench soak --help")
    return EXIT_OK


def run_suite(arguments: argparse.Namespace) -> int:
    """Check and time the cases of one operator."""
    from qsun_bench.measure import Outcome, measure

    suite: Suite = arguments.suite
    recording = recording_of(arguments)
    cases = _cases(arguments, suite)
    chosen = _chosen(arguments, suite, cases)
    before = _recorded_run(arguments, suite)
    header = header_of(arguments, recording)
    order = {case.name: i for i, case in enumerate(cases)}

    def run(outcomes: Sequence[Outcome]) -> Run:
        records = [outcome.record for outcome in outcomes if outcome.record is not None]
        return Run(header, tuple(sorted(records, key=lambda record: order[record.case])))

    outcomes: list[Outcome] = []
    end = time.monotonic() + (arguments.limit or float("inf"))
    why = ""
    with _progress(len(cases) * len(chosen)) as advance:
        try:
            with termination_raises():
                for outcome in measure(cases, chosen, arguments.device, seconds=arguments.seconds):
                    if outcomes and outcome.contender != outcomes[-1].contender:
                        keep(run(outcomes), arguments)
                    outcomes.append(outcome)
                    advance(f"{outcome.case.name} {outcome.contender}")
                    if time.monotonic() > end:
                        why = "--limit"
                        break
        except Terminated:
            why = "terminated"
    if why:
        left = len(cases) * len(chosen) - len(outcomes)
        print(f"not run: {left} of {len(cases) * len(chosen)} ({why})", file=sys.stderr)
    for note in dict.fromkeys(f"{o.contender}: {o.note}" for o in outcomes if o.record is None):
        print(f"not run: {note}", file=sys.stderr)
    for outcome in outcomes:
        if outcome.record is not None and not outcome.record.ok:
            print(f"WRONG: {outcome.case.name} {outcome.contender}: {outcome.note}", file=sys.stderr)
    return finish(run(outcomes), suite.name, suite.baseline, arguments, recording, before)


def _chosen(arguments: argparse.Namespace, suite: Suite, cases: Sequence[Case]) -> Sequence[Contender]:
    """The contenders that --backend and --peers name. One named by --backend must run, a peer may fail."""
    from qsun_bench.contenders import contenders

    known = {contender.name: contender for contender in contenders(suite.op, suite.variants)}
    peers = {name: contender for name, contender in known.items() if not contender.is_ours}
    named: tuple[str, ...] | None = arguments.backend
    for name in named or ():
        if name not in known:
            raise UsageError(f"--backend: got {name!r}, expected some of {', '.join(known)}")
        reasons = [known[name].available(case, arguments.device) for case in cases]
        if all(reasons):
            raise BackendUnavailable(suite.op, name, str(reasons[0]))
    asked: tuple[str, ...] = arguments.peers or (("all",) if named is None else ("none",))
    if asked in (("all",), ("none",)):
        beside = list(peers) if asked == ("all",) else []
    else:
        for name in asked:
            if name not in peers:
                raise UsageError(f"--peers: got {name!r}, expected all, none or some of {', '.join(peers)}")
        beside = list(asked)
    ours = [name for name in known if name not in peers]
    return [known[name] for name in dict.fromkeys([*(ours if named is None else named), *beside])]


def _recorded_run(arguments: argparse.Namespace, suite: Suite) -> Run | None:
    """The run that --compare names: a file, REVISION:PATH, or what a revision recorded for this device."""
    name: str | None = arguments.compare
    if name is None:
        return None
    if ":" not in name and not Path(name).is_file():
        folder = results.device_folder(arguments.device)
        name = f"{name}:{(results.RESULTS / folder / suite.name).as_posix()}.json"
    return results.load(name)


def keep(run: Run, arguments: argparse.Namespace) -> None:
    """Write what there is so far: a run that is stopped from outside has not been for nothing."""
    if arguments.json is not None and str(arguments.json) != "-" and run.records:
        results.write(run, arguments.json)


def recording_of(arguments: argparse.Namespace) -> tuple[Path, str] | None:
    """(root, commit) when the run is to be recorded: asked before anything is timed."""
    if arguments.record:
        return results.recordable_commit(arguments.commit)
    for name, value in (("--commit", arguments.commit), ("--as", arguments.recorded_as)):
        if value is not None:
            raise UsageError(f"{name}: expected only with --record")
    return None


def header_of(arguments: argparse.Namespace, recording: tuple[Path, str] | None) -> results.Header:
    """The header of this run; takes the read bandwidth, which a GPU must have to itself."""
    command = shlex.join(["qsun-bench", *arguments.argv])
    return results.header(
        arguments.device, command, read_bandwidth(arguments.device), recording[1] if recording else None
    )


def finish(
    run: Run,
    suite: str,
    baseline: str,
    arguments: argparse.Namespace,
    recording: tuple[Path, str] | None,
    before: Run | None = None,
) -> int:
    """Show, write, draw and record a run as the options say; the exit code tells whether all was right."""
    to_stdout = arguments.json is not None and str(arguments.json) == "-"
    stream = sys.stderr if to_stdout else sys.stdout
    views.show(run, baseline, stream)
    if before is not None:
        _show_comparison(before, run, stream)
    if to_stdout:
        print(run.to_json(), end="")
    elif arguments.json is not None:
        results.write(run, arguments.json)
    if arguments.plot is not None:
        from qsun_bench import plots

        views.plot(run, arguments.plot)
        if plots.has_skew(run):
            plots.save_skew(run, arguments.plot.with_stem(f"{arguments.plot.stem}-skew"))
    if recording is not None:
        folder = results.device_folder(arguments.device)
        path = recording[0] / results.RESULTS / folder / f"{arguments.recorded_as or suite}.json"
        if not run.records:
            raise ResultsError(f"nothing was measured, expected a record for {path}: it stays as it is")
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
    compared = _show_comparison(before, after, sys.stdout)
    if arguments.fail_above is not None:
        worse = compare.worse(compared, arguments.fail_above)
        for pair in worse:
            print(f"worse: {' '.join(pair.name)}", file=sys.stderr)
        return EXIT_WRONG if worse else EXIT_OK
    return EXIT_OK


def _show_comparison(before: Run, after: Run, stream: TextIO) -> Sequence[compare.Pair]:
    if before.header.device != after.header.device:
        print(
            f"qsun-bench: the runs are of different devices: {before.header.device}; {after.header.device}",
            file=sys.stderr,
        )
    compared = compare.pairs(before, after)
    print(f"A: {before.header.line()}\nB: {after.header.line()}", file=stream)
    columns = ("case", "backend", "A us", "B us", "A / B")
    tables.show("", columns, compare.rows(compared), stream, text_columns=2)
    mean = compare.geometric_mean(compared)
    if mean is not None:
        print(f"geometric mean of A / B: {mean:.3f} (above 1: B is faster)", file=stream)
    return compared


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
    if arguments.plots is not None:
        from qsun_bench import plots

        for path in plots.save_recorded(root, arguments.plots):
            print(f"drew {path}")
    return EXIT_WRONG if arguments.check and changed else EXIT_OK


def explain_wna16(arguments: argparse.Namespace) -> int:
    """Which kernel each backend would use for one matrix product, and what it must read."""
    from qsun_bench.cases.wna16 import Wna16Case
    from qsun_bench.launches import cuda_launch
    from qsun_kernels.ops.explain import explain_rows
    from qsun_kernels.quant import QuantSpec

    group = arguments.group_size or (128 if arguments.K % 128 == 0 else 64)
    spec = QuantSpec(cast("Bits", arguments.bits), cast("GroupSize", group), not arguments.asymmetric)
    sizes = (arguments.M, arguments.N, arguments.K)
    case = Wna16Case("explain", *sizes, spec, arguments.dtype, arguments.act_order)
    rows = [(row.backend, row.status, row.detail) for row in explain_rows(case.problem(arguments.device))]
    order = " act-order" if case.act_order else ""
    problem = f"M={case.M} N={case.N} K={case.K} {spec}{order} {arguments.dtype}"
    title = f"{case.op} {problem} on {arguments.device}"
    tables.show(title, ("backend", "", "kernel"), rows, text_columns=3)
    launch = cuda_launch(case, arguments.device)
    if launch is not None:
        print(f"cuda launches {launch}")
    dense = (case.N * case.K + case.M * (case.N + case.K)) * arguments.dtype.itemsize
    flops = 2 * case.M * case.N * case.K
    print(f"reads and writes {case.bytes:,} bytes, {dense / case.bytes:.2f} times fewer than dense;")
    print(f"{flops:,} floating point operations, {flops / case.bytes:.1f} a byte")
    speed = read_bandwidth(arguments.device)
    print(f"at the {speed * 1e-12:.3g} TB/s that {arguments.device} reads: {case.bytes / speed * 1e6:.1f} us")
    return EXIT_OK
