"""The one face of every checkpoint format, and how a path becomes a reader."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from torch import Tensor

from qsun.errors import CheckpointError
from qsun.models.config import ModelConfig
from qsun_kernels.quant.formats import CheckpointFormat

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Names under which pickled weights travel; unpickling runs code of their author, so none is opened."""


class CheckpointReader(Protocol):
    """Tensors of one model by their Hugging Face names, read one at a time.

    path: what errors call the checkpoint.  config: the model's shape.  quantization: how the decoder's linear
    layers are stored when they are packed in few bits; None for an ordinary checkpoint.
    """

    path: Path
    config: ModelConfig
    quantization: CheckpointFormat | None

    def names(self) -> frozenset[str]:
        """Every tensor there is."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""

    def get(self, name: str) -> Tensor:
        """Read a tensor into host memory.  Raises CheckpointError when there is none of that name."""

    def vocabulary(self) -> dict[int, str] | None:
        """Token by id; None when the checkpoint has no tokenizer."""

    def close(self) -> None:
        """Close the files."""


def open_checkpoint(path: Path | str) -> CheckpointReader:
    """Open a checkpoint: a directory with config.json and safetensors weights, or a GGUF file.

    Raises CheckpointError when the path is missing, holds pickled weights (which are never opened), or holds
    nothing that is known; and what the reader itself finds.
    """
    from qsun.checkpoint.gguf_reader import GGUFReader
    from qsun.checkpoint.safetensors_reader import SafetensorsReader

    path = Path(path)
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir())
        if not any(
            name.endswith(".safetensors") or name.endswith(".safetensors.index.json") for name in names
        ):
            refuse_pickles(path, names)
            gguf = [name for name in names if name.endswith(".gguf")]
            if len(gguf) == 1:
                return GGUFReader(path / gguf[0])
            raise CheckpointError(
                f"{path} has no weights (it holds {_some(names)}), expected *.safetensors or one *.gguf"
            )
        return SafetensorsReader(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist, expected a checkpoint directory or a GGUF file")
    refuse_pickles(path.parent, [path.name])
    if path.suffix == ".gguf":
        return GGUFReader(path)
    raise CheckpointError(
        f"{path} is a file, expected a directory with config.json and *.safetensors, or a *.gguf file"
    )


def refuse_pickles(directory: Path, names: Iterable[str]) -> None:
    """Raise CheckpointError naming the first file whose name says that it is pickled."""
    for name in names:
        if Path(name).suffix in PICKLE_SUFFIXES:
            raise CheckpointError(
                f"{directory / name} is a pickle by its name, and pickles can run code and are never opened, "
                "expected weights converted to safetensors"
            )


def _some(names: list[str]) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
