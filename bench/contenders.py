"""Who runs a case: our backends by the names cuda, triton, torch, and the peers by their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qsun_bench import peers
from qsun_bench.cases import Case
from qsun_bench.cases.attention import AttentionOperands
from qsun_bench.cases.wna16 import Wna16Operands
from qsun_bench.peers import Prepared
from qsun_kernels import (
    AttentionPlan,
    paged_attention_decode,
    plan_paged_attention,
    prepare_weight,
    wna16_linear,
)
from qsun_kernels.backends.dispatch import refusal
from qsun_kernels.backends.problems import BACKENDS, BackendName


@dataclass(frozen=True, slots=True)
class Contender:
    """name: as in the records. op: the operator it runs.

    available: None, or why it cannot run a case on a device.
    prepare: lays the operands of a case out in memory of their own and returns what runs them.
    note: what a reader of its figures must know.
    """

    name: str
    op: str
    available: Callable[[Case, torch.device], str | None]
    prepare: Callable[[Any], Prepared]
    note: str = ""

    @property
    def is_ours(self) -> bool:
        return self.name in BACKENDS


def _ours(op: str, backend: BackendName, prepare: Callable[[Any, BackendName], Prepared]) -> Contender:
    def available(case: Case, device: torch.device) -> str | None:
        if backend == "triton" and device.type != "cuda":
            return f"on {device} Triton runs through its interpreter, whose time says nothing"
        return refusal(backend, case.problem(device))

    return Contender(backend, op, available, lambda operands: prepare(operands, backend))


def _prepare_linear(operands: Wna16Operands, backend: BackendName) -> Prepared:
    weight = prepare_weight(operands.copy().weight, dtype=operands.dtype, backend=backend)

    def run(x: Tensor) -> Tensor:
        return wna16_linear(x, weight)

    return Prepared(run, weight.tensors)


def _prepare_attention(operands: AttentionOperands, backend: BackendName) -> Prepared:
    kv = operands.copy()
    _, num_kv_heads, block_size, head_dim = kv.k_cache.shape

    def make_plan() -> AttentionPlan:
        return plan_paged_attention(
            kv.seq_lens,
            num_q_heads=kv.q_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            block_size=block_size,
            dtype=kv.k_cache.dtype,
            window=kv.window,
            backend=backend,
        )

    plan = make_plan()

    def run(q: Tensor) -> Tensor:
        out = paged_attention_decode(
            q,
            kv.k_cache,
            kv.v_cache,
            kv.block_table,
            kv.seq_lens,
            softmax_scale=kv.softmax_scale,
            window=kv.window,
            plan=plan,
        )
        assert isinstance(out, Tensor)
        return out

    return Prepared(run, kv.tensors, plan=make_plan if plan.tensors else None)


def contenders(op: str) -> Sequence[Contender]:
    """Every contender of an operator, ours first in the order of preference."""
    preparers: dict[str, Callable[[Any, BackendName], Prepared]] = {
        "wna16_linear": _prepare_linear,
        "paged_attention_decode": _prepare_attention,
    }
    if op not in preparers:
        raise ValueError(f"op is {op!r}, expected one of {', '.join(preparers)}")
    ours = [_ours(op, backend, preparers[op]) for backend in BACKENDS]
    others = [
        Contender(peer.NAME, peer.OPERATOR, peer.available, peer.prepare, getattr(peer, "NOTE", ""))
        for peer in peers.modules()
        if op == peer.OPERATOR
    ]
    return [*ours, *others]
