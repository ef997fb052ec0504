"""Where an interrupted run continues: weights, optimizer and step, as safetensors and JSON.

DIR/step-00000120/{weights,optimizer}.safetensors and state.json; a folder appears whole or not at all, and
the one before it is kept until then.  The order of the data is a function of seed and step and nothing else
is random, so these three are all there is.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qsun.errors import CheckpointError, QsunError
from qsun.models.fields import Fields, read_json_object
from qsun.training.folder import whole_folder

STATE_FORMAT = 1
_STEP = re.compile(r"step-\d{8}")
_PARTIAL = re.compile(r"\.step-\d{8}\.[0-9a-f]+\.partial")


class TrainingStopped(QsunError):
    """A run cannot go on; the message says why, and which checkpoint is the last good one."""


@dataclass(frozen=True, slots=True)
class RunState:
    """step: steps done.  losses: of each of them.  run: what the run is, as JSON."""

    step: int
    losses: list[float]
    run: dict[str, Any]
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def latest(directory: Path) -> Path | None:
    """The newest whole checkpoint of a run; None when there is none."""
    if not directory.is_dir():
        return None
    found = sorted(path for path in directory.iterdir() if _STEP.fullmatch(path.name))
    return found[-1] if found else None


def remove_states(directory: Path) -> None:
    """Remove the checkpoints of a run, and their folder unless something else lies in it."""
    for path in directory.iterdir() if directory.is_dir() else ():
        if _STEP.fullmatch(path.name) or _PARTIAL.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        directory.rmdir()


def save_state(
    directory: Path,
    *,
    step: int,
    losses: list[float],
    run: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
) -> Path:
    """Write a checkpoint, then remove the older ones.

    Raises TrainingStopped naming the last good checkpoint when it cannot be written.
    """
    from safetensors.torch import save_file

    before = latest(directory)
    target = directory / f"step-{step:08d}"
    try:
        with whole_folder(target) as work:
            for name, tensors in (("weights", weights), ("optimizer", optimizer)):
                save_file(
                    {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()},
                    work / f"{name}.safetensors",
                )
            content = {"format": STATE_FORMAT, "step": step, "losses": losses, "run": dict(run)}
            (work / "state.json").write_text(json.dumps(content) + "\n", encoding="utf-8")
    except Exception as error:  # the disk may be full in the words of Python, of safetensors or of the system
        good = "there is none before it" if before is None else f"the last good one is {before}"
        raise TrainingStopped(
            f"the checkpoint {target} cannot be written ({type(error).__name__}: {error}); {good}"
        ) from error
    for path in list(directory.iterdir()):
        if _STEP.fullmatch(path.name) and path.name < target.name:
            shutil.rmtree(path, ignore_errors=True)
    return target


def load_state(path: Path) -> RunState:
    """Read a checkpoint.  Raises CheckpointError naming the file that is damaged."""
    from safetensors.torch import load_file

    fields = Fields(read_json_object(path / "state.json"), str(path / "state.json"))
    if fields.integer("format") != STATE_FORMAT:
        raise fields.error("format", fields.raw("format"), f"{STATE_FORMAT}")
    tensors = {}
    for name in ("weights", "optimizer"):
        try:
            tensors[name] = load_file(path / f"{name}.safetensors")
        except Exception as error:  # safetensors has errors of its own
            raise CheckpointError(f"{path / name}.safetensors cannot be read ({error})") from error
    run = fields.raw("run", {})
    return RunState(
        fields.integer("step", minimum=0),
        [float(x) for x in fields.raw("losses", [])],
        run,
        tensors["weights"],
        tensors["optimizer"],
    )


def require_same_run(stored: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError naming the first setting in which a checkpoint and this run differ."""
    for name in sorted({*stored, *now}):
        # Compared as JSON has them: a tuple and a list are one.
        mine, theirs = (json.loads(json.dumps(side.get(name))) for side in (now, stored))
        if mine != theirs:
            raise CheckpointError(
                f"{path} is of another run: {name} is {theirs!r} there and {mine!r} now, expected equality "
                "(train into another folder, or remove this one)"
            )
