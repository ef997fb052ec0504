"""Which quantisation a checkpoint directory states, and the tensors that a quantised layer of it may have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qsun.errors import CheckpointError, UnsupportedModel
from qsun.models.fields import read_json_object
from qsun_kernels.quant.formats import CheckpointFormat, UnsupportedQuantization, detect
from qsun_kernels.quant.formats.awq import TENSOR_NAMES as AWQ_TENSORS
from qsun_kernels.quant.formats.compressed_tensors import TENSOR_NAMES as COMPRESSED_TENSORS
from qsun_kernels.quant.formats.detect import FormatName
from qsun_kernels.quant.formats.gptq import TENSOR_NAMES as GPTQ_TENSORS

# Checkpoints of 2023 state their quantisation in a file of its own.
_OLD_FILES = ("quantize_config.json", "quant_config.json")

PACKED_TENSORS: Mapping[FormatName, tuple[str, ...]] = MappingProxyType(
    {"awq": AWQ_TENSORS, "gptq": GPTQ_TENSORS, "compressed-tensors": COMPRESSED_TENSORS}
)
"""Names of a quantised layer's tensors within the layer, those that may be absent included."""


def detect_quantization(raw_config: Mapping[str, Any], directory: Path) -> CheckpointFormat | None:
    """How the quantised layers of a directory are stored; None for an ordinary checkpoint.

    raw_config: the contents of its config.json.
    Raises UnsupportedModel naming the option that is not supported, CheckpointError for an entry that is no
    object.
    """
    path = directory / "config.json"
    stated = raw_config.get("quantization_config", raw_config.get("compression_config"))
    if stated is None:
        old = next((directory / name for name in _OLD_FILES if (directory / name).is_file()), None)
        if old is None:
            return None
        path, stated = old, read_json_object(old)
    try:
        return detect(stated)
    except UnsupportedQuantization as error:
        raise UnsupportedModel(f"{path}: {error}") from error
    except TypeError as error:
        raise CheckpointError(f"{path}: {error}") from error


def describe(stored: CheckpointFormat) -> str:
    """For messages: the format and the spec, for example "awq W4 g128 asymmetric"."""
    return f"{stored.name} {stored.spec}"
