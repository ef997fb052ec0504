"""Low-bit weights: what they are (`QuantSpec`, `PackedWeight`), how they are made, where they are read from."""

from __future__ import annotations

from qsun_kernels.quant.packed import PackedWeight
from qsun_kernels.quant.packing import pack_codes, unpack_codes
from qsun_kernels.quant.spec import Bits, GroupSize, QuantSpec

__all__ = ["Bits", "GroupSize", "PackedWeight", "QuantSpec", "pack_codes", "unpack_codes"]
