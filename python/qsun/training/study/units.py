"""The arms of the study, and the pieces of work that they fall into.

A unit is one training run with every way of serving its result; nothing of it is needed by another unit, so
each can run on a machine of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from qsun.core import FirstToken
from qsun.training.batch import Method

DecoderKind = Literal["base", "tuned"]

LOW_BITS = (4, 3, 2)
FULL_RATE, SUN_RATE, PAIR_RATE = 1e-4, 3e-4, 2e-3
"""Of three rates, a factor of two apart, those with the least loss on a tenth of the training data that was
kept aside: one seed, summed over the families.  That of SUN lies between its two best; pairs in the whole
model take half of the rate of pairs in the prefill module, without a trial."""


@dataclass(frozen=True, slots=True)
class Serving:
    """One arm: who decodes, in how many bits, and who reads the prompt.

    decoder: the base, or the fine-tuned model itself.  bits: 16, or those that it is quantised to by AWQ.
    module: whether the trained module reads the prompt; else the decoder's own weights do.
    """

    arm: str
    decoder: DecoderKind
    bits: int
    module: bool


@dataclass(frozen=True, slots=True)
class Unit:
    """method None trains nothing.  bits: of the decoder in training.  rank: of pairs; None: all weights."""

    name: str
    method: Method | None
    servings: tuple[Serving, ...]
    first_token: FirstToken = "decode"
    bits: int = 16
    rank: int | None = None
    learning_rate: float = FULL_RATE


def _units() -> Mapping[str, Unit]:
    units = [
        Unit("base", None, (Serving("base", "base", 16, False),)),
        Unit(
            "full",
            "full",
            (
                Serving("full", "tuned", 16, False),
                Serving("naive", "base", 16, True),
                *(Serving(f"full-awq{bits}", "tuned", bits, False) for bits in LOW_BITS),
            ),
        ),
        Unit(
            "sun",
            "sun",
            (
                Serving("sun", "base", 16, True),
                *(Serving(f"qsun-ptq{bits}", "base", bits, True) for bits in LOW_BITS),
            ),
            learning_rate=SUN_RATE,
        ),
        Unit(
            "sun-prefill",
            "sun",
            (Serving("sun-prefill", "base", 16, True),),
            first_token="prefill",
            learning_rate=SUN_RATE,
        ),
        *(
            Unit(
                f"qsun{bits}",
                "sun",
                (Serving(f"qsun{bits}", "base", bits, True),),
                bits=bits,
                learning_rate=SUN_RATE,
            )
            for bits in LOW_BITS
        ),
        Unit("lora", "full", (Serving("lora", "tuned", 16, False),), rank=16, learning_rate=PAIR_RATE / 2),
        Unit("sun-lora", "sun", (Serving("sun-lora", "base", 16, True),), rank=8, learning_rate=PAIR_RATE),
        # What the demo serves: pairs against the 4-bit decoder.
        Unit("qsun4-lora", "sun", (Serving("qsun4-lora", "base", 4, True),), bits=4, rank=8,
             learning_rate=PAIR_RATE),
    ]  # fmt: skip
    return MappingProxyType({unit.name: unit for unit in units})


UNITS = _units()

COMPARISONS: tuple[tuple[str, str], ...] = (
    ("sun", "full"),
    ("sun-prefill", "full"),
    ("sun", "naive"),
    ("sun-prefill", "sun"),
    ("qsun4", "sun"),
    ("qsun3", "sun"),
    ("qsun2", "sun"),
    ("qsun4", "qsun-ptq4"),
    ("qsun3", "qsun-ptq3"),
    ("qsun2", "qsun-ptq2"),
    ("qsun4", "full-awq4"),
    ("sun-lora", "lora"),
    ("qsun4-lora", "sun-lora"),
    ("full", "base"),
    ("sun", "base"),
    ("qsun4", "base"),
    ("qsun3", "base"),
    ("qsun2", "base"),
    ("lora", "base"),
    ("sun-lora", "base"),
)
"""(a, b): reported is a minus b, paired by item."""
