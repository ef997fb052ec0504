"""Writing a checkpoint that appears whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from qsun.checkpoint.safetensors_reader import INDEX_FILE, SINGLE_FILE

MAX_SHARD_BYTES = 2 * 1024**3
"""Bytes of tensors gathered in memory before a shard is written."""


class CheckpointWriter:
    """Writes tensors and files to a directory beside `path`, which is renamed to `path` at the end.

    with CheckpointWriter(path) as writer:
        writer.add("model.norm.weight", tensor)
        writer.write_json("config.json", config)

    Leaving the block by an error removes what was written; `path` is then as it was.
    Raises ValueError when `path` exists already (an empty directory does not count).
    """

    def __init__(self, path: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        # Of "." and of a link there is no sibling to be renamed to it.
        path = path.resolve()
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise ValueError(f"path {path} exists already, expected a new or empty directory")
        self.path = path
        # Beside the target: a rename is atomic within one file system only.  A name of its own: in containers
        # processes have the same few numbers, and one that was killed leaves its directory behind.
        self.directory = path.parent / f".{path.name}.{secrets.token_hex(8)}.partial"
        self._max_shard_bytes = max_shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[tuple[Path, tuple[str, ...]]] = []
        self._total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor; it is copied to host memory, and written when a shard is full."""
        if name in self._pending or any(name in names for _, names in self._shards):
            raise ValueError(f"tensor {name!r} was added twice, expected it once")
        if self._pending and self._pending_bytes + tensor.nbytes > self._max_shard_bytes:
            self._flush()
        self._pending[name] = tensor.detach().cpu().contiguous()
        self._pending_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file."""
        (self.directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def copy(self, source: Path) -> None:
        """Copy a file under its own name."""
        shutil.copyfile(source, self.directory / source.name)

    def __enter__(self) -> CheckpointWriter:
        self.directory.mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
                # Replaces an empty directory, and fails on anything that appeared there meanwhile.
                os.rename(self.directory, self.path)
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _flush(self) -> None:
        from safetensors.torch import save_file

        path = self.directory / f"shard-{len(self._shards) + 1}.safetensors"
        # transformers refuses files that do not say which framework wrote them.
        save_file(self._pending, path, metadata={"format": "pt"})
        self._shards.append((path, tuple(self._pending)))
        self._pending = {}
        self._pending_bytes = 0

    def _finish(self) -> None:
        """Give the shards their names, which need their number, and write the index."""
        if self._pending:
            self._flush()
        if len(self._shards) == 1:
            self._shards[0][0].rename(self.directory / SINGLE_FILE)
            return
        weight_map: dict[str, str] = {}
        for number, (path, names) in enumerate(self._shards, start=1):
            final = f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"
            path.rename(self.directory / final)
            weight_map.update(dict.fromkeys(names, final))
        self.write_json(INDEX_FILE, {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map})
