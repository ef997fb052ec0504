"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder beside `path` to fill, which is renamed to it at the end.

    An error removes what was written, and `path` is as it was.
    Raises ValueError when `path` exists already (an empty directory does not count).
    """
    path = path.resolve()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"path {path} exists already, expected a new or empty directory")
    work = path.parent / f".{path.name}.{secrets.token_hex(8)}.partial"
    work.mkdir(parents=True)
    try:
        yield work
        os.rename(work, path)
    finally:
        shutil.rmtree(work, ignore_errors=True)
