"""AWQ checkpoints, the "gemm" layout of AutoAWQ.

    qweight  int32 (K, N/8)    transposed: a word holds 8 neighbouring output rows of one input column
    qzeros   int32 (G, N/8)    packed the same way
    scales   float (G, N)

Nibble i (bits 4i..4i+3) of word j holds output row 8*j + ORDER[i]: even rows in the low half, odd rows in the
high half, so that a GPU kernel extracts rows 2i and 2i+1 as a pair of halves.
w = (code - zero) * scale, 4 bits, always with zero points.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qsun_kernels.quant.formats.module_tensors import ModuleTensors
from qsun_kernels.quant.packed import SCALE_DTYPES, PackedWeight
from qsun_kernels.quant.packing import unpack_codes
from qsun_kernels.quant.spec import QuantSpec

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
TENSOR_NAMES = ("qweight", "qzeros", "scales")


def _unpack_columns(words: Tensor) -> Tensor:
    """int32 (R, N/8) to uint8 (R, N), output rows in natural order."""
    nibbles = unpack_codes(words, 4, 8 * words.shape[1]).view(words.shape[0], words.shape[1], 8)
    nibble_of_row = [ORDER.index(row) for row in range(8)]
    return nibbles[:, :, nibble_of_row].reshape(words.shape[0], -1)


def from_awq(tensors: Mapping[str, Tensor], spec: QuantSpec, module: str = "linear") -> PackedWeight:
    """Read one linear layer of an AWQ "gemm" checkpoint.

    tensors: qweight, qzeros, scales (and bias, ignored) as described above; spec: from the checkpoint's
    configuration; module: the layer's name, for messages.
    Returns the PackedWeight with the same codes, zeros and scales (scales keep their dtype).

    Raises ValueError or TypeError naming the tensor for missing, mis-shaped or mistyped tensors and bad
    values.
    """
    if spec.bits != 4 or spec.symmetric:
        raise ValueError(f"spec is {spec}, expected 4 bits, asymmetric: AWQ checkpoints have no other form")
    source = ModuleTensors(tensors, module, "AWQ", TENSOR_NAMES)
    qweight = source.take("qweight", (torch.int32,), (None, None), "= (K, N/8)")
    K, words = qweight.shape
    groups = spec.num_groups(K)
    why = f"for qweight {tuple(qweight.shape)} and {spec}"
    qzeros = source.take("qzeros", (torch.int32,), (groups, words), why)
    scales = source.take("scales", SCALE_DTYPES, (groups, 8 * words), why)
    codes = _unpack_columns(qweight).t().contiguous()
    zeros = _unpack_columns(qzeros).t().contiguous()
    return source.validated(PackedWeight.from_codes(codes, scales.t().contiguous(), spec, zeros))
