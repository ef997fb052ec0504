"""Names of the engine's suites, of their choices, and of what their figures are told against."""

from __future__ import annotations

from typing import Final, Literal, get_args

DECODE: Final = "decode"
DENSE: Final = "dense"
"""A module whose projections keep 16 bits: cuBLAS in the same engine."""

KvDtype = Literal["auto", "fp8", "int8", "int4"]
KV_DTYPES: Final[tuple[KvDtype, ...]] = get_args(KvDtype)
"""What a KV cache may hold; "auto" is the dtype of the activations."""

SOAK: Final = "soak"
"""An engine under random requests for a long time: right throughout, or not."""

SERVE: Final = "serve"
SHARED: Final = "shared"
PER_MODEL: Final = "per-model"
"""An arm whose decode steps serve one model each."""

ArmName = Literal["shared", "per-model"]
ARMS: Final[tuple[ArmName, ...]] = get_args(ArmName)

Order = Literal["round-robin", "longest-queue"]
ORDERS: Final[tuple[Order, ...]] = get_args(Order)
"""Whose turn it is among the engines of the arm per-model."""
