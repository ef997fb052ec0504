"""GGUF files: written by hand and by the package gguf, damaged on purpose, and a real one against transformers."""

# One damaged case a line reads best, however long.
# ruff: noqa: E501

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qsun_kernels.quant.formats import GGUFFile, undo_rotary_permutation
from qsun_kernels.quant.formats.gguf_header import BLOCK_TYPES, parse_header

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)
F32, F16, Q4_0, Q4_1, Q8_0, BF16 = 0, 1, 2, 3, 8, 30


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor_entry(name: str | bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    """shape innermost first, as the file has it."""
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


ARCHITECTURE = entry("general.architecture", STRING, text("llama"))


def gguf_bytes(
    metadata: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    tensor_count: int | None = None,
    metadata_count: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A GGUF file, with any of its counts replaced by a lie."""
    metadata = [ARCHITECTURE] if metadata is None else metadata
    tensors = [] if tensors is None else tensors
    counts = (
        len(tensors) if tensor_count is None else tensor_count,
        len(metadata) if metadata_count is None else metadata_count,
    )
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(metadata) + b"".join(tensors)
    return head + b"\0" * (-len(head) % alignment) + data


def half(value: float) -> bytes:
    return struct.pack("<e", value)


def q4_block(values: list[int]) -> bytes:
    """16 bytes: value i in the low half of byte i, value i + 16 in the high half."""
    return bytes(values[i] | values[i + 16] << 4 for i in range(16))


def sample_file() -> tuple[bytes, dict[str, torch.Tensor]]:
    """Five tensors of the common types with their values worked out here."""
    generator = torch.Generator().manual_seed(0)
    f32 = torch.randn(3, 4, generator=generator)
    f16 = torch.randn(2, 8, generator=generator).half()
    bf16 = torch.randn(8, generator=generator).bfloat16()
    nibbles = torch.randint(0, 16, (2, 32), generator=generator).tolist()
    bytes_ = torch.randint(-128, 128, (1, 64), generator=generator).tolist()
    q4_0 = b"".join(half(0.5 * (i + 1)) + q4_block(row) for i, row in enumerate(nibbles))
    q4_1 = b"".join(half(0.25) + half(-1.5) + q4_block(row) for row in nibbles)
    q8_0 = (
        half(0.125) + struct.pack("<32b", *bytes_[0][:32]) + half(-2.0) + struct.pack("<32b", *bytes_[0][32:])
    )
    expected = {
        "f32": f32,
        "f16": f16.float(),
        "bf16": bf16.float(),
        "q4_0": torch.tensor([[(v - 8) * 0.5 * (i + 1) for v in row] for i, row in enumerate(nibbles)]),
        "q4_1": torch.tensor([[v * 0.25 - 1.5 for v in row] for row in nibbles]),
        "q8_0": torch.tensor([[v * 0.125 for v in bytes_[0][:32]] + [v * -2.0 for v in bytes_[0][32:]]]),
    }
    parts = {
        "f32": ((4, 3), F32, f32.numpy().tobytes()),
        "f16": ((8, 2), F16, f16.numpy().tobytes()),
        "bf16": ((8,), BF16, bf16.view(torch.int16).numpy().tobytes()),
        "q4_0": ((32, 2), Q4_0, q4_0),
        "q4_1": ((32, 2), Q4_1, q4_1),
        "q8_0": ((64, 1), Q8_0, q8_0),
    }
    entries, data = [], b""
    for name, (shape, kind, raw) in parts.items():
        data += b"\0" * (-len(data) % 32)
        entries.append(tensor_entry(name, shape, kind, len(data)))
        data += raw
    return gguf_bytes(tensors=entries, data=data), expected


def write(folder: Path, content: bytes) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(content)
    return path


def test_tensors_of_a_hand_written_file(tmp_path):
    pytest.importorskip("gguf")
    content, expected = sample_file()
    with GGUFFile(write(tmp_path, content)) as file:
        assert file.architecture == "llama" and file.version == 3
        assert list(file.tensors) == list(expected)
        values = {name: file.read(name) for name in file.tensors}
    for name, tensor in expected.items():
        assert values[name].dtype == torch.float32
        assert torch.equal(values[name], tensor), name
    assert (tmp_path / "model.gguf").read_bytes() == content


def test_float_tensors_need_no_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    content, expected = sample_file()
    with GGUFFile(write(tmp_path, content)) as file:
        for name in ("f32", "f16", "bf16"):
            assert torch.equal(file.read(name), expected[name])
        with pytest.raises(
            ImportError, match="needs the package gguf, which is not installed: pip install gguf"
        ):
            file.read("q4_0")


def test_metadata_of_every_type(tmp_path):
    strings = struct.pack("<IQ", STRING, 3) + text("a") + text("") + text("Ġé")
    nested = struct.pack("<IQ", ARRAY, 2) + (
        struct.pack("<IQ2B", UINT8, 2, 1, 2) + struct.pack("<IQ", UINT8, 0)
    )
    metadata = [
        ARCHITECTURE,
        entry("u8", UINT8, b"\xff"),
        entry("i8", INT8, b"\xff"),
        entry("u16", UINT16, b"\xff\xff"),
        entry("i16", INT16, b"\xff\xff"),
        entry("u32", UINT32, struct.pack("<I", 1 << 31)),
        entry("i32", INT32, struct.pack("<i", -5)),
        entry("f32", FLOAT32, struct.pack("<f", 0.5)),
        entry("bool", BOOL, b"\x01"),
        entry("u64", UINT64, struct.pack("<Q", 1 << 63)),
        entry("i64", INT64, struct.pack("<q", -(1 << 62))),
        entry("f64", FLOAT64, struct.pack("<d", 1e-300)),
        entry("strings", ARRAY, strings),
        entry("floats", ARRAY, struct.pack("<IQ2f", FLOAT32, 2, 1.0, -2.0)),
        entry("empty", ARRAY, struct.pack("<IQ", INT32, 0)),
        entry("nested", ARRAY, nested),
    ]
    with GGUFFile(write(tmp_path, gguf_bytes(metadata))) as file:
        assert dict(file.metadata) == {
            "general.architecture": "llama", "u8": 255, "i8": -1, "u16": 65535, "i16": -1, "u32": 1 << 31, "i32": -5,
            "f32": 0.5, "bool": True, "u64": 1 << 63, "i64": -(1 << 62), "f64": 1e-300, "strings": ["a", "", "Ġé"],
            "floats": [1.0, -2.0], "empty": [], "nested": [[1, 2], []],
        }  # fmt: skip
        assert file.metadata["bool"] is True


@pytest.mark.parametrize("alignment", [1, 8, 64, 4096])
def test_another_alignment(tmp_path, alignment):
    metadata = [ARCHITECTURE, entry("general.alignment", UINT32, struct.pack("<I", alignment))]
    data = struct.pack("<4f", 1, 2, 3, 4)
    content = gguf_bytes(metadata, [tensor_entry("a", (4,), F32, 0)], data, alignment=alignment)
    with GGUFFile(write(tmp_path, content)) as file:
        assert file.read("a").tolist() == [1, 2, 3, 4]


def test_block_types_agree_with_the_package():
    constants = pytest.importorskip("gguf.constants")
    for number, block in BLOCK_TYPES.items():
        kind = constants.GGMLQuantizationType(number)
        assert (kind.name, constants.GGML_QUANT_SIZES[kind]) == (block.name, (block.weights, block.nbytes))


@pytest.mark.parametrize("name", [block.name for block in BLOCK_TYPES.values()])
def test_files_of_the_package(tmp_path, name):
    """Written by GGUFWriter from blocks of every type, read as GGUFReader and gguf.dequantize read them."""
    gguf = pytest.importorskip("gguf")
    import numpy

    kind = gguf.GGMLQuantizationType[name]
    weights, nbytes = gguf.GGML_QUANT_SIZES[kind]
    rng = numpy.random.default_rng(1)
    if name in ("F32", "F16"):
        blocks = rng.standard_normal((3, 8)).astype(name.replace("F", "float"))
    else:
        # Exponents of random halves may be those of infinity: keep every byte's top bits clear.
        blocks = rng.integers(0, 0x3C, (3, 2 * nbytes), dtype=numpy.uint8)
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(7)
    writer.add_tensor("blk.0.ffn_up.weight", blocks, raw_dtype=None if name in ("F32", "F16") else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = gguf.dequantize(gguf.GGUFReader(path).tensors[0].data, kind)
    with GGUFFile(path) as file:
        assert file.architecture == "qwen2" and file.metadata["qwen2.block_count"] == 7
        tensor = file.tensors["blk.0.ffn_up.weight"]
        assert tensor.shape == (3, 2 * weights if name not in ("F32", "F16") else 8)
        assert tensor.type.name == name
        assert torch.equal(file.read("blk.0.ffn_up.weight"), torch.from_numpy(expected.copy()))


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 2), (3, 8), (9, 64)])
def test_rotary_order_is_undone(heads, head_dim):
    """The writer's reordering, row by row: row i of the first half to 2*i, of the second to 2*i + 1."""
    weight = torch.randn(heads * head_dim, 5)
    stored = torch.empty_like(weight)
    for head in range(heads):
        for i in range(head_dim // 2):
            for part in (0, 1):
                stored[head * head_dim + 2 * i + part] = weight[head * head_dim + part * head_dim // 2 + i]
    assert torch.equal(undo_rotary_permutation(stored, heads), weight)
    assert torch.equal(undo_rotary_permutation(stored[:, 0], heads), weight[:, 0])


NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip


def assert_layers_are_equal(file: GGUFFile, state: dict[str, torch.Tensor], layers: tuple[int, ...]) -> None:
    """Every projection and norm of some layers, q and k rows put back in order."""
    heads = {
        "attn_q": file.metadata["llama.attention.head_count"],
        "attn_k": file.metadata["llama.attention.head_count_kv"],
    }
    for layer in layers:
        for stored, name in NAMES.items():
            value = file.read(f"blk.{layer}.{stored}.weight")
            expected = state[f"model.layers.{layer}.{name}.weight"]
            if stored in heads:
                assert not torch.equal(value, expected)
                value = undo_rotary_permutation(value, heads[stored])
            assert torch.equal(value, expected), (layer, name)


def excerpt(file: GGUFFile, rows: int) -> bytes:
    """The first layer of a file, its norm and `rows` rows of the embedding: as they are, bit for bit."""
    metadata = [ARCHITECTURE]
    for key, value in file.metadata.items():
        if key == "llama.block_count":
            value = 1
        elif key == "llama.vocab_size":
            value = rows
        if key.startswith("llama.") and type(value) is int:
            metadata.append(entry(key, UINT32, struct.pack("<I", value)))
        elif key.startswith("llama.") and type(value) is float:
            metadata.append(entry(key, FLOAT32, struct.pack("<f", value)))
    whole = Path(file.path).read_bytes()
    entries, data = [], b""
    for tensor in file.tensors.values():
        if tensor.name.startswith("blk.") and not tensor.name.startswith("blk.0."):
            continue
        shape = (rows, *tensor.shape[1:]) if tensor.name == "token_embd.weight" else tensor.shape
        nbytes = tensor.nbytes * shape[0] // tensor.shape[0]
        data += b"\0" * (-len(data) % 32)
        entries.append(tensor_entry(tensor.name, shape[::-1], tensor.type_number, len(data)))
        data += whole[tensor.offset : tensor.offset + nbytes]
    return gguf_bytes(metadata, entries, data)


def test_a_real_layer_is_what_transformers_loads(smollm2_gguf, tmp_path):
    """The first layer of SmolLM2-135M-Instruct (4-bit Q4_1 weights, Q8_0 embedding)."""
    pytest.importorskip("gguf")
    transformers = pytest.importorskip("transformers")
    with GGUFFile(smollm2_gguf) as whole:
        path = write(tmp_path, excerpt(whole, 64))
        original = whole.read("blk.0.attn_q.weight")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    )
    state = model.state_dict()
    with GGUFFile(path) as file:
        assert torch.equal(file.read("blk.0.attn_q.weight"), original)
        assert torch.equal(file.read("token_embd.weight"), state["model.embed_tokens.weight"])
        assert torch.equal(file.read("output_norm.weight"), state["model.norm.weight"])
        assert_layers_are_equal(file, state, (0,))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.xdist_group("smollm2")
def test_a_real_file_is_what_transformers_loads(smollm2_gguf, smollm2_by_transformers):
    state = smollm2_by_transformers.state_dict()
    with GGUFFile(smollm2_gguf) as file:
        assert torch.equal(file.read("token_embd.weight"), state["model.embed_tokens.weight"])
        assert_layers_are_equal(file, state, (0, 13, 29))


def metadata_lie(kind: int, value: bytes) -> bytes:
    return gguf_bytes([ARCHITECTURE, entry("key", kind, value)])


HUGE = 1 << 60
ONE = tensor_entry("a", (4,), F32, 0)
DEEP = struct.pack("<IQ", ARRAY, 1) * 8 + struct.pack("<IQB", UINT8, 1, 0)
DAMAGED = {
    "empty": (b"", "it is empty, expected b'GGUF'"),
    "two bytes": (b"GG", "the magic needs 4 bytes at byte 0, expected at most the 2 that are left"),
    "another magic": (gguf_bytes(magic=b"GGML"), "it starts with b'GGML', expected b'GGUF'"),
    "a zip": (b"PK\x03\x04" + bytes(100), "it starts with b'PK"),
    "version 1": (gguf_bytes(version=1), "its version is 1, expected 2 or 3"),
    "version 4": (gguf_bytes(version=4), "its version is 4, expected 2 or 3"),
    "big-endian": (gguf_bytes(version=3 << 24), r"its version is 50331648 \(a big-endian file\?\), expected 2 or 3"),
    "no counts": (b"GGUF" + struct.pack("<I", 3), "the tensor count needs 8 bytes"),
    "endless metadata": (gguf_bytes(metadata_count=HUGE), r"the metadata \(1152921504606846976 entries\) needs .* expected at most"),
    "endless tensors": (gguf_bytes(tensor_count=HUGE), r"the tensor list \(1152921504606846976 entries\) needs .* expected at most"),
    "one entry too many": (gguf_bytes(metadata_count=2, alignment=1), r"the metadata \(2 entries\) needs|the length of metadata key 1 needs"),
    "endless key": (gguf_bytes([struct.pack("<Q", HUGE) + b"abcdefghijkl"]), "metadata key 0 needs .* expected at most"),
    "endless string": (metadata_lie(STRING, struct.pack("<Q", HUGE)), "'key' needs .* expected at most"),
    "endless array": (metadata_lie(ARRAY, struct.pack("<IQ", UINT8, HUGE)), "'key' needs .* expected at most"),
    "endless string array": (metadata_lie(ARRAY, struct.pack("<IQ", STRING, HUGE)), "'key' needs .* expected at most"),
    "endless nested array": (metadata_lie(ARRAY, struct.pack("<IQ", ARRAY, HUGE)), "'key' needs .* expected at most"),
    "deep array": (metadata_lie(ARRAY, DEEP), "'key' nests arrays more than 4 deep"),
    "metadata type 13": (metadata_lie(13, bytes(8)), "'key' has type 13, expected 0 to 12"),
    "array item type 99": (metadata_lie(ARRAY, struct.pack("<IQ", 99, 1) + bytes(16)), "'key' has type 99, expected 0 to 12"),
    "key twice": (gguf_bytes([ARCHITECTURE, ARCHITECTURE]), "metadata key 'general.architecture' appears twice"),
    "key no text": (gguf_bytes([entry(b"\xff\xfe\xfd", UINT8, b"\0")]), "metadata key 0 is not UTF-8"),
    "alignment 48": (gguf_bytes([entry("general.alignment", UINT32, struct.pack("<I", 48))]), "general.alignment is 48, expected a power of two"),
    "alignment 0": (gguf_bytes([entry("general.alignment", UINT32, struct.pack("<I", 0))]), "general.alignment is 0, expected"),
    "alignment text": (gguf_bytes([entry("general.alignment", STRING, text("32"))]), "general.alignment is '32', expected"),
    "alignment true": (gguf_bytes([entry("general.alignment", BOOL, b"\1")]), "general.alignment is True, expected"),
    "data truncated": (gguf_bytes(tensors=[ONE], data=bytes(15)), r"tensor 'a' takes bytes 128 to 144, expected them within the file's 143"),
    "offset past the end": (gguf_bytes(tensors=[tensor_entry("a", (4,), F32, HUGE)], data=bytes(16)), "tensor 'a' takes bytes 1152921504606847104 to .* expected them within"),
    "shape too large": (gguf_bytes(tensors=[tensor_entry("a", (HUGE, HUGE), F32, 0)], data=bytes(16)), "tensor 'a' takes bytes 128 to .* expected them within"),
    "shape zero": (gguf_bytes(tensors=[tensor_entry("a", (4, 0), F32, 0)], data=bytes(16)), r"tensor 'a' has sizes \[4, 0\], expected them to be at least 1"),
    "rank 0": (gguf_bytes(tensors=[tensor_entry("a", (), F32, 0)], data=bytes(16)), "tensor 'a' has rank 0, expected 1 to 4"),
    "rank 1000000": (gguf_bytes(tensors=[text("a") + struct.pack("<I", 1000000) + bytes(64)]), "tensor 'a' has rank 1000000, expected 1 to 4"),
    "unknown block type": (gguf_bytes(tensors=[tensor_entry("a", (4,), 4, 0)], data=bytes(16)), r"tensor 'a' has type 4, expected one of 0 \(F32\)"),
    "half a block": (gguf_bytes(tensors=[tensor_entry("a", (48,), Q4_0, 0)], data=bytes(64)), "tensor 'a' has rows of 48 weights, expected a multiple of 32 for Q4_0"),
    "tensor twice": (gguf_bytes(tensors=[ONE, ONE], data=bytes(16)), "tensor 'a' appears twice"),
}  # fmt: skip


@pytest.mark.damaged
@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files(tmp_path, case):
    content, message = DAMAGED[case]
    path = write(tmp_path, content)
    with pytest.raises(ValueError, match=rf"model\.gguf is not a readable GGUF file: .*({message})"):
        GGUFFile(path)


@pytest.mark.damaged
def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.gguf"):
        GGUFFile(tmp_path / "none.gguf")


@pytest.mark.damaged
def test_missing_tensor(tmp_path):
    content, _ = sample_file()
    with (
        GGUFFile(write(tmp_path, content)) as file,
        pytest.raises(KeyError, match=r"model\.gguf has no tensor 'b'"),
    ):
        file.read("b")


@pytest.mark.damaged
@pytest.mark.parametrize("metadata", [[], [entry("general.architecture", UINT8, b"\1")]])
def test_missing_architecture(tmp_path, metadata):
    message = r"model\.gguf: general\.architecture is (None|1), expected a name"
    with GGUFFile(write(tmp_path, gguf_bytes(metadata))) as file, pytest.raises(ValueError, match=message):
        assert file.architecture


@pytest.mark.damaged
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(tmp_path, value):
    data = struct.pack("<4f", 1, 2, value, 4)
    content = gguf_bytes(tensors=[tensor_entry("a", (2, 2), F32, 0)], data=data)
    message = rf"tensor 'a' is {value} at \(1, 0\), expected finite values"
    with GGUFFile(write(tmp_path, content)) as file, pytest.raises(ValueError, match=message):
        file.read("a")


@pytest.mark.damaged
@pytest.mark.parametrize(("rows", "heads"), [(10, 3), (9, 3), (8, 0)])
def test_rows_that_are_no_heads(rows, heads):
    with pytest.raises(
        ValueError, match=rf"weight has shape \({rows}, 2\), expected {heads} heads of an even number"
    ):
        undo_rotary_permutation(torch.zeros(rows, 2), heads)


@pytest.mark.damaged
def test_every_prefix_of_a_file_is_refused():
    content, _ = sample_file()
    for length in range(len(content)):
        with pytest.raises(ValueError, match="cut is not a readable GGUF file: "):
            parse_header(memoryview(content[:length]), "cut")
    parse_header(memoryview(content), "whole")


@settings(max_examples=300, deadline=1000)
@given(st.data())
def test_flipped_bytes_end_in_a_value_error_or_a_header_within_the_file(data):
    content = bytearray(sample_file()[0])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 400))] = data.draw(st.integers(0, 255))
    try:
        header = parse_header(memoryview(bytes(content)), "flipped")
    except ValueError as error:
        assert str(error).startswith("flipped is not a readable GGUF file: ")
        return
    for tensor in header.tensors.values():
        assert tensor.offset + tensor.nbytes <= len(content)
