"""GGUF files: the model in them is the one that was written, and damage is named."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch

from qsun.checkpoint.gguf_reader import GGUFReader
from qsun.checkpoint.reader import open_checkpoint
from qsun.checkpoint.weights import check_names
from qsun.errors import CheckpointError, UnsupportedModel
from qsun.modules.decode import load_decode_module

gguf = pytest.importorskip("gguf", reason="the gguf package writes the files under test")

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    if name in NAMES:
        return NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    module, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{NAMES[module]}.{kind}"


def pairs_together(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's order: rows i and i + head_dim/2 of a head, which rotate together, become neighbours."""
    size = rows.shape[0] // heads
    order = [
        head * size + i + half for head in range(heads) for i in range(size // 2) for half in (0, size // 2)
    ]
    return rows[order]


def write_gguf(
    path: Path,
    hf,
    *,
    skip: str | None = None,
    extra: dict | None = None,
    tokens: list | None = None,
    **metadata,
) -> Path:
    """Write a model as llama.cpp's converter would; keywords are metadata, __ stands for a dot."""
    config, arch = hf.config, hf.config.model_type
    writer = gguf.GGUFWriter(path, arch)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if tokens is not None:
        writer.add_token_list(tokens)
    for key, value in metadata.items():
        writer.add_uint32(key.replace("__", "."), value)
    tensors = {name: tensor for name, tensor in hf.state_dict().items()}
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    for name, tensor in tensors.items():
        if arch == "llama" and ".q_proj." in name:
            tensor = pairs_together(tensor, config.num_attention_heads)
        if arch == "llama" and ".k_proj." in name:
            tensor = pairs_together(tensor, config.num_key_value_heads)
        if name != skip:
            writer.add_tensor(gguf_name(name), tensor.contiguous().numpy())
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}


@pytest.fixture
def llama(tiny):
    return tiny("llama", **ROPE).hf


@pytest.fixture
def good(tmp_path, llama) -> Path:
    return write_gguf(tmp_path / "model.gguf", llama)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", ROPE),
        ("llama", {**ROPE, "tie_word_embeddings": True, "head_dim": 24}),
        ("qwen2", {"use_sliding_window": False}),
        ("qwen3", {}),
    ],
    ids=["llama", "llama tied", "qwen2", "qwen3"],
)
def test_logits_equal_the_model_that_was_written(tiny, paged, tmp_path, kind, changes):
    model = tiny(kind, **changes)
    path = write_gguf(tmp_path / "model.gguf", model.hf)
    decode = load_decode_module(path, dtype=torch.float32, device="cpu")
    ids = list(range(10, 40))
    with torch.no_grad():
        expected = model.hf(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(paged(decode).prefill(ids), expected, rtol=0, atol=2e-5)


def test_tensors_are_those_of_the_safetensors_checkpoint(tiny, good, llama):
    with_names = open_checkpoint(good)
    state = llama.state_dict()
    assert with_names.names() == set(state)
    for name, expected in state.items():
        assert with_names.shape(name) == tuple(expected.shape)
        assert torch.equal(with_names.get(name), expected), name
    assert with_names.vocabulary() is None
    with_names.close()


def test_a_directory_with_one_gguf_file(good):
    assert isinstance(open_checkpoint(good.parent), GGUFReader)


def test_the_fingerprint_is_that_of_the_safetensors_checkpoint(tiny, good):
    ours = load_decode_module(good, dtype=torch.float32, device="cpu").fingerprint
    other = load_decode_module(tiny("llama", **ROPE).path, dtype=torch.bfloat16, device="cpu").fingerprint
    assert ours == other


def test_vocabulary_comes_from_the_file(tmp_path, llama):
    path = write_gguf(tmp_path / "x.gguf", llama, tokens=["a", "b"])
    assert GGUFReader(path).vocabulary() == {0: "a", 1: "b"}


DAMAGE = {
    "magic": (lambda b: b"GGML" + b[4:], "GGUF"),
    "version 1": (lambda b: b[:4] + struct.pack("<I", 1) + b[8:], "version"),
    "version of the other byte order": (lambda b: b[:4] + struct.pack(">I", 3) + b[8:], "version"),
    "absurd tensor count": (lambda b: b[:8] + struct.pack("<Q", 2**60) + b[16:], "1152921504606846976"),
    "absurd metadata count": (lambda b: b[:16] + struct.pack("<Q", 2**62) + b[24:], "4611686018427387904"),
    "absurd key length": (lambda b: b[:24] + struct.pack("<Q", 2**50) + b[32:], "1125899906842624"),
    "empty": (lambda b: b"", "empty"),
    "only the magic": (lambda b: b[:4], "GGUF"),
    "header cut": (lambda b: b[:300], "expected"),
    "data cut": (lambda b: b[:-100], "expected"),
    "a safetensors file": (lambda b: (10).to_bytes(8, "little") + b"{}" + b[10:], "GGUF"),
}


@pytest.mark.damaged
@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files_are_named(good, case):
    change, message = DAMAGE[case]
    good.write_bytes(change(good.read_bytes()))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_decode_module(good, device="cpu")
    assert str(good) in str(caught.value) and "expected" in str(caught.value)


@pytest.mark.damaged
def test_missing_file(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"x.gguf cannot be read \(No such file or directory\), expected a GGUF"
    ):
        GGUFReader(tmp_path / "x.gguf")


@pytest.mark.damaged
def test_missing_and_unknown_tensors(tmp_path, llama):
    path = write_gguf(tmp_path / "a.gguf", llama, skip="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(
        CheckpointError, match=r"a.gguf has no tensor 'model.layers.1.mlp.up_proj.weight', expected"
    ):
        check_names(GGUFReader(path))
    path = write_gguf(tmp_path / "b.gguf", llama, extra={"blk.0.ffn_gate_exps.weight": torch.ones(2, 2)})
    with pytest.raises(
        CheckpointError, match=r"b.gguf holds tensor 'blk.0.ffn_gate_exps.weight', expected only"
    ):
        GGUFReader(path)
    path = write_gguf(tmp_path / "c.gguf", llama, extra={"blk.0.attn_q_norm.weight": torch.ones(16)})
    with pytest.raises(CheckpointError, match=r"has no tensor 'model.layers.0.self_attn.k_norm.weight'"):
        check_names(GGUFReader(path))


@pytest.mark.damaged
def test_shapes_that_contradict_the_metadata(tmp_path, llama):
    path = write_gguf(tmp_path / "a.gguf", llama, llama__rope__dimension_count=8)
    with pytest.raises(
        UnsupportedModel, match=r"a.gguf: llama.rope.dimension_count is 8, expected the head size 16"
    ):
        GGUFReader(path)
    llama.config.intermediate_size += 1
    try:
        path = write_gguf(tmp_path / "b.gguf", llama)
    finally:
        llama.config.intermediate_size -= 1
    with pytest.raises(CheckpointError, match=r"gate_proj.weight' has shape \(96, 64\), expected \(97, 64\)"):
        load_decode_module(path, device="cpu")


@pytest.mark.damaged
def test_values_that_are_not_finite(tmp_path, llama):
    import copy

    broken = copy.deepcopy(llama)
    with torch.no_grad():
        broken.model.layers[2].mlp.down_proj.weight[3, 4] = torch.inf
    path = write_gguf(tmp_path / "a.gguf", broken)
    with pytest.raises(CheckpointError, match=r"a.gguf: tensor 'blk.2.ffn_down.weight' is inf at \(3, 4\)"):
        load_decode_module(path, device="cpu")
