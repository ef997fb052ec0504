"""What a quantised weight is made of: bits, group size, symmetric or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Bits = Literal[2, 3, 4, 8]
GroupSize = Literal[32, 64, 128, "channel"]

SUPPORTED_BITS: tuple[Bits, ...] = get_args(Bits)
SUPPORTED_GROUP_SIZES: tuple[GroupSize, ...] = get_args(GroupSize)


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """How the weights of one linear layer are coded.

    bits: width of a code: 2, 3, 4 or 8.
    group_size: input columns that share a scale: 32, 64, 128, or "channel" for one scale per output row.
    symmetric: True when the zero point is the middle code 2**(bits-1) everywhere and is not stored;
        False when every group stores its own integer zero point in 0..2**bits-1.

    Raises ValueError or TypeError naming the field when a value is not one of these.
    """

    bits: Bits
    group_size: GroupSize
    symmetric: bool

    def __post_init__(self) -> None:
        # Configurations hand over anything. 4.0 == 4 == Decimal(4): the type is part of the value.
        bits: object = self.bits
        group_size: object = self.group_size
        symmetric: object = self.symmetric
        if type(bits) is not int or bits not in SUPPORTED_BITS:
            raise ValueError(f"bits is {bits!r}, expected one of {SUPPORTED_BITS}")
        if type(group_size) not in (int, str) or group_size not in SUPPORTED_GROUP_SIZES:
            raise ValueError(f"group_size is {group_size!r}, expected one of {SUPPORTED_GROUP_SIZES}")
        if not isinstance(symmetric, bool):
            raise TypeError(f"symmetric is {symmetric!r}, expected True or False")

    @property
    def max_code(self) -> int:
        """The largest code, 2**bits - 1."""
        return (1 << self.bits) - 1

    @property
    def zero_point(self) -> int:
        """The zero point of every group of a symmetric weight, 2**(bits-1).

        Raises ValueError for an asymmetric spec, where each group has its own.
        """
        if not self.symmetric:
            raise ValueError(f"{self} has no common zero point: zero points are stored per group")
        return 1 << (self.bits - 1)

    def columns_per_group(self, K: int) -> int:
        """Input columns of a full group: group_size, or K for "channel"."""
        return K if self.group_size == "channel" else self.group_size

    def num_groups(self, K: int) -> int:
        """Groups along K input columns: ceil(K / group_size), 1 for "channel"."""
        return 1 if self.group_size == "channel" else -(-K // self.group_size)

    def num_words(self, K: int) -> int:
        """32-bit words that hold a row of K codes: ceil(K * bits / 32)."""
        return -(-K * self.bits // 32)

    def __str__(self) -> str:
        group = "channel" if self.group_size == "channel" else f"g{self.group_size}"
        return f"W{self.bits} {group} {'symmetric' if self.symmetric else 'asymmetric'}"
