"""Checkpoint directories: single files, shards and their index, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qsun.checkpoint.reader import PICKLE_SUFFIXES, open_checkpoint
from qsun.checkpoint.safetensors_reader import INDEX_FILE, SafetensorsReader
from qsun.checkpoint.weights import check_names, read_embedding, read_layer, read_lm_head
from qsun.errors import CheckpointError
from qsun.modules.decode import load_decode_module

Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def copy(tiny, tmp_path) -> Path:
    """A tiny llama's directory, to be damaged."""
    return Path(shutil.copytree(tiny("llama").path, tmp_path / "model"))


@pytest.fixture
def shards(copy) -> Path:
    """The same in two shards with an index."""
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, copy / file)
    write_index(copy, {name: file for file, part in halves.items() for name in part})
    return copy


def write_index(path: Path, weight_map: object) -> None:
    (path / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read_index(path: Path) -> dict:
    return json.loads((path / INDEX_FILE).read_text())["weight_map"]


def rewrite(path: Path, **changes) -> None:
    """Change tensors of a single-file checkpoint; None removes one."""
    tensors = load_file(path / "model.safetensors")
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, path / "model.safetensors")


def edit_config(path: Path, **changes) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def test_a_single_file(tiny):
    model = tiny("llama")
    state = model.hf.state_dict()
    with SafetensorsReader(model.path) as reader:
        assert reader.names() == set(state)
        assert reader.quantization is None and reader.vocabulary() is None
        for name, expected in state.items():
            assert reader.shape(name) == tuple(expected.shape)
            assert torch.equal(reader.get(name), expected)


def test_shards_read_like_a_single_file(tiny, shards):
    state = tiny("llama").hf.state_dict()
    with SafetensorsReader(shards) as reader:
        assert reader.names() == set(state)
        assert all(torch.equal(reader.get(name), expected) for name, expected in state.items())


def test_a_bare_decoder_has_no_prefix(copy):
    tensors = load_file(copy / "model.safetensors")
    bare = {
        name.removeprefix("model."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"
    }
    save_file(bare, copy / "model.safetensors")
    edit_config(copy, architectures=["LlamaModel"])
    with SafetensorsReader(copy) as reader:
        check_names(reader)
        assert torch.equal(reader.get(Q), tensors[Q])
        assert "lm_head.weight" not in reader.names()


def test_old_rotary_buffers_are_ignored(copy):
    rewrite(copy, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    with SafetensorsReader(copy) as reader:
        check_names(reader)


def test_a_bias_of_zeros_is_ignored_where_the_checkpoint_is_quantised_only(copy):
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}
    rewrite(copy, **bias)
    with (
        SafetensorsReader(copy) as reader,
        pytest.raises(
            CheckpointError, match=r"holds tensor 'model.layers.0.self_attn.q_proj.bias', expected only"
        ),
    ):
        check_names(reader)


def test_end_tokens_of_generation_config_win(copy):
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert SafetensorsReader(copy).config.eos_token_ids == (5, 6)
    (copy / "generation_config.json").write_text(json.dumps({"temperature": 0.6}))
    assert SafetensorsReader(copy).config.eos_token_ids == (2,)


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dense_dtypes_are_rounded_to_the_one_asked_for(copy, stored):
    tensors = {name: tensor.to(stored) for name, tensor in load_file(copy / "model.safetensors").items()}
    save_file(tensors, copy / "model.safetensors")
    with SafetensorsReader(copy) as reader:
        layer = read_layer(reader, 1, torch.bfloat16)
        assert torch.equal(layer.projections["q_proj"].weight, tensors[Q].to(torch.bfloat16))
        assert read_embedding(reader, None).dtype == stored


def test_tied_lm_head_is_the_embedding(tiny, tmp_path):
    path = Path(shutil.copytree(tiny("qwen2").path, tmp_path / "model"))
    with SafetensorsReader(path) as reader:
        embedding = read_embedding(reader, torch.float32)
        assert read_lm_head(reader, embedding, torch.float32) is embedding
    rewrite(path, **{"lm_head.weight": embedding.clone()})
    with SafetensorsReader(path) as reader:
        assert read_lm_head(reader, embedding, torch.float32) is embedding


def damaged(path: Path) -> str:
    """The message with which loading fails."""
    with pytest.raises(CheckpointError) as caught:
        load_decode_module(path, dtype=torch.float32, device="cpu")
    return str(caught.value)


def nan(tensor: torch.Tensor, value: float = float("nan")) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[5] = value
    return tensor


WEIGHTS = {
    "nan": (lambda w: nan(w), "'{name}' is nan at (0, 5), expected a finite number"),
    "infinite": (lambda w: nan(w, float("inf")), "'{name}' is inf at (0, 5), expected a finite number"),
    "transposed sizes": (lambda w: w[:32].clone(), "'{name}' has shape (32, 64), expected (64, 64)"),
    "another rank": (lambda w: w.view(-1), "'{name}' has shape (4096,), expected (64, 64)"),
    "integers": (
        lambda w: w.to(torch.int8),
        "'{name}' has dtype torch.int8, expected one of float64, float32",
    ),
    "eight bits": (
        lambda w: w.to(torch.float8_e4m3fn),
        "'{name}' has dtype torch.float8_e4m3fn, expected one of",
    ),
    "missing": (lambda w: None, "has no tensor '{name}', expected every tensor of a llama model of 3 layers"),
}


@pytest.mark.damaged
@pytest.mark.parametrize("case", WEIGHTS)
def test_bad_weights_are_named(copy, case):
    change, message = WEIGHTS[case]
    rewrite(copy, **{Q: change(load_file(copy / "model.safetensors")[Q])})
    assert f"{copy}" in (got := damaged(copy))
    assert message.format(name=Q) in got


@pytest.mark.damaged
def test_a_weight_that_overflows_the_dtype_is_named(copy):
    rewrite(copy, **{Q: nan(load_file(copy / "model.safetensors")[Q], 1e6)})
    with pytest.raises(
        CheckpointError, match=r"q_proj.weight' is 1000000.0 at \(0, 5\).*that torch.float16 can hold"
    ):
        load_decode_module(copy, dtype=torch.float16, device="cpu")


EXTRA = {
    "model.layers.3.self_attn.q_proj.weight": "a layer past the last",
    "model.layers.0.self_attn.q_norm.weight": "a norm of another architecture",
    "model.layers.0.self_attn.o_proj.bias": "a bias that the configuration denies",
    "model.layers.0.mlp.experts.0.up_proj.weight": "an expert",
    "model.layers.0.self_attn.q_proj.qweight": "packed weights without a quantization_config",
    "visual.patch_embed.weight": "another modality",
}


@pytest.mark.damaged
@pytest.mark.parametrize("name", EXTRA, ids=lambda name: EXTRA[name])
def test_tensors_that_would_be_ignored_are_named(copy, name):
    rewrite(copy, **{name: torch.ones(64, 64)})
    assert f"holds tensor '{name}', expected only tensors of a llama model of 3 layers" in damaged(copy)


CONFIG_LIES = {
    "fewer layers": ({"num_hidden_layers": 2}, "holds tensor 'model.layers.2."),
    "more layers": (
        {"num_hidden_layers": 4},
        "has no tensor 'model.layers.3.input_layernorm.weight' (and 8 more)",
    ),
    "vocabulary": ({"vocab_size": 97}, "'model.embed_tokens.weight' has shape (96, 64), expected (97, 64)"),
    "heads": ({"num_key_value_heads": 4}, "k_proj.weight' has shape (32, 64), expected (64, 64)"),
    "width": ({"intermediate_size": 128}, "gate_proj.weight' has shape (96, 64), expected (128, 64)"),
    "angles": (
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 1e-300}},
        "gives angles that are not finite",
    ),
    "bias": ({"attention_bias": True}, "has no tensor 'model.layers.0.self_attn.k_proj.bias'"),
    "tied": (
        {"tie_word_embeddings": True},
        "lm_head.weight differs from model.embed_tokens.weight, expected equality",
    ),
}


@pytest.mark.damaged
@pytest.mark.parametrize("case", CONFIG_LIES)
def test_a_config_that_lies_about_the_weights(copy, case):
    changes, message = CONFIG_LIES[case]
    edit_config(copy, **changes)
    assert message in damaged(copy)


@pytest.mark.damaged
def test_an_untied_model_without_lm_head(copy):
    rewrite(copy, **{"lm_head.weight": None})
    assert "has no tensor 'lm_head.weight', expected it among" in damaged(copy)


JSON_DAMAGE = {
    "garbage": (b"\x00\x01", "is not JSON"),
    "not utf-8": (b'{"a": "\xff"}', "is not JSON"),
    "a list": (b"[]", "holds a JSON list, expected an object"),
    "cut": (b'{"model_type": "llama', "is not JSON"),
    "deep": (b"[" * 200000, "is not JSON"),
    "a number of 5000 digits": (b'{"vocab_size": ' + b"9" * 5000 + b"}", "is not JSON"),
}


@pytest.mark.damaged
@pytest.mark.parametrize("case", JSON_DAMAGE)
@pytest.mark.parametrize("file", ["config.json", INDEX_FILE, "generation_config.json"])
def test_damaged_json_is_named(shards, file, case):
    content, message = JSON_DAMAGE[case]
    (shards / file).write_bytes(content)
    assert f"{shards / file} {message}" in damaged(shards)


@pytest.mark.damaged
def test_no_config(copy):
    (copy / "config.json").unlink()
    assert "config.json cannot be read (No such file or directory), expected a JSON file" in damaged(copy)


@pytest.mark.damaged
def test_a_missing_shard(shards):
    (shards / "two.safetensors").unlink()
    assert f"two.safetensors is missing, expected it because {INDEX_FILE} names it" in damaged(shards)


@pytest.mark.damaged
def test_a_shard_without_what_the_index_promises(shards):
    tensors = load_file(shards / "two.safetensors")
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, shards / "two.safetensors")
    assert f"two.safetensors has no tensor '{name}', expected it by {INDEX_FILE}" in damaged(shards)


@pytest.mark.damaged
def test_a_tensor_in_two_shards(shards):
    first, second = load_file(shards / "one.safetensors"), load_file(shards / "two.safetensors")
    name = sorted(first)[0]
    save_file({**second, name: first[name]}, shards / "two.safetensors")
    assert f"tensor '{name}' is in {shards / 'one.safetensors'} and in" in damaged(shards)


@pytest.mark.damaged
def test_a_tensor_that_the_index_does_not_list(shards):
    weight_map = read_index(shards)
    name = sorted(load_file(shards / "one.safetensors"))[0]
    del weight_map[name]
    write_index(shards, weight_map)
    assert f"one.safetensors holds tensor '{name}', expected it in 'no file'" in damaged(shards)


@pytest.mark.damaged
@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "/etc/passwd", "one.bin", "sub/one.safetensors", ""]
)
def test_a_shard_outside_the_directory(shards, shard):
    write_index(shards, {**read_index(shards), Q: shard})
    assert f"shard {shard!r} is not a *.safetensors name inside the directory" in damaged(shards)


@pytest.mark.damaged
@pytest.mark.parametrize("weight_map", [None, [], "one.safetensors", {"a": 1}], ids=repr)
def test_an_index_without_a_map(shards, weight_map):
    write_index(shards, weight_map)
    assert INDEX_FILE in (message := damaged(shards))
    assert "expected a" in message


@pytest.mark.damaged
@pytest.mark.parametrize("suffix", PICKLE_SUFFIXES)
def test_pickles_are_refused_by_name_and_not_opened(copy, suffix, tmp_path):
    (copy / "model.safetensors").unlink()
    canary = tmp_path / "canary"
    # A pickle that would create the canary: protocol 0, os.system.
    pickle = copy / f"pytorch_model{suffix}"
    pickle.write_bytes(b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR.")
    for offered in (copy, pickle):
        assert f"{pickle} is a pickle by its name" in damaged(offered)
    assert not canary.exists()


@pytest.mark.damaged
def test_paths_that_are_no_checkpoint(tmp_path):
    with pytest.raises(
        CheckpointError, match="nowhere does not exist, expected a checkpoint directory or a GGUF"
    ):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no weights \(it holds nothing\), expected"):
        open_checkpoint(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"notes.txt is a file, expected a directory"):
        open_checkpoint(tmp_path / "notes.txt")
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="model_type is missing"):
        open_checkpoint(tmp_path)
