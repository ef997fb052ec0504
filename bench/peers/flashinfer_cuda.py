"""FlashInfer's decode without tensor cores, for groups of query heads that it has a kernel for."""

from __future__ import annotations

import torch

from qsun_bench.cases import Case
from qsun_bench.cases.attention import AttentionCase, AttentionOperands
from qsun_bench.peers import Prepared, _attention, _flashinfer, _packages

NAME = "flashinfer-cuda"
OPERATOR = "paged_attention_decode"
NOTE = "planned on the host: plan_us is wall clock"

_GROUPS = (1, 2, 3, 4, 8)


def available(case: Case, device: torch.device) -> str | None:
    assert isinstance(case, AttentionCase)
    refused = _attention.refusal(
        case, device, head_dims=(64, 128, 256), capability=(8, 0), caches=_flashinfer.CACHES
    )
    group = case.q_heads // case.kv_heads
    if refused is None and group not in _GROUPS:
        refused = f"groups of {', '.join(map(str, _GROUPS))} query heads only, got {group}"
    return refused or _packages.missing("flashinfer")


def prepare(operands: AttentionOperands) -> Prepared:
    return _flashinfer.prepare(operands, tensor_cores=False)
