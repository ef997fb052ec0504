"""A written checkpoint appears whole or not at all, wherever it is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qsun.checkpoint.writer import CheckpointWriter


def write(path: Path) -> None:
    with CheckpointWriter(path) as writer:
        writer.add("a", torch.ones(2))


def test_into_the_working_directory(tmp_path, monkeypatch):
    target = tmp_path / "here"
    target.mkdir()
    monkeypatch.chdir(target)
    write(Path("."))
    assert torch.equal(load_file(target / "model.safetensors")["a"], torch.ones(2))
    assert [entry.name for entry in tmp_path.iterdir()] == ["here"]


def test_into_a_link_to_an_empty_directory(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "model.safetensors").is_file()


def test_a_writer_that_was_killed_is_not_in_the_way(tmp_path):
    dead = CheckpointWriter(tmp_path / "model")
    dead.__enter__()
    write(tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").is_file()


@pytest.mark.damaged
def test_an_error_leaves_nothing(tmp_path):
    with (
        pytest.raises(ValueError, match="tensor 'a' was added twice"),
        CheckpointWriter(tmp_path / "m") as writer,
    ):
        writer.add("a", torch.ones(2))
        writer.add("a", torch.ones(2))
    assert list(tmp_path.iterdir()) == []
