"""From command line options to a loaded engine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from qsun.cli.exits import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from qsun.models.config import ModelConfig
    from qsun.modules.quantize import Progress


def device_of(text: str | None) -> torch.device | None:
    """The device of an option; None where none was given.

    Raises UsageError for what is no device, BackendUnavailable for a CUDA device that is not there.
    """
    import torch

    from qsun_kernels.errors import BackendUnavailable

    if text is None:
        return None
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device: got {text!r}, expected cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise BackendUnavailable(
            "the engine", None, f"device {text!r} was asked for, torch sees {count} CUDA devices"
        )
    return device


def dtype_of(text: str) -> torch.dtype | str:
    """The dtype of an option; "auto" stays."""
    import torch

    dtype = getattr(torch, text, text)
    assert dtype == "auto" or isinstance(dtype, torch.dtype)
    return dtype


def config_of(model: Path) -> ModelConfig:
    """The shape of a checkpoint, without its weights."""
    from qsun.checkpoint.reader import open_checkpoint

    reader = open_checkpoint(model)
    try:
        return reader.config
    finally:
        reader.close()


@contextmanager
def progress_bar(what: str, *, quiet: bool) -> Iterator[Progress]:
    """A bar on stderr that is told (done, total, step): with rich on a terminal, else nothing."""
    from importlib.util import find_spec

    if quiet or not sys.stderr.isatty() or find_spec("rich") is None:
        yield lambda done, total, step: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)

        def update(done: int, total: int, step: str) -> None:
            bar.update(task, completed=done, total=total, description=f"{what}: {step}")

        yield update
