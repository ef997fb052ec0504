"""LoRA adapters: merged as PEFT merges them, and refused by name where they cannot be."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qsun.errors import CheckpointError, IncompatibleModule, SharedPartsWarning, UnsupportedModel
from qsun.modules.card import ModuleCard
from qsun.modules.decode import load_decode_module
from qsun.modules.prefill import load_prefill_module

peft = pytest.importorskip("peft")

IDS = list(range(20, 45))
PREFIX = "base_model.model.model.layers"


def make_adapter(hf, path: Path, *, seed: int = 0, **arguments):
    """Save a random adapter with PEFT; returns PEFT's own merge."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **arguments})
    torch.manual_seed(seed)
    model = peft.get_peft_model(copy.deepcopy(hf), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(path)
    return model.merge_and_unload()


@pytest.fixture(scope="module")
def llama(tiny):
    return tiny("llama")


@pytest.fixture(scope="module")
def decode(llama):
    return load_decode_module(llama.path, dtype=torch.float32, device="cpu")


def load(path, llama, decode, **arguments):
    return load_prefill_module("task", path, base_path=llama.path, decode=decode, **arguments)


VARIANTS = {
    "two projections": {"target_modules": ["q_proj", "v_proj"]},
    "all linear": {"target_modules": "all-linear"},
    "regular expression": {"target_modules": r".*\.(1|2)\.mlp\.(up|down)_proj"},
    "rank-stabilised": {"target_modules": ["o_proj", "gate_proj"], "use_rslora": True, "r": 6},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "down_proj"],
        "rank_pattern": {"k_proj": 2, r"layers\.1\.mlp\.down_proj": 7},
        "alpha_pattern": {"q_proj": 3, r"layers\.0\..*down_proj": 32},
    },
    "some layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    "full names": {"target_modules": ["model.layers.1.self_attn.k_proj"]},
}


@pytest.mark.parametrize("case", VARIANTS)
def test_merge_equals_that_of_peft(llama, decode, paged, tmp_path, case):
    merged = make_adapter(llama.hf, tmp_path, **VARIANTS[case])
    with torch.no_grad():
        expected = merged(torch.tensor([IDS])).logits[0]
        base = llama.hf(torch.tensor([IDS])).logits[0]
    module = load(tmp_path, llama, decode)
    got = paged(decode).prefill(IDS, module.stack)
    torch.testing.assert_close(got, expected, rtol=0, atol=3e-5)
    assert (expected - base).abs().max() > 0.1
    assert module.notices == () and module.first_token == "decode"


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "mistral"])
def test_other_architectures(tiny, paged, tmp_path, kind):
    model = tiny(kind)
    decode = load_decode_module(model.path, dtype=torch.float32, device="cpu")
    merged = make_adapter(model.hf, tmp_path, target_modules="all-linear")
    with torch.no_grad():
        expected = merged(torch.tensor([IDS])).logits[0]
    got = paged(decode).prefill(IDS, load(tmp_path, model, decode).stack)
    torch.testing.assert_close(got, expected, rtol=0, atol=3e-5)


def test_merged_weights_are_rounded_once(llama, tmp_path):
    """bfloat16(W + scale * B A), with the sum in float32: not bfloat16(W) + bfloat16(delta)."""
    make_adapter(llama.hf, tmp_path, target_modules=["o_proj"])
    decode = load_decode_module(llama.path, dtype=torch.bfloat16, device="cpu")
    module = load(tmp_path, llama, decode)
    pairs = load_file(tmp_path / "adapter_model.safetensors")
    state = llama.hf.state_dict()
    for layer in range(3):
        name = f"{PREFIX}.{layer}.self_attn.o_proj"
        delta = 2.0 * (pairs[f"{name}.lora_B.weight"] @ pairs[f"{name}.lora_A.weight"])
        expected = (state[f"model.layers.{layer}.self_attn.o_proj.weight"] + delta).bfloat16()
        assert torch.equal(module.stack.layers[layer].attention.o.weight, expected)


def test_two_adapters_have_two_fingerprints(llama, decode, tmp_path):
    make_adapter(llama.hf, tmp_path / "a", target_modules=["q_proj"], seed=1)
    make_adapter(llama.hf, tmp_path / "b", target_modules=["q_proj"], seed=2)
    fingerprints = {load(path, llama, decode).fingerprint for path in (None, tmp_path / "a", tmp_path / "b")}
    assert len(fingerprints) == 3


def test_the_merge_of_a_full_checkpoint_is_the_same_module(llama, decode, tmp_path):
    """Merged here or merged and saved by PEFT: one fingerprint where the arithmetic is exact."""
    make_adapter(llama.hf, tmp_path / "adapter", target_modules=["v_proj"])
    pairs = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    save_file(
        {key: (16 * pair).round() / 16 for key, pair in pairs.items()},
        tmp_path / "adapter/adapter_model.safetensors",
    )
    base = copy.deepcopy(llama.hf)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_((parameter * 256).round() / 256)
    base.save_pretrained(tmp_path / "base")
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    model.save_pretrained(tmp_path / "merged")
    decode = load_decode_module(tmp_path / "base", dtype=torch.float32, device="cpu")
    merged_here = load_prefill_module("a", tmp_path / "adapter", base_path=tmp_path / "base", decode=decode)
    merged_there = load_prefill_module("b", tmp_path / "merged", base_path=tmp_path / "base", decode=decode)
    assert merged_here.fingerprint == merged_there.fingerprint


@pytest.mark.parametrize("part", ["embed_tokens", "lm_head"])
def test_shared_modules_of_an_adapter_are_compared(llama, decode, tmp_path, part):
    make_adapter(llama.hf, tmp_path, target_modules=["q_proj"], modules_to_save=[part])
    assert load(tmp_path, llama, decode).notices == ()
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    (key,) = (key for key in tensors if part in key)
    tensors[key][5] += 1.0
    save_file(tensors, path)
    with pytest.warns(
        SharedPartsWarning, match=f"its {part} differs from the decode module's in 1 of 96 rows"
    ):
        assert len(load(tmp_path, llama, decode).notices) == 1


def test_an_adapters_card(llama, decode, tmp_path):
    make_adapter(llama.hf, tmp_path, target_modules=["q_proj"])
    ModuleCard("poet", "prefill", decode.fingerprint, {"steps": 10}).write(tmp_path)
    module = load(tmp_path, llama, decode)
    assert module.first_token == "prefill" and module.card.training == {"steps": 10}
    with pytest.raises(IncompatibleModule, match="first_token is 'decode', expected 'prefill'"):
        load(tmp_path, llama, decode, first_token="decode")


@pytest.fixture
def adapter(llama, tmp_path) -> Path:
    make_adapter(llama.hf, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    return tmp_path / "adapter"


def edit(adapter: Path, **changes) -> None:
    path = adapter / "adapter_config.json"
    config = {
        key: value for key, value in {**json.loads(path.read_text()), **changes}.items() if value is not ...
    }
    path.write_text(json.dumps(config))


UNSUPPORTED = {
    "peft_type": ("IA3", "peft_type is 'IA3', expected 'LORA'"),
    "use_dora": (True, "use_dora is True, expected it off"),
    "bias": ("all", "bias is 'all', expected 'none'"),
    "lora_bias": (True, "lora_bias is True, expected it off"),
    "fan_in_fan_out": (True, "fan_in_fan_out is True, expected it off"),
    "modules_to_save": (["norm"], "modules_to_save has 'norm', expected only"),
    "init_lora_weights": ("pissa", "init_lora_weights is 'pissa', expected one that leaves the base"),
    "trainable_token_indices": ([1, 2], "trainable_token_indices is .1, 2., expected it off"),
    "layer_replication": ([[0, 2]], "layer_replication is .* expected it off"),
    "alora_invocation_tokens": ([5], "alora_invocation_tokens is .5., expected it off"),
    "target_parameters": (["mlp.experts"], "target_parameters is .* expected it off"),
    "something_new": ("on", "something_new is 'on', expected it off"),
    "target_modules": (
        ["q_proj", "embed_tokens"],
        "target_modules match 'model.embed_tokens', expected projections",
    ),
    "layers_pattern": ("blocks", "layers_pattern is 'blocks', expected 'layers'"),
}


@pytest.mark.damaged
@pytest.mark.parametrize("field", UNSUPPORTED)
def test_what_cannot_be_merged_is_refused_by_name(llama, decode, adapter, field):
    value, message = UNSUPPORTED[field]
    edit(adapter, **{field: value}, **({"layers_to_transform": [0]} if field == "layers_pattern" else {}))
    with pytest.raises(UnsupportedModel, match=f"adapter_config.json: {message}"):
        load(adapter, llama, decode)


CONFIG_DAMAGE = {
    "no rank": ({"r": ...}, "r is missing, expected an integer from 1"),
    "rank zero": ({"r": 0}, "r is 0, expected an integer from 1"),
    "alpha text": ({"lora_alpha": "16"}, "lora_alpha is '16', expected a finite number"),
    "alpha nan": ({"lora_alpha": float("nan")}, "lora_alpha is nan, expected a finite number"),
    "no targets": ({"target_modules": ...}, "target_modules is None, expected a list of names or a regular"),
    "targets a number": ({"target_modules": 3}, "target_modules is 3, expected a list of strings"),
    "bad expression": (
        {"target_modules": "(q_proj"},
        r"target_modules is '\(q_proj', expected a regular expression",
    ),
    "pattern a list": ({"rank_pattern": [4]}, r"rank_pattern is \[4\], expected an object"),
    "pattern of text": (
        {"rank_pattern": {"q_proj": "4"}},
        "rank_pattern is '4', expected integers of at least 1",
    ),
    "layers text": (
        {"layers_to_transform": "0"},
        "layers_to_transform is '0', expected an integer or a list",
    ),
    "no type": ({"peft_type": ...}, "peft_type is missing, expected a string"),
}


@pytest.mark.damaged
@pytest.mark.parametrize("case", CONFIG_DAMAGE)
def test_a_damaged_adapter_config_is_named(llama, decode, adapter, case):
    changes, message = CONFIG_DAMAGE[case]
    edit(adapter, **changes)
    with pytest.raises(CheckpointError, match=f"adapter_config.json: {message}"):
        load(adapter, llama, decode)


A, B = (f"{PREFIX}.1.self_attn.q_proj.lora_{side}.weight" for side in "AB")
NOT_FINITE = f"tensor '{A}' .torch.float32. has values that are not finite, expected"
WEIGHT_DAMAGE = {
    "half of a pair": ({B: None}, CheckpointError, f"has no tensor '{B}', expected it by target_modules"),
    "no pair": ({A: None, B: None}, CheckpointError, f"has no tensor '{A}', expected it by target_modules"),
    "another rank": (
        {A: torch.ones(3, 64)},
        CheckpointError,
        r"has shape \(3, 64\), expected \(4, 64\) for the rank 4",
    ),
    "a vector": ({A: torch.ones(64)}, CheckpointError, r"has shape \(64,\), expected \(4, 64\)"),
    "another base": (
        {A: torch.ones(4, 128)},
        IncompatibleModule,
        r"\(4, 128\), expected \(4, 64\) for this base",
    ),
    "another base's heads": (
        {B: torch.ones(96, 4)},
        IncompatibleModule,
        r"\(96, 4\), expected \(64, 4\) for this",
    ),
    "nan": ({A: torch.full((4, 64), torch.nan)}, CheckpointError, NOT_FINITE),
    "infinite": ({A: torch.full((4, 64), torch.inf)}, CheckpointError, NOT_FINITE),
    "integers": (
        {A: torch.ones(4, 64, dtype=torch.int32)},
        CheckpointError,
        "torch.int32. has values that are not",
    ),
    "a pair for no target": (
        {A.replace("q_proj", "k_proj"): torch.ones(4, 64)},
        IncompatibleModule,
        "has a pair for 'model.layers.1.self_attn.k_proj', expected pairs only for modules of the base",
    ),
    "a layer past the last": (
        {A.replace(".1.", ".7."): torch.ones(4, 64)},
        IncompatibleModule,
        r"has a pair for 'model.layers.7.self_attn.q_proj', expected pairs only .*\(3 layers\)",
    ),
    "a magnitude": (
        {A.replace("lora_A", "lora_magnitude_vector"): torch.ones(4)},
        UnsupportedModel,
        "holds tensor .*lora_magnitude_vector.*expected only",
    ),
}


@pytest.mark.damaged
@pytest.mark.parametrize("case", WEIGHT_DAMAGE)
def test_damaged_adapter_weights_are_named(llama, decode, adapter, case):
    changes, error, message = WEIGHT_DAMAGE[case]
    path = adapter / "adapter_model.safetensors"
    tensors = {key: changes.get(key, tensor) for key, tensor in {**load_file(path), **changes}.items()}
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, path)
    with pytest.raises(error, match=f"adapter_model.safetensors.*{message}"):
        load(adapter, llama, decode)


@pytest.mark.damaged
def test_an_adapter_that_matches_nothing(llama, decode, adapter):
    edit(adapter, target_modules=["query_key_value"])
    with pytest.raises(
        IncompatibleModule, match=r"target_modules \['query_key_value'\] match nothing in the base"
    ):
        load(adapter, llama, decode)


@pytest.mark.damaged
def test_pickled_adapters_are_refused(llama, decode, adapter):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model.bin is a pickle by its name"):
        load(adapter, llama, decode)
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors is missing, expected it beside"):
        load(adapter, llama, decode)


@pytest.mark.damaged
def test_a_merge_that_overflows(llama, adapter):
    decode = load_decode_module(llama.path, dtype=torch.float16, device="cpu")
    edit(adapter, lora_alpha=1e9)
    with pytest.raises(
        CheckpointError, match=r"merged layer 0: .*q_proj.weight overflows, expected .*float16"
    ):
        load(adapter, llama, decode)


@pytest.mark.damaged
def test_a_quantised_base_cannot_take_an_adapter(llama, adapter, tmp_path):
    from qsun.modules.export import export_quantized

    export_quantized(llama.path, tmp_path / "q", bits=4, device="cpu")
    decode = load_decode_module(tmp_path / "q", device="cpu")
    with pytest.raises(
        IncompatibleModule, match=r"q is quantised \(compressed-tensors W4.*expected 16-bit weights"
    ):
        load_prefill_module("x", adapter, base_path=tmp_path / "q", decode=decode)
    # The 16-bit base that it was made of can.
    assert load_prefill_module("x", adapter, base_path=llama.path, decode=decode).notices == ()


@pytest.mark.damaged
def test_an_adapter_whose_card_names_another_base(llama, decode, adapter, tiny):
    other = load_decode_module(tiny("llama", seed=4).path, device="cpu")
    ModuleCard("poet", "decode", other.fingerprint).write(adapter)
    with pytest.raises(
        IncompatibleModule, match=r"adapter .* does not fit the decode module: base is 'sha256:"
    ):
        load(adapter, llama, decode)
    shutil.rmtree(adapter)
