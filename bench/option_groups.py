"""Options that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from qsun_bench import option_types


def device_option(parser: argparse.ArgumentParser) -> None:
    """Where it runs."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", type=option_types.device, default=default, help="cpu or cuda (default: cuda if there)"
    )


def precision_options(parser: argparse.ArgumentParser) -> None:
    """One kind of weight."""
    parser.add_argument("--bits", type=int, choices=option_types.BITS, default=4)
    parser.add_argument(
        "--group-size",
        "--group",
        type=option_types.group_size,
        help="32, 64, 128 or channel (default: 128 or 64)",
    )
    parser.add_argument("--asymmetric", "--zeros", action="store_true", help="stored zero points")
    parser.add_argument(
        "--dtype", type=option_types.dtype, default="bfloat16", help="of activations and KV (bfloat16)"
    )


def selection_options(parser: argparse.ArgumentParser) -> None:
    """Cases of a suite, and lists of all that they differ in."""
    parser.add_argument(
        "--shape",
        "--shapes",
        type=option_types.shape_names,
        default=(),
        help="models, sets (decode7) or MODEL.MATRIX, comma-separated",
    )
    parser.add_argument(
        "--batch", "--m", type=option_types.integers, default=(), help="batch sizes (M), comma-separated"
    )
    parser.add_argument(
        "--context", type=option_types.integers, default=(), help="context lengths, comma-separated"
    )
    parser.add_argument("--smoke", action="store_true", help="a few small cases: a check, not a figure")
    parser.add_argument(
        "--bits", type=option_types.bits, default="4", help="2, 3, 4 and 8, comma-separated (4)"
    )
    parser.add_argument(
        "--group-size",
        "--group",
        type=option_types.group_sizes,
        default=(None,),
        help="32, 64, 128 and channel, comma-separated (default: 128 or 64)",
    )
    parser.add_argument("--asymmetric", "--zeros", action="store_true", help="stored zero points")
    parser.add_argument("--act-order", action="store_true", help="groups given column by column")
    parser.add_argument(
        "--dtype",
        type=option_types.dtypes,
        default="bfloat16",
        help="of activations and KV: bf16, fp16, fp32 (bf16)",
    )
    device_option(parser)


def output_options(parser: argparse.ArgumentParser) -> None:
    """What becomes of a run."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the run there (- for stdout)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the run (png, svg, pdf)")
    parser.add_argument("--record", action="store_true", help="keep the run under bench/results/")
    parser.add_argument("--commit", help="with --record: the commit of sources that carry no git")
