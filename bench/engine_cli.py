"""The options of `qsun-bench decode`, `qsun-bench serve` and `qsun-bench soak`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from qsun_bench import engine_commands, option_types
from qsun_bench.engine_suites import ARMS, KV_DTYPES, ORDERS
from qsun_bench.option_groups import device_option, output_options

_FULL_BITS = "16 (dense), 8, 4, 3, 2"


def add_decode(subparsers: Any) -> None:
    """The command `decode`."""
    parser = subparsers.add_parser(
        "decode",
        help="time per output token of the whole decode step",
        description="Time per output token of the engine: steps of a batch whose requests bring random KV.",
    )
    parser.set_defaults(run=engine_commands.run_decode)
    _model_options(parser)
    number = option_types.integer
    parser.add_argument(
        "--bits",
        type=option_types.bits_or_dense,
        default=(),
        help=f"of the projections: {_FULL_BITS}, comma-separated (default: 4,16, or a checkpoint's own)",
    )
    parser.add_argument(
        "--kv-dtype",
        type=partial(option_types.chosen_of, KV_DTYPES),
        default="auto",
        metavar="NAMES",
        help="of the KV cache: auto, fp8, int8, int4, comma-separated (auto)",
    )
    parser.add_argument(
        "--lm-head-bits",
        type=option_types.bits_or_dense,
        default="16",
        help=f"of the lm_head: {_FULL_BITS}, comma-separated (16)",
    )
    parser.add_argument("--batch", type=option_types.integers, default=(), help="requests, comma-separated")
    parser.add_argument(
        "--context",
        type=_at_least(2, option_types.integers),
        default=(),
        help="prompt tokens, comma-separated",
    )
    parser.add_argument(
        "--tokens", type=_at_least(2, number), help="of each request, that are timed (192; 64 on a CPU)"
    )
    parser.add_argument(
        "--mix",
        type=option_types.mix,
        metavar="models=N,zipf=A",
        help="each batch again, of requests of N models by Zipf's law, beside the same batch of one model",
    )
    parser.add_argument("--breakdown", action="store_true", help="time and launches of every operator")
    parser.add_argument("--host", action="store_true", help="what the host adds to a step (CUDA)")
    parser.add_argument(
        "--generate",
        nargs="?",
        choices=("also", "only"),
        default="no",
        const="also",
        help="whole answers, too, or only: prompts of CONTEXT random tokens, by generate",
    )
    parser.add_argument(
        "--prefill-chunk", type=number, help="with --generate: prompt tokens a step (8192; 512 on a CPU)"
    )
    parser.add_argument(
        "--limit", type=option_types.limit, metavar="SECONDS", help="start no further case after that long"
    )
    parser.add_argument("--smoke", action="store_true", help="two layers, a few steps: a check, not a figure")
    device_option(parser)
    output_options(parser)


def add_serve(subparsers: Any) -> None:
    """The command `serve`."""
    parser = subparsers.add_parser(
        "serve",
        help="several models under load: shared decode against a batch a model",
        description="Play arrivals to one GPU by the wall clock, in two arms.",
    )
    parser.set_defaults(run=engine_commands.run_serve)
    _model_options(parser)
    number = option_types.integer
    parser.add_argument(
        "--bits", type=option_types.one_bits_or_dense, help=f"{_FULL_BITS} (4, or a checkpoint's own)"
    )
    parser.add_argument("--kv-dtype", choices=KV_DTYPES, default="auto", help="of the KV cache (auto)")
    parser.add_argument(
        "--lm-head-bits", type=option_types.one_bits_or_dense, default="16", help=f"{_FULL_BITS} (16)"
    )
    load = parser.add_mutually_exclusive_group()
    load.add_argument(
        "--rate", type=option_types.rates, metavar="R,...", help="requests a second, Poisson (2)"
    )
    load.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="instead: CSV or JSONL with arrival_s, model, prompt_tokens, output_tokens",
    )
    parser.add_argument("--duration", type=option_types.limit, metavar="SECONDS", help="of the arrivals (60)")
    parser.add_argument("--models", type=number, help="models of the load (8)")
    parser.add_argument("--zipf", type=option_types.exponent, help="exponent of their popularity (1.0)")
    parser.add_argument(
        "--prompt-tokens", type=option_types.quantiles, metavar="MEDIAN,P95", help="lognormal (1020,4083)"
    )
    parser.add_argument(
        "--output-tokens", type=option_types.quantiles, metavar="MEDIAN,P95", help="lognormal (129,451)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals (0)")
    parser.add_argument(
        "--arms",
        type=partial(option_types.chosen_of, ARMS),
        default=",".join(ARMS),
        metavar="NAMES",
        help="shared, per-model (both)",
    )
    parser.add_argument(
        "--order", choices=ORDERS, default=ORDERS[0], help="of the models' turns in per-model"
    )
    parser.add_argument(
        "--slo-ttft", type=option_types.milliseconds, default="1000", metavar="MS", help="(1000)"
    )
    parser.add_argument("--slo-tpot", type=option_types.milliseconds, default="50", metavar="MS", help="(50)")
    parser.add_argument(
        "--bisect",
        type=option_types.share,
        metavar="SHARE",
        help="of rising rates, look for the last at which an arm serves this share as promised (play all)",
    )
    parser.add_argument("--max-batch", type=number, help="requests in a decode batch (128; 8 on a CPU)")
    parser.add_argument("--prefill-chunk", type=number, default=512, help="prompt tokens a step (512)")
    parser.add_argument(
        "--overlap", choices=("auto", "on", "off"), help="of host and device in the engines (as they do)"
    )
    parser.add_argument(
        "--kv-memory",
        type=option_types.size,
        metavar="SIZE",
        help="of all caches of an arm (0.7 of what is free)",
    )
    parser.add_argument(
        "--limit",
        type=option_types.limit,
        default=600.0,
        metavar="SECONDS",
        help="leave a load after so long (600)",
    )
    parser.add_argument(
        "--smoke", action="store_true", help="two layers, a few short requests: a check, not a figure"
    )
    device_option(parser)
    output_options(parser)


def add_soak(subparsers: Any) -> None:
    """The command `soak`."""
    parser = subparsers.add_parser(
        "soak",
        help="an engine under random requests for a long time: right throughout, or not",
        description="Random requests, cancels, preemptions, overflows; a sample of the answers is checked.",
    )
    parser.set_defaults(run=engine_commands.run_soak)
    _model_options(parser)
    number = option_types.integer
    parser.add_argument("--bits", type=option_types.one_bits_or_dense, help=f"{_FULL_BITS} (4)")
    parser.add_argument("--kv-dtype", choices=KV_DTYPES, default="auto", help="of the KV cache (auto)")
    parser.add_argument(
        "--lm-head-bits", type=option_types.one_bits_or_dense, default="16", help=f"{_FULL_BITS} (16)"
    )
    parser.add_argument("--minutes", type=option_types.limit, help="how long (8; 30 on a CPU)")
    parser.add_argument("--models", type=number, default=6, help="each with weights of its own (6)")
    parser.add_argument("--zipf", type=option_types.exponent, help="exponent of their popularity (1.0)")
    parser.add_argument("--max-batch", type=number, help="requests in a decode batch (32; 8 on a CPU)")
    parser.add_argument(
        "--context", type=_at_least(64, number), help="most tokens of a request (1024; 256 on a CPU)"
    )
    parser.add_argument("--prefill-chunk", type=number, help="prompt tokens a step (512; 96 on a CPU)")
    parser.add_argument(
        "--check", type=option_types.share, metavar="SHARE", help="of the requests, that are checked (0.01)"
    )
    parser.add_argument(
        "--rest",
        type=option_types.limit,
        metavar="SECONDS",
        help="how often the engine is emptied and looked at (30)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the requests (0)")
    parser.add_argument("--smoke", action="store_true", help="a few seconds: a check of the check")
    device_option(parser)
    output_options(parser)


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        "--shape",
        type=option_types.model,
        metavar="NAME|PATH",
        help="a checkpoint, or a shape of random weights: llama-3.1-8b, qwen3-8b, llama-3.1-70b,"
        " smollm2-135m, tiny",
    )
    parser.add_argument(
        "--layers", type=option_types.integer, help="only so many layers of the shape (recorded)"
    )
    parser.add_argument(
        "--group-size",
        "--group",
        type=option_types.group_size,
        help="32, 64, 128 or channel (default: 128 or 64)",
    )
    parser.add_argument("--asymmetric", "--zeros", action="store_true", help="stored zero points")
    parser.add_argument(
        "--dtype", type=option_types.dtype, default="bfloat16", help="of activations (bfloat16)"
    )
    parser.add_argument("--backend", choices=("cuda", "triton", "torch"), help="for every operator")


def _at_least(least: int, read: Callable[[str], Any]) -> Callable[[str], Any]:
    """An option type that takes no integer below `least`."""

    def checked(text: str) -> Any:
        values = read(text)
        if min(values if isinstance(values, tuple) else (values,)) < least:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected integers of at least {least}")
        return values

    return checked
