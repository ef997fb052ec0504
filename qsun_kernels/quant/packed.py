"""PackedWeight: the one canonical layout every quantiser writes and every backend reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qsun_kernels.quant.packing import pack_codes, unpack_codes
from qsun_kernels.quant.spec import QuantSpec

SCALE_DTYPES: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16, torch.float32)


def _check_tensor(name: str, value: object, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {type(value).__name__}, expected a torch.Tensor")
    if value.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} has dtype {value.dtype}, expected {expected}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {shape}")
    if not value.is_contiguous():
        raise ValueError(f"{name} has strides {value.stride()}, expected a contiguous {shape}")


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """The weight (N, K) of a linear layer y = x @ W.T, as codes, scales and zero points.

        w[n, k] = (code[n, k] - zero[n, g(k)]) * scale[n, g(k)]        evaluated in float32

    spec: bits, group size, symmetry.
    N, K: output rows and input columns, both at least 1.
    qweight: int32 (N, ceil(K*bits/32)); row n is a little-endian bit stream, code k at bits
        [k*bits, (k+1)*bits), bits after the last code zero.
    scales: float16, bfloat16 or float32 (N, G), G = spec.num_groups(K).
    qzeros: uint8 (N, G), each in 0..spec.max_code; None exactly when spec.symmetric, and then every zero
        point is 2**(bits-1).
    g_idx: int32 (K,), the group g(k) of input column k in 0..G-1 (act-order checkpoints); None means
        k // group_size. The last group may be short.

    All tensors are contiguous and on one device. Construction checks types, shapes and devices; `validate`
    also reads the values.
    """

    spec: QuantSpec
    N: int
    K: int
    qweight: Tensor
    scales: Tensor
    qzeros: Tensor | None = None
    g_idx: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.spec, QuantSpec):
            raise TypeError(f"spec is {type(self.spec).__name__}, expected a QuantSpec")
        for name, size in (("N", self.N), ("K", self.K)):
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"{name} is {size!r}, expected an int")
            if size < 1:
                raise ValueError(f"{name} is {size}, expected at least 1")
        groups = (self.N, self.spec.num_groups(self.K))
        _check_tensor("qweight", self.qweight, (self.N, self.spec.num_words(self.K)), (torch.int32,))
        _check_tensor("scales", self.scales, groups, SCALE_DTYPES)
        if self.spec.symmetric:
            if self.qzeros is not None:
                raise ValueError(
                    f"qzeros has shape {tuple(self.qzeros.shape)}, expected None for a symmetric spec "
                    f"(the zero point is {self.spec.zero_point})"
                )
        elif self.qzeros is None:
            raise ValueError(f"qzeros is None, expected uint8 {groups} for an asymmetric spec")
        else:
            _check_tensor("qzeros", self.qzeros, groups, (torch.uint8,))
        if self.g_idx is not None:
            _check_tensor("g_idx", self.g_idx, (self.K,), (torch.int32,))
        for name, tensor in (("scales", self.scales), ("qzeros", self.qzeros), ("g_idx", self.g_idx)):
            if tensor is not None and tensor.device != self.qweight.device:
                raise ValueError(f"{name} is on {tensor.device}, expected {self.qweight.device} like qweight")

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scales: Tensor,
        spec: QuantSpec,
        qzeros: Tensor | None = None,
        g_idx: Tensor | None = None,
    ) -> PackedWeight:
        """Pack uint8 codes (N, K) with their scales (N, G), zero points (N, G) and group index (K,)."""
        qweight = pack_codes(codes, spec.bits)
        N, K = codes.shape
        return cls(spec, N, K, qweight, scales, qzeros, g_idx)

    @property
    def device(self) -> torch.device:
        """The device of every tensor of this weight."""
        return self.qweight.device

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that are present, in the order qweight, scales, qzeros, g_idx."""
        optional = (self.qzeros, self.g_idx)
        return (self.qweight, self.scales, *(tensor for tensor in optional if tensor is not None))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def codes(self) -> Tensor:
        """The codes, uint8 (N, K)."""
        return unpack_codes(self.qweight, self.spec.bits, self.K)

    def column_groups(self) -> Tensor:
        """The group of every input column, int64 (K,), whether g_idx is given or implied."""
        if self.g_idx is not None:
            return self.g_idx.long()
        columns = torch.arange(self.K, device=self.device)
        return columns // self.spec.columns_per_group(self.K)

    def to(self, device: torch.device | str) -> PackedWeight:
        """This weight with every tensor on `device`; itself when it is there already."""
        device = torch.device(device)
        if device == self.device:
            return self
        return replace(
            self,
            qweight=self.qweight.to(device),
            scales=self.scales.to(device),
            qzeros=None if self.qzeros is None else self.qzeros.to(device),
            g_idx=None if self.g_idx is None else self.g_idx.to(device),
        )

    def with_scales(self, dtype: torch.dtype) -> PackedWeight:
        """This weight with its scales rounded to `dtype` (float16, bfloat16 or float32).

        Raises ValueError when a scale would overflow to infinity or become zero: either would change the
        weights of its whole group without a trace.
        """
        if dtype not in SCALE_DTYPES:
            raise TypeError(f"dtype is {dtype}, expected one of {SCALE_DTYPES}")
        if dtype == self.scales.dtype:
            return self
        scales = self.scales.to(dtype)
        lost = (scales.isinf() & self.scales.isfinite()) | ((scales == 0) & (self.scales != 0))
        if bool(lost.any()):
            n, g = (int(i) for i in lost.nonzero()[0])
            raise ValueError(
                f"scales[{n}, {g}] is {float(self.scales[n, g])!r} in {self.scales.dtype} and would become "
                f"{float(scales[n, g])!r} in {dtype}, expected values that {dtype} can hold "
                f"({int(lost.sum())} of {lost.numel()} scales are affected)"
            )
        return replace(self, scales=scales)

    def validate(self) -> PackedWeight:
        """Check the values as well, and return this weight.

        Raises ValueError naming the first bad value: scales that are zero or not finite (a negative scale is
        as good as a positive one, and some quantisers write them), zero points above spec.max_code, group
        indices outside 0..G-1, set bits after the last code of a row.
        """
        bad = ~(self.scales.isfinite() & (self.scales != 0))
        if bool(bad.any()):
            n, g = (int(i) for i in bad.nonzero()[0])
            raise ValueError(
                f"scales[{n}, {g}] is {float(self.scales[n, g])!r}, expected a finite number other than 0 "
                f"({int(bad.sum())} of {bad.numel()} scales are affected)"
            )
        if self.qzeros is not None and int(self.qzeros.max()) > self.spec.max_code:
            n, g = (int(i) for i in (self.qzeros > self.spec.max_code).nonzero()[0])
            raise ValueError(
                f"qzeros[{n}, {g}] is {int(self.qzeros[n, g])}, expected at most {self.spec.max_code} "
                f"for {self.spec.bits} bits"
            )
        if self.g_idx is not None:
            groups = self.spec.num_groups(self.K)
            outside = (self.g_idx < 0) | (self.g_idx >= groups)
            if bool(outside.any()):
                k = int(outside.nonzero()[0])
                raise ValueError(f"g_idx[{k}] is {int(self.g_idx[k])}, expected a group in 0..{groups - 1}")
        used = self.K * self.spec.bits % 32
        if used:
            tail = (self.qweight[:, -1] >> used) & ((1 << (32 - used)) - 1)
            if bool(tail.any()):
                n = int(tail.nonzero()[0])
                raise ValueError(
                    f"qweight[{n}, {self.qweight.shape[1] - 1}] has bits set after the last of "
                    f"{self.K} codes, expected zeros from bit {used}"
                )
        return self


def concatenate_rows(weights: Sequence[PackedWeight]) -> PackedWeight:
    """Stack weights with the same input, as q, k and v or gate and up, into one weight: rows in order.

    Raises ValueError when they differ in spec, K, device or scale dtype, or when their g_idx differ: columns
    regrouped differently (act-order found per matrix) cannot share one g_idx.
    """
    if not weights:
        raise ValueError("weights is empty, expected at least one PackedWeight")
    first = weights[0]
    for i, weight in enumerate(weights[1:], start=1):
        for name, got, expected in (
            ("spec", weight.spec, first.spec),
            ("K", weight.K, first.K),
            ("device", weight.device, first.device),
            ("dtype of scales", weight.scales.dtype, first.scales.dtype),
        ):
            if got != expected:
                raise ValueError(f"weights[{i}] has {name} {got}, expected {expected} like weights[0]")
        if not torch.equal(weight.column_groups(), first.column_groups()):
            raise ValueError(
                f"weights[{i}] has another g_idx than weights[0], expected the same columns' groups"
            )
    if len(weights) == 1:
        return first
    qzeros = [weight.qzeros for weight in weights if weight.qzeros is not None]
    return PackedWeight(
        first.spec,
        sum(weight.N for weight in weights),
        first.K,
        torch.cat([weight.qweight for weight in weights]),
        torch.cat([weight.scales for weight in weights]),
        torch.cat(qzeros) if qzeros else None,
        first.g_idx,
    )
