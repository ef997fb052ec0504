"""`qsun train`: a prefill module for a task, or the fully fine-tuned model that it is compared with."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsun.cli import exits
from qsun.cli.exits import UsageError
from qsun.cli.loading import config_of, device_of, dtype_of
from qsun.cli.values import QUANTIZERS, check_calibration, group_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from qsun.training.data import DataReport
    from qsun.training.options import TrainOptions
    from qsun.training.trainer import StepReport, TrainingResult

_LORA_RATE, _FULL_RATE = 2e-4, 2e-5


def add_train_options(parser: argparse.ArgumentParser) -> None:
    """The options of `qsun train`."""
    parser.add_argument("--model", required=True, metavar="PATH", help="the 16-bit base: folder or GGUF file")
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        action="append",
        metavar="FILE",
        help="JSON lines: {messages} or {prompt, response}; may be given again",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="folder to make; it must not hold anything"
    )
    parser.add_argument("--name", help="of the module (the folder's name)")
    what = parser.add_argument_group("what is trained")
    what.add_argument(
        "--method",
        choices=("sun", "full"),
        default="sun",
        help="sun: a prefill module for the frozen decoder; full: a whole model, for comparison (sun)",
    )
    what.add_argument(
        "--first-token",
        choices=("decode", "prefill"),
        default="decode",
        help="which module predicts the first token of an answer (decode)",
    )
    what.add_argument(
        "--lora", type=int, metavar="RANK", help="train low-rank pairs of this rank, not all weights"
    )
    what.add_argument("--lora-alpha", type=float, help="their scale times their rank (twice the rank)")
    what.add_argument("--lora-targets", nargs="+", metavar="NAME", help="projections with a pair (all)")
    decoder = parser.add_argument_group("the frozen decoder")
    decoder.add_argument("--decoder", type=Path, metavar="PATH", help="its checkpoint (the base's own)")
    decoder.add_argument(
        "--bits", type=int, choices=(2, 3, 4, 8, 16), help="of its weights (as they are stored)"
    )
    decoder.add_argument(
        "--group-size", type=group_size, metavar="N", help="auto, 32, 64, 128 or channel (auto)"
    )
    decoder.add_argument("--asymmetric", action="store_true", help="store a zero point for each group")
    decoder.add_argument("--quantizer", choices=QUANTIZERS, default="rtn")
    decoder.add_argument(
        "--calibration", type=Path, metavar="FILE", help="text for awq and gptq, as for quantize"
    )
    data = parser.add_argument_group("data")
    data.add_argument("--max-length", type=int, default=2048, help="longest example, in tokens (2048)")
    data.add_argument("--on-long", choices=("drop", "truncate"), default="drop", help="(drop)")
    data.add_argument(
        "--on-bad-data", choices=("stop", "skip"), default="stop", help="at a damaged line (stop)"
    )
    steps = parser.add_argument_group("steps")
    steps.add_argument("--epochs", type=float, default=1.0)
    steps.add_argument("--steps", type=int, help="in place of --epochs")
    steps.add_argument("--batch-size", type=int, default=32, help="examples a step (32)")
    steps.add_argument("--pack-tokens", type=int, default=8192, help="positions computed at one time (8192)")
    steps.add_argument(
        "--lr", type=float, help=f"peak learning rate ({_FULL_RATE}, with --lora {_LORA_RATE})"
    )
    steps.add_argument("--schedule", choices=("cosine", "linear", "constant"), default="cosine")
    steps.add_argument("--warmup", type=float, default=0.03, help="share of the steps (0.03)")
    steps.add_argument("--floor", type=float, default=0.1, help="last rate over the peak (0.1)")
    steps.add_argument("--weight-decay", type=float, default=0.0)
    steps.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient, 0 for none (1)")
    steps.add_argument("--seed", type=int, default=0)
    steps.add_argument("--teacher", metavar="PATH", help="distil from this fine-tuned model, or from `base`")
    steps.add_argument("--teacher-weight", type=float, help="share of its term (0.5)")
    steps.add_argument("--teacher-temperature", type=float, help="of both distributions (1)")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    machine.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there)")
    machine.add_argument("--checkpointing", action="store_true", help="compute activations twice, keep few")
    machine.add_argument("--compile", action="store_true", help="fuse elementwise operations (torch.compile)")
    run = parser.add_argument_group("the run")
    run.add_argument("--state", type=Path, metavar="FOLDER", help="its checkpoints (OUT.training)")
    run.add_argument("--save-every", type=int, default=0, metavar="STEPS", help="0: when it stops (0)")
    run.add_argument("--resume", action="store_true", help="continue from the state where there is one")
    run.add_argument("--stop-after", type=float, metavar="SECONDS", help="save the state and stop then")
    run.add_argument("--log", type=Path, metavar="FILE", help="a JSON line a step")


def train(arguments: argparse.Namespace) -> int:
    """Check everything, read the data, train, write."""
    from qsun.engine.sources import find_tokenizer, local_checkpoint
    from qsun.training.data import load_examples
    from qsun.training.run import train as run_training
    from qsun.training.trainer import announce_repeatable

    announce_repeatable()
    out: Path = arguments.out
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"--out: {out} exists already, expected a new or empty folder")
    if arguments.max_length < 2:
        raise UsageError(f"--max-length: got {arguments.max_length}, expected at least 2")
    if arguments.stop_after is not None and not arguments.stop_after > 0:
        raise UsageError(f"--stop-after: got {arguments.stop_after}, expected seconds above 0")
    for name in ("teacher_weight", "teacher_temperature"):
        if arguments.teacher is None and getattr(arguments, name) is not None:
            raise UsageError(
                f"--{name.replace('_', '-')}: got it without --teacher, expected both or neither"
            )
    for path in arguments.data:
        if not path.is_file():
            raise UsageError(f"--data: {path} is no file, expected JSON lines")
    options = _options(arguments, calibration=None)
    device = _resolved_device(arguments.device)
    model = local_checkpoint(arguments.model)
    tokenizer = find_tokenizer(model)
    if arguments.calibration is not None:
        from qsun.cli.quantize import calibration_tokens

        options = _options(arguments, calibration_tokens(arguments.calibration, tokenizer))
    config = config_of(model)
    examples, report = load_examples(
        arguments.data,
        tokenizer,
        max_length=min(arguments.max_length, config.max_position_embeddings),
        vocab_size=config.vocab_size,
        on_bad_data=arguments.on_bad_data,
        on_long=arguments.on_long,
    )
    _tell_data(report, options)
    begin = time.perf_counter()
    with _log(arguments.log) as log, _interrupts() as interrupted:

        def should_stop() -> bool:
            limit = arguments.stop_after
            return interrupted() or (limit is not None and time.perf_counter() - begin >= limit)

        def progress(step: StepReport) -> None:
            log(step)
            if not arguments.json:
                _show_step(step)

        try:
            result = run_training(
                model,
                examples,
                options,
                out,
                device=device,
                state=arguments.state,
                resume=arguments.resume,
                name=arguments.name,
                data_facts=report.facts(),
                progress=progress,
                should_stop=should_stop,
            )
        except ValueError as error:
            # A group that does not divide, a state in the way: the options and the model disagree.
            raise UsageError(str(error)) from error
    _tell_result(arguments, report, result, out)
    return exits.INTERRUPTED if interrupted() and not result.finished else exits.OK


def _options(arguments: argparse.Namespace, calibration: Any) -> TrainOptions:
    import torch

    from qsun.training.base import DecoderChoice
    from qsun.training.lora import LoraOptions
    from qsun.training.loss import Distillation
    from qsun.training.options import TrainOptions

    check_calibration("--quantizer", arguments.quantizer, arguments.calibration)
    if arguments.lora is None and (arguments.lora_alpha is not None or arguments.lora_targets):
        raise UsageError("--lora-alpha, --lora-targets: got them without --lora, expected it with them")
    distillation = {
        name: value
        for name, value in (
            ("weight", arguments.teacher_weight),
            ("temperature", arguments.teacher_temperature),
        )
        if value is not None
    }
    try:
        lora = None
        if arguments.lora is not None:
            chosen = {"targets": tuple(arguments.lora_targets)} if arguments.lora_targets else {}
            alpha = 2.0 * arguments.lora if arguments.lora_alpha is None else arguments.lora_alpha
            lora = LoraOptions(arguments.lora, alpha, **chosen)
        rate = arguments.lr if arguments.lr is not None else (_LORA_RATE if lora else _FULL_RATE)
        on_gpu = _resolved_device(arguments.device).type == "cuda"
        dtype = dtype_of(arguments.dtype)
        if dtype == "auto":
            dtype = torch.bfloat16 if on_gpu else torch.float32
        return TrainOptions(
            method=arguments.method,
            first_token=arguments.first_token,
            decoder=DecoderChoice(
                path=arguments.decoder,
                bits=arguments.bits,
                group_size=arguments.group_size,
                symmetric=not arguments.asymmetric,
                quantizer=arguments.quantizer,
                calibration=calibration,
            ),
            lora=lora,
            epochs=arguments.epochs,
            steps=arguments.steps,
            batch_size=arguments.batch_size,
            pack_tokens=arguments.pack_tokens,
            learning_rate=rate,
            schedule=arguments.schedule,
            warmup=arguments.warmup,
            floor=arguments.floor,
            weight_decay=arguments.weight_decay,
            clip=arguments.clip,
            seed=arguments.seed,
            dtype=dtype,  # type: ignore[arg-type]  # "auto" was resolved above
            checkpointing=arguments.checkpointing,
            compiled=arguments.compile,
            teacher=arguments.teacher,
            distillation=Distillation(**distillation),
            save_every=arguments.save_every,
        )
    except ValueError as error:
        raise UsageError(str(error)) from None


def _resolved_device(text: str | None) -> Any:
    from qsun.modules.decode import resolve_device

    return resolve_device(device_of(text))


def _tell_data(report: DataReport, options: TrainOptions) -> None:
    for line in report.bad:
        print(f"qsun: left out {line}", file=sys.stderr)
    left_out = [
        f"{count} {what}"
        for count, what in (
            (len(report.bad), "damaged lines left out"),
            (report.dropped, "dropped as too long"),
            (report.truncated, "truncated"),
        )
        if count
    ]
    print(
        f"{report.examples} examples, {report.prompt_tokens} prompt and {report.response_tokens} response "
        f"tokens{''.join(', ' + text for text in left_out)}",
        file=sys.stderr,
    )


def _show_step(step: StepReport) -> None:
    print(
        f"step {step.step}/{step.steps}  loss {step.loss:.4f}  rate {step.rate:.2e}  "
        f"gradient {step.gradient_norm:.2f}  {step.tokens_per_s:.0f} tokens/s",
        flush=True,
    )


def _tell_result(
    arguments: argparse.Namespace, report: DataReport, result: TrainingResult, out: Path
) -> None:
    if arguments.json:
        summary = {
            "out": str(out) if result.finished else None,
            "finished": result.finished,
            "steps": result.steps,
            "first_loss": result.losses[0] if result.losses else None,
            "last_loss": result.losses[-1] if result.losses else None,
            "positions": result.positions,
            "seconds": round(result.seconds, 2),
            "data": report.facts(),
        }
        print(json.dumps(summary, indent=2))
    elif result.finished:
        print(f"{out}: {result.steps} steps in {result.seconds:.1f} s, loss {result.losses[-1]:.4f}")
    if not result.finished:
        print(f"qsun: stopped after step {result.steps}; --resume continues", file=sys.stderr)


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """The first interrupt lets the step end and the state be saved; the second ends the process."""
    told: list[int] = []

    def note(number: int, frame: Any) -> None:
        if told:
            raise KeyboardInterrupt
        told.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # signals are the main thread's
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(told)
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _log(path: Path | None) -> Iterator[Callable[[StepReport], None]]:
    if path is None:
        yield lambda step: None
        return
    with path.open("a", encoding="utf-8") as file:

        def write(step: StepReport) -> None:
            line = {
                "step": step.step,
                "loss": step.loss,
                "rate": step.rate,
                "gradient_norm": step.gradient_norm,
                "positions": step.positions,
                "seconds": step.seconds,
            }
            file.write(json.dumps(line) + "\n")
            file.flush()

        yield write
