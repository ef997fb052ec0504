"""Humming (`humming-kernels`): compiled for each shape when it is first called, by its own heuristics.

The heuristics map intervals of M to kernels, some thirty a shape, and a first call compiles them all. Only
those are asked for here that the cases meet, so that a shape costs seconds; which they are stays its choice.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from qsun_bench.cases import Case
from qsun_bench.cases.wna16 import DECODE_M, Wna16Operands
from qsun_bench.peers import Prepared, _packages
from qsun_kernels.quant.packing import pack_codes

NAME = "humming"
OPERATOR = "wna16_linear"


def available(case: Case, device: torch.device) -> str | None:
    refused = _packages.refusal(
        case,
        device,
        bits=(2, 3, 4, 8),
        groups=(32, 64, 128, "channel"),
        n_multiple=64,
        k_multiple=64,
        capability=(8, 0),
    )
    problem = _packages.problem_of(case, device)
    if refused is None and problem.bits == 8 and not problem.symmetric:
        refused = "zero points with up to 7 bits only"
    return refused or _packages.missing("humming.layer")


def prepare(operands: Wna16Operands) -> Prepared:
    weight = operands.weight
    spec, device = weight.spec, weight.device
    config = {
        "dtype": f"uint{spec.bits}",
        "group_size": 0 if spec.group_size == "channel" else spec.group_size,
        "has_zero_point": not spec.symmetric,
    }
    humming = _packages.load("humming.layer")
    with torch.device(device):
        layer = humming.HummingLayer(
            shape_n=weight.N, shape_k=weight.K, weight_config=config, torch_dtype=operands.dtype
        )
    # Its own format before the layer lays it out: a row's codes as one bit stream, as ours.
    tensors = {"weight": weight.qweight, "weight_scale": weight.scales.to(operands.dtype)}
    if weight.qzeros is not None:
        tensors["zero_point"] = pack_codes(weight.qzeros.t().contiguous(), spec.bits).t().contiguous()
    layer.load_from_tensors(tensors)
    layer.transform()

    intervals = humming.HummingLayerMethod.get_default_tuning_configs(layer)
    usual = _covering(intervals, DECODE_M)

    @cache
    def configuration(M: int) -> str:
        return usual if M in DECODE_M else _covering(intervals, (M,))

    def run(x: Tensor) -> Tensor:
        out: Tensor = layer(x, tuning_config=configuration(x.shape[0]))
        return out

    names = ("weight", "weight_scale", "zero_point")
    streamed = tuple(t.data for name in names if isinstance(t := getattr(layer, name, None), Tensor))
    return Prepared(run, streamed)


def _covering(intervals: Sequence[Sequence[object]], rows: Sequence[int]) -> str:
    """Those of (above, up to, configuration) that hold one of `rows`, as the JSON that the layer takes."""
    found = []
    for above, up_to, configuration in intervals:
        assert isinstance(above, int) and isinstance(up_to, int)
        if any(above < M <= up_to for M in rows):
            found.append((above, up_to, configuration))
    return json.dumps(found)
