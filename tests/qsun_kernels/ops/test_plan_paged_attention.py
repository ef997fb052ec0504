"""plan_paged_attention: one plan for several calls, and who may not use it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qsun_kernels import (
    AttentionPlan,
    BackendUnavailable,
    paged_attention_decode,
    plan_paged_attention,
    use_backend,
)
from qsun_kernels.backends import dispatch
from qsun_kernels.backends.problems import AttentionImplementation
from qsun_kernels.backends.reference import paged_attention_decode as reference
from qsun_kernels.testing import inputs
from qsun_kernels.testing.inputs import PagedAttentionInputs
from qsun_kernels.testing.judge import judge_paged_attention_decode

SIZES: dict[str, Any] = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 16, "block_size": 4}


def case_of(**changes: Any) -> PagedAttentionInputs:
    sizes: dict[str, Any] = SIZES | {"dtype": torch.float32} | changes
    lengths = sizes.pop("seq_lens", [5, 0, 21])
    return inputs.paged_attention_inputs(inputs.generator(0), lengths, **sizes)


def plan_of(case: PagedAttentionInputs, **changes: Any) -> AttentionPlan:
    arguments: dict[str, Any] = SIZES | {
        "dtype": case.q.dtype,
        "kv_dtype": case.k_cache.dtype,
        "q_len": case.q_len,
        "window": case.window,
    }
    return plan_paged_attention(case.seq_lens, **(arguments | changes))


def attend(case: PagedAttentionInputs, plan: AttentionPlan | None, backend: Any = None) -> Tensor:
    return paged_attention_decode(
        case.q,
        case.k_cache,
        case.v_cache,
        case.block_table,
        case.seq_lens,
        softmax_scale=case.softmax_scale,
        window=case.window,
        plan=plan,
        backend=backend,
    )


@pytest.mark.parametrize("q_len", [1, 3])
def test_one_plan_serves_several_calls(q_len: int, device: torch.device) -> None:
    case = case_of(q_len=q_len, window=9, device=device)
    plan = plan_of(case)
    assert (plan.batch, plan.q_len, plan.problem.window) == (3, q_len, 9)
    other = replace(case, q=case.q.flip(1).contiguous(), k_cache=case.v_cache, v_cache=case.k_cache)
    for layer in (case, other):
        assert torch.equal(attend(layer, plan), attend(layer, None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_plan_that_is_given_the_block_table(dtype: torch.dtype, device: torch.device) -> None:
    """Requests 0, 3 and 5 have 300 tokens in common: whoever shares them, and not, gets the same results."""
    sizes = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64, "block_size": 16}
    case = case_of(seq_lens=[310, 40, 0, 333, 64, 301], dtype=dtype, device=device, **sizes)
    inputs.share_prefix(case, (0, 3, 5), 18)
    plan = plan_of(case, block_table=case.block_table, **sizes)
    got = paged_attention_decode(
        *(case.q, case.k_cache, case.v_cache, case.block_table, case.seq_lens),
        softmax_scale=case.softmax_scale,
        plan=plan,
        lse=True,
    )
    judge_paged_attention_decode(got, case).require()
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(case, plan), got[0])


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"num_q_heads": 8}, "num_q_heads 8, expected one for num_q_heads 4"),
    ({"num_kv_heads": 1}, "num_kv_heads 1, expected one for num_kv_heads 2"),
    ({"head_dim": 32}, "head_dim 32, expected one for head_dim 16"),
    ({"block_size": 8}, "block_size 8, expected one for block_size 4"),
    ({"window": 7}, "window 7, expected one for window None"),
    ({"dtype": torch.float16}, "dtype torch.float16, expected one for dtype torch.float32"),
    ({"kv_dtype": torch.bfloat16}, "kv_dtype torch.bfloat16, expected one for kv_dtype torch.float32"),
    ({"q_len": 2}, "q_len 2, expected one for q_len 1"),
]


@pytest.mark.damaged
@pytest.mark.parametrize(("changes", "says"), REFUSED, ids=lambda value: str(value)[:30])
def test_a_plan_of_other_sizes_is_refused(changes: dict[str, Any], says: str) -> None:
    case = case_of()
    with pytest.raises(ValueError, match=f"plan was made for {says}"):
        attend(case, plan_of(case, **changes))


@pytest.mark.damaged
def test_a_plan_of_another_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="plan was made for batch 2, expected one for batch 3"):
        attend(case_of(), plan_of(case_of(seq_lens=[1, 2])))


@pytest.mark.damaged
def test_a_plan_of_another_backend_is_refused() -> None:
    case = case_of()
    plan = plan_of(case, backend="torch")
    says = "plan was made for backend 'torch', expected one for 'triton'"
    with pytest.raises(ValueError, match=says):
        attend(case, plan, "triton")
    with use_backend("triton"), pytest.raises(ValueError, match=says):
        attend(case, plan)


@pytest.mark.damaged
def test_what_is_no_plan_is_refused() -> None:
    with pytest.raises(TypeError, match="plan is a tuple, expected an AttentionPlan"):
        attend(case_of(), ())  # type: ignore[arg-type]


def test_a_call_runs_on_the_backend_of_its_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """And gets the tensors of the plan, as they are."""
    marks = (torch.tensor([7]),)
    got: list[object] = []

    def run(*arguments: Any) -> tuple[Tensor, Tensor]:
        got.append(arguments[10])
        return reference.run(*arguments)

    planning = AttentionImplementation(
        reference.supports, run, reference.describe, lambda problem, lengths, q_len, window, table: marks
    )
    monkeypatch.setitem(dispatch.load_backend("torch").IMPLEMENTATIONS, "paged_attention_decode", planning)  # type: ignore[arg-type]
    dispatch.forget_choices()
    try:
        case = case_of()
        plan = plan_of(case, backend="torch")
        assert plan.backend == "torch" and plan.tensors is marks
        attend(case, plan)
        attend(case, None)
        assert got == [marks, None]
    finally:
        monkeypatch.undo()
        dispatch.forget_choices()


def test_a_backend_that_cannot_run_the_problem_makes_no_plan() -> None:
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    with pytest.raises(BackendUnavailable, match="paged_attention_decode"):
        plan_of(case_of(), backend="cuda")


@pytest.mark.parametrize("inside", [False, True], ids=["made outside", "made inside"])
def test_plans_in_compiled_code(inside: bool) -> None:
    case = case_of(window=9)
    outside = plan_of(case)

    def step(q: Tensor, seq_lens: Tensor) -> Tensor:
        plan = outside
        if inside:
            plan = plan_paged_attention(seq_lens, **SIZES, dtype=torch.float32, window=9)
        return attend(replace(case, q=q, seq_lens=seq_lens), plan)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(case.q, case.seq_lens), attend(case, None))


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"seq_lens": [1, 2]}, TypeError, "seq_lens is a list, expected a torch.Tensor"),
    ({"seq_lens": torch.zeros(2)}, TypeError, "seq_lens has dtype torch.float32, expected torch.int32"),
    ({"seq_lens": torch.zeros(2, 1, dtype=torch.int32)}, ValueError, r"seq_lens has shape \(2, 1\)"),
    ({"seq_lens": torch.zeros(4, dtype=torch.int32)[::2]}, ValueError, "seq_lens has strides"),
    ({"num_q_heads": 5}, ValueError, "num_q_heads is 5, expected a multiple of num_kv_heads, 2"),
    ({"num_kv_heads": 0}, ValueError, "num_kv_heads is 0, expected at least 1"),
    ({"head_dim": 2.0}, TypeError, "head_dim is 2.0, expected an integer"),
    ({"block_size": -1}, ValueError, "block_size is -1, expected at least 1"),
    ({"q_len": 0}, ValueError, "q_len is 0, expected at least 1"),
    ({"q_len": 9}, ValueError, "q_len is 9, expected at most 8"),
    ({"window": 0}, ValueError, "window is 0, expected at least 1"),
    ({"dtype": torch.int8}, TypeError, "dtype is torch.int8, expected one of torch.float32"),
    ({"kv_dtype": "fp8"}, TypeError, "kv_dtype is 'fp8', expected one of torch.float32"),
    ({"backend": "rocm"}, ValueError, "backend is 'rocm'"),
    ({"block_table": [[1], [2]]}, TypeError, "block_table is a list, expected a torch.Tensor or None"),
    (
        {"block_table": torch.zeros(2, 3)},
        TypeError,
        "block_table has dtype torch.float32, expected torch.int",
    ),
    ({"block_table": torch.zeros(2, dtype=torch.int32)}, ValueError, r"block_table has shape \(2,\)"),
    (
        {"block_table": torch.zeros(3, 1, dtype=torch.int32)},
        ValueError,
        "block_table has 3 rows, expected one for each of the 2 requests of seq_lens",
    ),
]


@pytest.mark.damaged
@pytest.mark.parametrize(("changes", "error", "says"), BAD, ids=lambda value: str(value)[:40])
def test_wrong_arguments_are_named(changes: dict[str, Any], error: type[Exception], says: str) -> None:
    arguments: dict[str, Any] = SIZES | {
        "seq_lens": torch.ones(2, dtype=torch.int32),
        "dtype": torch.float32,
    }
    plan_paged_attention(**arguments)
    with pytest.raises(error, match=says):
        plan_paged_attention(**(arguments | changes))
