"""GGUF checkpoints (llama.cpp): read tensor by tensor and dequantised to float.

F32, F16 and BF16 tensors are read by torch alone; the block formats (Q4_1, Q6_K, IQ4_XS, ...) are
dequantised by the `gguf` package, which is imported when the first of them is read.

llama.cpp stores the q and k projections of architecture "llama" (which includes Mistral) with the rows of
each head reordered: its rotary embedding pairs neighbouring rows, that of transformers pairs row i with row
i + head_dim / 2. `undo_rotary_permutation` restores the latter order, which is the one used in this project.
Qwen2 and Qwen3 files are not reordered.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from types import ModuleType, TracebackType

import torch
from torch import Tensor

from qsun_kernels.quant.formats.gguf_header import GGUFTensor, MetadataValue, parse_header

_TORCH_TYPES: dict[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# Architectures of GGUF whose q and k rows are reordered, as general.architecture names them.
PERMUTED_ARCHITECTURES = frozenset({"llama"})


def _gguf_quants() -> ModuleType:
    """The module of the gguf package that dequantises; ImportError naming the package when it is missing."""
    try:
        from gguf import quants
    except ImportError as error:
        raise ImportError(
            "dequantising this GGUF file needs the package gguf, which is not installed: pip install gguf"
        ) from error
    assert isinstance(quants, ModuleType)
    return quants


def dequantize_blocks(data: Tensor, type_name: str, shape: tuple[int, ...]) -> Tensor:
    """Turn the bytes of a GGUF tensor into floats.

    data: uint8 (nbytes,), contiguous, on the CPU; type_name: "F32", "Q4_1", ... ; shape: outermost first.
    Returns float32 of that shape, freshly allocated.
    Raises ImportError when the gguf package is needed and missing.
    """
    dtype = _TORCH_TYPES.get(type_name)
    if dtype is not None:
        return data.clone().view(dtype).reshape(shape).float()
    quants = _gguf_quants()
    from gguf import GGMLQuantizationType

    rows = data.reshape(*shape[:-1], -1).numpy()
    return torch.from_numpy(quants.dequantize(rows, GGMLQuantizationType[type_name])).reshape(shape)


def undo_rotary_permutation(weight: Tensor, num_heads: int) -> Tensor:
    """Put the q or k rows of a "llama" GGUF file back in the order of transformers.

    weight: (num_heads * head_dim, ...), the projection's weight or bias.
    num_heads: query heads for q, key-value heads for k.
    Within a head, row 2*i + j of the file is row j * head_dim/2 + i of the result (j in 0..1).
    Returns a new contiguous tensor. Raises ValueError when the rows are not num_heads heads of even size.
    """
    rows = weight.shape[0]
    if num_heads < 1 or rows % (2 * num_heads):
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, expected {num_heads} heads of an even number of rows"
        )
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape).contiguous()


class GGUFFile:
    """A GGUF file, mapped into memory; tensors are read one at a time.

    with GGUFFile(path) as file:
        file.architecture                   "llama", "qwen2", ...
        file.metadata["llama.block_count"]
        file.tensors["blk.0.attn_q.weight"].shape
        file.read("blk.0.attn_q.weight")    float32

    Raises FileNotFoundError for a missing file and ValueError, naming the file, for one that is not a
    readable GGUF file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        with open(self.path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise ValueError(f"{self.path} is not a readable GGUF file: it is empty, expected b'GGUF'")
            # A private copy-on-write mapping: torch wants a writable buffer, the file must never change.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        try:
            with memoryview(self._map) as data:
                header = parse_header(data, self.path)
        except ValueError:
            self._map.close()
            raise
        self.version: int = header.version
        self.metadata: Mapping[str, MetadataValue] = header.metadata
        self.tensors: Mapping[str, GGUFTensor] = header.tensors

    @property
    def architecture(self) -> str:
        """The metadata entry general.architecture; ValueError when it is missing or no string."""
        value = self.metadata.get("general.architecture")
        if not isinstance(value, str):
            raise ValueError(
                f"{self.path}: general.architecture is {value!r}, expected a name such as 'llama'"
            )
        return value

    def read(self, name: str) -> Tensor:
        """One tensor as float32, in the file's own row order (see `undo_rotary_permutation`).

        Raises KeyError naming the tensor and the file, ImportError when the gguf package is needed and
        missing, ValueError when the tensor holds NaN or infinity (damaged scales).
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise KeyError(
                f"{self.path} has no tensor {name!r}, expected one of its {len(self.tensors)} tensors"
            )
        data = torch.frombuffer(self._map, dtype=torch.uint8, count=tensor.nbytes, offset=tensor.offset)
        values = dequantize_blocks(data, tensor.type.name, tensor.shape)
        if not bool(values.isfinite().all()):
            index = tuple(int(i) for i in (~values.isfinite()).nonzero()[0])
            raise ValueError(
                f"{self.path}: tensor {name!r} is {float(values[index])!r} at {index}, expected finite values"
            )
        return values

    def close(self) -> None:
        """Unmap the file. Tensors read before stay valid: they are copies."""
        self._map.close()

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
