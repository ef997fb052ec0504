"""Decode modules, quantised on the way in: the dense model on the dequantised weights."""

from __future__ import annotations

import copy

import pytest
import torch

from qsun.errors import CheckpointError
from qsun.models.hf_config import model_config_from_hf
from qsun.modules.decode import load_decode_module
from qsun.modules.prefill import load_prefill_module
from qsun.modules.quantize import default_group_size
from qsun_kernels import QuantSpec, dequantize
from qsun_kernels.quant import quantize_rtn


def dequantised(hf, spec: QuantSpec, dtype: torch.dtype):
    """The transformers model with every projection of the layers replaced by what its codes stand for."""
    model = copy.deepcopy(hf)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "_proj.weight" in name:
                weight.copy_(dequantize(quantize_rtn(weight.float(), spec, scale_dtype=dtype), torch.float32))
    return model


def both_paths(paged, decode, ids: list[int]) -> torch.Tensor:
    sequence = paged(decode)
    return torch.cat([sequence.prefill(ids[:16]), *(sequence.step(token) for token in ids[16:])])


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        ("llama", QuantSpec(4, 32, True)),
        ("llama", QuantSpec(3, 32, False)),
        ("qwen2", QuantSpec(2, 64, True)),
        ("qwen3", QuantSpec(8, "channel", True)),
        ("mistral", QuantSpec(4, 128, False)),
    ],
    ids=str,
)
def test_logits_equal_the_dense_model_on_dequantised_weights(tiny, paged, kind, spec):
    model = tiny(kind)
    decode = load_decode_module(
        model.path,
        bits=spec.bits,
        group_size=spec.group_size,
        symmetric=spec.symmetric,
        dtype=torch.float32,
        device="cpu",
    )
    assert decode.quantization == spec
    ids = list(range(30, 60))
    with torch.no_grad():
        expected = dequantised(model.hf, spec, torch.float32)(torch.tensor([ids])).logits[0]
        original = model.hf(torch.tensor([ids])).logits[0]
    got = both_paths(paged, decode, ids)
    torch.testing.assert_close(got, expected, rtol=0, atol=3e-5)
    # The test would notice if nothing had been quantised.
    assert (expected - original).abs().max() > 100 * (got - expected).abs().max()


def test_embedding_and_lm_head_stay_as_they_are(tiny):
    model = tiny("llama")
    decode = load_decode_module(model.path, bits=4, dtype=torch.bfloat16, device="cpu")
    state = model.hf.state_dict()
    assert torch.equal(decode.embed_tokens, state["model.embed_tokens.weight"].bfloat16())
    assert torch.equal(decode.lm_head, state["lm_head.weight"].bfloat16())
    assert decode.dtype == torch.bfloat16


def test_tied_parts_are_one_tensor(tiny):
    decode = load_decode_module(tiny("qwen2").path, bits=4, device="cpu")
    assert decode.lm_head is decode.embed_tokens
    assert decode.nbytes == decode.bytes_per_step
    untied = load_decode_module(tiny("llama").path, device="cpu")
    assert untied.nbytes == untied.bytes_per_step + untied.embed_tokens.nbytes
    state = tiny("llama").hf.state_dict()
    assert untied.nbytes == sum(tensor.nbytes for tensor in state.values())


@pytest.mark.parametrize(("changes", "expected"), [
    ({}, 32),
    ({"intermediate_size": 128}, 64),
    ({"hidden_size": 128, "intermediate_size": 384, "head_dim": 32}, 128),
    ({"intermediate_size": 100}, "channel"),
])  # fmt: skip
def test_default_group_size_divides_every_projection(changes, expected):
    raw = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 8,
        **changes,
    }
    assert default_group_size(model_config_from_hf(raw, "x")) == expected


def test_bits_16_and_none_keep_the_weights(tiny, paged):
    model = tiny("llama")
    ids = list(range(20, 40))
    first, second = (load_decode_module(model.path, bits=bits, device="cpu") for bits in (16, None))
    assert first.quantization is None and second.quantization is None
    assert torch.equal(both_paths(paged, first, ids), both_paths(paged, second, ids))


def test_dtype_auto_is_the_checkpoints_own(tiny):
    assert load_decode_module(tiny("llama").path, device="cpu").dtype == torch.float32
    half = tiny("llama", dtype=torch.float16)
    assert load_decode_module(half.path, device="cpu").dtype == torch.float16


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_a_dtype_by_its_name(tiny, name):
    path = tiny("llama").path
    decode = load_decode_module(path, dtype=name, device="cpu")
    assert decode.dtype == getattr(torch, name)
    prefill = load_prefill_module("p", base_path=path, decode=decode, dtype=name)
    assert prefill.stack.norm.weight.dtype == decode.dtype


def test_progress_counts_layers(tiny):
    seen = []
    load_decode_module(tiny("llama").path, bits=4, device="cpu", progress=lambda *step: seen.append(step))
    assert seen == [(1, 3, "decode layers"), (2, 3, "decode layers"), (3, 3, "decode layers")]


def test_quantising_repeats_bit_for_bit(tiny):
    first, second = (load_decode_module(tiny("qwen3").path, bits=4, device="cpu") for _ in range(2))
    for a, b in zip(first.stack.layers, second.stack.layers, strict=True):
        for x, y in zip(a.attention.qkv.weight.tensors, b.attention.qkv.weight.tensors, strict=True):
            assert torch.equal(x, y)


BAD = [
    ({"bits": 5}, ValueError, "bits is 5, expected 2, 3, 4, 8, 16 or None"),
    ({"bits": "4"}, ValueError, "bits is '4', expected"),
    ({"bits": True}, ValueError, "bits is True, expected"),
    ({"bits": 4, "group_size": 48}, ValueError, "group_size is 48, expected one of"),
    ({"bits": 4, "quantizer": "magic"}, ValueError, "quantizer is 'magic', expected one of"),
    (
        {"bits": 4, "calibration": [[1, 2]]},
        ValueError,
        "calibration has 1 sequences, expected none for quantizer 'rtn'",
    ),
    ({"bits": 4, "quantizer": "awq"}, ValueError, "calibration is empty, expected at least one sequence"),
    ({"bits": 4, "quantizer": "gptq"}, ValueError, "calibration is empty, .* for quantizer 'gptq'"),
    (
        {"bits": 4, "quantizer": "awq", "calibration": [[1], []]},
        ValueError,
        r"calibration\[1\] has 0 tokens, expected 1 to 128",
    ),
    (
        {"bits": 4, "quantizer": "awq", "calibration": [[1, 96]]},
        ValueError,
        r"calibration\[0\] has token 96, expected integers in 0..95",
    ),
    ({"dtype": torch.int8}, ValueError, "dtype is torch.int8, expected 'auto', one of"),
    ({"dtype": "float7"}, ValueError, "dtype is 'float7', expected 'auto', one of"),
    ({"dtype": "half"}, ValueError, "dtype is 'half', expected 'auto'"),
    ({"bits": 4, "backend": "opencl"}, ValueError, "backend is 'opencl'"),
]


@pytest.mark.damaged
@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_arguments_are_named(tiny, arguments, error, message):
    with pytest.raises(error, match=message):
        load_decode_module(tiny("llama").path, device="cpu", **arguments)


@pytest.mark.damaged
def test_weights_that_no_scale_can_hold(tiny, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    path = shutil.copytree(tiny("llama").path, tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e7
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"layer 1 cannot be quantised: weight\[0\] needs the scale .*float16"
    ):
        load_decode_module(path, bits=4, dtype=torch.float16, device="cpu")
