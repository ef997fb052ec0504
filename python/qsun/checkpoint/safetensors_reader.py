"""A Hugging Face checkpoint directory: config.json with one safetensors file, or shards and their index."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import TracebackType

from torch import Tensor

from qsun.checkpoint.quantization import detect_quantization
from qsun.checkpoint.safetensors_file import SafetensorsFile
from qsun.checkpoint.tokenizer import read_vocabulary
from qsun.errors import CheckpointError
from qsun.models.config import ModelConfig
from qsun.models.fields import Fields, read_json_object
from qsun.models.hf_config import eos_token_ids, model_config_from_hf
from qsun_kernels.quant.formats import CheckpointFormat

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class SafetensorsReader:
    """Reads a checkpoint directory; see `CheckpointReader` for the meaning of its attributes.

    Names are given with the prefix "model." whether the file has it (a causal language model) or not (a bare
    decoder).

    Raises CheckpointError when config.json or the index is missing or damaged, a shard is missing, a shard
    lacks a tensor that the index promises or holds one that it does not, or a file is damaged;
    UnsupportedModel for models that are not implemented.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.raw_config = read_json_object(path / "config.json")
        source = str(path / "config.json")
        self.config = _with_generation_ends(model_config_from_hf(self.raw_config, source), path)
        self.quantization: CheckpointFormat | None = detect_quantization(self.raw_config, path)
        self._files: list[SafetensorsFile] = []
        try:
            self._where = self._open_files()
        except BaseException:
            self.close()
            raise
        prefix = "" if any(name.startswith("model.") for name in self._where) else "model."
        self._stored_names = {
            name if name.startswith("lm_head.") else prefix + name: name for name in self._where
        }

    def names(self) -> frozenset[str]:
        """Every tensor there is."""
        return frozenset(self._stored_names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        stored = self._stored_name(name)
        return self._where[stored].entries[stored].shape

    def get(self, name: str) -> Tensor:
        """Read a tensor into host memory."""
        stored = self._stored_name(name)
        return self._where[stored].get(stored)

    def vocabulary(self) -> dict[int, str] | None:
        """Token by id; None when the directory has no tokenizer."""
        return read_vocabulary(self.path)

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _stored_name(self, name: str) -> str:
        try:
            return self._stored_names[name]
        except KeyError:
            raise CheckpointError(
                f"{self.path} has no tensor {name!r}, "
                f"expected it among the {len(self._stored_names)} that it has"
            ) from None

    def _open_files(self) -> dict[str, SafetensorsFile]:
        """The file of every tensor.  One file is preferred to an index, as in transformers."""
        if (self.path / SINGLE_FILE).exists():
            file = self._open(self.path / SINGLE_FILE)
            return dict.fromkeys(file.entries, file)
        if (self.path / INDEX_FILE).exists():
            return self._open_shards()
        others = sorted(entry.name for entry in self.path.glob("*.safetensors*"))
        raise CheckpointError(f"{self.path} has {', '.join(others)}, expected {SINGLE_FILE} or {INDEX_FILE}")

    def _open_shards(self) -> dict[str, SafetensorsFile]:
        index_path = self.path / INDEX_FILE
        index = Fields(read_json_object(index_path), str(index_path)).mapping("weight_map")
        promised = {name: index.string(name) for name in index.names()}
        where: dict[str, SafetensorsFile] = {}
        shards = sorted(set(promised.values()))
        for shard in shards:
            if Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise CheckpointError(
                    f"{index_path}: shard {shard!r} is not a *.safetensors name inside the directory, "
                    "expected one"
                )
        for shard in shards:
            if not (self.path / shard).exists():
                raise CheckpointError(
                    f"{self.path / shard} is missing, expected it because {INDEX_FILE} names it"
                )
            file = self._open(self.path / shard)
            for name in file.entries:
                if name in where:
                    raise CheckpointError(
                        f"tensor {name!r} is in {where[name].path} and in {file.path}, "
                        "expected it in one of them"
                    )
                if promised.get(name) != shard:
                    raise CheckpointError(
                        f"{file.path} holds tensor {name!r}, "
                        f"expected it in {promised.get(name, 'no file')!r} by {INDEX_FILE}"
                    )
                where[name] = file
        for name, shard in promised.items():
            if name not in where:
                raise CheckpointError(
                    f"{self.path / shard} has no tensor {name!r}, expected it by {INDEX_FILE}"
                )
        return where

    def _open(self, path: Path) -> SafetensorsFile:
        file = SafetensorsFile(path)
        self._files.append(file)
        return file


def _with_generation_ends(config: ModelConfig, path: Path) -> ModelConfig:
    """The configuration with the end-of-answer tokens of generation_config.json where there is one.

    Chat models state there what ends a turn, and config.json keeps the one token that ends a text.
    """
    file = path / "generation_config.json"
    if not file.is_file():
        return config
    ends = eos_token_ids(Fields(read_json_object(file), str(file)))
    try:
        return replace(config, eos_token_ids=ends) if ends else config
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error
