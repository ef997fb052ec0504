"""Options that several commands share."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch

from qsun_bench import option_types
from qsun_bench.kv_choice import KV_CHOICES


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


def selection_options(parser: argparse.ArgumentParser, *, formats: bool = True) -> None:
    """Cases of a suite, and lists of all that they differ in. formats: the kinds of weights among them."""
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
    parser.add_argument(
        "--kv-dtype",
        type=partial(option_types.chosen_of, KV_CHOICES),
        default=(),
        metavar="NAMES",
        help=f"of the KV cache: {', '.join(KV_CHOICES)}, comma-separated",
    )
    parser.add_argument(
        "--block-size",
        type=option_types.integers,
        default=(),
        metavar="SIZES",
        help="tokens of a block of the KV cache, comma-separated (16)",
    )
    parser.add_argument(
        "--heads",
        type=option_types.heads,
        default=(),
        metavar="QxKV",
        help="query and key heads instead of the model's, comma-separated: 32x8,40x8",
    )
    parser.add_argument("--smoke", action="store_true", help="a few small cases: a check, not a figure")
    device_option(parser)
    if formats:
        _format_options(parser)
    else:
        default = {"group_size": (None,), "asymmetric": False, "act_order": False}
        parser.set_defaults(bits=(4,), dtype=(torch.bfloat16,), **default)


def _format_options(parser: argparse.ArgumentParser) -> None:
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


def output_options(parser: argparse.ArgumentParser) -> None:
    """What becomes of a run."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the run there (- for stdout)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the run (png, svg, pdf)")
    parser.add_argument("--record", action="store_true", help="keep the run under bench/results/")
    parser.add_argument(
        "--as",
        dest="recorded_as",
        type=option_types.record_name,
        metavar="NAME",
        help="with --record: NAME.json instead of the suite's, so that it replaces no other run",
    )
    parser.add_argument("--commit", help="with --record: the commit of sources that carry no git")
