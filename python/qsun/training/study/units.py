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
from qsun.modules.quantize import Quantizer
from qsun.training.batch import Method
from qsun_kernels.quant import GroupSize

DecoderKind = Literal["base", "tuned"]

LOW_BITS = (4, 3, 2)
FULL_RATE, SUN_RATE, PAIR_RATE = 1e-4, 3e-4, 2e-3
"""Of three rates, a factor of two apart, those with the least loss on a tenth of the training data that was
kept aside: one seed, summed over the families.  That of SUN lies between its two best; pairs in the whole
model take half of the rate of pairs in the prefill module, without a trial."""


@dataclass(frozen=True, slots=True)
class Rounding:
    """How a decoder is quantised.

    quantizer, group_size, symmetric: as in `load_decode_module`.  sequences: of training data that the
    quantiser looks at, all families together.
    """

    quantizer: Quantizer
    group_size: GroupSize | None
    symmetric: bool
    sequences: int


AWQ = Rounding("awq", None, True, 48)
"""The package's default groups: 64, the largest that divide this model; 4.25 bits a weight at 4 bits."""
GPTQ = Rounding("gptq", 32, False, 192)
"""The finest groups that the kernels read, with zero points: 4.75 bits a weight at 4 bits."""


@dataclass(frozen=True, slots=True)
class Serving:
    """One arm: who decodes, in how many bits, and who reads the prompt.

    decoder: the base, or the fine-tuned model itself.  bits: 16, or those that it is quantised to.
    module: whether the trained module reads the prompt; else the decoder's own weights do.
    rounding: how it is quantised.
    """

    arm: str
    decoder: DecoderKind
    bits: int
    module: bool
    rounding: Rounding = AWQ


@dataclass(frozen=True, slots=True)
class Unit:
    """method None trains nothing.  bits, rounding: of the decoder in training.  rank: of pairs; None: all
    weights."""

    name: str
    method: Method | None
    servings: tuple[Serving, ...]
    first_token: FirstToken = "decode"
    bits: int = 16
    rounding: Rounding = AWQ
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
        *(
            Unit(
                f"qsun{bits}-gptq",
                "sun",
                (Serving(f"qsun{bits}-gptq", "base", bits, True, GPTQ),),
                bits=bits,
                rounding=GPTQ,
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
    ("qsun4-gptq", "sun"),
    ("qsun3-gptq", "sun"),
    ("qsun2-gptq", "sun"),
    ("qsun4-gptq", "full"),
    ("qsun4-gptq", "qsun4"),
    ("qsun3-gptq", "qsun3"),
    ("qsun2-gptq", "qsun2"),
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
    ("qsun4-gptq", "base"),
    ("lora", "base"),
    ("sun-lora", "base"),
)
"""(a, b): reported is a minus b, paired by item."""
