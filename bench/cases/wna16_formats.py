"""Suites of `wna16_linear` that ask other questions than how fast it is on its main format.

wna16-formats   what another width, group, zero point, dtype or act-order costs, against W4 in symmetric
                groups of 128 with bfloat16
wna16-steps     what one token more costs where a tile of 16 or 32 is full
wna16-sm80      the kernels that GPUs before sm_90 run, on whatever GPU this is
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from qsun_bench.cases import Selection, Suite
from qsun_bench.cases.wna16 import Wna16Case, cases
from qsun_bench.shapes import matrices
from qsun_bench.variants import SM80
from qsun_kernels.quant import QuantSpec

_FORMAT_MATRICES = ("llama-3.1-8b.gate_up", "llama-3.1-8b.o")
_FORMAT_M = (1, 8, 16, 32, 64)
_STEP_M = (16, 17, 32, 33)
_SM80_M = (1, 2, 4, 8, 16, 32, 64)
_SMALL, _SMALL_M = ("smollm2-135m.down",), (1, 8)


@dataclass(frozen=True, slots=True)
class Format:
    """A kind of weight and activation. most: of the time of the first format that it should take.

    most_up_to: the number of tokens up to which it should, None for all.
    """

    name: str
    spec: QuantSpec
    dtype: torch.dtype = torch.bfloat16
    act_order: bool = False
    most: float = 1.0
    most_up_to: int | None = None


FORMATS = (
    Format("W4 g128", QuantSpec(4, 128, True)),
    Format("W4 g128 zeros", QuantSpec(4, 128, False), most=1.03),
    Format("W4 g32", QuantSpec(4, 32, True), most=1.12),
    Format("W4 g128 float16", QuantSpec(4, 128, True), dtype=torch.float16, most=1.05),
    Format("W4 g128 act-order", QuantSpec(4, 128, True), act_order=True, most=1.05),
    Format("W8 g128", QuantSpec(8, 128, True), most=2.05),
    Format("W3 g128", QuantSpec(3, 128, True), most=0.85, most_up_to=16),
    Format("W2 g128", QuantSpec(2, 128, True), most=0.62, most_up_to=16),
)
"""The first is what the others are held against."""


def _formats(selection: Selection) -> Sequence[Wna16Case]:
    is_small = selection.smoke or selection.device.type != "cuda"
    names = selection.shapes or (_SMALL if is_small else _FORMAT_MATRICES)
    rows = selection.batches or (_SMALL_M if is_small else _FORMAT_M)
    found = []
    for sizes, matrix in matrices(names):
        N, K = sizes.linears[matrix]
        for kind in FORMATS:
            group = kind.spec.group_size
            if group != "channel" and K % group:
                continue
            label = f"{sizes.name}.{matrix}"
            found += [Wna16Case(label, M, N, K, kind.spec, kind.dtype, kind.act_order) for M in rows]
    return found


def _at(selection: Selection, rows: tuple[int, ...]) -> Sequence[Wna16Case]:
    if not selection.smoke and selection.device.type == "cuda":
        selection = replace(selection, shapes=selection.shapes or ("decode7",))
    return cases(replace(selection, batches=selection.batches or rows))


FORMATS_SUITE = Suite(
    name="wna16-formats",
    op=Wna16Case.op,
    summary="low-bit matrix multiplication in every kind of weight, against W4 in groups of 128",
    baseline="dense",
    cases=_formats,
    own_formats=True,
)
STEPS_SUITE = Suite(
    name="wna16-steps",
    op=Wna16Case.op,
    summary="low-bit matrix multiplication where a tile of 16 or 32 tokens overflows",
    baseline="dense",
    cases=lambda selection: _at(selection, _STEP_M),
)
SM80_SUITE = Suite(
    name="wna16-sm80",
    op=Wna16Case.op,
    summary="low-bit matrix multiplication by the kernels of GPUs before sm_90",
    baseline="marlin",
    cases=lambda selection: _at(selection, _SM80_M),
    variants=(SM80,),
)
