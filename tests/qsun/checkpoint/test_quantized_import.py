"""AWQ, GPTQ and compressed-tensors checkpoints, packed here by hand, against dense models."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qsun.errors import CheckpointError, UnsupportedModel
from qsun.layers.linear import QuantLinear, SplitLinear
from qsun.layers.mlp import GateUpSilu
from qsun.modules.decode import load_decode_module
from qsun_kernels import QuantSpec
from qsun_kernels.testing.tolerances import compare

GROUP = 32
AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
GPTQ_CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False, "desc_act": False}


def words(values: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Eight 4-bit numbers of the last dimension a word, number order[i] in bits 4i..4i+3."""
    eights = values.long().unflatten(-1, (-1, 8))[..., list(order)]
    packed = (eights << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def awq_tensors(codes, zeros, scales, g_idx) -> dict[str, torch.Tensor]:
    """codes (N, K), zeros and scales (N, G) in AutoAWQ's layout: output rows interleaved in a word."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": words(codes.t(), order),
        "qzeros": words(zeros.t(), order),
        "scales": scales.t().contiguous(),
    }


def gptq_tensors(codes, zeros, scales, g_idx) -> dict[str, torch.Tensor]:
    """The same in GPTQ's layout, version 1: zero points are stored minus one."""
    return {
        "qweight": words(codes).t().contiguous(),
        "qzeros": words(zeros.t() - 1),
        "scales": scales.t().contiguous(),
        "g_idx": g_idx.int(),
    }


def quantise(
    model,
    directory: Path,
    pack: Callable[..., dict],
    config: dict,
    act_order: Callable[[str, int], torch.Tensor | None],
):
    """Write `model` with random low-bit projections; returns the transformers model with the same weights,
    dense.

    act_order: the group of every column for a projection's name and K; None is in order.
    """
    dense = copy.deepcopy(model.hf)
    generator = torch.Generator().manual_seed(7)
    stored = {}
    state = dense.state_dict()
    for name, weight in state.items():
        if "_proj.weight" not in name:
            stored[name] = weight.clone()
            continue
        N, K = weight.shape
        groups = -(-K // GROUP)
        codes = torch.randint(0, 16, (N, K), generator=generator)
        zeros = torch.randint(1, 16, (N, groups), generator=generator)
        scales = (0.01 + 0.05 * torch.rand(N, groups, generator=generator)).half()
        g_idx = act_order(name, K)
        if g_idx is None:
            g_idx = torch.arange(K) // GROUP
        weight.copy_((codes - zeros[:, g_idx]) * scales.float()[:, g_idx])
        module = name.removesuffix(".weight")
        stored.update(
            {f"{module}.{key}": tensor for key, tensor in pack(codes, zeros, scales, g_idx).items()}
        )
    directory.mkdir()
    save_file({key: value.contiguous() for key, value in stored.items() if key != "lm_head.weight" or not
               dense.config.tie_word_embeddings}, directory / "model.safetensors")  # fmt: skip
    raw = json.loads((model.path / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**raw, "quantization_config": config}))
    return dense


def check_logits(directory: Path, dense, paged) -> object:
    """Logits as near to the dense model's in float64 as transformers comes in float32, by the usual rule."""
    decode = load_decode_module(directory, dtype=torch.float32, device="cpu")
    ids = list(range(20, 50))
    with torch.no_grad():
        plain = dense(torch.tensor([ids])).logits[0]
        exact = copy.deepcopy(dense).double()(torch.tensor([ids])).logits[0]
    sequence = paged(decode)
    got = torch.cat([sequence.prefill(ids[:20]), *(sequence.step(token) for token in ids[20:])])
    compare("logits", got, exact, plain).require()
    return decode


def in_order(name: str, K: int) -> None:
    return None


def shared_act_order(name: str, K: int) -> torch.Tensor:
    """One order for all projections of an input, as GPTQ's Hessian gives."""
    return (torch.arange(K) // GROUP)[torch.randperm(K, generator=torch.Generator().manual_seed(K))]


def own_act_order(name: str, K: int) -> torch.Tensor:
    """Another order for every projection."""
    seed = sum(map(ord, name))
    return (torch.arange(K) // GROUP)[torch.randperm(K, generator=torch.Generator().manual_seed(seed))]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_awq(tiny, paged, tmp_path, kind):
    dense = quantise(tiny(kind), tmp_path / "q", awq_tensors, AWQ_CONFIG, in_order)
    decode = check_logits(tmp_path / "q", dense, paged)
    assert decode.quantization == QuantSpec(4, GROUP, False)
    # q, k, v are one matrix, and so are gate and up.
    for layer in decode.stack.layers:
        assert isinstance(layer.attention.qkv, QuantLinear) and isinstance(layer.mlp.gate_up, GateUpSilu)


@pytest.mark.parametrize("order", [in_order, shared_act_order, own_act_order], ids=lambda f: f.__name__)
def test_gptq(tiny, paged, tmp_path, order):
    config = {**GPTQ_CONFIG, "desc_act": order is not in_order}
    dense = quantise(tiny("llama"), tmp_path / "q", gptq_tensors, config, order)
    decode = check_logits(tmp_path / "q", dense, paged)
    expected = SplitLinear if order is own_act_order else QuantLinear
    assert all(type(layer.attention.qkv) is expected for layer in decode.stack.layers)


def test_gptq_version_2_and_the_separate_file_of_old_checkpoints(tiny, paged, tmp_path):
    def version_2(codes, zeros, scales, g_idx):
        return {**gptq_tensors(codes, zeros, scales, g_idx), "qzeros": words(zeros.t())}

    config = {**GPTQ_CONFIG, "checkpoint_format": "gptq_v2"}
    dense = quantise(tiny("llama"), tmp_path / "q", version_2, config, in_order)
    raw = json.loads((tmp_path / "q" / "config.json").read_text())
    (tmp_path / "q" / "quantize_config.json").write_text(json.dumps(raw.pop("quantization_config")))
    (tmp_path / "q" / "config.json").write_text(json.dumps(raw))
    check_logits(tmp_path / "q", dense, paged)


def test_gptq_biases_of_zeros(tiny, paged, tmp_path):
    """AutoGPTQ stores a bias for every layer; zeros are dropped, anything else is refused."""

    def with_bias(codes, zeros, scales, g_idx):
        return {**gptq_tensors(codes, zeros, scales, g_idx), "bias": torch.zeros(codes.shape[0]).half()}

    dense = quantise(tiny("llama"), tmp_path / "q", with_bias, GPTQ_CONFIG, in_order)
    check_logits(tmp_path / "q", dense, paged)
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.bias"][3] = 0.5
    save_file(tensors, tmp_path / "q" / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"'model.layers.1.mlp.up_proj.bias' is not zero, expected no bias"
    ):
        load_decode_module(tmp_path / "q", device="cpu")


def test_compressed_tensors_written_by_its_own_package(tiny, paged, tmp_path):
    package = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    assert package
    arguments = QuantizationArgs(num_bits=4, type="int", symmetric=False, strategy="group", group_size=GROUP)
    compressor = BaseCompressor.load_from_registry("pack-quantized")

    def pack(codes, zeros, scales, g_idx):
        signed_zeros = (zeros - 8).to(torch.int8)
        weight = (codes - zeros[:, g_idx]) * scales.float()[:, g_idx]
        state = {"weight": weight.half(), "weight_scale": scales, "weight_zero_point": signed_zeros}
        scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
        return compressor.compress(state, scheme)

    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": arguments.model_dump(mode="json")}},
        "ignore": ["lm_head"],
    }
    dense = quantise(tiny("llama"), tmp_path / "q", pack, config, in_order)
    check_logits(tmp_path / "q", dense, paged)


def test_dense_and_packed_projections_beside_each_other(tiny, paged, tmp_path):
    """What a checkpoint leaves in 16 bits stays so, also where it would be fused with packed neighbours."""
    model = tiny("llama")
    dense = quantise(model, tmp_path / "q", awq_tensors, AWQ_CONFIG, in_order)
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj"
    for part in ("qweight", "qzeros", "scales"):
        del tensors[f"{name}.{part}"]
    tensors[f"{name}.weight"] = model.hf.state_dict()[f"{name}.weight"].clone()
    dense.load_state_dict({**dense.state_dict(), f"{name}.weight": tensors[f"{name}.weight"]})
    save_file(tensors, tmp_path / "q" / "model.safetensors")
    decode = check_logits(tmp_path / "q", dense, paged)
    assert isinstance(decode.stack.layers[1].attention.qkv, SplitLinear)


def test_a_quantised_checkpoint_is_taken_as_it_is(tiny, tmp_path):
    quantise(tiny("llama"), tmp_path / "q", awq_tensors, AWQ_CONFIG, in_order)
    for bits, group_size in ((None, None), (4, None), (4, GROUP)):
        decode = load_decode_module(tmp_path / "q", bits=bits, group_size=group_size, device="cpu")
        assert decode.quantization == QuantSpec(4, GROUP, False)


@pytest.mark.damaged
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 8}, "is quantised already .awq W4 g32 asymmetric.: bits is 8, expected 4 or None"),
        ({"bits": 16}, "bits is 16, expected 4 or None"),
        ({"bits": 4, "group_size": 128}, "group_size is 128, expected 32 or None"),
    ],
)
def test_arguments_that_disagree_with_the_checkpoint(tiny, tmp_path, arguments, message):
    quantise(tiny("llama"), tmp_path / "q", awq_tensors, AWQ_CONFIG, in_order)
    with pytest.raises(CheckpointError, match=message):
        load_decode_module(tmp_path / "q", device="cpu", **arguments)


Q = "model.layers.2.mlp.down_proj"
DAMAGE = {
    "no scales": ({"scales": None}, f"{Q} has the tensors .*, expected scales too"),
    "no codes": ({"qweight": None}, f"has no tensor '{Q}.qweight'"),
    "scale of another shape": ({"scales": lambda t: t[:1].clone()}, f"{Q}.scales has shape .*, expected"),
    "codes of another type": (
        {"qweight": lambda t: t.long()},
        f"{Q}.qweight has dtype torch.int64, expected",
    ),
    "fewer columns": ({"qweight": lambda t: t[:64].clone()}, f"{Q}.*expected"),
    "scale nan": (
        {"scales": lambda t: t.index_fill(0, torch.tensor([1]), torch.nan)},
        f"{Q}: scales.* is nan",
    ),
    "scale infinite": (
        {"scales": lambda t: t.index_fill(0, torch.tensor([1]), torch.inf)},
        f"{Q}: scales.* is inf",
    ),
    "scale zero": ({"scales": lambda t: t.index_fill(0, torch.tensor([0]), 0.0)}, f"{Q}: scales.* is 0.0"),
    "a tensor of another format": (
        {"weight_packed": lambda t: torch.ones(2)},
        f"holds tensor '{Q}.weight_packed'",
    ),
}


@pytest.mark.damaged
@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_packed_weights_are_named(tiny, tmp_path, case):
    changes, message = DAMAGE[case]
    quantise(tiny("llama"), tmp_path / "q", awq_tensors, AWQ_CONFIG, in_order)
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    for part, change in changes.items():
        value = tensors.pop(f"{Q}.{part}", None)
        if change is not None:
            tensors[f"{Q}.{part}"] = change(value)
    save_file(tensors, tmp_path / "q" / "model.safetensors")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_decode_module(tmp_path / "q", device="cpu")
    assert str(tmp_path / "q") in str(caught.value)


CONFIGS = {
    "another method": ({"quant_method": "bitsandbytes"}, "quant_method is 'bitsandbytes'"),
    "no method": ({"bits": 4}, "quant_method is None"),
    "another layout": ({**AWQ_CONFIG, "version": "gemv"}, "version is 'gemv', expected 'gemm'"),
    "another width": ({**GPTQ_CONFIG, "bits": 5}, "bits is 5, expected one of"),
    "another group": ({**GPTQ_CONFIG, "group_size": 16}, "group_size is 16, expected one of"),
    "a list": ([4, 128], "quantization_config is list, expected a mapping"),
}


@pytest.mark.damaged
@pytest.mark.parametrize("case", CONFIGS)
def test_unsupported_quantisation_is_refused_by_name(tiny, tmp_path, case):
    config, message = CONFIGS[case]
    quantise(tiny("llama"), tmp_path / "q", awq_tensors, config, in_order)
    expected = CheckpointError if case == "a list" else UnsupportedModel
    with pytest.raises(expected, match=f"config.json.*{message}"):
        load_decode_module(tmp_path / "q", device="cpu")


@pytest.mark.damaged
def test_a_quantised_lm_head_is_refused(tiny, tmp_path):
    quantise(tiny("llama"), tmp_path / "q", awq_tensors, AWQ_CONFIG, in_order)
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    tensors["lm_head.qweight"] = torch.ones(64, 12, dtype=torch.int32)
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "q" / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"holds tensor 'lm_head.qweight', expected only tensors of a llama"
    ):
        load_decode_module(tmp_path / "q", device="cpu")
