"""Cases of `wna16_linear`: the matrices of real models at decode batch sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch
from torch import Tensor

from qsun_bench.cases import Json, Selection, Suite, generator
from qsun_bench.random_weights import random_packed_weight, weight_bytes
from qsun_bench.shapes import ModelShape, matrices
from qsun_kernels.backends.problems import Wna16Problem
from qsun_kernels.quant import Bits, GroupSize, PackedWeight, QuantSpec

DECODE_M = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_CPU_M = (1, 8)


@dataclass(frozen=True, slots=True)
class DenseOracle:
    """What x @ weight.T is, for a weight (N, K) in float64 and activations of `dtype`."""

    weight: Tensor
    dtype: torch.dtype

    def exact(self, activation: Tensor) -> Tensor:
        return activation.double() @ self.weight.T

    def plain(self, activation: Tensor) -> Tensor:
        return activation @ self.weight.to(self.dtype).T

    def terms(self, activation: Tensor) -> Tensor:
        return activation.double().abs() @ self.weight.abs().T


@dataclass(frozen=True, slots=True)
class Wna16Operands:
    """A packed weight of random codes and scales, and its dense forms when asked for."""

    weight: PackedWeight
    dtype: torch.dtype
    _dense: dict[torch.dtype, Tensor] = field(default_factory=dict)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.weight.tensors

    def copy(self) -> Wna16Operands:
        w = self.weight
        zeros = None if w.qzeros is None else w.qzeros.clone()
        g_idx = None if w.g_idx is None else w.g_idx.clone()
        copied = PackedWeight(w.spec, w.N, w.K, w.qweight.clone(), w.scales.clone(), zeros, g_idx)
        return Wna16Operands(copied, self.dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight (N, K) in `dtype`, computed from its codes in float64."""
        if dtype not in self._dense:
            w = self.weight
            groups = w.column_groups()
            zeros = float(w.spec.zero_point) if w.qzeros is None else w.qzeros.double()[:, groups]
            self._dense[dtype] = ((w.codes().double() - zeros) * w.scales.double()[:, groups]).to(dtype)
        return self._dense[dtype]

    def exact(self, activation: Tensor) -> Tensor:
        return DenseOracle(self.dense(torch.float64), self.dtype).exact(activation)

    def plain(self, activation: Tensor) -> Tensor:
        return activation @ self.dense(self.dtype).T

    def terms(self, activation: Tensor) -> Tensor:
        return DenseOracle(self.dense(torch.float64), self.dtype).terms(activation)


@dataclass(frozen=True, slots=True)
class Wna16Case:
    """x (M, K) times a weight (N, K) of `spec`. label: the model and the matrix. act_order: groups given
    column by column.
    """

    op: ClassVar[str] = "wna16_linear"

    label: str
    M: int
    N: int
    K: int
    spec: QuantSpec
    dtype: torch.dtype
    act_order: bool = False

    @property
    def name(self) -> str:
        group = "channel" if self.spec.group_size == "channel" else f"g{self.spec.group_size}"
        zeros = "" if self.spec.symmetric else "z"
        order = "a" if self.act_order else ""
        dtype = "" if self.dtype == torch.bfloat16 else "." + str(self.dtype).removeprefix("torch.")
        return f"{self.label}.w{self.spec.bits}{group}{zeros}{order}{dtype}.M{self.M}"

    @property
    def bytes(self) -> int:
        activations = self.M * (self.K + self.N) * self.dtype.itemsize
        group_index = 4 * self.K if self.act_order else 0
        return weight_bytes(self.N, self.K, self.spec, self.dtype) + group_index + activations

    @property
    def operands_key(self) -> object:
        key = (self.N, self.K, self.spec, self.dtype)
        return (*key, "act-order") if self.act_order else key

    def fields(self) -> dict[str, Json]:
        fields: dict[str, Json] = {
            "M": self.M,
            "N": self.N,
            "K": self.K,
            "bits": self.spec.bits,
            "group_size": self.spec.group_size,
            "symmetric": self.spec.symmetric,
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        # Only where it is: older recorded runs say nothing of it and stay comparable.
        return fields | ({"act_order": True} if self.act_order else {})

    def problem(self, device: torch.device) -> Wna16Problem:
        spec = self.spec
        return Wna16Problem(
            self.N, self.K, spec.bits, spec.group_size, spec.symmetric, self.act_order, self.dtype, device
        )

    def operands(self, device: torch.device) -> Wna16Operands:
        g = generator(device, "weight", self.operands_key)
        weight = random_packed_weight(self.N, self.K, self.spec, self.dtype, g, act_order=self.act_order)
        return Wna16Operands(weight, self.dtype)

    def activation(self, device: torch.device) -> Tensor:
        g = generator(device, "x", self.M, self.K)
        return torch.randn(self.M, self.K, device=device, generator=g).to(self.dtype)


def _group_size(selection: Selection, sizes: ModelShape) -> GroupSize:
    """What was asked for, else the widest that divides every row of the model, as the engine chooses."""
    if selection.group_size is not None:
        return cast(GroupSize, selection.group_size)
    rows = [K for _, K in sizes.linears.values()]
    groups: tuple[GroupSize, ...] = (128, 64, 32)
    fitting = [group for group in groups if all(K % cast(int, group) == 0 for K in rows)]
    return fitting[0] if fitting else "channel"


def cases(selection: Selection) -> Sequence[Wna16Case]:
    """Every matrix of the chosen shapes at every M, equal problems once."""
    on_cuda = selection.device.type == "cuda"
    names = selection.shapes or (
        ("llama-3.1-8b", "qwen3-8b", "llama-3.1-70b") if on_cuda else ("smollm2-135m",)
    )
    rows = selection.batches or (DECODE_M if on_cuda else _CPU_M)
    if selection.smoke:
        names, rows = selection.shapes or ("smollm2-135m",), selection.batches or (1, 8)
    seen: set[object] = set()
    found: list[Wna16Case] = []
    for sizes, matrix in matrices(names):
        N, K = sizes.linears[matrix]
        spec = QuantSpec(cast(Bits, selection.bits), _group_size(selection, sizes), selection.symmetric)
        key = (N, K, spec)
        if key in seen:
            continue
        seen.add(key)
        label = f"{sizes.name}.{matrix}"
        found += [Wna16Case(label, M, N, K, spec, selection.dtype, selection.act_order) for M in rows]
    return found


SUITE = Suite(
    name="wna16",
    op=Wna16Case.op,
    summary="low-bit weight-only matrix multiplication at decode batch sizes",
    baseline="dense",
    cases=cases,
)
