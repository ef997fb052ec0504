"""One safetensors file: read back exactly, and every lie of a header named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qsun.checkpoint.safetensors_file import DTYPES, SafetensorsFile
from qsun.errors import CheckpointError


def write_raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A file with this header, which is JSON unless it is bytes already, and stated header length."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(encoded) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + encoded + data)
    return path


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_every_dtype_reads_back_as_the_reference_package_wrote_it(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, dtype in DTYPES.items():
        bits = torch.randint(
            0, 2 if dtype == torch.bool else 256, (3, 8), dtype=torch.uint8, generator=generator
        )
        tensors[name] = bits.view(dtype) if dtype != torch.bool else bits.bool()
    tensors["empty"] = torch.empty(0, 4)
    tensors["scalar"] = torch.tensor(2.5)
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    with SafetensorsFile(tmp_path / "x.safetensors") as file:
        assert set(file.entries) == set(tensors)
        assert file.metadata == {"format": "pt"}
        for name, expected in tensors.items():
            got = file.get(name)
            assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
            assert torch.equal(got.view(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))


def test_tensors_outlive_the_file_and_share_nothing_with_it(tmp_path):
    save_file({"a": torch.ones(4)}, tmp_path / "x.safetensors")
    with SafetensorsFile(tmp_path / "x.safetensors") as file:
        first = file.get("a")
        first.zero_()
        assert torch.equal(file.get("a"), torch.ones(4))
    assert torch.equal(first, torch.zeros(4))


HEADERS = [
    ("not an object", [1, 2], b"", "header of type list, expected an object"),
    ("not json", b"{'a': 1}", b"", "header that is not JSON .* expected JSON"),
    ("not text", b"\xff\xfe{}", b"", "header that is not JSON"),
    ("deep", b"[" * 200000, b"", "header that is not JSON"),
    ("digits", b'{"a": ' + b"9" * 5000 + b"}", b"", "header that is not JSON"),
    (
        "twice",
        b'{"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}, "a": {}}',
        b"",
        "lists 'a' twice",
    ),
    (
        "metadata of numbers",
        {"__metadata__": {"n": 1}},
        b"",
        "__metadata__ .*, expected an object of strings",
    ),
    (
        "entry is a list",
        {"a": [1]},
        b"",
        r"tensor 'a' is described by \[1\], expected dtype, shape and data_offsets",
    ),
    (
        "no offsets",
        {"a": {"dtype": "F32", "shape": [2]}},
        bytes(8),
        "tensor 'a' is described by .*expected dtype",
    ),
    ("unknown dtype", {"a": entry("F7")}, bytes(8), "tensor 'a' has dtype 'F7', expected one of F64, F32"),
    ("dtype is a number", {"a": entry(7)}, bytes(8), "tensor 'a' has dtype 7, expected one of"),
    (
        "negative size",
        {"a": entry(shape=[-2])},
        bytes(8),
        r"tensor 'a' has shape \[-2\], expected a list of at most 8 integers",
    ),
    (
        "fractional size",
        {"a": entry(shape=[2.0])},
        bytes(8),
        r"tensor 'a' has shape \[2.0\], expected a list",
    ),
    (
        "size true",
        {"a": entry(shape=[True, 2])},
        bytes(8),
        r"tensor 'a' has shape \[True, 2\], expected a list",
    ),
    (
        "size beyond any",
        {"a": entry(shape=[0, 2**49], offsets=[0, 0])},
        b"",
        r"tensor 'a' has shape \[0, 562949953421312\], expected a list",
    ),
    (
        "a thousand sizes",
        {"a": entry(shape=[9**99] * 1000, offsets=[0, 0])},
        b"",
        r"tensor 'a' has shape \[29512\d+, .*\.\.\., expected a list of at most 8 integers",
    ),
    ("nine sizes", {"a": entry(shape=[1] * 9, offsets=[0, 4])}, bytes(4), r"expected a list of at most 8"),
    ("one offset", {"a": entry(offsets=[8])}, bytes(8), r"data_offsets \[8\], expected two integers"),
    (
        "backwards",
        {"a": entry(offsets=[8, 0])},
        bytes(8),
        r"data_offsets \[8, 0\], expected begin <= end <= 8",
    ),
    (
        "past the end",
        {"a": entry(offsets=[0, 8])},
        bytes(4),
        r"data_offsets \[0, 8\], expected begin <= end <= 4",
    ),
    ("huge offset", {"a": entry(offsets=[0, 2**70])}, bytes(8), "expected begin <= end <= 8"),
    ("too few bytes", {"a": entry(shape=[4])}, bytes(8), "tensor 'a' has 8 bytes, expected 16 for F32"),
    (
        "overflowing shape",
        {"a": entry(shape=[2**40, 2**40])},
        bytes(8),
        "tensor 'a' has 8 bytes, expected 48357",
    ),
    (
        "overlap",
        {"a": entry(), "b": entry(offsets=[4, 12])},
        bytes(12),
        "tensor 'b' starts at byte 4 inside 'a', expected it to start at byte 8",
    ),
    (
        "same bytes",
        {"a": entry(), "b": entry()},
        bytes(8),
        "tensor 'b' starts at byte 0 inside 'a', expected it to start at byte 8",
    ),
    ("gap", {"a": entry(offsets=[4, 12])}, bytes(12), "tensor 'a' starts at byte 4, expected byte 0"),
    (
        "data left over",
        {"a": entry()},
        bytes(12),
        "has 12 bytes of data, expected 8, where its last tensor ends",
    ),
]


@pytest.mark.damaged
@pytest.mark.parametrize(
    ("header", "data", "message"), [case[1:] for case in HEADERS], ids=[c[0] for c in HEADERS]
)
def test_lying_headers_are_named(tmp_path, header, data, message):
    path = write_raw(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CheckpointError, match=f"x.safetensors.*{message}"):
        SafetensorsFile(path)


LENGTHS = [
    ("empty", b"", "has 0 bytes, expected at least 8"),
    ("short", b"\x01\x00\x00", "has 3 bytes, expected at least 8"),
    (
        "header past the end",
        (100).to_bytes(8, "little") + b"{}",
        "states a header of 100 bytes, expected at most 2 ",
    ),
    ("absurd length", (2**63).to_bytes(8, "little") + b"{}", "states a header of 9223372036854775808 bytes"),
    ("a pickle", b"\x80\x02}q\x00.\x00\x00\x00\x00", "states a header of .* not a safetensors file"),
]


@pytest.mark.damaged
@pytest.mark.parametrize(("content", "message"), [case[1:] for case in LENGTHS], ids=[c[0] for c in LENGTHS])
def test_truncated_files_are_named(tmp_path, content, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"x.safetensors {message}"):
        SafetensorsFile(path)


@pytest.mark.damaged
def test_a_header_longer_than_any_model_needs_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((2**34).to_bytes(8, "little"))
        file.truncate(2**35)  # sparse: takes no disk
    with pytest.raises(
        CheckpointError, match="states a header of 17179869184 bytes, expected at most 104857600"
    ):
        SafetensorsFile(path)


@pytest.mark.damaged
def test_every_truncation_of_a_good_file_is_refused(tmp_path):
    save_file({"a": torch.arange(6.0), "b": torch.ones(3, dtype=torch.int8)}, tmp_path / "good.safetensors")
    content = (tmp_path / "good.safetensors").read_bytes()
    path = tmp_path / "cut.safetensors"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"cut.safetensors"):
            SafetensorsFile(path)


@pytest.mark.damaged
def test_a_file_that_shrinks_while_open(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(4096)}, path)
    with SafetensorsFile(path) as file:
        with path.open("r+b") as other:
            other.truncate(1000)
        with pytest.raises(CheckpointError, match=r"tensor 'a' ended after .* bytes, expected 16384"):
            file.get("a")


@pytest.mark.damaged
def test_missing_file_and_missing_tensor(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"nowhere.safetensors cannot be read .*expected a safetensors file"
    ):
        SafetensorsFile(tmp_path / "nowhere.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    with (
        SafetensorsFile(tmp_path / "x.safetensors") as file,
        pytest.raises(CheckpointError, match=r"x.safetensors has no tensor 'b', expected it there"),
    ):
        file.get("b")
