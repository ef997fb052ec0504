"""The study's folder: what `prepare` writes and `run` reads.

manifest.json             settings, and size and SHA-256 of every file below
FAMILY.train.jsonl.gz     {"prompt": ids, "response": ids}
FAMILY.held.jsonl.gz      the same
FAMILY.test.jsonl.gz      {"id", "prompt": ids}
weights/NAME.part00 ...   the base's files, cut into parts that travel one at a time
tokenizer/                for `collect`
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qsun.errors import CheckpointError
from qsun.evaluation.items import Item, field_of, json_lines
from qsun.training.batch import Example
from qsun.training.data import load_examples
from qsun.training.folder import whole_folder

MANIFEST = "manifest.json"
WEIGHTS = "weights"
TOKENIZER = "tokenizer"
PART_BYTES = 50_000_000
"""Of a weight file's part: what a machine is sent at one time may be limited."""


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def split_file(source: Path, folder: Path, part_bytes: int = PART_BYTES) -> list[str]:
    """Cut a file into NAME.part00, NAME.part01, ...; returns their names."""
    names: list[str] = []
    with source.open("rb") as file:
        while block := file.read(part_bytes):
            names.append(f"{source.name}.part{len(names):02d}")
            (folder / names[-1]).write_bytes(block)
    return names


@dataclass(frozen=True, slots=True)
class StudyFolder:
    """A prepared folder.  settings: what `prepare` decided, such as the tokens of an answer."""

    path: Path
    files: dict[str, dict[str, Any]]
    weights: dict[str, list[str]]
    settings: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> StudyFolder:
        """Raises CheckpointError when the manifest is missing or damaged."""
        try:
            content = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            return cls(path, content["files"], content["weights"], content["settings"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path / MANIFEST} cannot be read ({error!r}), expected a folder that `prepare` wrote"
            ) from None

    def check(self, name: str) -> Path:
        """A file of the folder.  Raises CheckpointError when it is missing or not the one prepared."""
        path, wanted = self.path / name, self.files[name]
        if not path.is_file() or path.stat().st_size != wanted["bytes"] or digest(path) != wanted["sha256"]:
            raise CheckpointError(
                f"{path} is missing or damaged, expected {wanted['bytes']} bytes with SHA-256 "
                f"{wanted['sha256']}"
            )
        return path

    def families(self) -> list[str]:
        """The families that were prepared."""
        return list(self.settings["max_tokens"])

    def train(self, family: str) -> list[Example]:
        """Training examples."""
        return self._examples(f"{family}.train.jsonl.gz")

    def held(self, family: str) -> list[Example]:
        """Examples whose likelihood is measured."""
        return self._examples(f"{family}.held.jsonl.gz")

    def test(self, family: str) -> list[Item]:
        """Test prompts as token ids; what they are judged by stays behind."""
        return [
            Item(field_of(where, line, "id", str), field_of(where, line, "prompt", list), None)
            for where, line in json_lines(self.check(f"{family}.test.jsonl.gz"))
        ]

    def _examples(self, name: str) -> list[Example]:
        return load_examples([self.check(name)], None, max_length=1 << 20, vocab_size=1 << 31)[0]

    def join_weights(self, target: Path) -> Path:
        """Put the base's files together again in a folder, once; returns the checkpoint's path."""
        if not target.exists():
            with whole_folder(target) as work:
                for name, parts in self.weights.items():
                    with (work / name).open("wb") as file:
                        for part in parts:
                            file.write(self.check(f"{WEIGHTS}/{part}").read_bytes())
        return target


def write_manifest(
    folder: Path, weights: dict[str, list[str]], settings: dict[str, Any], names: Sequence[str]
) -> None:
    """Record every file with its size and digest."""
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": digest(folder / name)} for name in names
    }
    content = {"files": files, "weights": weights, "settings": settings}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
