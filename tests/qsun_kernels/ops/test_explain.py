"""explain: the table says what an operator call would do."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from qsun_kernels import explain, use_backend
from qsun_kernels.backends.problems import BACKENDS, RmsNormProblem, Wna16Problem
from qsun_kernels.backends.reference import IMPLEMENTATIONS
from qsun_kernels.ops.explain import explain_rows, representative_problems

CPU = torch.device("cpu")
NORM = RmsNormProblem(576, True, torch.bfloat16, CPU)


def test_without_a_problem_every_operator_and_backend_is_there() -> None:
    rows = explain_rows()
    assert {(row.operator, row.backend) for row in rows} == {
        (operator, backend) for operator in IMPLEMENTATIONS for backend in BACKENDS
    }
    text = explain()
    for row in rows:
        assert f"  {row.backend:<6}  {row.status:<9}  {row.detail}" in text
        assert row.problem in text


def test_exactly_one_backend_is_chosen_when_none_is_named() -> None:
    for problem in representative_problems(CPU):
        rows = explain_rows(problem)
        assert [row.backend for row in rows if row.status == "chosen"] == ["torch"]
        assert tuple(row.backend for row in rows) == BACKENDS
        assert all(row.detail for row in rows)


def test_a_problem_is_printed_with_its_values() -> None:
    text = explain(Wna16Problem(48, 100, 3, "channel", False, True, torch.float16, CPU))
    assert text.startswith(
        "wna16_linear  (N=48 K=100 bits=3 group_size=channel symmetric=False has_g_idx=True "
        "dtype=float16 device=cpu)\n"
    )
    assert "torch   chosen     torch.dense: dequantised weight kept in torch.float16" in text
    assert "considered for CUDA tensors only, device is cpu" in text


def test_the_context_and_the_argument_are_obeyed() -> None:
    with use_backend("torch"):
        assert [row.status for row in explain_rows(NORM)] == ["refused", "refused", "chosen"]
    assert explain_rows(NORM, backend="torch")[2].status == "chosen"


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_a_named_backend_that_refuses_leaves_nothing_chosen() -> None:
    rows = explain_rows(NORM, backend="cuda")
    assert [row.status for row in rows] == ["refused", "refused", "available"]
    assert rows[0].detail


def test_several_problems_keep_their_order() -> None:
    other = RmsNormProblem(64, False, torch.float32, CPU)
    assert [row.problem for row in explain_rows([other, NORM])][::3] == [
        "hidden_size=64 has_residual=False dtype=float32 device=cpu",
        "hidden_size=576 has_residual=True dtype=bfloat16 device=cpu",
    ]


def test_rows_are_plain_data() -> None:
    for row in explain_rows(NORM):
        assert all(isinstance(value, str) for value in asdict(row).values())
