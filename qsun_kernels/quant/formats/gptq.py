"""GPTQ checkpoints (AutoGPTQ, GPTQModel), formats "gptq" (v1) and "gptq_v2".

    qweight  int32 (K*bits/32, N)   column n is a little-endian bit stream of the codes of output row n
    qzeros   int32 (G, N*bits/32)   row g is a little-endian bit stream of the zero points of group g
    scales   float (G, N)
    g_idx    int32 (K,)             group of input column k; absent in some old checkpoints without act-order

This includes 3 bits, where 32 codes fill 3 words and some cross from one word to the next. So qweight,
transposed, is the canonical layout already.

Version 1 stores each zero point minus one. Subtracting one from a zero point of 0 borrows from its
neighbour in the word, and the writer (GPTQModel) subtracts, and its reader adds, 0x11111111 (4 bits) on
whole words: the carry repairs the borrow. So whole words are added here too; readers that add one nibble
by nibble get such groups wrong. Where no zero point is 0 both ways agree. With 3 bits, whose zero points
cross words, each is taken by itself, modulo 8.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from qsun_kernels.quant.formats.module_tensors import ModuleTensors, implied_groups
from qsun_kernels.quant.packed import SCALE_DTYPES, PackedWeight
from qsun_kernels.quant.packing import unpack_codes
from qsun_kernels.quant.spec import QuantSpec

ZeroVersion = Literal["v1", "v2"]
TENSOR_NAMES = ("qweight", "qzeros", "scales", "g_idx")


def _zero_points(qzeros: Tensor, bits: int, N: int, version: ZeroVersion) -> Tensor:
    """int32 (G, N*bits/32) to uint8 (G, N), the offset of version 1 undone."""
    if version == "v2":
        return unpack_codes(qzeros, bits, N)
    if bits == 3:
        return (unpack_codes(qzeros, bits, N) + 1) & 7
    ones = sum(1 << shift for shift in range(0, 32, bits))
    words = (qzeros.long() + ones) & 0xFFFFFFFF
    # Back to the int32 with the same bits: values from 2**31 stand for negative numbers.
    words = torch.where(words >= 1 << 31, words - (1 << 32), words)
    return unpack_codes(words.int(), bits, N)


def from_gptq(
    tensors: Mapping[str, Tensor],
    spec: QuantSpec,
    module: str = "linear",
    *,
    zeros: ZeroVersion = "v1",
    act_order: bool = False,
) -> PackedWeight:
    """Read one linear layer of a GPTQ checkpoint.

    tensors: qweight, qzeros, scales, g_idx (and bias, ignored) as described above; spec: from the
    checkpoint's configuration; module: the layer's name, for messages; zeros: how zero points are stored;
    act_order: the configuration's desc_act, which makes g_idx obligatory. A g_idx that only says what is
    implied without it is dropped. For a symmetric spec every stored zero point must be the middle code,
    and none is kept.

    Raises ValueError or TypeError naming the tensor for missing, mis-shaped or mistyped tensors and bad
    values, among them zero points that contradict a symmetric spec.
    """
    if zeros not in ("v1", "v2"):
        raise ValueError(f"zeros is {zeros!r}, expected 'v1' or 'v2'")
    source = ModuleTensors(tensors, module, "GPTQ", TENSOR_NAMES)
    qweight = source.take("qweight", (torch.int32,), (None, None), "= (K*bits/32, N)")
    words, N = qweight.shape
    g_idx = source.take("g_idx", (torch.int32,), (None,), "= (K,)") if "g_idx" in source else None
    K = words * 32 // spec.bits if g_idx is None else g_idx.shape[0]
    if spec.num_words(K) != words:
        raise ValueError(
            f"{module}.qweight has shape {tuple(qweight.shape)}, expected ({spec.num_words(K)}, {N}) "
            f"for K = {K} and {spec.bits} bits"
        )
    if act_order and g_idx is None and spec.group_size != "channel":
        raise ValueError(f"{module} has no g_idx, expected one: the configuration says desc_act")
    groups = spec.num_groups(K)
    why = f"for K = {K}, N = {N} and {spec}"
    scales = source.take("scales", SCALE_DTYPES, (groups, N), why)
    qzeros = source.take("qzeros", (torch.int32,), (groups, spec.num_words(N)), why)
    zero_points: Tensor | None = _zero_points(qzeros, spec.bits, N, zeros).t().contiguous()
    if spec.symmetric:
        assert zero_points is not None
        wrong = zero_points != spec.zero_point
        if bool(wrong.any()):
            n, g = (int(i) for i in wrong.nonzero()[0])
            raise ValueError(
                f"{module}.qzeros holds the zero point {int(zero_points[n, g])} for row {n}, group {g}, "
                f"expected {spec.zero_point}: the configuration says sym (is the format {zeros}?)"
            )
        zero_points = None
    if g_idx is not None and implied_groups(g_idx, spec.columns_per_group(K)):
        g_idx = None
    packed = PackedWeight(
        spec,
        N,
        K,
        qweight.t().contiguous(),
        scales.t().contiguous(),
        zero_points,
        None if g_idx is None else g_idx.contiguous(),
    )
    return source.validated(packed)
