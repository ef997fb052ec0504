"""The README's Python runs as it stands there, on real weights."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)


def test_there_is_a_block_for_each_python_user() -> None:
    assert len(blocks()) == 2
    assert all(len(block.splitlines()) <= 20 for block in blocks())


def test_the_kernel_users_block(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(blocks()[0], str(README), "exec"), {})
    assert "torch.Size([8, 4096])" in capsys.readouterr().out


@pytest.mark.long
def test_the_engine_users_block(capsys: pytest.CaptureFixture[str], smollm2_gguf: Path) -> None:
    weights = str(smollm2_gguf)
    code = blocks()[1].replace("path/to/base", weights).replace("path/to/sql-model", weights)
    exec(compile(code, str(README), "exec"), {})
    printed = capsys.readouterr().out
    together = re.match(r"base (.+?)\nsql (.+?)\n", printed, re.DOTALL)
    assert together is not None
    # Greedy and alone, the stream gives what the batch of two models gave.
    assert printed[together.end() :] == together[1]


def test_every_file_the_readme_links_to_exists() -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", README.read_text())
    assert links
    assert [link for link in links if not (README.parent / link).exists()] == []
