"""Arguments, and the one place where errors become exit codes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qsun.cli import exits
from qsun.cli.evaluate import add_eval_options
from qsun.cli.train import add_train_options
from qsun.cli.values import (
    KV_CACHE_DTYPES,
    KV_CACHE_HELP,
    QUANTIZERS,
    group_size,
    name_and_path,
    name_and_text,
)


def _quantisation_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--group-size", type=group_size, help="auto, 32, 64, 128 or channel (auto)")
    parser.add_argument("--asymmetric", action="store_true", help="store a zero point for each group")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there)")


def _sampling_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=int, default=128)
    group.add_argument("--min-tokens", type=int, default=0)
    group.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token (0)")
    group.add_argument("--top-k", type=int, default=0)
    group.add_argument("--top-p", type=float, default=1.0)
    group.add_argument("--min-p", type=float, default=0.0)
    group.add_argument("--repetition-penalty", type=float, default=1.0)
    group.add_argument("--presence-penalty", type=float, default=0.0)
    group.add_argument("--frequency-penalty", type=float, default=0.0)
    group.add_argument("--seed", type=int)
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="may be given again")
    group.add_argument("--ignore-eos", action="store_true")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    # Shared by every command, so that `qsun generate --debug` works as well as it reads.
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    common.add_argument("--json", action="store_true", help="machine-readable output on stdout, nothing else")
    how: dict[str, Any] = {
        "parents": [common],
        "epilog": exits.EPILOG,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }
    parser = argparse.ArgumentParser(
        prog="qsun",
        description="Serve many fine-tuned models from one frozen low-bit decoder.",
        epilog=exits.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="answer prompts of several models in one batch", **how)
    generate.add_argument(
        "--model", required=True, metavar="PATH", help="checkpoint folder, GGUF file or hub id"
    )
    generate.add_argument(
        "--prefill",
        type=name_and_path,
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="a task's prefill module: a full checkpoint or a LoRA adapter; may be given again",
    )
    generate.add_argument(
        "--prompt",
        type=name_and_text,
        action="append",
        required=True,
        metavar="NAME:TEXT",
        help="a prompt for the model of that name (base: the decoder's own weights); may be given again",
    )
    generate.add_argument("--raw", action="store_true", help="prompts as they are, without the chat template")
    generate.add_argument("--backend", choices=("cuda", "triton", "torch"), help="for every operator")
    generate.add_argument("--max-batch-size", type=int, default=64)
    generate.add_argument("--kv-cache-dtype", choices=KV_CACHE_DTYPES, default="auto", help=KV_CACHE_HELP)
    generate.add_argument(
        "--bits",
        type=int,
        choices=(2, 3, 4, 8, 16),
        help="of the decode weights (4, or those of a checkpoint that is quantised already)",
    )
    _quantisation_options(generate)
    _sampling_options(generate)

    quantize = commands.add_parser("quantize", help="write a low-bit copy of a checkpoint", **how)
    quantize.add_argument("model", metavar="MODEL", help="checkpoint folder or GGUF file")
    quantize.add_argument("out", type=Path, metavar="OUT", help="folder to make; it must not hold anything")
    quantize.add_argument("--method", choices=QUANTIZERS, default="rtn")
    quantize.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="text for awq and gptq: .txt, or .jsonl with a text a line",
    )
    quantize.add_argument("--bits", type=int, choices=(2, 3, 4, 8), default=4, help="of the weights (4)")
    _quantisation_options(quantize)

    train = commands.add_parser("train", help="fine-tune a prefill module for the frozen decoder", **how)
    add_train_options(train)

    evaluate = commands.add_parser("eval", help="measure models by the engine on tasks with answers", **how)
    add_eval_options(evaluate)

    commands.add_parser("doctor", help="what was built, what is there, which backend runs what", **how)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is documented in --help."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    return exits.guarded(lambda: _run(arguments), debug=arguments.debug)


def _run(arguments: argparse.Namespace) -> int:
    # Imported when run: `qsun --help` and usage errors need neither torch nor transformers.
    if arguments.command == "generate":
        from qsun.cli.generate import generate

        return generate(arguments)
    if arguments.command == "quantize":
        from qsun.cli.quantize import quantize

        return quantize(arguments)
    if arguments.command == "train":
        from qsun.cli.train import train

        return train(arguments)
    if arguments.command == "eval":
        from qsun.cli.evaluate import evaluate

        return evaluate(arguments)
    from qsun.cli.doctor import doctor

    return doctor(arguments)
