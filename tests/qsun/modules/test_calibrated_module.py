"""Calibrated quantisers over a whole model: closer than rounding, keys and values keep their meaning."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qsun.modules.calibration import CalibrationRun
from qsun.modules.decode import load_decode_module
from qsun.modules.export import export_quantized
from qsun.modules.quantize import CALIBRATED, QUANTIZERS

GENERATOR = torch.Generator().manual_seed(5)
CALIBRATION = [torch.randint(3, 96, (length,), generator=GENERATOR).tolist() for length in (50, 7, 33, 64)]
HELD_OUT = torch.randint(3, 96, (48,), generator=GENERATOR).tolist()


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def outliers(tiny, request, tmp_path_factory):
    """A tiny model in which a few channels are twenty times as active as the others."""
    path = shutil.copytree(tiny(request.param).path, tmp_path_factory.mktemp("outliers") / "model")
    tensors = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensor[::13] *= 20
        if name.endswith(
            ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")
        ):
            tensor[:, ::13] /= 10
    save_file(tensors, path / "model.safetensors")
    return path


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def correlated(tiny, request, tmp_path_factory):
    """A tiny model whose hidden states lie near eight directions, as those of real models lie near few."""
    path = shutil.copytree(tiny(request.param).path, tmp_path_factory.mktemp("correlated") / "model")
    tensors = load_file(path / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    generator = torch.Generator().manual_seed(6)
    low_rank = torch.randn(len(embedding), 8, generator=generator) @ torch.randn(
        8, embedding.shape[1], generator=generator
    )
    embedding.mul_(0.1).add_(low_rank * embedding.std() * 10 / 8**0.5)
    save_file(tensors, path / "model.safetensors")
    return path


def logits(paged, module) -> torch.Tensor:
    sequence = paged(module)
    return torch.cat([sequence.prefill(HELD_OUT[:40]), *(sequence.step(token) for token in HELD_OUT[40:])])


def is_closer_than_rounding(path, paged, quantizer, dtype) -> bool:
    arguments = {"bits": 4, "group_size": 32, "dtype": dtype, "device": "cpu"}
    exact = logits(paged, load_decode_module(path, dtype=torch.float32, device="cpu"))
    rounded = logits(paged, load_decode_module(path, **arguments))
    calibrated = logits(
        paged, load_decode_module(path, quantizer=quantizer, calibration=CALIBRATION, **arguments)
    )
    return bool((calibrated - exact).norm() < 0.8 * (rounded - exact).norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_awq_makes_up_for_loud_channels_on_held_out_tokens(outliers, paged, dtype):
    assert is_closer_than_rounding(outliers, paged, "awq", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gptq_makes_use_of_correlations_on_held_out_tokens(correlated, paged, dtype):
    assert is_closer_than_rounding(correlated, paged, "gptq", dtype)


def test_keys_and_values_stay_the_same_functions(outliers, paged):
    """With 8 bits the cache of the AWQ module is the dense module's, as nearly as that of plain rounding is.

    Scales fold into norms and the up projection.  Scaling v_proj for o_proj's sake would show here.
    """

    def cache_of(module) -> torch.Tensor:
        sequence = paged(module)
        sequence.prefill(HELD_OUT)
        return sequence.cache.read_blocks(sequence.block_ids[: len(HELD_OUT) // 4].tolist()).data

    arguments = {"bits": 8, "dtype": torch.float32, "device": "cpu"}
    dense = load_decode_module(outliers, dtype=torch.float32, device="cpu")
    searched = load_decode_module(outliers, quantizer="awq", calibration=CALIBRATION, **arguments)
    expected, got = cache_of(dense), cache_of(searched)
    rounded = cache_of(load_decode_module(outliers, **arguments))
    for layer in range(3):
        for side in range(2):
            error = (got[layer, side] - expected[layer, side]).norm()
            assert error < 1.5 * (rounded[layer, side] - expected[layer, side]).norm()
            assert error < 0.05 * expected[layer, side].norm()
    # Norms really were changed, so there was something to get wrong.
    before, after = (
        dense.stack.layers[0].attention_norm.weight,
        searched.stack.layers[0].attention_norm.weight,
    )
    assert (after / before - 1).abs().max() > 0.5


@pytest.mark.parametrize("quantizer", CALIBRATED)
def test_calibration_activations_are_the_dense_models(outliers, quantizer, monkeypatch):
    """What is seen of layer 2 is the input that the unquantised model gives it."""
    seen = []
    original = CalibrationRun.advance

    def record(run, layer, weights, collectors):
        original(run, layer, weights, collectors)
        seen.append(collectors)

    monkeypatch.setattr(CalibrationRun, "advance", record)
    load_decode_module(
        outliers,
        bits=2,
        group_size=32,
        dtype=torch.float32,
        device="cpu",
        quantizer=quantizer,
        calibration=[CALIBRATION[0]],
    )
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(outliers, dtype=torch.float32)
    layer = hf.model.layers[2]
    captured = {}
    hooks = {
        "attention_input": layer.self_attn.q_proj,
        "attention_output": layer.self_attn.o_proj,
        "mlp_input": layer.mlp.gate_proj,
        "mlp_output": layer.mlp.down_proj,
    }
    for name, module in hooks.items():
        module.register_forward_hook(lambda _, inputs, __, name=name: captured.update({name: inputs[0][0]}))
    with torch.no_grad():
        hf(torch.tensor([CALIBRATION[0]]))
    assert set(seen[2]) == set(captured)
    for name, activations in captured.items():
        if quantizer == "awq":
            got, expected = seen[2][name].mean_abs, activations.abs().mean(0)
        else:
            got, expected = seen[2][name].matrix.float(), activations.t() @ activations
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_gptq_leaves_norms_and_biases_alone(outliers):
    arguments = {"bits": 4, "group_size": 32, "symmetric": False, "dtype": torch.bfloat16, "device": "cpu"}
    rounded = load_decode_module(outliers, **arguments)
    compensated = load_decode_module(outliers, quantizer="gptq", calibration=CALIBRATION, **arguments)
    for a, b in zip(rounded.stack.layers, compensated.stack.layers, strict=True):
        assert torch.equal(a.attention_norm.weight, b.attention_norm.weight)
        assert torch.equal(a.mlp_norm.weight, b.mlp_norm.weight)
        for x, y in ((a.attention.qkv, b.attention.qkv), (a.mlp.down, b.mlp.down)):
            assert x.bias is None if y.bias is None else torch.equal(x.bias, y.bias)
            assert not all(map(torch.equal, x.weight.tensors, y.weight.tensors))


@pytest.mark.parametrize("quantizer", CALIBRATED)
def test_it_repeats_bit_for_bit(outliers, quantizer):
    arguments = {
        "bits": 4,
        "dtype": torch.bfloat16,
        "device": "cpu",
        "quantizer": quantizer,
        "calibration": CALIBRATION[:1],
    }
    first, second = (load_decode_module(outliers, **arguments) for _ in range(2))
    for a, b in zip(first.stack.layers, second.stack.layers, strict=True):
        assert torch.equal(a.mlp_norm.weight, b.mlp_norm.weight)
        for x, y in zip(a.mlp.gate_up.weight.tensors, b.mlp.gate_up.weight.tensors, strict=True):
            assert torch.equal(x, y)


@pytest.mark.gpu
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_a_gpu_quantises_like_the_cpu(outliers, paged, quantizer, tmp_path):
    """Loaded and exported on a GPU; sums in another order may turn a few codes."""
    arguments = {"bits": 4, "group_size": 32, "dtype": torch.float32, "quantizer": quantizer}
    if quantizer in CALIBRATED:
        arguments["calibration"] = CALIBRATION
    exact = logits(paged, load_decode_module(outliers, dtype=torch.float32, device="cpu"))
    on_cpu = logits(paged, load_decode_module(outliers, device="cpu", **arguments))
    on_gpu = logits(paged, load_decode_module(outliers, device="cuda", **arguments))
    if quantizer == "rtn":
        torch.testing.assert_close(on_gpu, on_cpu, rtol=0, atol=1e-3)
    assert (on_gpu - exact).norm() < 1.2 * (on_cpu - exact).norm()
    export_quantized(outliers, tmp_path / "q", device="cuda", **arguments)
    exported = logits(paged, load_decode_module(tmp_path / "q", device="cuda"))
    torch.testing.assert_close(exported, on_gpu, rtol=0, atol=1e-3)
