"""`qsun-bench`: is this kernel right, how fast is it, how far from the memory limit, against whom."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from qsun.errors import QsunError
from qsun_bench import commands
from qsun_bench.cases import suites
from qsun_bench.results import ResultsError
from qsun_bench.shapes import SHAPES, matrices
from qsun_kernels.errors import BackendUnavailable

_EPILOG = """\
exit codes:
  0  done, every result right
  1  a result was wrong, a comparison too slow, or the documents differ from the recorded runs
  2  the command line is wrong
  3  a file is missing or damaged, or this run may not be recorded
  4  a backend that was named cannot run here
"""

_DTYPES = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float32": torch.float32,
    "fp32": torch.float32,
}
_BITS = (2, 3, 4, 8)


def _integers(text: str) -> tuple[int, ...]:
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = (0,)
    if any(value < 1 for value in values):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected integers of at least 1, such as 1,8,64")
    return values


def _integer(text: str) -> int:
    values = _integers(text)
    if len(values) != 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected one integer")
    return values[0]


def _shape_names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        try:
            matrices([name])
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error).replace("shape is", "got", 1)) from None
    return names


def _group_size(text: str) -> int | str:
    if text not in ("32", "64", "128", "channel"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected 32, 64, 128 or channel")
    return text if text == "channel" else int(text)


def _group_sizes(text: str) -> tuple[int | str, ...]:
    return tuple(_group_size(part) for part in text.split(","))


def _bits(text: str) -> tuple[int, ...]:
    values = _integers(text)
    if any(value not in _BITS for value in values):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected some of {', '.join(map(str, _BITS))}")
    return values


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _limit(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected seconds above 0")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 60:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected seconds above 0 and up to 60")
    return value


def _factor(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a factor of at least 1")
    return value


def _device(text: str) -> torch.device:
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected cpu or cuda")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("got 'cuda', but torch sees no CUDA device")
    return torch.device("cuda", torch.cuda.current_device()) if text == "cuda" else torch.device("cpu")


def _device_option(parser: argparse.ArgumentParser) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", type=_device, default=default, help="cpu or cuda (default: cuda if there)"
    )


def _dtype(text: str) -> torch.dtype:
    if text not in _DTYPES:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected one of {', '.join(_DTYPES)}")
    return _DTYPES[text]


def _dtypes(text: str) -> tuple[torch.dtype, ...]:
    return tuple(_dtype(part) for part in text.split(","))


def _precision_options(parser: argparse.ArgumentParser, bits: Sequence[int] = _BITS) -> None:
    parser.add_argument("--bits", type=int, choices=bits, default=4)
    parser.add_argument(
        "--group-size", "--group", type=_group_size, help="32, 64, 128 or channel (default: 128 or 64)"
    )
    parser.add_argument("--asymmetric", "--zeros", action="store_true", help="stored zero points")
    parser.add_argument("--dtype", type=_dtype, default="bfloat16", help="of activations and KV (bfloat16)")


def _selection_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shape",
        "--shapes",
        type=_shape_names,
        default=(),
        help="models, sets (decode7) or MODEL.MATRIX, comma-separated",
    )
    parser.add_argument("--batch", "--m", type=_integers, default=(), help="batch sizes (M), comma-separated")
    parser.add_argument("--context", type=_integers, default=(), help="context lengths, comma-separated")
    parser.add_argument("--smoke", action="store_true", help="a few small cases: a check, not a figure")
    parser.add_argument("--bits", type=_bits, default="4", help="2, 3, 4 and 8, comma-separated (4)")
    parser.add_argument(
        "--group-size",
        "--group",
        type=_group_sizes,
        default=(None,),
        help="32, 64, 128 and channel, comma-separated (default: 128 or 64)",
    )
    parser.add_argument("--asymmetric", "--zeros", action="store_true", help="stored zero points")
    parser.add_argument("--act-order", action="store_true", help="groups given column by column")
    parser.add_argument(
        "--dtype", type=_dtypes, default="bfloat16", help="of activations and KV: bf16, fp16, fp32 (bf16)"
    )
    _device_option(parser)


def _output_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the run there (- for stdout)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the run (png, svg, pdf)")
    parser.add_argument("--record", action="store_true", help="keep the run under bench/results/")
    parser.add_argument("--commit", help="with --record: the commit of sources that carry no git")


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
    _selection_options(listing)

    for suite in suites().values():
        command = subparsers.add_parser(suite.name, help=f"time {suite.summary}")
        command.set_defaults(run=commands.run_suite, suite=suite)
        _selection_options(command)
        command.add_argument(
            "--backend", type=_names, metavar="NAMES", help="only these contenders, comma-separated"
        )
        command.add_argument(
            "--peers",
            type=_names,
            metavar="NAMES",
            help="all, none, or these peers beside --backend (default: all without --backend, else none)",
        )
        command.add_argument("--seconds", type=_seconds, default=0.3, help="to measure each case (0.3)")
        command.add_argument(
            "--limit", type=_limit, metavar="SECONDS", help="start no further case after that long"
        )
        command.add_argument(
            "--compare",
            metavar="RUN",
            help="then against FILE, REVISION:PATH or what REVISION recorded",
        )
        _output_options(command)

    decode = subparsers.add_parser("decode", help="time per output token of the whole decode step")
    decode.set_defaults(run=commands.run_decode)
    what = decode.add_mutually_exclusive_group()
    what.add_argument("--shape", choices=sorted(SHAPES), help="a model of that shape with random weights")
    what.add_argument("--model", type=Path, metavar="PATH", help="a checkpoint folder or GGUF file instead")
    decode.add_argument("--layers", type=_integer, help="only so many layers of the shape (recorded)")
    decode.add_argument("--batch", type=_integers, default=(), help="batch sizes, comma-separated")
    decode.add_argument("--context", type=_integers, default=(), help="context lengths, comma-separated")
    decode.add_argument("--tokens", type=_integer, default=24, help="steps that are timed (24)")
    decode.add_argument("--backend", choices=("cuda", "triton", "torch"), help="for every operator")
    decode.add_argument("--smoke", action="store_true", help="two layers, a few steps: a check, not a figure")
    _precision_options(decode, (2, 3, 4, 8, 16))
    _device_option(decode)
    _output_options(decode)

    compare = subparsers.add_parser("compare", help="two recorded runs side by side")
    compare.set_defaults(run=commands.compare_runs)
    compare.add_argument("before", metavar="A", help="PATH, or REVISION:PATH for a file of a git revision")
    compare.add_argument("after", metavar="B", help="likewise")
    compare.add_argument(
        "--fail-above", type=_factor, metavar="R", help="exit 1 when one became R times slower, or wrong"
    )

    report = subparsers.add_parser("report", help="regenerate the tables of README.md and docs/")
    report.set_defaults(run=commands.write_report)
    report.add_argument("--check", action="store_true", help="write nothing; exit 1 when a table differs")
    report.add_argument("--root", type=Path, help="root of the sources (default: this checkout)")
    report.add_argument("--plots", type=Path, metavar="DIR", help="draw every recorded run there, too")

    tune = subparsers.add_parser("tune", help="find the fastest configurations of a kernel on this GPU")
    tuned = tune.add_subparsers(dest="operator", required=True, metavar="OPERATOR")
    matmul = tuned.add_parser("wna16", help="the tiles of the Triton matmul, at seven matrices and nine M")
    matmul.set_defaults(run=commands.tune_wna16)
    matmul.add_argument(
        "--budget", type=_limit, default=400.0, metavar="SECONDS", help="try nothing further after that (400)"
    )
    matmul.add_argument("--quick", action="store_true", help="the smallest matrix alone")
    where = matmul.add_mutually_exclusive_group()
    where.add_argument(
        "--out", type=Path, default=Path(), metavar="DIR", help="write wna16_tuned.py there (here)"
    )
    where.add_argument("--write", action="store_true", help="write over the table in use")

    explain = subparsers.add_parser("explain", help="which kernel would run a problem, and what it must read")
    operators = explain.add_subparsers(dest="operator", required=True, metavar="OPERATOR")
    wna16 = operators.add_parser("wna16", help="x (M, K) times a low-bit weight (N, K)")
    wna16.set_defaults(run=commands.explain_wna16)
    for size in ("M", "N", "K"):
        wna16.add_argument(size, type=_integer)
    _precision_options(wna16)
    wna16.add_argument("--act-order", action="store_true", help="groups given column by column")
    _device_option(wna16)
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
