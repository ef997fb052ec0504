"""Prefill modules: what they compute, provenance, first token, compatibility and shared parts."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from qsun.errors import CheckpointError, IncompatibleModule, SharedPartsWarning
from qsun.modules.card import CARD_FILE, ModuleCard
from qsun.modules.decode import load_decode_module
from qsun.modules.prefill import load_prefill_module

pytestmark = pytest.mark.filterwarnings("error::qsun.errors.SharedPartsWarning")

IDS = list(range(20, 45))


def edit_config(path: Path, **changes) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def write_tokenizer(path: Path, words: list[str]) -> None:
    Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0])).save(
        str(path / "tokenizer.json")
    )


@pytest.fixture
def base(tiny, tmp_path) -> Path:
    """A tiny llama with a tokenizer of 90 words for its 96 rows."""
    path = Path(shutil.copytree(tiny("llama").path, tmp_path / "base"))
    write_tokenizer(path, [f"w{i}" for i in range(90)])
    return path


@pytest.fixture
def decode(base):
    return load_decode_module(base, dtype=torch.float32, device="cpu")


@pytest.fixture
def task(base, tmp_path) -> Path:
    """A fine-tuned checkpoint: every weight of the layers differs a little, the shared parts do not."""
    path = Path(shutil.copytree(base, tmp_path / "task"))
    torch.manual_seed(3)
    tensors = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        if name.startswith("model.layers") or name == "model.norm.weight":
            tensor += 0.05 * torch.randn_like(tensor)
    save_file(tensors, path / "model.safetensors")
    return path


def load(path, base, decode, **arguments):
    return load_prefill_module("task", path, base_path=base, decode=decode, **arguments)


def hf_logits(path: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(torch.tensor([IDS])).logits[0]


def test_the_base_itself(base, decode, paged):
    module = load(None, base, decode)
    assert (module.name, module.first_token, module.notices) == ("task", "decode", ())
    torch.testing.assert_close(paged(decode).prefill(IDS, module.stack), hf_logits(base), rtol=0, atol=2e-5)
    assert module.nbytes == decode.stack.nbytes
    # One rotary table for both.
    assert module.stack.cos_sin is decode.stack.cos_sin


def test_a_full_checkpoint(base, decode, task, paged):
    module = load(task, base, decode)
    torch.testing.assert_close(paged(decode).prefill(IDS, module.stack), hf_logits(task), rtol=0, atol=2e-5)


def test_decode_attends_to_the_keys_and_values_that_the_task_wrote(base, decode, task, paged):
    """After a prompt that the task's module read, the decode module's answer is that of transformers doing
    the same: the task's cache, then the base's weights.  Rebuilding the prompt with the base gives other
    logits."""
    from transformers import AutoModelForCausalLM, DynamicCache

    theirs = AutoModelForCausalLM.from_pretrained(task, dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    cache = DynamicCache()
    with torch.no_grad():
        theirs(torch.tensor([IDS[:-1]]), past_key_values=cache)
        expected = ours(torch.tensor([IDS[-1:]]), past_key_values=cache).logits[0]
    sequence = paged(decode)
    sequence.prefill(IDS[:-1], load(task, base, decode).stack)
    got = sequence.step(IDS[-1])
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    naive = paged(decode)
    naive.prefill(IDS[:-1])
    assert (naive.step(IDS[-1]) - expected).abs().max() > 0.01


def test_progress_counts_layers(base, decode):
    seen = []
    load(None, base, decode, progress=lambda *step: seen.append(step))
    assert seen == [(i, 3, "prefill layers of task") for i in (1, 2, 3)]


# Provenance


def test_fingerprints_are_those_of_the_weights(base, decode, task):
    first, again = load(None, base, decode), load(base, base, decode)
    assert first.fingerprint == again.fingerprint
    assert load(task, base, decode).fingerprint != first.fingerprint


def all_names() -> list[str]:
    parts = ["input_layernorm", "post_attention_layernorm", *(f"self_attn.{x}_proj" for x in "qkvo")]
    parts += [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    return ["model.norm.weight", *(f"model.layers.{i}.{part}.weight" for i in range(3) for part in parts)]


@pytest.mark.parametrize("name", all_names())
def test_one_bit_of_any_weight_changes_the_fingerprint(base, decode, name):
    """A digest of samples, or of names and shapes, would let two fine-tunes share KV."""
    before = load(None, base, decode).fingerprint
    tensors = load_file(base / "model.safetensors")
    bits = tensors[name].view(-1).view(torch.int32)
    bits[bits.numel() // 2] ^= 1
    save_file(tensors, base / "model.safetensors")
    assert load(None, base, decode).fingerprint != before


@pytest.mark.parametrize("changes", [{"rms_norm_eps": 1e-5}])
def test_constants_that_change_keys_change_the_fingerprint(base, decode, changes):
    before = load(None, base, decode).fingerprint
    edit_config(base, **changes)
    assert load(None, base, decode).fingerprint != before


def test_the_embedding_is_no_part_of_the_fingerprint(base, decode, task):
    """It belongs to the decode module, whatever the checkpoint holds."""
    before = load(task, base, decode).fingerprint
    tensors = load_file(task / "model.safetensors")
    del tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]
    save_file(tensors, task / "model.safetensors")
    assert load(task, base, decode).fingerprint == before


# First token


@pytest.mark.parametrize("convention", ["decode", "prefill"])
def test_a_card_states_the_convention(base, decode, task, convention):
    ModuleCard("poet", convention, decode.fingerprint).write(task)
    for wanted in (None, convention):
        assert load(task, base, decode, first_token=wanted).first_token == convention


def test_without_a_card_the_caller_decides(base, decode, task):
    assert load(task, base, decode).first_token == "decode"
    for convention in ("decode", "prefill"):
        assert load(task, base, decode, first_token=convention).first_token == convention


@pytest.mark.damaged
@pytest.mark.parametrize(("stated", "wanted"), [("decode", "prefill"), ("prefill", "decode")])
def test_a_convention_other_than_the_cards_is_an_error(base, decode, task, stated, wanted):
    ModuleCard("poet", stated, decode.fingerprint).write(task)
    with pytest.raises(IncompatibleModule, match=f"first_token is '{wanted}', expected '{stated}'"):
        load(task, base, decode, first_token=wanted)


@pytest.mark.damaged
def test_an_unknown_convention(base, decode):
    with pytest.raises(ValueError, match="first_token is 'both', expected 'decode', 'prefill' or None"):
        load(None, base, decode, first_token="both")


# Compatibility

OTHERS = {
    "layers": ({"num_hidden_layers": 2}, "num_layers is 2, expected 3"),
    "query heads": ({"num_attention_heads": 8, "head_dim": 16}, "num_q_heads is 8, expected 4"),
    "KV heads": ({"num_key_value_heads": 4}, "num_kv_heads is 4, expected 2"),
    "head size": ({"head_dim": 32}, "head_dim is 32, expected 16"),
    "width": ({"hidden_size": 128, "head_dim": 16}, "hidden_size is 128, expected 64"),
    "feed-forward": ({"intermediate_size": 128}, "intermediate_size is 128, expected 96"),
    "vocabulary": ({"vocab_size": 112}, "vocab_size is 112, expected 96"),
    "rotary base": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        r"rope is {'rope_theta': 500000.0, 'rope_type': 'default'}, expected {'rope_theta': 10000.0",
    ),
}


@pytest.mark.damaged
@pytest.mark.parametrize("case", OTHERS)
def test_a_checkpoint_of_another_shape_is_refused_with_both_values(tiny, base, decode, case):
    changes, message = OTHERS[case]
    with pytest.raises(IncompatibleModule, match=f"does not fit the decode module: {message}"):
        load(tiny("llama", **changes).path, base, decode)


@pytest.mark.damaged
def test_another_architecture_is_refused(tiny, base, decode):
    other = tiny("qwen3", head_dim=16).path
    with pytest.raises(IncompatibleModule, match=r"architecture is 'qwen3', expected 'llama' .and rope"):
        load(other, base, decode)


@pytest.mark.damaged
def test_another_tokenizer_is_refused_with_both_digests(base, decode, task):
    write_tokenizer(task, [f"w{i}" for i in range(88)] + ["swapped", "w88"])
    with pytest.raises(IncompatibleModule, match=r"tokenizer is 'sha256:\w{64}', expected 'sha256:\w{64}'"):
        load(task, base, decode)


def test_a_checkpoint_without_tokenizer_fits(base, decode, task):
    (task / "tokenizer.json").unlink()
    assert load(task, base, decode).notices == ()


@pytest.mark.damaged
def test_a_tokenizer_with_ids_past_the_vocabulary(base, decode, task):
    words = [f"w{i}" for i in range(97)]
    write_tokenizer(task, words)
    with pytest.raises(CheckpointError, match="token 'w96' with id 96, expected ids below vocab_size 96"):
        load(task, base, decode)
    write_tokenizer(base, words)
    with pytest.raises(CheckpointError, match="token 'w96' with id 96, expected ids below vocab_size 96"):
        load_decode_module(base, device="cpu")


@pytest.mark.damaged
def test_a_base_that_is_not_the_decode_modules(tiny, decode):
    other = tiny("llama", seed=9).path
    with pytest.raises(IncompatibleModule, match=r"base is 'sha256:\w{64}', expected 'sha256:\w{64}'"):
        load_prefill_module("x", None, base_path=other, decode=decode)


CARDS = {
    "num_layers": 4,
    "num_kv_heads": 4,
    "head_dim": 32,
    "vocab_size": 100,
    "architecture": "qwen2",
    "rope": {"rope_theta": 1e6, "rope_type": "default"},
}


@pytest.mark.damaged
@pytest.mark.parametrize("field", CARDS)
def test_a_card_that_contradicts_the_files_beside_it(base, decode, task, field):
    lie = dataclasses.replace(decode.fingerprint, **{field: CARDS[field]})
    ModuleCard("poet", "decode", lie).write(task)
    with pytest.raises(
        CheckpointError, match=rf"{CARD_FILE}: decoder.{field} is .*, expected .* as in the files"
    ):
        load(task, base, decode)


@pytest.mark.damaged
@pytest.mark.parametrize("field", ["base", "tokenizer"])
def test_a_card_for_another_decode_module(base, decode, task, field):
    """The weights fit, but they were trained against another base."""
    (task / "tokenizer.json").unlink()
    other = dataclasses.replace(decode.fingerprint, **{field: "sha256:" + "0" * 64})
    ModuleCard("poet", "decode", other).write(task)
    with pytest.raises(IncompatibleModule, match=rf"{field} is 'sha256:0000.*', expected 'sha256:"):
        load(task, base, decode)


# What it was trained against


@pytest.mark.parametrize(
    ("training", "told"),
    [
        ({}, False),
        ({"decoder": {"quantization": "16-bit"}}, False),
        ({"decoder": {"quantization": "W4 g64 symmetric"}}, True),
        ({"decoder": "by hand"}, False),
    ],
)
def test_a_decoder_of_other_bits_is_told(base, decode, task, training, told):
    ModuleCard("poet", "decode", decode.fingerprint, training=training).write(task)
    expected = "task: trained against a decoder of W4 g64 symmetric, and this one has 16-bit"
    assert load(task, base, decode).notices == ((expected,) if told else ())


# Shared parts


@pytest.mark.filterwarnings("default::qsun.errors.SharedPartsWarning")
@pytest.mark.parametrize(
    ("name", "part"), [("model.embed_tokens.weight", "embed_tokens"), ("lm_head.weight", "lm_head")]
)
def test_own_shared_parts_that_differ_are_told_and_not_used(base, decode, task, paged, name, part):
    silent = load(task, base, decode)
    tensors = load_file(task / "model.safetensors")
    tensors[name][7] += 0.25
    tensors[name][11, 0] -= 0.5
    save_file(tensors, task / "model.safetensors")
    expected = f"its {part} differs from the decode module's in 2 of 96 rows, by at most 0.5"
    with pytest.warns(SharedPartsWarning, match=expected):
        module = load(task, base, decode)
    assert len(module.notices) == 1 and expected in module.notices[0]
    assert module.fingerprint == silent.fingerprint
    ids = [7, 11, *IDS]
    assert torch.equal(paged(decode).prefill(ids, module.stack), paged(decode).prefill(ids, silent.stack))


@pytest.mark.filterwarnings("default::qsun.errors.SharedPartsWarning")
def test_a_tied_embedding_that_differs_is_two_notices(tiny):
    base, other = tiny("mistral").path, tiny("mistral", seed=1).path
    decode = load_decode_module(base, device="cpu")
    with pytest.warns(SharedPartsWarning):
        module = load(other, base, decode)
    assert [notice.split()[2] for notice in module.notices] == ["embed_tokens", "lm_head"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_shared_parts_are_silent(base, task, dtype):
    """Equal after rounding to the decode module's dtype is equal."""
    decode = load_decode_module(base, bits=4, dtype=dtype, device="cpu")
    tensors = load_file(task / "model.safetensors")
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, task / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(task, base, decode).notices == ()


def test_a_quantised_base_as_prefill_module_is_told(tiny, tmp_path):
    from qsun.modules.export import export_quantized

    export_quantized(tiny("llama").path, tmp_path / "q", bits=4, device="cpu")
    decode = load_decode_module(tmp_path / "q", device="cpu")
    module = load(None, tmp_path / "q", decode)
    assert module.notices == ("task: prefill weights are quantised (compressed-tensors W4 g32 symmetric)",)


def test_a_prefill_module_in_another_dtype(base, decode, task):
    assert load(task, base, decode, dtype=torch.bfloat16).stack.norm.weight.dtype == torch.bfloat16
    assert load(task, base, decode, dtype=torch.bfloat16).fingerprint != load(task, base, decode).fingerprint
