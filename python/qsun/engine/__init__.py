"""The engine: scheduling, batching, sampling, and the public `DecodeEngine`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qsun.engine.engine import DecodeEngine

__all__ = ["DecodeEngine"]


def __getattr__(name: str) -> Any:
    # Loaded on demand: the scheduler beside it is imported without torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from qsun.engine.engine import DecodeEngine

    return DecodeEngine
