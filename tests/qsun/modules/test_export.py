"""Exported checkpoints: the same module when read back, and the same model for transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from qsun.checkpoint.tokenizer import load_tokenizer
from qsun.errors import CheckpointError
from qsun.modules.card import CARD_FILE, ModuleCard
from qsun.modules.decode import load_decode_module
from qsun.modules.export import export_quantized
from qsun.modules.prefill import load_prefill_module

IDS = list(range(20, 45))
CALIBRATION = [list(range(3, 60)), list(range(90, 40, -1))]


def logits(paged, module) -> torch.Tensor:
    sequence = paged(module)
    return torch.cat([sequence.prefill(IDS[:15]), *(sequence.step(token) for token in IDS[15:])])


def read_with_transformers(path: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0]


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("llama", {"bits": 4, "symmetric": True}),
        ("llama", {"bits": 4, "symmetric": False, "quantizer": "awq", "calibration": CALIBRATION}),
        (
            "llama",
            {
                "bits": 4,
                "group_size": 32,
                "symmetric": False,
                "quantizer": "gptq",
                "calibration": CALIBRATION,
            },
        ),
        ("qwen2", {"bits": 8, "group_size": "channel"}),
        ("qwen3", {"bits": 4, "symmetric": False}),
        ("mistral", {"bits": 8, "symmetric": False, "group_size": 32}),
    ],
    ids=["llama", "llama awq", "llama gptq", "qwen2", "qwen3", "mistral"],
)
def test_read_back_by_us_and_by_transformers(tiny, paged, tmp_path, kind, arguments):
    pytest.importorskip("compressed_tensors")
    source = tiny(kind).path
    export_quantized(source, tmp_path / "q", dtype=torch.float32, device="cpu", **arguments)
    on_load = load_decode_module(source, dtype=torch.float32, device="cpu", **arguments)
    read_back = load_decode_module(tmp_path / "q", dtype=torch.float32, device="cpu")
    assert read_back.quantization == on_load.quantization
    expected = logits(paged, on_load)
    assert torch.equal(logits(paged, read_back), expected)
    torch.testing.assert_close(read_with_transformers(tmp_path / "q"), expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("bits", [2, 3])
def test_narrow_codes_read_back_by_us(tiny, paged, tmp_path, bits):
    export_quantized(tiny("llama").path, tmp_path / "q", bits=bits, dtype=torch.float32, device="cpu")
    on_load = load_decode_module(tiny("llama").path, bits=bits, dtype=torch.float32, device="cpu")
    read_back = load_decode_module(tmp_path / "q", dtype=torch.float32, device="cpu")
    assert torch.equal(logits(paged, read_back), logits(paged, on_load))


@pytest.mark.parametrize("source_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_export_has_the_fingerprint_of_its_source(tiny, tmp_path, source_dtype, dtype):
    """Also where the embedding is rounded twice on the way: the card ties the claim to the weights."""
    source = tiny("llama", dtype=source_dtype).path
    export_quantized(source, tmp_path / "q", bits=4, dtype=dtype, device="cpu")
    original = load_decode_module(source, dtype=dtype, device="cpu")
    exported = load_decode_module(tmp_path / "q", device="cpu")
    assert exported.dtype == dtype
    assert exported.fingerprint == original.fingerprint
    # So a prefill module of the 16-bit base fits the exported decode module.
    load_prefill_module("x", None, base_path=source, decode=exported)


def test_what_lies_beside_the_weights(tiny, tmp_path):
    source = Path(shutil.copytree(tiny("llama").path, tmp_path / "source"))
    words = {f"w{i}": i for i in range(90)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), unk_token="w0"
    )
    tokenizer.save_pretrained(source)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3], "temperature": 0.6}))
    seen = []
    card = export_quantized(
        source,
        tmp_path / "out" / "q",
        bits=4,
        device="cpu",
        name="mine",
        progress=lambda *step: seen.append(step),
    )
    target = tmp_path / "out" / "q"
    assert seen == [(i, 3, "quantised layers") for i in (1, 2, 3)]
    assert card.name == "mine" and ModuleCard.read(target) == card
    assert load_tokenizer(target).get_vocab() == words
    assert json.loads((target / "generation_config.json").read_text())["eos_token_id"] == [2, 3]
    assert load_decode_module(target, device="cpu").config.eos_token_ids == (2, 3)
    before = json.loads((source / "config.json").read_text())
    after = json.loads((target / "config.json").read_text())
    assert {key: after[key] for key in before} == before
    assert set(after) - set(before) == {"quantization_config"}
    # Nothing but the target is left.
    assert [entry.name for entry in target.parent.iterdir()] == ["q"]


def test_the_export_is_smaller(tiny, tmp_path):
    export_quantized(tiny("llama", dtype=torch.bfloat16).path, tmp_path / "q", bits=4, device="cpu")
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    layers = sum(t.nbytes for name, t in tensors.items() if "_proj." in name)
    dense = sum(
        p.nbytes for name, p in tiny("llama", dtype=torch.bfloat16).hf.named_parameters() if "_proj." in name
    )
    # 4 bits, a 16-bit scale every 32, and 16 bytes of shape a matrix, which only tiny models notice.
    assert layers == dense * (4 + 0.5) / 16 + 21 * 16


def test_shards(tiny, paged, tmp_path):
    arguments = {"bits": 4, "dtype": torch.float32, "device": "cpu"}
    export_quantized(tiny("llama").path, tmp_path / "one", **arguments)
    export_quantized(tiny("llama").path, tmp_path / "many", max_shard_bytes=20000, **arguments)
    files = sorted(entry.name for entry in (tmp_path / "many").glob("*.safetensors"))
    count = len(files)
    assert count > 3 and files[0] == f"model-00001-of-{count:05d}.safetensors"
    assert all((tmp_path / "many" / file).stat().st_size < 40000 for file in files)
    modules = [load_decode_module(tmp_path / name, device="cpu") for name in ("one", "many")]
    assert torch.equal(logits(paged, modules[0]), logits(paged, modules[1]))
    one = load_file(tmp_path / "one" / "model.safetensors")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(one)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())


def test_a_quantised_checkpoint_is_converted_as_it_is(tiny, paged, tmp_path):
    """A compressed-tensors export again: the same codes and scales, so the same logits bit for bit."""
    export_quantized(
        tiny("qwen2").path, tmp_path / "a", bits=4, symmetric=False, dtype=torch.float32, device="cpu"
    )
    export_quantized(tmp_path / "a", tmp_path / "b", bits=None, device="cpu")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(CheckpointError, match=r"bits is 8, expected 4 or None"):
        export_quantized(tmp_path / "a", tmp_path / "c", bits=8, device="cpu")


def test_act_order_is_kept(tiny, paged, tmp_path):
    """A GPTQ checkpoint with act-order becomes a compressed-tensors one with a group index in every layer."""
    source = tmp_path / "gptq"
    source.mkdir()
    raw = json.loads((tiny("llama").path / "config.json").read_text())
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": True}
    (source / "config.json").write_text(json.dumps({**raw, "quantization_config": config}))
    generator = torch.Generator().manual_seed(0)
    stored = {}
    for name, tensor in tiny("llama").hf.state_dict().items():
        if "_proj.weight" not in name:
            stored[name] = tensor.clone()
            continue
        N, K = tensor.shape
        module = name.removesuffix(".weight")
        order = torch.arange(K) // 32
        if "k_proj" not in name:  # one with the trivial order, which must be stored as well
            order = order[torch.randperm(K, generator=generator)]
        stored[f"{module}.qweight"] = torch.randint(-(2**31), 2**31, (K // 8, N), generator=generator).int()
        stored[f"{module}.qzeros"] = torch.full((K // 32, N // 8), 0x77777777, dtype=torch.int32)
        stored[f"{module}.scales"] = (0.02 + 0.02 * torch.rand(K // 32, N, generator=generator)).half()
        stored[f"{module}.g_idx"] = order.int()
    save_file(stored, source / "model.safetensors")
    export_quantized(source, tmp_path / "q", bits=4, dtype=torch.float32, device="cpu")
    expected = logits(paged, load_decode_module(source, device="cpu"))
    assert torch.equal(logits(paged, load_decode_module(tmp_path / "q", device="cpu")), expected)
    torch.testing.assert_close(read_with_transformers(tmp_path / "q"), expected, rtol=0, atol=5e-5)


# What must not happen


@pytest.mark.damaged
@pytest.mark.parametrize("bits", [None, 16])
def test_nothing_to_quantise(tiny, tmp_path, bits):
    with pytest.raises(ValueError, match=f"bits is {bits}, expected 2, 3, 4 or 8 to quantise"):
        export_quantized(tiny("llama").path, tmp_path / "q", bits=bits, device="cpu")
    assert not any(tmp_path.iterdir())


@pytest.mark.damaged
def test_a_group_size_that_the_format_cannot_say(tiny, tmp_path):
    """Groups of 64 do not divide 96: loading can round such weights, the file format cannot hold them."""
    with pytest.raises(
        ValueError, match="layer 0: weight has K = 96 and groups of 64, expected a group size that divides"
    ):
        export_quantized(tiny("llama").path, tmp_path / "q", bits=4, group_size=64, device="cpu")
    assert not any(tmp_path.iterdir())


@pytest.mark.damaged
def test_a_target_that_exists(tiny, tmp_path):
    (tmp_path / "q").mkdir()
    export_quantized(tiny("llama").path, tmp_path / "q", bits=4, device="cpu")
    before = {entry.name: entry.read_bytes() for entry in (tmp_path / "q").iterdir()}
    with pytest.raises(ValueError, match="q exists already, expected a new or empty directory"):
        export_quantized(tiny("llama").path, tmp_path / "q", bits=8, device="cpu")
    assert {entry.name: entry.read_bytes() for entry in (tmp_path / "q").iterdir()} == before


@pytest.mark.damaged
def test_an_interrupted_export_leaves_nothing(tiny, tmp_path):
    def interrupt(done: int, total: int, what: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_quantized(
            tiny("llama").path, tmp_path / "q", bits=4, device="cpu", max_shard_bytes=1, progress=interrupt
        )
    assert not any(tmp_path.iterdir())


@pytest.mark.damaged
def test_the_claim_of_a_card_is_tied_to_its_weights(tiny, tmp_path):
    """Copied beside other weights, a card is an error, not a false fingerprint."""
    export_quantized(tiny("llama").path, tmp_path / "a", bits=4, dtype=torch.float16, device="cpu")
    export_quantized(tiny("llama", seed=8).path, tmp_path / "b", bits=4, dtype=torch.float16, device="cpu")
    assert ModuleCard.read(tmp_path / "a").embed_tokens is not None
    shutil.copyfile(tmp_path / "a" / CARD_FILE, tmp_path / "b" / CARD_FILE)
    with pytest.raises(
        CheckpointError, match=r"the embedding has the digest sha256:\w+, expected sha256:\w+ by the"
    ):
        load_decode_module(tmp_path / "b", device="cpu")
