"""One safetensors file, opened without trusting it.

Layout (the format's own description): 8 bytes little-endian header length n; n bytes of JSON, an object from
tensor name to {"dtype", "shape", "data_offsets": [begin, end]} plus an optional "__metadata__"; then the
data, which the tensors cover from end to end without gap or overlap.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from qsun.errors import CheckpointError

MAX_HEADER_BYTES = 100 * 1024 * 1024
"""What the reference implementation accepts: a longer header is a lie or an attack, not a model."""

MAX_RANK = 8
MAX_SIZE = 2**48
"""Beyond any tensor of a model: the product of more or larger sizes may take for ever, or torch cannot hold
it."""

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies: dtype, shape, and its bytes [begin, end) counted from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """A safetensors file whose header has been checked against the file; tensors are read one at a time.

    entries: every tensor by name.  metadata: the header's "__metadata__", empty when absent.
    Raises CheckpointError when the file is truncated, the header is not what the format says, or an entry
    has an unknown dtype, an impossible shape, or bytes that are outside the file, shared with another tensor,
    or too many or few for its shape.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: BinaryIO = path.open("rb")
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be read ({error.strerror}), expected a safetensors file"
            ) from error
        try:
            header, self._data_start, data_bytes = self._read_header()
            self.metadata = self._check_metadata(header.pop("__metadata__", {}))
            self.entries: Mapping[str, TensorEntry] = MappingProxyType(
                {name: self._check_entry(name, entry, data_bytes) for name, entry in header.items()}
            )
            self._check_cover(data_bytes)
        except BaseException:
            self._file.close()
            raise

    def get(self, name: str) -> Tensor:
        """Read one tensor into host memory of its own; CheckpointError when the file has no such tensor."""
        try:
            entry = self.entries[name]
        except KeyError:
            raise CheckpointError(f"{self.path} has no tensor {name!r}, expected it there") from None
        size = entry.end - entry.begin
        if size == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)
        buffer = bytearray(size)
        self._file.seek(self._data_start + entry.begin)
        got = self._file.readinto(buffer)  # type: ignore[attr-defined]
        if got != size:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} ended after {got} bytes, "
                f"expected {size} (the file shrank while open)"
            )
        return torch.frombuffer(buffer, dtype=entry.dtype).view(entry.shape)

    def close(self) -> None:
        """Close the file; the header stays readable."""
        self._file.close()

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_header(self) -> tuple[dict[str, Any], int, int]:
        """The header, where the data starts, and how many bytes of data there are."""
        file_bytes = os.fstat(self._file.fileno()).st_size
        prefix = self._file.read(8)
        if len(prefix) < 8:
            raise CheckpointError(
                f"{self.path} has {file_bytes} bytes, expected at least 8 for a safetensors header length"
            )
        size = int.from_bytes(prefix, "little")
        room = min(file_bytes - 8, MAX_HEADER_BYTES)
        if size > room:
            raise CheckpointError(
                f"{self.path} states a header of {size} bytes, expected at most {room} "
                f"(the file has {file_bytes} bytes; it is truncated or not a safetensors file)"
            )
        raw = self._file.read(size)
        try:
            header = json.loads(raw.decode("utf-8"), object_pairs_hook=self._unique_keys)
        except (
            ValueError,
            RecursionError,
        ) as error:  # not UTF-8, not JSON, an integer of thousands of digits
            raise CheckpointError(
                f"{self.path} has a header that is not JSON ({error}), expected JSON"
            ) from error
        if not isinstance(header, dict):
            raise CheckpointError(
                f"{self.path} has a header of type {type(header).__name__}, expected an object"
            )
        return header, 8 + size, file_bytes - 8 - size

    def _unique_keys(self, pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise CheckpointError(f"{self.path} lists {key!r} twice in its header, expected it once")
            result[key] = value
        return result

    def _check_metadata(self, metadata: object) -> Mapping[str, str]:
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise CheckpointError(f"{self.path} has __metadata__ {metadata!r}, expected an object of strings")
        return MappingProxyType(metadata)

    def _check_entry(self, name: str, entry: object, data_bytes: int) -> TensorEntry:
        where = f"{self.path}: tensor {name!r}"
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise CheckpointError(
                f"{where} is described by {entry!r}, expected dtype, shape and data_offsets"
            )
        dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
        if dtype is None:
            raise CheckpointError(
                f"{where} has dtype {entry['dtype']!r}, expected one of {', '.join(DTYPES)}"
            )
        shape, offsets = entry["shape"], entry["data_offsets"]
        if not _is_sizes(shape) or len(shape) > MAX_RANK or max(shape, default=0) > MAX_SIZE:
            raise CheckpointError(
                f"{where} has shape {_shown(shape)}, expected a list of at most {MAX_RANK} integers "
                f"from 0 to {MAX_SIZE}"
            )
        if not _is_sizes(offsets) or len(offsets) != 2:
            raise CheckpointError(f"{where} has data_offsets {_shown(offsets)}, expected two integers from 0")
        begin, end = offsets
        if not begin <= end <= data_bytes:
            raise CheckpointError(
                f"{where} has data_offsets {offsets}, "
                f"expected begin <= end <= {data_bytes}, the bytes of data there are"
            )
        expected = math.prod(shape) * dtype.itemsize
        if end - begin != expected:
            raise CheckpointError(
                f"{where} has {end - begin} bytes, expected {expected} for {entry['dtype']} of shape {shape}"
            )
        return TensorEntry(dtype, tuple(shape), begin, end)

    def _check_cover(self, data_bytes: int) -> None:
        """Every byte of data belongs to exactly one tensor."""
        position, previous = 0, "the header"
        for name, entry in sorted(self.entries.items(), key=lambda item: (item[1].begin, item[1].end)):
            if entry.begin < position:
                raise CheckpointError(
                    f"{self.path}: tensor {name!r} starts at byte {entry.begin} inside {previous!r}, "
                    f"expected it to start at byte {position}"
                )
            if entry.begin > position:
                raise CheckpointError(
                    f"{self.path}: tensor {name!r} starts at byte {entry.begin}, "
                    f"expected byte {position}, where {previous!r} ends"
                )
            position, previous = entry.end, name
        if position != data_bytes:
            raise CheckpointError(
                f"{self.path} has {data_bytes} bytes of data, expected {position}, where its last tensor ends"
            )


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _shown(value: object) -> str:
    words = repr(value)
    return words if len(words) <= 200 else f"{words[:200]}..."
