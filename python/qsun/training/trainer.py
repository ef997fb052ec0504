"""The training loop: steps, checkpoints of the run, and where it stops."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from qsun.training.base import Base
from qsun.training.batch import Example, Pack
from qsun.training.forward import forward
from qsun.training.kernels import compiled_kernels, eager_kernels
from qsun.training.loss import Teacher, response_loss, token_losses
from qsun.training.optimizer import (
    clip_gradients,
    learning_rate,
    make_optimizer,
    optimizer_tensors,
    restore_optimizer,
    set_learning_rate,
)
from qsun.training.options import TrainOptions
from qsun.training.order import DataOrder, cut_into_packs
from qsun.training.stack import TrainingStack
from qsun.training.state import (
    RunState,
    TrainingStopped,
    latest,
    load_state,
    require_same_run,
    save_state,
)


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a step did.  step: from 1.  loss: mean over its predicted tokens.  positions: computed in it."""

    step: int
    steps: int
    loss: float
    rate: float
    gradient_norm: float
    positions: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """Positions of prompts and answers a second."""
        return self.positions / self.seconds


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """losses: of every step, those before a resumption included.  finished: False when told to stop early."""

    steps: int
    losses: list[float]
    positions: int
    seconds: float
    finished: bool


def announce_repeatable() -> None:
    """Tell cuBLAS to repeat its results.  It reads this once, before its first product in a process."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Run with algorithms that give the same bits every time on the same device."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if device.type == "cuda":
        announce_repeatable()
    torch.use_deterministic_algorithms(True)
    # Every buffer here is written before it is read.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


class Trainer:
    """One run.

    prefill: the trained stack.  decode: the frozen decoder, None for method "full".
    teacher: the stack and lm_head that are distilled from.
    """

    def __init__(
        self,
        base: Base,
        prefill: TrainingStack,
        decode: TrainingStack | None,
        examples: Sequence[Example],
        options: TrainOptions,
        *,
        teacher: tuple[TrainingStack, Tensor] | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        """identity: what else a resumed run must agree on, such as the digest of the data."""
        if (decode is None) != (options.method == "full"):
            raise ValueError(f"decode is {decode!r}, expected a stack for 'sun' and None for 'full'")
        if (teacher is None) != (options.teacher is None):
            raise ValueError(f"teacher is {teacher!r}, expected what options.teacher says")
        self.base = base
        self.prefill = prefill
        self.decode = decode
        self.examples = examples
        self.options = options
        self._teacher = teacher
        self._kernels = compiled_kernels() if options.compiled else eager_kernels()
        self._parameters = prefill.parameters()
        self._optimizer = make_optimizer(
            self._parameters, weight_decay=options.weight_decay, betas=(options.beta1, options.beta2)
        )
        self._order = DataOrder(len(examples), options.batch_size, options.seed)
        self.steps = options.steps or max(1, math.ceil(options.epochs * self._order.steps_per_epoch))
        self._run = {**options.facts(), **(identity or {}), "total_steps": self.steps}
        self.done = 0
        self.losses: list[float] = []

    def resume(self, directory: Path) -> bool:
        """Continue from the newest checkpoint of a folder; False when it has none.

        Raises CheckpointError when it is damaged, or of a run with other settings or data.
        """
        path = latest(directory)
        if path is None:
            return False
        state = load_state(path)
        require_same_run(state.run, self._run, path)
        self._restore(state)
        return True

    def _restore(self, state: RunState) -> None:
        with torch.no_grad():
            for name, tensor in self._parameters.items():
                tensor.copy_(state.weights[name])
        restore_optimizer(self._optimizer, self._parameters, state.optimizer)
        self.done, self.losses = state.step, list(state.losses)

    def run(
        self,
        directory: Path | None = None,
        *,
        progress: Callable[[StepReport], None] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> TrainingResult:
        """Train until the last step.

        directory: for checkpoints of the run, which the caller removes; None for none.
        should_stop: asked after each step; True saves a checkpoint and returns early.
        Raises TrainingStopped, naming the last good checkpoint, when loss or gradient are no numbers or a
        checkpoint cannot be written.
        """
        begin, positions = time.perf_counter(), 0
        with repeatable(self.base.device):
            while self.done < self.steps:
                report = self._step(directory)
                positions += report.positions
                if progress is not None:
                    progress(report)
                stopping = self.done < self.steps and should_stop()
                every = self.options.save_every
                if directory is not None and (
                    stopping or (every and self.done % every == 0) or self.done == self.steps
                ):
                    self.save(directory)
                if stopping:
                    break
        seconds = time.perf_counter() - begin
        return TrainingResult(self.done, self.losses, positions, seconds, self.done == self.steps)

    def save(self, directory: Path) -> Path:
        """Write a checkpoint of the run."""
        return save_state(
            directory,
            step=self.done,
            losses=self.losses,
            run=self._run,
            weights=self._parameters,
            optimizer=optimizer_tensors(self._optimizer, self._parameters),
        )

    def _step(self, directory: Path | None) -> StepReport:
        begin = time.perf_counter()
        options = self.options
        chosen = [self.examples[i] for i in self._order.step(self.done)]
        rate = learning_rate(
            self.done,
            peak=options.learning_rate,
            warmup=round(options.warmup * self.steps),
            total=self.steps,
            schedule=options.schedule,
            floor=options.floor,
        )
        set_learning_rate(self._optimizer, rate)
        self._optimizer.zero_grad(set_to_none=True)
        loss = self.backward(chosen)
        norm = clip_gradients(self._parameters, options.clip)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            found = None if directory is None else latest(directory)
            good = "there is no checkpoint" if found is None else f"the last good checkpoint is {found}"
            raise TrainingStopped(
                f"step {self.done + 1}: the loss is {loss} and the norm of its gradient {norm}, expected "
                f"finite numbers (a smaller learning rate, or damaged data?); {good}"
            )
        self._optimizer.step()
        self.done += 1
        self.losses.append(loss)
        positions = sum(e.num_positions for e in chosen)
        return StepReport(self.done, self.steps, loss, rate, norm, positions, time.perf_counter() - begin)

    def backward(self, examples: Sequence[Example]) -> float:
        """Add the gradient of the mean loss over the predicted tokens of all examples; returns that loss."""
        targets = sum(len(e.response) for e in examples)
        total = 0.0
        losses = []
        for members in cut_into_packs(examples, self.options.pack_tokens):
            pack = self.pack(members)
            loss = self.loss(pack) / targets
            if loss.requires_grad:  # prompts of one token leave nothing to the trained module
                loss.backward()
            losses.append(loss.detach())
        if losses:
            # One look at the device a step.
            total = float(torch.stack(losses).double().sum())
        return total

    def pack(self, examples: Sequence[Example]) -> Pack:
        """Lay out examples on the device of this run."""
        options = self.options
        return Pack.of(
            examples, method=options.method, first_token=options.first_token, device=self.base.device
        )

    def hidden(self, pack: Pack) -> Tensor:
        """Hidden states (M, H) of the rows that predict."""
        return forward(
            pack,
            self.base.frame,
            self.prefill,
            self.decode,
            self._kernels,
            checkpointing=self.options.checkpointing,
        )

    def loss(self, pack: Pack) -> Tensor:
        """Summed over the predicted tokens of a pack."""
        frame = self.base.frame
        teacher = None
        if self._teacher is not None:
            stack, lm_head = self._teacher
            # The same rows of the same pack, all of them through the teacher.
            with torch.no_grad():
                states = forward(_undivided(pack), frame, stack, None, self._kernels)
            teacher = Teacher(states, lm_head, self.options.distillation)
        return response_loss(self.hidden(pack), frame.lm_head, pack.targets, teacher=teacher)

    @torch.no_grad()
    def mean_loss(self, examples: Sequence[Example]) -> float:
        """-log p over the predicted tokens of examples, by the weights as they are."""
        total, count = 0.0, 0
        for members in cut_into_packs(examples, self.options.pack_tokens):
            pack = self.pack(members)
            losses = token_losses(self.hidden(pack), self.base.frame.lm_head, pack.targets)
            total += float(losses.double().sum())
            count += pack.num_targets
        return total / count


def _undivided(pack: Pack) -> Pack:
    """The same rows as one module's."""
    return replace(pack, split=pack.num_tokens, needs_prefill_output=True)
