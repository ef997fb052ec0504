"""qsun: many fine-tuned models on one GPU for the price of one decoder.

    from qsun import DecodeEngine, SamplingParams

The names below are loaded when they are first used, so `import qsun` costs nothing and needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qsun.core import Completion, SamplingParams, StepOutput
    from qsun.engine.engine import DecodeEngine
    from qsun.errors import (
        CheckpointError,
        IncompatibleModule,
        MissingKV,
        OutOfCacheBlocks,
        QsunError,
        RequestError,
        SharedPartsWarning,
    )

__all__ = [
    "CheckpointError",
    "Completion",
    "DecodeEngine",
    "IncompatibleModule",
    "MissingKV",
    "OutOfCacheBlocks",
    "QsunError",
    "RequestError",
    "SamplingParams",
    "SharedPartsWarning",
    "StepOutput",
]

_HOMES = {
    "Completion": "qsun.core",
    "DecodeEngine": "qsun.engine.engine",
    "SamplingParams": "qsun.core",
    "StepOutput": "qsun.core",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "qsun.errors")), name)


def __dir__() -> list[str]:
    return sorted(__all__)
