"""Peers of attention: who refuses what, and that each is called with the arguments that it has.

FlashAttention 3 is registered here with the schema of vLLM 0.24's library, FlashInfer's wrapper with the
parameters of 0.6.12; behind both is arithmetic on what they were given.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from qsun_bench import measure
from qsun_bench.cases.attention import AttentionCase
from qsun_bench.gate import judge
from qsun_bench.kv_choice import KvChoice
from qsun_bench.peers import (
    Prepared,
    _attention,
    _flashinfer,
    _packages,
    fa3,
    flashinfer_cuda,
    flashinfer_tensor,
    sdpa,
)
from qsun_bench.plan_time import time_plan

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PEERS = (fa3, flashinfer_cuda, flashinfer_tensor)

FWD = (
    "fwd(Tensor! q, Tensor k, Tensor v, Tensor? k_new, Tensor? v_new, Tensor? q_v, Tensor!? out, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, Tensor? seqused_q, "
    "Tensor? seqused_k, int? max_seqlen_q, int? max_seqlen_k, Tensor? page_table, Tensor? kv_batch_idx, "
    "Tensor? leftpad_k, Tensor? rotary_cos, Tensor? rotary_sin, Tensor? seqlens_rotary, Tensor? q_descale, "
    "Tensor? k_descale, Tensor? v_descale, float softmax_scale, bool is_causal, int window_size_left, "
    "int window_size_right, float softcap, bool is_rotary_interleaved, Tensor? scheduler_metadata, "
    "int num_splits, bool? pack_gqa, int sm_margin, Tensor? s_aux, int cp_world_size, int cp_rank, "
    "Tensor? cp_tot_seqused_k) -> Tensor[]"
)
METADATA = (
    "get_scheduler_metadata(int batch_size, int max_seqlen_q, int max_seqlen_k, int num_heads, "
    "int num_heads_k, int headdim, int headdim_v, ScalarType qkv_dtype, Tensor seqused_k, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, Tensor? seqused_q, "
    "Tensor? leftpad_k, int? page_size, int max_seqlen_k_new, bool is_causal, int window_size_left, "
    "int window_size_right, bool has_softcap, int num_splits, bool? pack_gqa, int sm_margin) -> Tensor"
)


def case(
    lengths: tuple[int, ...] = (33, 1, 16),
    heads: tuple[int, int] = (8, 2),
    head_dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    window: int | None = None,
    kv: KvChoice = "auto",
) -> AttentionCase:
    return AttentionCase("a", lengths, *heads, head_dim, dtype, window=window, kv=kv)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU that no kernel is run on, and none of the packages."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for question in (_packages.missing, _packages.missing_fa3):
        question.cache_clear()
    yield
    for question in (_packages.missing, _packages.missing_fa3):
        question.cache_clear()


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.NAME)
def test_without_a_gpu_it_is_the_device(peer: Any) -> None:
    assert peer.available(case(), CPU) == "a CUDA kernel, device is cpu"


@pytest.mark.parametrize(
    ("peer", "says"),
    [
        (fa3, "no vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so on the path"),
        (flashinfer_cuda, "flashinfer is not installed"),
        (flashinfer_tensor, "flashinfer is not installed"),
    ],
    ids=lambda value: getattr(value, "NAME", None),
)
def test_without_its_package_it_is_the_package(peer: Any, says: str, hopper: None) -> None:
    assert peer.available(case(), CUDA) == says


@pytest.mark.parametrize(
    ("peer", "problem", "says"),
    [
        (fa3, case(dtype=torch.float32), "bfloat16 and float16 only, got torch.float32"),
        (fa3, case(head_dim=80), "head_dim 64, 96, 128, 192, 256 only, got 80"),
        (flashinfer_tensor, case(head_dim=96), "head_dim 64, 128, 256 only, got 96"),
        (fa3, case(kv="fp8-tensor"), "caches of values of the dtype of q only, got fp8-tensor"),
        (
            flashinfer_tensor,
            case(kv="fp8"),
            "caches of values of the dtype of q and fp8-tensor only, got fp8",
        ),
        (sdpa, case(kv="int4"), "caches of values of the dtype of q only, got int4"),
        (flashinfer_cuda, case(heads=(7, 1)), "groups of 1, 2, 3, 4, 8 query heads only, got 7"),
    ],
)
def test_what_a_kernel_does_not_take_is_told_without_its_package(
    peer: Any, problem: AttentionCase, says: str, hopper: None
) -> None:
    assert peer.available(problem, CUDA) == says


@pytest.mark.parametrize(
    ("found", "says"), [((8, 0), "needs compute capability 9.0"), ((10, 0), "9.0 alone")]
)
def test_fa3_is_for_hopper(
    found: tuple[int, int], says: str, hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: found)
    assert says in fa3.available(case(), CUDA)


def test_pages_of_a_batch() -> None:
    operands = case().operands(CPU)
    starts, indices, last = _attention.pages(operands)
    assert starts.tolist() == [0, 3, 4, 5] and last.tolist() == [1, 1, 16]
    assert starts.dtype == indices.dtype == last.dtype == torch.int32
    expected = [*operands.block_table[0, :3], operands.block_table[1, 0], operands.block_table[2, 0]]
    assert indices.tolist() == [int(page) for page in expected]


def attention(q: Tensor, keys: list[Tensor], values: list[Tensor], scale: float) -> Tensor:
    """q (B, Hq, D) over the keys and values (tokens, Hkv, D) of each request."""
    rows = []
    for row, k, v in zip(q, keys, values, strict=True):
        group = row.shape[0] // k.shape[1]
        k, v = (t.repeat_interleave(group, 1).transpose(0, 1)[None] for t in (k, v))
        rows.append(torch.nn.functional.scaled_dot_product_attention(row[None, :, None], k, v, scale=scale))
    return torch.cat(rows)[:, :, 0]


def agrees(problem: AttentionCase, prepared: Prepared) -> None:
    operands, q = problem.operands(CPU), problem.activation(CPU)
    before = q.clone()
    judgement = judge("peer", prepared.run(q), exact=operands.exact(q), plain=operands.plain(q))
    assert judgement.ok, judgement.reason
    assert torch.equal(q, before)


@pytest.fixture
def fa3_library() -> Iterator[list[dict[str, Any]]]:
    """`torch.ops._vllm_fa3_C` with the real schema; yields the arguments of each call of `fwd`."""
    library = torch.library.Library("_vllm_fa3_C", "DEF")
    library.define(FWD)
    library.define(METADATA)
    names = [part.split()[-1] for part in FWD[4:-12].rstrip(")").split(", ")]
    calls: list[dict[str, Any]] = []

    def metadata(*arguments: Any) -> Tensor:
        batch, tokens, longest, heads, kv_heads, head_dim, _, _, lengths = arguments[:9]
        assert tokens == 1 and longest == int(lengths.max()) and batch == len(lengths)
        return torch.tensor([batch, heads, kv_heads, head_dim], dtype=torch.int32)

    def fwd(*arguments: Any) -> list[Tensor]:
        given = dict(zip(names, arguments, strict=False))
        calls.append(given)
        q, k, v, out = (given[name] for name in ("q", "k", "v", "out"))
        assert given["scheduler_metadata"].tolist() == [len(q), q.shape[1], k.shape[2], q.shape[2]]
        assert given["cu_seqlens_q"].tolist() == list(range(len(q) + 1)) and given["is_causal"]
        keys, values = [], []
        for row, length in zip(given["page_table"], given["seqused_k"].tolist(), strict=True):
            assert int(row.max()) < len(k)  # it may prefetch any
            left = given["window_size_left"]
            first = 0 if left < 0 else max(0, length - 1 - left)
            keys.append(k[row.long()].flatten(0, 1)[first:length])
            values.append(v[row.long()].flatten(0, 1)[first:length])
        out.copy_(attention(q, keys, values, given["softmax_scale"]))
        return []

    library.impl("fwd", fwd, "CompositeExplicitAutograd")
    library.impl("get_scheduler_metadata", metadata, "CompositeExplicitAutograd")
    yield calls
    library._destroy()


@pytest.mark.parametrize("window", [None, 5])
def test_fa3_is_given_what_its_schema_asks(window: int | None, fa3_library: list[dict[str, Any]]) -> None:
    problem = case(window=window)
    prepared = fa3.prepare(problem.operands(CPU))
    agrees(problem, prepared)
    (given,) = fa3_library
    assert (given["window_size_left"], given["window_size_right"]) == ((-1, -1) if window is None else (4, 0))
    assert (given["cp_world_size"], given["softcap"], given["s_aux"]) == (1, 0.0, None)
    assert given["k"].shape == (5, 16, 2, 64) and given["k"].is_contiguous()
    assert prepared.plan is not None and not prepared.plans_on_host


class FakeWrapper:
    """`flashinfer.BatchDecodeWithPagedKVCacheWrapper`: its methods' parameters, its rules, arithmetic."""

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Tensor | None = None,
        paged_kv_indices_buffer: Tensor | None = None,
        paged_kv_last_page_len_buffer: Tensor | None = None,
    ) -> None:
        assert kv_layout == "HND" and use_cuda_graph and not float_workspace_buffer.any()
        assert paged_kv_indptr_buffer is not None and paged_kv_indices_buffer is not None
        assert paged_kv_last_page_len_buffer is not None
        self.tensor_cores = use_tensor_cores
        self.buffers = (paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer)

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype | None = None,
        kv_data_type: torch.dtype | None = None,
        sm_scale: float | None = None,
    ) -> None:
        for buffer, value in zip(self.buffers, (indptr, indices, last_page_len), strict=True):
            assert buffer.shape == value.shape and buffer.dtype == value.dtype == torch.int32
            buffer.copy_(value)
        self.sizes = (num_qo_heads, num_kv_heads, head_dim, page_size, q_data_type, kv_data_type)
        self.window_left, self.scale = window_left, sm_scale

    def run(
        self,
        q: Tensor,
        paged_kv_cache: tuple[Tensor, Tensor],
        *,
        k_scale: float | None = None,
        v_scale: float | None = None,
    ) -> Tensor:
        k, v = paged_kv_cache
        assert self.sizes == (q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.dtype, k.dtype)
        starts, indices, last = self.buffers
        keys, values = [], []
        for request, tokens in enumerate(last.tolist()):
            pages = indices[int(starts[request]) : int(starts[request + 1])].tolist()
            length = (len(pages) - 1) * k.shape[2] + tokens
            first = 0 if self.window_left < 0 else max(0, length - 1 - self.window_left)
            for rows, cache in ((keys, k), (values, v)):
                rows.append(cache.float()[pages].transpose(1, 2).flatten(0, 1)[first:length])
        assert self.scale is not None
        assert (k.dtype == torch.float8_e4m3fn) == isinstance(k_scale, float) == isinstance(v_scale, float)
        out = attention(q.float(), keys, values, self.scale * (k_scale or 1.0)) * (v_scale or 1.0)
        return out.to(q.dtype)


@pytest.mark.parametrize(("window", "kv"), [(None, "auto"), (5, "auto"), (None, "fp8-tensor")])
@pytest.mark.parametrize("peer", [flashinfer_cuda, flashinfer_tensor], ids=lambda peer: peer.NAME)
def test_flashinfer_is_planned_and_run(
    peer: Any, window: int | None, kv: KvChoice, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[FakeWrapper] = []

    def wrapper(*arguments: Any, **named: Any) -> FakeWrapper:
        made.append(FakeWrapper(*arguments, **named))
        return made[-1]

    package = SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=wrapper)
    monkeypatch.setattr(_packages, "load", lambda name: package)
    monkeypatch.setattr(_flashinfer, "_WORKSPACE_BYTES", 1024)
    _flashinfer._workspace.cache_clear()
    problem = case(window=window, kv=kv)
    prepared = peer.prepare(problem.operands(CPU))
    agrees(problem, prepared)
    assert made[0].tensor_cores is (peer is flashinfer_tensor)
    assert prepared.plans_on_host and prepared.plan is not None
    _flashinfer._workspace.cache_clear()


def test_a_plan_is_timed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[str] = []
    nothing = Prepared(lambda q: q, ())
    assert time_plan(nothing, CPU) is None
    us = time_plan(Prepared(lambda q: q, (), plan=lambda: planned.append("again")), CPU)
    assert us is not None and us > 0 and len(planned) > 10

    monkeypatch.setattr(measure, "_time", lambda case, rotation, device, seconds: 5.0)
    monkeypatch.setattr(measure, "time_plan", lambda prepared, device: 2.5)
    monkeypatch.setattr(measure, "copies_to_overflow", lambda size, device: 2)
    from qsun_bench.contenders import contenders

    (ours,) = (one for one in contenders("paged_attention_decode") if one.name == "torch")
    (outcome,) = measure.measure([case()], [ours], CPU, seconds=0.01)
    assert outcome.record is not None and (outcome.record.us, outcome.record.plan_us) == (5.0, 2.5)
