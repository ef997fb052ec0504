"""What a training run is asked to do, checked before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args

import torch

from qsun.core import FirstToken
from qsun.training.base import DecoderChoice
from qsun.training.batch import METHODS, Method
from qsun.training.lora import LoraOptions
from qsun.training.loss import Distillation
from qsun.training.optimizer import SCHEDULES, Schedule


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """Everything about a run but its data and its base.

    method: "sun" trains a prefill module against the frozen decoder; "full" fine-tunes a whole model.
    first_token: the convention that the module is trained for (of "sun" alone).
    decoder: the decoder of "sun".  lora: train pairs in place of the weights.
    steps: of the optimizer; None is epochs times the data.  batch_size: examples a step.
    pack_tokens: most positions computed at one time: a step with more is accumulated from several packs.
    warmup: share of the steps in which the rate rises.  clip: largest norm of the gradient, 0 for none.
    dtype: of computation; trained weights are float32 whatever it is (float64 for float64).
    checkpointing: trade a second forward pass for the memory of activations.
    compiled: fuse elementwise operations by torch.compile.
    teacher: a checkpoint to be distilled from, or "base"; with `distillation`.
    save_every: steps between two checkpoints of the run; 0 for none but the last.

    Raises ValueError naming the field.
    """

    method: Method = "sun"
    first_token: FirstToken = "decode"
    decoder: DecoderChoice = field(default_factory=DecoderChoice)
    lora: LoraOptions | None = None
    epochs: float = 1.0
    steps: int | None = None
    batch_size: int = 32
    pack_tokens: int = 8192
    learning_rate: float = 2e-5
    schedule: Schedule = "cosine"
    warmup: float = 0.03
    floor: float = 0.1
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    seed: int = 0
    dtype: torch.dtype = torch.bfloat16
    checkpointing: bool = False
    compiled: bool = False
    teacher: Path | str | None = None
    distillation: Distillation = field(default_factory=Distillation)
    save_every: int = 0

    def __post_init__(self) -> None:
        self._choice("method", METHODS)
        self._choice("first_token", get_args(FirstToken))
        self._choice("schedule", SCHEDULES)
        self._choice("dtype", (torch.bfloat16, torch.float16, torch.float32, torch.float64))
        for name, least in (("batch_size", 1), ("pack_tokens", 1), ("save_every", 0), ("seed", 0)):
            self._integer(name, least)
        if self.steps is not None:
            self._integer("steps", 1)
        for name, sound, expected in (
            ("epochs", lambda x: x > 0, "above 0"),
            ("learning_rate", lambda x: x > 0, "above 0"),
            ("warmup", lambda x: 0 <= x < 1, "in [0, 1)"),
            ("floor", lambda x: 0 <= x <= 1, "in [0, 1]"),
            ("weight_decay", lambda x: x >= 0, "of at least 0"),
            ("beta1", lambda x: 0 <= x < 1, "in [0, 1)"),
            ("beta2", lambda x: 0 <= x < 1, "in [0, 1)"),
            ("clip", lambda x: x >= 0, "of at least 0"),
        ):
            value = getattr(self, name)
            if type(value) not in (int, float) or not math.isfinite(value) or not sound(value):
                raise ValueError(f"{name} is {value!r}, expected a number {expected}")
        if self.method == "full" and self.decoder != DecoderChoice():
            raise ValueError(
                f"decoder is {self.decoder!r}, expected none for method 'full', which has no frozen decoder"
            )
        if self.method == "full" and self.first_token != "decode":
            raise ValueError(f"first_token is {self.first_token!r}, expected 'decode' for method 'full'")
        if self.dtype == torch.float16:
            raise ValueError(
                "dtype is float16, whose gradients underflow, expected bfloat16 (or float32 on a CPU)"
            )

    def _choice(self, name: str, allowed: tuple[Any, ...]) -> None:
        if getattr(self, name) not in allowed:
            raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {allowed}")

    def _integer(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if type(value) is not int or value < least:
            raise ValueError(f"{name} is {value!r}, expected an integer of at least {least}")

    def facts(self) -> dict[str, Any]:
        """As JSON: what a resumed run must agree on, and what the module card tells."""
        content = asdict(self)
        content["dtype"] = str(self.dtype).removeprefix("torch.")
        # Names, not paths: the card travels, and folders may move between a run and its resumption.
        content["teacher"] = None if self.teacher is None else Path(self.teacher).name
        if self.teacher is None:
            del content["distillation"]
        decoder = content["decoder"]
        decoder["path"] = None if decoder["path"] is None else Path(decoder["path"]).name
        # The texts themselves may be long.
        texts = self.decoder.calibration
        decoder["calibration"] = (
            None if texts is None else sha256(repr([list(t) for t in texts]).encode()).hexdigest()
        )
        # Neither changes a bit of the result; fused operations round otherwise.
        for name in ("save_every", "checkpointing"):
            del content[name]
        if self.lora is not None:
            content["lora"]["targets"] = list(self.lora.targets)
        return content
