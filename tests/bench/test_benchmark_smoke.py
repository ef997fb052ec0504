"""CPU operators through pytest-benchmark: `pytest tests/bench/test_benchmark_smoke.py --benchmark-only`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from qsun_bench.cases import Case
from qsun_bench.cases.attention import AttentionCase
from qsun_bench.cases.wna16 import Wna16Case
from qsun_bench.contenders import contenders
from qsun_bench.gate import judge
from qsun_kernels.quant import QuantSpec

CPU = torch.device("cpu")
CASES: tuple[Case, ...] = (
    Wna16Case("smollm2.qkv", 1, 960, 576, QuantSpec(4, 64, True), torch.bfloat16),
    Wna16Case("smollm2.qkv", 8, 960, 576, QuantSpec(4, 64, True), torch.bfloat16),
    AttentionCase("smollm2.8x64", (64,) * 8, 9, 3, 64, torch.bfloat16),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.benchmark(max_time=0.2, min_rounds=5, warmup=True, warmup_iterations=3)
def test_a_cpu_operator_is_right_and_timed(case: Case, benchmark: Callable[..., torch.Tensor]) -> None:
    (ours,) = [c for c in contenders(case.op) if c.name == "torch"]
    operands, x = case.operands(CPU), case.activation(CPU)
    prepared = ours.prepare(operands)
    got = benchmark(prepared.run, x)
    verdict = judge(case.name, got, exact=operands.exact(x), plain=operands.plain(x), terms=operands.terms(x))
    assert verdict.ok, verdict.reason
