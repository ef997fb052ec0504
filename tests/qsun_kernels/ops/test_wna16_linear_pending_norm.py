"""A norm that a product leaves to the next one: what it means, what is refused, and when it is worth it."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from qsun_kernels import (
    BackendUnavailable,
    PackedWeight,
    PendingNorm,
    PreparedWeight,
    QuantSpec,
    norm_may_pend,
    prepare_gate_up,
    prepare_weight,
    rms_norm,
    wna16_gate_up_silu,
    wna16_linear,
    wna16_linear_pending_norm,
)
from qsun_kernels.backends.dispatch import load_backend
from qsun_kernels.backends.problems import PendingNorms
from qsun_kernels.testing import inputs
from qsun_kernels.testing.judge import judge_wna16_gate_up_silu, judge_wna16_linear

# The package has the function under this name.
MODULE = importlib.import_module("qsun_kernels.ops.wna16_linear_pending_norm")
EPS = 1e-5
DTYPES = (torch.float32, torch.bfloat16)


def random_weight(
    source: torch.Generator, N: int, K: int, dtype: torch.dtype, spec: QuantSpec | None = None
) -> PackedWeight:
    spec = QuantSpec(4, 32, True) if spec is None else spec
    return inputs.packed_weight(source, N, K, spec).with_scales(dtype)


def torch_weight(N: int, K: int, dtype: torch.dtype = torch.float32) -> PreparedWeight:
    return prepare_weight(random_weight(inputs.generator(0), N, K, dtype), dtype=dtype, backend="torch")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", [QuantSpec(4, 32, True), QuantSpec(4, 32, False)], ids=["int4pack", "dense"])
@pytest.mark.parametrize("H", [16, 77, 64])
def test_what_is_left_and_what_it_comes_to(H, spec, dtype) -> None:
    """The stream of the operator without a norm; its rows times the weight; squares of 16 columns each.

    The product behind is that of the norm, with a bias, a residual, silu and into memory that is there.
    """
    source = inputs.generator(H)
    first, second = random_weight(source, H, 64, dtype, spec), random_weight(source, 24, H, dtype, spec)
    norm_weight, bias = inputs.normal(source, (H,), dtype), inputs.normal(source, (24,), dtype)
    front = prepare_weight(first, dtype=dtype, backend="torch")
    behind = prepare_weight(second, dtype=dtype, backend="torch")
    gate_up = prepare_gate_up(second, dtype=dtype, backend="torch")
    for M in (0, 1, 5, 16):
        x, residual = inputs.normal(source, (M, 64), dtype), inputs.normal(source, (M, H), dtype, std=20)
        norm, stream = wna16_linear_pending_norm(x, front, residual, norm_weight, eps=EPS)
        assert torch.equal(stream, wna16_linear(x, front, None, residual))
        assert torch.equal(norm.weighted, (stream.float() * norm_weight.float()).to(dtype))
        assert norm.squares.shape == (M, -(-H // 16)) and norm.squares.dtype == torch.float32
        for column in range(norm.squares.shape[1]):
            sums = stream[:, 16 * column : 16 * (column + 1)].float().square().sum(dim=-1)
            torch.testing.assert_close(norm.squares[:, column], sums, rtol=1e-6, atol=0)

        added = inputs.normal(source, (M, 24), dtype)
        got = wna16_linear(norm, behind, bias, added)
        judge_wna16_linear(got, norm, second, bias=bias, residual=added).require()
        whole = wna16_linear(rms_norm(stream, norm_weight, eps=EPS), behind, bias, added)
        apart = (got - whole).float().norm()
        assert apart <= (0.02 if dtype == torch.bfloat16 else 1e-5) * whole.float().norm()
        out = torch.full_like(got, torch.nan)
        assert wna16_linear(norm, behind, bias, added, out=out) is out and torch.equal(out, got)

        gated = wna16_gate_up_silu(norm, gate_up)
        judge_wna16_gate_up_silu(gated, norm, second).require()
        out = torch.full_like(gated, torch.nan)
        assert wna16_gate_up_silu(norm, gate_up, out=out) is out and torch.equal(out, gated)


def test_by_hand_with_a_norm_left() -> None:
    """A stream of (3, 4) and zeros, K = 32: a mean square of 25 / 32."""
    weight = torch_weight(32, 32)
    stream = torch.zeros(1, 32)
    stream[0, :2] = torch.tensor([3.0, 4.0])
    norm_weight = torch.full((32,), 2.0)
    norm, r = wna16_linear_pending_norm(torch.zeros(1, 32), weight, stream, norm_weight, eps=0.0)
    assert torch.equal(r, stream) and torch.equal(norm.weighted, 2 * stream)
    assert norm.squares.tolist() == [[25.0, 0.0]]
    expected = wna16_linear(2 * stream / (25 / 32) ** 0.5, weight)
    torch.testing.assert_close(wna16_linear(norm, weight), expected, rtol=1e-5, atol=1e-6)


def good() -> dict[str, Any]:
    return {
        "x": torch.ones(3, 32),
        "weight": torch_weight(16, 32),
        "residual": torch.ones(3, 16),
        "norm_weight": torch.ones(16),
        "eps": 1e-6,
    }


@pytest.mark.parametrize(
    ("wrong", "error", "parts"),
    [
        ({"x": torch.ones(3, 31)}, ValueError, ["x has shape (3, 31)", "(M, 32)"]),
        ({"x": torch.ones(1, 3, 32)}, ValueError, ["x has shape (1, 3, 32), expected (M, K)"]),
        ({"x": torch.ones(17, 32)}, ValueError, ["x has 17 rows, expected at most 16"]),
        ({"x": torch.ones(3, 32).bfloat16()}, TypeError, ["x has dtype torch.bfloat16"]),
        ({"residual": torch.ones(3, 15)}, ValueError, ["residual has shape (3, 15)", "(3, 16)"]),
        ({"norm_weight": torch.ones(15)}, ValueError, ["norm_weight has shape (15,)"]),
        ({"norm_weight": None}, TypeError, ["norm_weight is a NoneType"]),
        ({"bias": torch.ones(15)}, ValueError, ["bias has shape (15,)"]),
        ({"eps": -1.0}, ValueError, ["eps is -1.0"]),
        ({"backend": "triton"}, ValueError, ["backend is 'triton'"]),
        ({"weight": 3}, TypeError, ["weight is a int"]),
    ],
)
def test_a_wrong_argument_of_the_product_in_front_is_named(wrong, error, parts) -> None:
    wna16_linear_pending_norm(**good())
    with pytest.raises(error) as caught:
        wna16_linear_pending_norm(**{**good(), **wrong})
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def rows(M: int = 3, K: int = 32) -> PendingNorm:
    return PendingNorm(torch.ones(M, K), torch.ones(M, -(-K // 16)), 0.0)


@pytest.mark.parametrize(
    ("wrong", "error", "parts"),
    [
        (rows(K=48), ValueError, ["x has shape (3, 48)", "(..., 32)"]),
        (rows(17), ValueError, ["x.weighted has 17 rows, expected at most 16"]),
        (replace(rows(), weighted=torch.ones(1, 3, 32)), ValueError, ["x.weighted has shape (1, 3, 32)"]),
        (replace(rows(), squares=torch.ones(3, 1)), ValueError, ["x.squares has shape (3, 1)", "(3, 2)"]),
        (replace(rows(), squares=torch.ones(2, 3).T), ValueError, ["x.squares has strides"]),
        (replace(rows(), squares=torch.ones(3, 2).double()), TypeError, ["x.squares has dtype"]),
        (replace(rows(), eps=float("nan")), ValueError, ["x.eps is nan"]),
    ],
)
@pytest.mark.parametrize("operator", [wna16_linear, wna16_gate_up_silu])
def test_a_wrong_part_of_a_pending_norm_is_named(operator, wrong, error, parts) -> None:
    weight = replace(torch_weight(16, 32), operator=operator.__name__)
    operator(rows(), weight)
    with pytest.raises(error) as caught:
        operator(wrong, weight)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_a_batch_invariant_product_takes_whole_rows() -> None:
    with pytest.raises(ValueError, match="batch_invariant is True, expected False"):
        wna16_linear(rows(), torch_weight(16, 32), batch_invariant=True)
    norm = rows()
    with pytest.raises(ValueError, match="out is x, expected memory of its own"):
        wna16_linear(norm, torch_weight(32, 32), out=norm.weighted)


def test_a_backend_that_cannot_says_so(monkeypatch) -> None:
    """float16 might not hold a row before its norm; Triton's kernels have no such end."""
    half = torch_weight(16, 32, torch.float16)
    arguments = {name: t.half() if isinstance(t, Tensor) else t for name, t in good().items()}
    with pytest.raises(BackendUnavailable, match=r"wna16_linear_pending_norm.*torch.float16"):
        wna16_linear_pending_norm(**{**arguments, "weight": half})
    with pytest.raises(BackendUnavailable, match=r"wna16_linear of a PendingNorm.*torch.float16"):
        wna16_linear(replace(rows(), weighted=torch.ones(3, 32).half()), half)
    triton = load_backend("triton").IMPLEMENTATIONS
    if triton:
        assert triton["wna16_linear"].pending is None  # type: ignore[attr-defined]
    monkeypatch.setattr(MODULE, "_pending_norms", lambda backend: None)
    with pytest.raises(BackendUnavailable, match="it leaves no norms"):
        wna16_linear_pending_norm(**good())
    with pytest.raises(BackendUnavailable, match="it takes no norm that is pending"):
        wna16_linear(rows(), torch_weight(16, 32))
    assert not norm_may_pend(1, torch_weight(32, 32), torch_weight(16, 32))


@pytest.mark.damaged
def test_a_pending_norm_is_for_eager_calls_without_gradients() -> None:
    arguments = good()
    residual = arguments.pop("residual")
    with pytest.raises(RuntimeError, match="wna16_linear_pending_norm was called in traced code"):
        make_fx(lambda r: wna16_linear_pending_norm(**arguments, residual=r)[1])(residual)
    weight = arguments["weight"]
    with pytest.raises(RuntimeError, match="wna16_linear of a PendingNorm was called in traced code"):
        make_fx(lambda x: wna16_linear(replace(rows(), weighted=x), weight))(torch.ones(3, 32))
    with FakeTensorMode() as mode, pytest.raises(RuntimeError, match="traced code"):
        wna16_linear(replace(rows(), weighted=mode.from_tensor(torch.ones(3, 32))), weight)
    with pytest.raises(RuntimeError, match="has no gradient and residual requires one"):
        wna16_linear_pending_norm(**arguments, residual=residual.requires_grad_())


def test_when_a_norm_is_left(monkeypatch) -> None:
    """What the backend says, for products of one backend and dtype whose sizes meet, of up to 16 rows."""
    own = load_backend("torch").IMPLEMENTATIONS["wna16_linear"].pending  # type: ignore[attr-defined]
    front, behind = torch_weight(32, 64), torch_weight(16, 32)
    assert not norm_may_pend(1, front, behind)  # torch would be no faster
    asked: list[tuple[int, PreparedWeight, PreparedWeight]] = []

    def pays(*arguments: Any) -> bool:
        asked.append(arguments)
        return True

    def with_answers(**changes: Any) -> None:
        changed: PendingNorms = replace(own, pays=pays, **changes)
        monkeypatch.setattr(MODULE, "_pending_norms", lambda backend: changed)

    with_answers()
    assert norm_may_pend(1, front, behind) and norm_may_pend(16, front, behind)
    gate_up = replace(behind, operator="wna16_gate_up_silu")
    assert norm_may_pend(2, front, gate_up)
    assert asked == [(1, front, behind), (16, front, behind), (2, front, gate_up)]
    assert not norm_may_pend(0, front, behind) and not norm_may_pend(17, front, behind)
    assert not norm_may_pend(1, behind, front)  # 16 columns of 64
    assert not norm_may_pend(1, replace(front, operator="wna16_gate_up_silu"), behind)
    assert not norm_may_pend(1, replace(front, backend="triton"), behind)
    assert not norm_may_pend(1, front, replace(behind, dtype=torch.bfloat16))
    assert not norm_may_pend(1, torch_weight(32, 64, torch.float16), torch_weight(16, 32, torch.float16))
    with FakeTensorMode():
        assert not norm_may_pend(1, front, behind)
    with_answers(cannot_take=lambda weight: "of its layout")
    assert not norm_may_pend(1, front, behind)
    assert len(asked) == 3
