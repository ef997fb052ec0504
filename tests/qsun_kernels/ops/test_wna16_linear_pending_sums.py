"""A product's sums that are left to write_kv_cache, and how both refuse what cannot be. Needs no GPU."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from qsun_kernels import (
    BackendUnavailable,
    PendingSums,
    QuantSpec,
    prepare_gate_up,
    prepare_weight,
    quantize_rtn,
    sums_may_pend,
    wna16_linear_pending_sums,
    write_kv_cache,
)
from qsun_kernels.backends.problems import PreparedWeight, SplitProducts

MODULE = importlib.import_module("qsun_kernels.ops.wna16_linear_pending_sums")
DTYPE = torch.bfloat16


def torch_weight(N: int, K: int, dtype: torch.dtype = DTYPE) -> PreparedWeight:
    packed = quantize_rtn(
        torch.randn(N, K, generator=torch.Generator().manual_seed(0)), QuantSpec(4, 32, True)
    )
    return prepare_weight(packed, dtype=dtype, backend="torch")


@pytest.fixture
def in_two(monkeypatch) -> None:
    """A backend that splits products of more than two rows in two."""

    def leave(x: torch.Tensor, weight: PreparedWeight) -> PendingSums:
        dense = weight.tensors[0].float() if len(weight.tensors) == 1 else torch.zeros(weight.N, weight.K)
        half = weight.K // 2
        parts = [x[:, :half].float() @ dense[:, :half].T, x[:, half:].float() @ dense[:, half:].T]
        return PendingSums(torch.stack(parts), weight.dtype)

    split = SplitProducts(lambda rows, weight: 2 if rows > 2 else 1, leave)
    monkeypatch.setattr(MODULE, "_split_products", lambda backend: split)


def test_rows_are_the_parts_in_their_order() -> None:
    parts = torch.tensor([[2.0**25, 2.0**25, 1.0], [1.0, -(2.0**25), 2.0**25], [-(2.0**25), 1.0, -(2.0**25)]])
    sums = PendingSums(parts, DTYPE)
    assert torch.equal(sums.added(), torch.tensor([0.0, 1.0, 0.0], dtype=DTYPE))
    assert sums.shape == (3,) and sums.device == parts.device
    assert torch.equal(parts[0], torch.tensor([2.0**25, 2.0**25, 1.0]))  # still there


def test_only_products_that_are_split_leave_sums(in_two) -> None:
    weight = torch_weight(16, 64)
    assert [sums_may_pend(rows, weight) for rows in (0, 2, 3)] == [False, False, True]
    assert wna16_linear_pending_sums(torch.ones(3, 64, dtype=DTYPE), weight).shape == (3, 16)
    with pytest.raises(BackendUnavailable, match=r"wna16_linear_pending_sums.*the product of 2 rows"):
        wna16_linear_pending_sums(torch.ones(2, 64, dtype=DTYPE), weight)
    packed = quantize_rtn(torch.randn(32, 64), QuantSpec(4, 32, True))
    assert not sums_may_pend(3, prepare_gate_up(packed, dtype=DTYPE))


def test_the_backends_of_this_machine_leave_none() -> None:
    for rows in (1, 100):
        assert not sums_may_pend(rows, torch_weight(16, 64))
    with pytest.raises(BackendUnavailable, match="does not split the product of 100 rows"):
        wna16_linear_pending_sums(torch.ones(100, 64, dtype=DTYPE), torch_weight(16, 64))


@pytest.mark.parametrize(
    ("wrong", "error", "parts"),
    [
        ({"x": torch.ones(3, 63, dtype=DTYPE)}, ValueError, ["x has shape (3, 63)", "(M, 64)"]),
        ({"x": torch.ones(1, 3, 64, dtype=DTYPE)}, ValueError, ["x has shape (1, 3, 64), expected (M, K)"]),
        ({"x": torch.ones(3, 64)}, TypeError, ["x has dtype torch.float32"]),
        ({"x": torch.ones(64, 3, dtype=DTYPE).T}, ValueError, ["x has strides"]),
        ({"weight": 3}, TypeError, ["weight is a int"]),
        ({"backend": "triton"}, ValueError, ["backend is 'triton'"]),
    ],
)
def test_a_wrong_argument_of_the_product_is_named(in_two, wrong, error, parts) -> None:
    arguments: dict[str, Any] = {"x": torch.ones(3, 64, dtype=DTYPE), "weight": torch_weight(16, 64)}
    wna16_linear_pending_sums(**arguments)
    with pytest.raises(error) as caught:
        wna16_linear_pending_sums(**{**arguments, **wrong})
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_sums_are_for_eager_calls_without_gradients(in_two) -> None:
    weight, x = torch_weight(16, 64), torch.ones(3, 64, dtype=DTYPE)
    with pytest.raises(RuntimeError, match="wna16_linear_pending_sums was called in traced code"):
        make_fx(lambda rows: wna16_linear_pending_sums(rows, weight).parts)(x)
    with pytest.raises(RuntimeError, match="write_kv_cache of PendingSums was called in traced code"):
        make_fx(lambda parts: write(parts))(torch.ones(2, 3, 6, 8))
    with pytest.raises(RuntimeError, match="x requires one"):
        wna16_linear_pending_sums(x.requires_grad_(), weight)


def heads_of(parts: torch.Tensor, dtype: torch.dtype = DTYPE) -> list[PendingSums]:
    """q, k and v: two heads of each."""
    return [PendingSums(one, dtype) for one in parts.split(2, dim=2)]


def call(q: Any, k: Any, v: Any) -> dict[str, Any]:
    """Three tokens of 8 elements a head."""
    return {
        "k": k,
        "v": v,
        "k_cache": torch.zeros(2, 2, 4, 8, dtype=DTYPE),
        "v_cache": torch.zeros(2, 2, 4, 8, dtype=DTYPE),
        "slot_mapping": torch.tensor([1, -1, 6]),
        "q": q,
        "positions": torch.tensor([0, 3, 2]),
        "cos_sin": torch.randn(4, 8, generator=torch.Generator().manual_seed(1)),
    }


def write(parts: torch.Tensor) -> torch.Tensor:
    return write_kv_cache(**call(*heads_of(parts)))


@pytest.mark.parametrize("norms", [False, True])
def test_a_write_of_sums_is_the_write_of_their_rows(norms) -> None:
    """A backend that does not add sums itself gets rows."""
    parts = torch.randn(3, 3, 6, 8, generator=torch.Generator().manual_seed(2))
    weights = {name: torch.rand(8).to(DTYPE) for name in ("q_norm", "k_norm")} if norms else {}
    left, whole = (
        {**call(*(rows(one) for one in heads_of(parts))), **weights}
        for rows in (lambda one: one, PendingSums.added)
    )
    assert torch.equal(write_kv_cache(**left), write_kv_cache(**whole))
    for cache in ("k_cache", "v_cache"):
        assert left[cache].any() and torch.equal(left[cache], whole[cache])


def changed(index: int, sums: Any) -> dict[str, Any]:
    q, k, v = heads_of(torch.ones(2, 3, 6, 8))
    rows: list[Any] = [q, k, v]
    rows[index] = sums
    return call(*rows)


ROWS = torch.ones(3, 2, 8, dtype=DTYPE)
PARTS = torch.ones(2, 3, 2, 8)


@pytest.mark.parametrize(
    ("wrong", "error", "parts"),
    [
        (changed(1, None), TypeError, ["k is a NoneType beside sums, expected a PendingSums"]),
        (changed(2, None), TypeError, ["v is a NoneType beside sums"]),
        (changed(1, PendingSums(None, DTYPE)), TypeError, ["k.parts is a NoneType"]),
        (changed(0, ROWS), TypeError, ["q is a Tensor beside sums, expected a PendingSums"]),
        (changed(1, ROWS), TypeError, ["k is a Tensor beside sums"]),
        (changed(2, ROWS), TypeError, ["v is a Tensor beside sums"]),
        (changed(0, PendingSums(PARTS.double(), DTYPE)), TypeError, ["q.parts has dtype torch.float64"]),
        (changed(1, PendingSums(PARTS[0], DTYPE)), ValueError, ["k.parts has shape (3, 2, 8)"]),
        (changed(1, PendingSums(PARTS, torch.float32)), TypeError, ["k.dtype is torch.float32"]),
        (changed(2, PendingSums(PARTS, torch.float16)), TypeError, ["v.dtype is torch.float16"]),
        (
            changed(2, PendingSums(PARTS, DTYPE)),
            ValueError,
            ["v.parts are 2, 48 elements apart", "144 apart"],
        ),
        (changed(0, PendingSums(torch.ones(2, 3, 6, 9)[:, :, :2], DTYPE)), ValueError, ["q.parts are 2"]),
    ],
)
def test_wrong_sums_are_named(wrong, error, parts) -> None:
    with pytest.raises(error) as caught:
        write_kv_cache(**wrong)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_sums_of_another_shape_are_named() -> None:
    base = torch.ones(2, 3, 6, 8)
    q, k, _ = heads_of(base)
    with pytest.raises(ValueError, match=r"v has shape \(3, 1, 8\)"):
        write_kv_cache(**call(q, k, PendingSums(base[:, :, 5:], DTYPE)))
    with pytest.raises(ValueError, match=r"k\.parts are 0"):
        write_kv_cache(**call(*heads_of(base[:0])))
