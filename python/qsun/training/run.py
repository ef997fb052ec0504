"""A whole run: load, train (or continue), write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qsun.checkpoint.reader import open_checkpoint
from qsun.modules.decode import read_frame
from qsun.modules.quantize import Progress
from qsun.training.base import (
    Base,
    load_base,
    load_frozen_decoder,
    load_trained_stack,
    require_descent,
)
from qsun.training.batch import Example
from qsun.training.data import digest_of
from qsun.training.lora import LoraPairs
from qsun.training.options import TrainOptions
from qsun.training.output import write_prefill_module, write_whole_model
from qsun.training.stack import TrainingStack
from qsun.training.state import remove_states
from qsun.training.trainer import StepReport, Trainer, TrainingResult
from qsun_kernels import QuantSpec

BASE_TEACHER = "base"


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run with everything loaded.  quantization: of its decoder, None for 16 bits or no decoder."""

    trainer: Trainer
    quantization: QuantSpec | None


def prepare(
    base_path: Path,
    examples: Sequence[Example],
    options: TrainOptions,
    *,
    device: torch.device,
    progress: Progress | None = None,
    identity: Mapping[str, Any] | None = None,
) -> Prepared:
    """Load the base, the frozen decoder and the teacher, and make the trained weights.

    identity: what a resumed run must agree on beside options, base and data.
    Raises what the loaders raise; ValueError when there is no example, or the longest does not fit the model.
    """
    if not examples:
        raise ValueError("examples is empty, expected at least one")
    base = load_base(base_path, dtype=options.dtype, device=device)
    longest = max(e.num_positions for e in examples)
    if longest > base.config.max_position_embeddings:
        raise ValueError(
            f"examples reach {longest} positions, expected at most "
            f"{base.config.max_position_embeddings}, the longest sequence that the model is meant for"
        )
    decode, quantization = (
        load_frozen_decoder(base, options.decoder, progress) if options.method == "sun" else (None, None)
    )
    prefill = _trained_stack(base, decode, quantization, options)
    teacher = None if options.teacher is None else _teacher(base, options.teacher)
    run = {"base": base.card.decoder.base, "data": digest_of(examples), **(identity or {})}
    return Prepared(
        Trainer(base, prefill, decode, examples, options, teacher=teacher, identity=run), quantization
    )


def _trained_stack(
    base: Base, decode: TrainingStack | None, quantization: QuantSpec | None, options: TrainOptions
) -> TrainingStack:
    master = torch.float64 if base.dtype == torch.float64 else torch.float32
    if options.lora is None:
        stack = load_trained_stack(base, weights_dtype=master)
        stack.require_grad()
        return stack
    if decode is not None and quantization is None and options.decoder.path is None:
        # The pairs train on the very weights of the decoder: one copy in memory.
        frozen = decode
    else:
        frozen = load_trained_stack(base, weights_dtype=base.dtype)
    pairs = LoraPairs(options.lora, base.config, seed=options.seed, device=base.device, dtype=master)
    return TrainingStack(base.config, frozen.layers, frozen.norm, base.dtype, pairs)


def _teacher(base: Base, teacher: Path | str) -> tuple[TrainingStack, Tensor]:
    if teacher == BASE_TEACHER:
        return load_trained_stack(base, weights_dtype=base.dtype), base.frame.lm_head
    path = Path(teacher)
    reader = open_checkpoint(path)
    try:
        # Its layers read the base's embedding, so it must be a fine-tuned model of this very base.
        card, embed_tokens, lm_head = read_frame(reader, base.dtype)
        require_descent(f"teacher {path}", card, base)
        tied = lm_head is embed_tokens
    finally:
        reader.close()
    stack = load_trained_stack(base, weights_dtype=base.dtype, source=path)
    return stack, base.frame.lm_head if tied else lm_head.to(base.device)


def train(
    base_path: Path,
    examples: Sequence[Example],
    options: TrainOptions,
    target: Path,
    *,
    device: torch.device,
    state: Path | None = None,
    resume: bool = False,
    name: str | None = None,
    data_facts: Mapping[str, Any] | None = None,
    with_tokenizer: bool = True,
    loading: Progress | None = None,
    progress: Callable[[StepReport], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainingResult:
    """Train and write the result to `target`, which must not exist.

    state: folder for checkpoints of the run; by default `target` with the ending ".training".  They are
        removed once the result is written, and nothing else that lies there.
    resume: continue from it if it holds a checkpoint.
    name: of the module, by default the target's.  data_facts: for the module card.
    The result of a run that `should_stop` ended early is not written.
    """
    target = target.resolve()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"target {target} exists already, expected a new or empty directory")
    state = target.with_name(target.name + ".training") if state is None else state
    if not resume and state.is_dir() and any(state.iterdir()):
        raise ValueError(f"state {state} holds a run already, expected to resume it or a folder without one")
    prepared = prepare(base_path, examples, options, device=device, progress=loading)
    trainer = prepared.trainer
    if resume:
        trainer.resume(state)
    result = trainer.run(state, progress=progress, should_stop=should_stop)
    if not result.finished:
        return result
    facts = _facts(prepared, result, data_facts or {})
    module = name or target.name
    if options.method == "sun":
        write_prefill_module(
            target, trainer.base, trainer.prefill, name=module, first_token=options.first_token, facts=facts
        )
    else:
        write_whole_model(
            target, trainer.base, trainer.prefill, name=module, facts=facts, with_tokenizer=with_tokenizer
        )
    remove_states(state)
    return result


def _facts(prepared: Prepared, result: TrainingResult, data: Mapping[str, Any]) -> dict[str, Any]:
    trainer = prepared.trainer
    facts = trainer.options.facts()
    facts["base"] = trainer.base.card.name
    facts["trained"] = "all weights" if trainer.options.lora is None else "low-rank pairs"
    if trainer.options.method == "sun":
        bits = prepared.quantization
        facts["decoder"] = {**facts["decoder"], "quantization": "16-bit" if bits is None else str(bits)}
    else:
        del facts["decoder"], facts["first_token"]
    facts["data"] = dict(data)
    facts["steps"] = result.steps
    facts["first_loss"], facts["last_loss"] = result.losses[0], result.losses[-1]
    facts["made_by"] = f"qsun {_own_version()}"
    return facts


def _own_version() -> str:
    try:
        return version("qsun")
    except PackageNotFoundError:
        return "not installed"
