"""Where a model comes from: a path, or a name on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from qsun.checkpoint.tokenizer import TOKENIZER_FILES, load_tokenizer
from qsun.errors import CheckpointError

__all__ = ["find_tokenizer", "local_checkpoint"]

# Weights are fetched as safetensors only: nothing here would open a pickle.
_FETCHED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


def local_checkpoint(model: Path | str) -> Path:
    """The local path of a checkpoint; a hub id ("owner/name") is fetched, or found in the hub's own cache.

    Raises CheckpointError when it is neither a path nor a repository that can be had.
    """
    path = Path(model)
    if path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)):
        raise CheckpointError(
            f"{model} does not exist, expected a checkpoint directory, a GGUF file, or a hub id owner/name"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(model), allow_patterns=list(_FETCHED)))
    except Exception as failure:  # network, permission, spelling: the hub's client has an error for each
        raise CheckpointError(
            f"{model} is no local path, and fetching it from the hub failed"
            f" ({type(failure).__name__}: {failure})"
        ) from failure


def find_tokenizer(path: Path) -> Any | None:
    """The tokenizer of a checkpoint; None when it brings none, so that prompts have to be token ids.

    Raises CheckpointError when there is one that cannot be read.
    """
    if path.is_dir():
        has_files = any((path / name).exists() for name in TOKENIZER_FILES)
        if not has_files and not any(path.glob("*.gguf")):
            return None
    return load_tokenizer(path)
