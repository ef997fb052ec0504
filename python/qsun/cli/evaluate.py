"""`qsun eval`: models measured through the engine on tasks whose answers can be judged."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsun.cli import exits
from qsun.cli.exits import UsageError
from qsun.cli.loading import config_of, device_of, dtype_of, progress_bar
from qsun.cli.values import KV_CACHE_DTYPES, KV_CACHE_HELP, group_size, name_and_path

if TYPE_CHECKING:
    from qsun.engine.engine import DecodeEngine
    from qsun.evaluation.items import Task
    from qsun.modules.prefill import PrefillModule
    from qsun.training.batch import Example
    from qsun.training.data import DataReport

BASE = "base"
TASKS = ("gsm8k", "bfcl", "humaneval", "jsonl", "perplexity")


def add_eval_options(parser: argparse.ArgumentParser) -> None:
    """The options of `qsun eval`."""
    parser.add_argument("--model", required=True, metavar="PATH", help="the decoder: folder or GGUF file")
    parser.add_argument(
        "--prefill",
        type=name_and_path,
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="a task's prefill module; may be given again",
    )
    parser.add_argument("--no-base", action="store_true", help="leave out the decoder's own weights")
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument(
        "--data", type=Path, metavar="PATH", help="of the task (bfcl, humaneval: that of the package)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="kept and continued")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N items (bfcl: a category)")
    parser.add_argument("--category", action="append", help="of bfcl; may be given again")
    parser.add_argument("--metric", choices=("exact", "regex"), default="exact", help="of jsonl (exact)")
    parser.add_argument("--max-tokens", type=int, help="of an answer (the task's own)")
    parser.add_argument(
        "--allow-code-execution", action="store_true", help="let humaneval run what the models write"
    )
    parser.add_argument("--backend", choices=("cuda", "triton", "torch"), help="for every operator")
    parser.add_argument("--max-batch-size", type=int, default=64)
    parser.add_argument("--kv-cache-dtype", choices=KV_CACHE_DTYPES, default="auto", help=KV_CACHE_HELP)
    parser.add_argument("--bits", type=int, choices=(2, 3, 4, 8, 16), help="of the decoder (as stored)")
    parser.add_argument("--group-size", type=group_size, help="auto, 32, 64, 128 or channel (auto)")
    parser.add_argument("--asymmetric", action="store_true", help="store a zero point for each group")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there)")


def evaluate(arguments: argparse.Namespace) -> int:
    """Load the task, then the engine with every model, and ask."""
    from qsun import DecodeEngine
    from qsun.engine.options import EngineOptions
    from qsun.engine.sources import local_checkpoint

    modules = dict(arguments.prefill)
    if len(modules) != len(arguments.prefill) or BASE in modules:
        raise UsageError(
            f"--prefill: got {[name for name, _ in arguments.prefill]}, expected distinct names, not {BASE}"
        )
    if arguments.no_base and not modules:
        raise UsageError("--no-base: got no --prefill either, expected a model to measure")
    for name, least in (("limit", 1), ("max_tokens", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UsageError(f"--{name.replace('_', '-')}: got {value}, expected at least {least}")
    if arguments.task in ("gsm8k", "jsonl", "perplexity") and arguments.data is None:
        raise UsageError(f"--data: got none, expected the data of {arguments.task}")
    options = {
        "max_batch_size": arguments.max_batch_size,
        "backend": arguments.backend,
        "kv_cache_dtype": arguments.kv_cache_dtype,
    }
    try:
        EngineOptions(**options)
    except ValueError as error:
        raise UsageError(str(error)) from None
    # A damaged file is told before anything heavy is loaded.
    task = None if arguments.task == "perplexity" else _task(arguments)
    model = local_checkpoint(arguments.model)
    examples = _examples(arguments, model) if task is None else None
    device = device_of(arguments.device)
    with progress_bar("decode module", quiet=arguments.json) as progress:
        engine = DecodeEngine.from_pretrained(
            model,
            bits=arguments.bits,
            group_size=arguments.group_size,
            symmetric=not arguments.asymmetric,
            dtype=dtype_of(arguments.dtype),
            device=device,
            progress=progress,
            **options,
        )
    sources = {**({} if arguments.no_base else {BASE: None}), **modules}
    if examples is not None:
        summary = _perplexity(arguments, engine, sources, *examples)
    elif task is not None:
        summary = _ask(arguments, engine, task, sources)
    if arguments.json:
        print(json.dumps(summary, indent=2))
    else:
        _show(summary)
    failed = any(found.get("failed") for found in summary["models"].values())
    return exits.REQUEST_FAILED if failed else exits.OK


def _task(arguments: argparse.Namespace) -> Task:
    from dataclasses import replace

    from qsun.evaluation.bfcl import CATEGORIES, Bfcl
    from qsun.evaluation.gsm8k import Gsm8k
    from qsun.evaluation.humaneval import HumanEval
    from qsun.evaluation.jsonl_task import JsonlTask

    task: Any
    if arguments.task == "gsm8k":
        task = Gsm8k.load(arguments.data, arguments.limit)
    elif arguments.task == "bfcl":
        task = Bfcl.load(arguments.data, arguments.category or CATEGORIES[:2], arguments.limit)
    elif arguments.task == "humaneval":
        task = HumanEval.load(
            arguments.data, allow_execution=arguments.allow_code_execution, limit=arguments.limit
        )
    else:
        task = JsonlTask.load(arguments.data, arguments.metric, limit=arguments.limit)
    chosen: Task = replace(task, max_tokens=arguments.max_tokens) if arguments.max_tokens else task
    return chosen


def _module(engine: DecodeEngine, name: str, path: Path | None) -> PrefillModule:
    from qsun.modules.prefill import load_prefill_module

    decode = engine.decode_module
    return load_prefill_module(
        name, path, base_path=decode.path, decode=decode, backend=engine.options.backend
    )


def _ask(
    arguments: argparse.Namespace, engine: DecodeEngine, task: Task, sources: dict[str, Path | None]
) -> dict[str, Any]:
    from qsun.evaluation import runner
    from qsun.modules.quantize import DENSE_BITS

    decode = engine.decode_module
    decoder = f"{decode.path.resolve()}, {decode.quantization or '16-bit'}, {decode.dtype}"
    if decode.lm_head_bits != DENSE_BITS:
        decoder += f", lm_head of {decode.lm_head_bits} bits"
    identity = {"decoder": decoder}
    if arguments.kv_cache_dtype != "auto":
        identity["kv cache"] = arguments.kv_cache_dtype
    for name, path in sources.items():
        module = _module(engine, name, path)
        identity[f"model {name}"] = f"{module.fingerprint}, first token by {module.first_token}"
        engine.add_model(name, module)

    def progress(done: int, total: int) -> None:
        if not arguments.json and (done % 50 == 0 or done == total):
            print(f"{done} of {total} answers", file=sys.stderr, flush=True)

    return runner.evaluate(engine, task, list(sources), arguments.out, identity=identity, progress=progress)


def _examples(arguments: argparse.Namespace, model: Path) -> tuple[list[Example], DataReport]:
    """The responses whose perplexity is asked for, from a file in the format of training data."""
    from qsun.engine.sources import find_tokenizer
    from qsun.training.data import load_examples

    config = config_of(model)
    examples, report = load_examples(
        [arguments.data],
        find_tokenizer(model),
        max_length=config.max_position_embeddings,
        vocab_size=config.vocab_size,
    )
    return examples[: arguments.limit], report


def _perplexity(
    arguments: argparse.Namespace,
    engine: DecodeEngine,
    sources: dict[str, Path | None],
    examples: list[Example],
    report: DataReport,
) -> dict[str, Any]:
    """-log p of the responses; a line of items.jsonl for each."""
    from qsun.engine.options import kv_format_of
    from qsun.evaluation.perplexity import perplexity, response_losses
    from qsun.evaluation.runner import SUMMARY, VERDICTS

    decode = engine.decode_module
    kv_format = kv_format_of(engine.options.kv_cache_dtype, decode.dtype, decode.config.head_dim)
    models = {}
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / VERDICTS).open("w", encoding="utf-8") as file:
        for name, path in sources.items():
            module = _module(engine, name, path)
            losses = response_losses(decode, module, examples, module.first_token, kv_format)
            for index, loss in enumerate(losses):
                line = {"model": name, "item": str(index), "loss": loss.total, "tokens": loss.tokens}
                file.write(json.dumps(line) + "\n")
            models[name] = {
                "answered": len(losses),
                "tokens": sum(loss.tokens for loss in losses),
                "perplexity": perplexity(losses),
            }
    summary = {"task": "perplexity", "items": len(examples), "data": report.facts(), "models": models}
    (arguments.out / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def _show(summary: dict[str, Any]) -> None:
    width = max(map(len, summary["models"]))
    print(f"{summary['task']}: {summary['items']} items")
    for name, found in summary["models"].items():
        if "perplexity" in found:
            print(f"  {name:<{width}}  perplexity {found['perplexity']:.4f} of {found['tokens']} tokens")
        elif not found["answered"]:
            print(f"  {name:<{width}}  no answers")
        else:
            low, high = found["interval_95"]
            failed = f", {found['failed']} failed" if found["failed"] else ""
            print(
                f"  {name:<{width}}  {found['correct']} of {found['answered']} right, "
                f"{found['share']:.1%} (95 %: {low:.1%} to {high:.1%}){failed}"
            )
