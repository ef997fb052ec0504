"""`qsun-bench`: is this kernel right, how fast is it, how far from the memory limit, against whom."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from qsun.errors import QsunError
from qsun_bench import commands, engine_cli, option_types, tune_commands
from qsun_bench.cases import suites
from qsun_bench.option_groups import device_option, output_options, precision_options, selection_options
from qsun_bench.results import ResultsError
from qsun_kernels.errors import BackendUnavailable

_EPILOG = """\
exit codes:
  0  done, every result right
  1  a result was wrong, a comparison too slow, or the documents differ from the recorded runs
  2  the command line is wrong
  3  a file is missing or damaged, or this run may not be recorded
  4  a backend that was named cannot run here
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="qsun-bench",
        description="Check and time the kernels and their peers on this machine.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    listing = subparsers.add_parser("list", help="the cases, the contenders, and who can run here")
    listing.set_defaults(run=commands.list_cases)
    selection_options(listing)

    for suite in suites().values():
        command = subparsers.add_parser(suite.name, help=f"time {suite.summary}")
        command.set_defaults(run=commands.run_suite, suite=suite)
        selection_options(command, formats=not suite.own_formats)
        command.add_argument(
            "--backend",
            type=option_types.names,
            metavar="NAMES",
            help="only these contenders, comma-separated",
        )
        command.add_argument(
            "--peers",
            type=option_types.names,
            metavar="NAMES",
            help="all, none, or these peers beside --backend (default: all without --backend, else none)",
        )
        command.add_argument(
            "--seconds", type=option_types.seconds, default=0.3, help="to measure each case (0.3)"
        )
        command.add_argument(
            "--limit",
            type=option_types.limit,
            metavar="SECONDS",
            help="start no further case after that long",
        )
        command.add_argument(
            "--compare",
            metavar="RUN",
            help="then against FILE, REVISION:PATH or what REVISION recorded",
        )
        output_options(command)

    engine_cli.add_decode(subparsers)
    engine_cli.add_serve(subparsers)
    engine_cli.add_soak(subparsers)

    compare = subparsers.add_parser("compare", help="two recorded runs side by side")
    compare.set_defaults(run=commands.compare_runs)
    compare.add_argument("before", metavar="A", help="PATH, or REVISION:PATH for a file of a git revision")
    compare.add_argument("after", metavar="B", help="likewise")
    compare.add_argument(
        "--fail-above",
        type=option_types.factor,
        metavar="R",
        help="exit 1 when one became R times slower, or wrong",
    )

    report = subparsers.add_parser("report", help="regenerate the tables of README.md and docs/")
    report.set_defaults(run=commands.write_report)
    report.add_argument("--check", action="store_true", help="write nothing; exit 1 when a table differs")
    report.add_argument("--root", type=Path, help="root of the sources (default: this checkout)")
    report.add_argument("--plots", type=Path, metavar="DIR", help="draw every recorded run there, too")

    tune_commands.add_tune(subparsers)

    explain = subparsers.add_parser("explain", help="which kernel would run a problem, and what it must read")
    operators = explain.add_subparsers(dest="operator", required=True, metavar="OPERATOR")
    wna16 = operators.add_parser("wna16", help="x (M, K) times a low-bit weight (N, K)")
    wna16.set_defaults(run=commands.explain_wna16)
    for size in ("M", "N", "K"):
        wna16.add_argument(size, type=option_types.integer)
    precision_options(wna16)
    wna16.add_argument("--act-order", action="store_true", help="groups given column by column")
    device_option(wna16)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is documented in --help."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = build_parser()
    arguments = parser.parse_args(argv)
    arguments.argv = argv
    try:
        return int(arguments.run(arguments))
    except commands.UsageError as error:
        parser.error(str(error))
    except (ResultsError, QsunError, OSError) as error:
        print(f"qsun-bench: {error}", file=sys.stderr)
        return commands.EXIT_INPUT
    except BackendUnavailable as error:
        print(f"qsun-bench: {error}", file=sys.stderr)
        return commands.EXIT_UNAVAILABLE
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
