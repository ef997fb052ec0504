"""How keys and values are kept: as they are, or as codes of 8 or 4 bits with scales."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qsun_kernels.backends.problems import KV_SCALES, KvScales

__all__ = ["CODES", "VALUES", "KVFormat"]

VALUES: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of caches that hold keys and values themselves."""

CODES: dict[str, torch.dtype] = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}
"""Names and dtypes of caches that hold codes; torch.uint8 holds two a byte."""


@dataclass(frozen=True, slots=True)
class KVFormat:
    """The contents of a cache.

    dtype: of the cache's elements.  values: dtype of keys and values as they come, which is that of the
    cache unless it holds codes.  rotates: keys are multiplied by a Hadamard matrix before they become codes,
    and so are the queries that meet them.

    Raises TypeError for a dtype that a cache cannot have.
    """

    dtype: torch.dtype
    values: torch.dtype
    rotates: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in (*VALUES, *CODES.values()):
            raise TypeError(f"dtype is {self.dtype}, expected one of {(*VALUES, *CODES.values())}")
        if self.values not in VALUES:
            raise TypeError(f"values is {self.values}, expected one of {VALUES}")

    @classmethod
    def of(cls, dtype: torch.dtype | KVFormat) -> KVFormat:
        """The format itself, or that of a cache of values of this dtype."""
        if isinstance(dtype, KVFormat):
            return dtype
        if dtype not in VALUES:
            raise TypeError(f"dtype is {dtype}, expected one of {VALUES}, or a KVFormat")
        return cls(dtype, dtype)

    @property
    def scales(self) -> KvScales:
        """ "none", or "token" where the cache holds codes."""
        return KV_SCALES[self.dtype][0]

    @property
    def has_scales(self) -> bool:
        """Whether the cache holds codes."""
        return self.scales != "none"

    def width(self, head_dim: int) -> int:
        """Elements of `dtype` that a head of one token takes."""
        return head_dim // 2 if self.dtype == torch.uint8 else head_dim

    def head_bytes(self, head_dim: int) -> int:
        """Bytes that the keys, or the values, of a head of one token take, their scale included."""
        scale = torch.float32.itemsize if self.has_scales else 0
        return self.width(head_dim) * self.dtype.itemsize + scale

    def __str__(self) -> str:
        names = {dtype: name for name, dtype in CODES.items()}
        name = names.get(self.dtype, str(self.dtype).removeprefix("torch."))
        return f"{name}, rotated" if self.rotates else name
