"""The header of a GGUF file: metadata and where each tensor lies. Nothing is trusted before it is checked.

    "GGUF"  u32 version  u64 tensor count  u64 metadata count
    metadata: (string key, u32 type, value)*          string: u64 length, UTF-8 bytes
                                                      array: u32 type, u64 length, values
    tensors:  (string name, u32 rank, u64 sizes[rank], u32 type, u64 offset)*      sizes innermost first
    padding to the alignment (metadata "general.alignment", else 32), then the data, offsets from here

All numbers are little-endian (the format: ggml/docs/gguf.md of the ggml project, versions 2 and 3).
Every count and length is compared with the bytes that are left before anything is read or allocated, so a
damaged file ends in a ValueError and not in a loop over 2**60 entries.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

MetadataValue: TypeAlias = "int | float | bool | str | list[MetadataValue]"

# Type number of a metadata value: (struct code, bytes). 8 is a string, 9 an array.
_SCALARS: dict[int, tuple[str, int]] = {
    0: ("B", 1),
    1: ("b", 1),
    2: ("H", 2),
    3: ("h", 2),
    4: ("I", 4),
    5: ("i", 4),
    6: ("f", 4),
    7: ("?", 1),
    10: ("Q", 8),
    11: ("q", 8),
    12: ("d", 8),
}
_STRING, _ARRAY = 8, 9
_MAX_ARRAY_DEPTH = 4
_MAX_RANK = 4


class BlockType(NamedTuple):
    """A tensor type of GGUF: `weights` values are stored together in `nbytes` bytes."""

    name: str
    weights: int
    nbytes: int


BLOCK_TYPES: dict[int, BlockType] = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    10: BlockType("Q2_K", 256, 84),
    11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    16: BlockType("IQ2_XXS", 256, 66),
    17: BlockType("IQ2_XS", 256, 74),
    18: BlockType("IQ3_XXS", 256, 98),
    19: BlockType("IQ1_S", 256, 50),
    20: BlockType("IQ4_NL", 32, 18),
    21: BlockType("IQ3_S", 256, 110),
    22: BlockType("IQ2_S", 256, 82),
    23: BlockType("IQ4_XS", 256, 136),
    29: BlockType("IQ1_M", 256, 56),
    30: BlockType("BF16", 1, 2),
    34: BlockType("TQ1_0", 256, 54),
    35: BlockType("TQ2_0", 256, 66),
}


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where one tensor lies and what it is.

    name: as in the file, e.g. "blk.0.attn_q.weight". shape: outermost dimension first, as torch has it.
    type_number, type: the block type. offset, nbytes: the bytes of the tensor in the file.
    """

    name: str
    shape: tuple[int, ...]
    type_number: int
    type: BlockType
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """Version, metadata and tensors of a GGUF file."""

    version: int
    metadata: dict[str, MetadataValue]
    tensors: dict[str, GGUFTensor]


class _Cursor:
    """Reads forward through the bytes of a file and never past their end."""

    def __init__(self, data: memoryview, path: str) -> None:
        self.data = data
        self.path = path
        self.position = 0

    def error(self, what: str) -> ValueError:
        return ValueError(f"{self.path} is not a readable GGUF file: {what}")

    def require(self, nbytes: int, what: str) -> None:
        left = len(self.data) - self.position
        if nbytes > left:
            raise self.error(
                f"{what} needs {nbytes} bytes at byte {self.position}, "
                f"expected at most the {left} that are left (truncated?)"
            )

    def unpack(self, codes: str, nbytes: int, what: str) -> tuple[int | float | bool, ...]:
        self.require(nbytes, what)
        values = struct.unpack_from("<" + codes, self.data, self.position)
        self.position += nbytes
        return values

    def u32(self, what: str) -> int:
        return int(self.unpack("I", 4, what)[0])

    def u64(self, what: str) -> int:
        return int(self.unpack("Q", 8, what)[0])

    def string(self, what: str) -> str:
        length = self.u64(f"the length of {what}")
        self.require(length, what)
        raw = bytes(self.data[self.position : self.position + length])
        self.position += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8 ({error}), expected text") from error

    def value(self, type_number: int, what: str, depth: int = 0) -> MetadataValue:
        if type_number == _STRING:
            return self.string(what)
        if type_number in _SCALARS:
            code, nbytes = _SCALARS[type_number]
            return self.unpack(code, nbytes, what)[0]
        if type_number != _ARRAY:
            raise self.error(f"{what} has type {type_number}, expected 0 to 12")
        if depth == _MAX_ARRAY_DEPTH:
            raise self.error(f"{what} nests arrays more than {_MAX_ARRAY_DEPTH} deep")
        item_type = self.u32(f"the item type of {what}")
        length = self.u64(f"the length of {what}")
        if item_type in _SCALARS:
            code, nbytes = _SCALARS[item_type]
            self.require(length * nbytes, what)
            return list(self.unpack(f"{length}{code}", length * nbytes, what))
        # A string takes at least its length field, an array its type and length.
        self.require(length * (8 if item_type == _STRING else 12), what)
        return [self.value(item_type, what, depth + 1) for _ in range(length)]


def parse_header(data: memoryview, path: str) -> GGUFHeader:
    """Read the header of a GGUF file.

    data: the bytes of the whole file; path: its name, for messages.
    Raises ValueError naming the file, what was found and what was expected: another magic or version, counts,
    lengths or offsets that reach past the end, text that is not UTF-8, unknown types, repeated names, rows
    that are no whole number of blocks.
    """
    cursor = _Cursor(data, path)
    cursor.require(4, "the magic")
    magic = bytes(data[:4])
    if magic != b"GGUF":
        raise cursor.error(f"it starts with {magic!r}, expected b'GGUF'")
    cursor.position = 4
    version = cursor.u32("the version")
    if version not in (2, 3):
        hint = " (a big-endian file?)" if version & 0xFFFF == 0 else ""
        raise cursor.error(f"its version is {version}{hint}, expected 2 or 3")
    tensor_count = cursor.u64("the tensor count")
    metadata_count = cursor.u64("the metadata count")
    # A key, its type and a value take at least 13 bytes; a name, rank, one size, type and offset 32.
    cursor.require(metadata_count * 13, f"the metadata ({metadata_count} entries)")
    metadata: dict[str, MetadataValue] = {}
    for i in range(metadata_count):
        key = cursor.string(f"metadata key {i}")
        if key in metadata:
            raise cursor.error(f"metadata key {key!r} appears twice, expected it once")
        metadata[key] = cursor.value(cursor.u32(f"the type of {key!r}"), repr(key))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise cursor.error(f"general.alignment is {alignment!r}, expected a power of two")
    cursor.require(tensor_count * 24, f"the tensor list ({tensor_count} entries)")
    entries = [_tensor_entry(cursor, i) for i in range(tensor_count)]
    start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for tensor in entries:
        if tensor.name in tensors:
            raise cursor.error(f"tensor {tensor.name!r} appears twice, expected it once")
        offset = start + tensor.offset
        if offset + tensor.nbytes > len(data):
            raise cursor.error(
                f"tensor {tensor.name!r} takes bytes {offset} to {offset + tensor.nbytes}, "
                f"expected them within the file's {len(data)} (truncated?)"
            )
        tensors[tensor.name] = GGUFTensor(
            tensor.name, tensor.shape, tensor.type_number, tensor.type, offset, tensor.nbytes
        )
    return GGUFHeader(version, metadata, tensors)


def _tensor_entry(cursor: _Cursor, i: int) -> GGUFTensor:
    """One entry of the tensor list; its offset still counts from the start of the data."""
    name = cursor.string(f"the name of tensor {i}")
    rank = cursor.u32(f"the rank of tensor {name!r}")
    if not 1 <= rank <= _MAX_RANK:
        raise cursor.error(f"tensor {name!r} has rank {rank}, expected 1 to {_MAX_RANK}")
    sizes = [cursor.u64(f"the shape of tensor {name!r}") for _ in range(rank)]
    if 0 in sizes:
        raise cursor.error(f"tensor {name!r} has sizes {sizes}, expected them to be at least 1")
    type_number = cursor.u32(f"the type of tensor {name!r}")
    offset = cursor.u64(f"the offset of tensor {name!r}")
    block = BLOCK_TYPES.get(type_number)
    if block is None:
        known = ", ".join(f"{number} ({known.name})" for number, known in BLOCK_TYPES.items())
        raise cursor.error(f"tensor {name!r} has type {type_number}, expected one of {known}")
    if sizes[0] % block.weights:
        raise cursor.error(
            f"tensor {name!r} has rows of {sizes[0]} weights, "
            f"expected a multiple of {block.weights} for {block.name}"
        )
    weights = 1
    for size in sizes:
        weights *= size
    nbytes = weights // block.weights * block.nbytes
    return GGUFTensor(name, tuple(reversed(sizes)), type_number, block, offset, nbytes)
