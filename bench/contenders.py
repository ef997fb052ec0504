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
from qsun_bench.cases.write import WriteOperands
from qsun_bench.peers import Prepared
from qsun_bench.variants import OURS, SM80, prepare_sm80, sm80_refusal
from qsun_kernels import (
    AttentionPlan,
    paged_attention_decode,
    plan_paged_attention,
    prepare_weight,
    wna16_linear,
    write_kv_cache,
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
        return self.name in OURS


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
    _, num_kv_heads, block_size, _ = kv.k_cache.shape

    def make_plan() -> AttentionPlan:
        return plan_paged_attention(
            kv.seq_lens,
            num_q_heads=kv.q_heads,
            num_kv_heads=num_kv_heads,
            head_dim=kv.head_dim,
            block_size=block_size,
            dtype=kv.dtype,
            kv_dtype=kv.k_cache.dtype,
            kv_scales=kv.kv_scales,
            window=kv.window,
            block_table=kv.block_table if kv.shares_prefixes else None,
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
            k_scale=kv.k_scale,
            v_scale=kv.v_scale,
            plan=plan,
        )
        assert isinstance(out, Tensor)
        return out

    return Prepared(run, kv.tensors, plan=make_plan if plan.tensors else None)


def _prepare_write(operands: WriteOperands, backend: BackendName) -> Prepared:
    own = operands.copy()
    call = own.call

    def run(qkv: Tensor) -> Tensor:
        q, k, v = own.views(qkv)
        return write_kv_cache(
            *(k, v, own.k_cache, own.v_cache, call.slot_mapping),
            q=q,
            positions=call.positions,
            cos_sin=call.cos_sin,
            q_norm=call.q_norm,
            k_norm=call.k_norm,
            eps=call.eps,
            rotate=call.rotate,
            k_scale=own.k_scale,
            v_scale=own.v_scale,
            backend=backend,
        )

    return Prepared(run, own.tensors, judge=lambda qkv, q: operands.judge(qkv, q, own))


def contenders(op: str, variants: Sequence[str] = ()) -> Sequence[Contender]:
    """Every contender of an operator, ours first in the order of preference, then the variants of ours that
    are asked for.
    """
    preparers: dict[str, Callable[[Any, BackendName], Prepared]] = {
        "wna16_linear": _prepare_linear,
        "paged_attention_decode": _prepare_attention,
        "write_kv_cache": _prepare_write,
    }
    if op not in preparers:
        raise ValueError(f"op is {op!r}, expected one of {', '.join(preparers)}")
    ours = [_ours(op, backend, preparers[op]) for backend in BACKENDS]
    others = [
        Contender(peer.NAME, peer.OPERATOR, peer.available, peer.prepare, getattr(peer, "NOTE", ""))
        for peer in peers.modules()
        if op == peer.OPERATOR
    ]
    own_variants = [_variant(name, op) for name in variants]
    return [*ours, *own_variants, *others]


def _variant(name: str, op: str) -> Contender:
    if (name, op) != (SM80, "wna16_linear"):
        raise ValueError(f"variants holds {name!r} of {op}, expected {SM80!r} of wna16_linear")
    return Contender(
        name, op, sm80_refusal, prepare_sm80, "as a GPU of compute capability 8.0 would launch it"
    )
