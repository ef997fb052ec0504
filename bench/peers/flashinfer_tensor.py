"""FlashInfer's decode on tensor cores, which is its prefill kernel with the heads of a group as rows."""

from __future__ import annotations

import torch

from qsun_bench.cases import Case
from qsun_bench.cases.attention import AttentionOperands
from qsun_bench.peers import Prepared, _attention, _flashinfer, _packages

NAME = "flashinfer-tensor"
OPERATOR = "paged_attention_decode"
NOTE = "planned on the host: plan_us is wall clock"


def available(case: Case, device: torch.device) -> str | None:
    refused = _attention.refusal(
        case, device, head_dims=(64, 128, 256), capability=(8, 0), caches=_flashinfer.CACHES
    )
    return refused or _packages.missing("flashinfer")


def prepare(operands: AttentionOperands) -> Prepared:
    return _flashinfer.prepare(operands, tensor_cores=True)
