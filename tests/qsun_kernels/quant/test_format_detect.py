"""quantization_config entries as they are found in checkpoints, and ones that must be refused."""

# One case a line reads best, however long.
# ruff: noqa: E501

from __future__ import annotations

import copy

import pytest
import torch

from qsun_kernels.quant import QuantSpec, quantize_rtn
from qsun_kernels.quant.formats import (
    UnsupportedQuantization,
    detect,
    quantization_config,
    to_compressed_tensors,
)

AWQ = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 128,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": None,
}
GPTQ = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 128,
    "desc_act": True,
    "sym": True,
    "damp_percent": 0.1,
    "true_sequential": True,
    "static_groups": False,
}
# As llm-compressor writes it.
COMPRESSED = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
    "global_compression_ratio": None, "kv_cache_scheme": None, "version": "0.12.2", "sparsity_config": {}, "transform_config": {},
    "ignore": ["lm_head", "re:.*mlp.gate$"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"], "input_activations": None, "output_activations": None, "format": "pack-quantized",
            "weights": {
                "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128, "block_structure": None,
                "dynamic": False, "actorder": None, "observer": "minmax", "observer_kwargs": {},
            },
        }
    },
}  # fmt: skip


def with_entry(config: dict, path: str, value: object) -> dict:
    """A deep copy of config with the entry at "a/b/c" replaced; ... removes it."""
    config = copy.deepcopy(config)
    *parents, last = path.split("/")
    inner = config
    for parent in parents:
        inner = inner[parent]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return config


WEIGHTS = "config_groups/group_0/weights"
TWO_GROUPS = with_entry(
    COMPRESSED,
    "config_groups/group_1",
    COMPRESSED["config_groups"]["group_0"] | {"targets": ["re:.*down_proj"]},
)


@pytest.mark.parametrize(
    ("config", "name", "spec"),
    [
        (AWQ, "awq", QuantSpec(4, 128, False)),
        (AWQ | {"version": "GEMM", "group_size": -1}, "awq", QuantSpec(4, "channel", False)),
        ({"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}, "awq", QuantSpec(4, 64, False)),
        ({"quant_method": "awq", "bits": 4, "group_size": 32, "checkpoint_format": "gemm"}, "awq", QuantSpec(4, 32, False)),
        (GPTQ, "gptq", QuantSpec(4, 128, True)),
        (GPTQ | {"bits": 3, "group_size": -1, "sym": False}, "gptq", QuantSpec(3, "channel", False)),
        (with_entry(GPTQ, "quant_method", ...), "gptq", QuantSpec(4, 128, True)),
        (with_entry(GPTQ, "sym", ...), "gptq", QuantSpec(4, 128, False)),
        (GPTQ | {"pack_dtype": "int32", "meta": {"quantizer": ["gptqmodel:4.0.0"]}, "lm_head": False}, "gptq", QuantSpec(4, 128, True)),
        (COMPRESSED, "compressed-tensors", QuantSpec(4, 128, True)),
        (with_entry(COMPRESSED, f"{WEIGHTS}/num_bits", 8), "compressed-tensors", QuantSpec(8, 128, True)),
        (with_entry(with_entry(COMPRESSED, f"{WEIGHTS}/strategy", "channel"), f"{WEIGHTS}/group_size", None), "compressed-tensors", QuantSpec(4, "channel", True)),
        (with_entry(with_entry(COMPRESSED, f"{WEIGHTS}/strategy", ...), f"{WEIGHTS}/group_size", -1), "compressed-tensors", QuantSpec(4, "channel", True)),
        (with_entry(COMPRESSED, "quantization_status", "frozen"), "compressed-tensors", QuantSpec(4, 128, True)),
        (with_entry(COMPRESSED, "format", "mixed-precision"), "compressed-tensors", QuantSpec(4, 128, True)),
        (TWO_GROUPS, "compressed-tensors", QuantSpec(4, 128, True)),
    ],
)  # fmt: skip
def test_name_and_spec(config, name, spec):
    before = copy.deepcopy(config)
    found = detect(config)
    assert (found.name, found.spec) == (name, spec)
    assert config == before
    assert found.codes_name == ("weight_packed" if name == "compressed-tensors" else "qweight")


def test_zero_point_versions_and_order():
    assert (detect(GPTQ).zeros, detect(GPTQ).act_order) == ("v1", True)
    assert detect(GPTQ | {"checkpoint_format": "gptq"}).zeros == "v1"
    assert detect(GPTQ | {"checkpoint_format": "gptq_v2"}).zeros == "v2"
    assert detect(GPTQ | {"format": "gptq_v2", "desc_act": False}).act_order is False
    orders = {
        None: False,
        False: False,
        "weight": False,
        "static": False,
        "group": True,
        "dynamic": True,
        True: True,
    }
    for written, expected in orders.items():
        assert detect(with_entry(COMPRESSED, f"{WEIGHTS}/actorder", written)).act_order is expected


def test_which_modules_are_quantised():
    awq = detect(AWQ | {"modules_to_not_convert": ["visual", "layers.3.mlp"]})
    assert awq.quantizes("model.layers.2.mlp.up_proj") and awq.quantizes("model.layers.30.mlp.up_proj")
    assert not awq.quantizes("model.layers.3.mlp.up_proj")
    assert not awq.quantizes("model.visual.proj") and not awq.quantizes("lm_head")
    gptq = detect(GPTQ | {"dynamic": {r"-:.*\.down_proj": {}}})
    assert gptq.quantizes("model.layers.0.mlp.up_proj") and not gptq.quantizes("model.layers.0.mlp.down_proj")
    assert not gptq.quantizes("lm_head") and detect(GPTQ | {"lm_head": True}).quantizes("lm_head")
    for inside in (["self_attn.q_proj", "mlp.up_proj"], [["self_attn.q_proj"], ["mlp.up_proj"]]):
        some = detect(GPTQ | {"modules_in_block_to_quantize": inside})
        assert some.quantizes("model.layers.0.self_attn.q_proj") and some.quantizes(
            "model.layers.9.mlp.up_proj"
        )
        assert not some.quantizes("model.layers.0.self_attn.k_proj")
    compressed = detect(COMPRESSED)
    assert compressed.quantizes("model.layers.0.mlp.gate_proj")
    assert not compressed.quantizes("model.layers.0.mlp.gate") and not compressed.quantizes("lm_head")
    narrow = detect(
        with_entry(COMPRESSED, "config_groups/group_0/targets", ["re:.*q_proj", "model.layers.0.mlp.up_proj"])
    )
    assert narrow.quantizes("model.layers.5.self_attn.q_proj") and narrow.quantizes(
        "model.layers.0.mlp.up_proj"
    )
    assert not narrow.quantizes("model.layers.1.mlp.up_proj")


def test_read_uses_the_reader_of_the_format(float_weight):
    packed = quantize_rtn(torch.randn(8, 64), QuantSpec(3, 32, False))
    found = detect(quantization_config(packed.spec))
    assert torch.equal(float_weight(found.read(to_compressed_tensors(packed), "m")), float_weight(packed))
    qweight = packed.qweight.t().contiguous()
    zeros = torch.zeros(2, 24, dtype=torch.int32)
    gptq = detect(
        {"quant_method": "gptq", "bits": 3, "group_size": 32, "sym": False, "checkpoint_format": "gptq_v2"}
    )
    tensors = {"qweight": torch.cat([qweight] * 32, dim=1), "qzeros": zeros, "scales": torch.ones(2, 256)}
    assert torch.equal(gptq.read(tensors).codes(), packed.codes().repeat(32, 1))
    awq = detect(AWQ | {"group_size": 32})
    tensors = {"qweight": torch.zeros(64, 1, dtype=torch.int32), "qzeros": torch.zeros(2, 1, dtype=torch.int32), "scales": torch.ones(2, 8)}  # fmt: skip
    assert torch.equal(float_weight(awq.read(tensors)), torch.zeros(8, 64, dtype=torch.float64))


REFUSED = {
    "no method": ({}, "quant_method is None, supported: awq"),
    "fp8": ({"quant_method": "fp8", "activation_scheme": "static"}, "quant_method is 'fp8', supported: awq"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method is 'bitsandbytes', supported"),
    "mxfp4": ({"quant_method": "mxfp4"}, "quant_method is 'mxfp4', supported"),
    "awq gemv": (AWQ | {"version": "gemv"}, "version is 'gemv', expected 'gemm'"),
    "awq marlin": (AWQ | {"version": "marlin"}, "version is 'marlin', expected 'gemm'"),
    "awq without zeros": (AWQ | {"zero_point": False}, "zero_point is False, expected true"),
    "awq 8 bits": (AWQ | {"bits": 8}, "bits is 8, expected 4"),
    "awq bits as text": (AWQ | {"bits": "4"}, "bits is '4', expected one of"),
    "awq no bits": (with_entry(AWQ, "bits", ...), "bits is None, expected one of"),
    "awq group 16": (AWQ | {"group_size": 16}, "group_size is 16, expected one of"),
    "awq modules": (AWQ | {"modules_to_not_convert": "lm_head"}, "modules_to_not_convert is 'lm_head', expected a list"),
    "gptq 5 bits": (GPTQ | {"bits": 5}, "bits is 5, expected one of"),
    "gptq group 1024": (GPTQ | {"group_size": 1024}, "group_size is 1024, expected one of"),
    "gptq marlin": (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin', expected 'gptq' or 'gptq_v2'"),
    "gptq marlin flag": (GPTQ | {"is_marlin_format": True}, "is_marlin_format is True, expected false"),
    "gptq int64": (GPTQ | {"pack_dtype": "int64"}, "pack_dtype is 'int64', expected 'int32'"),
    "gptq mixed": (GPTQ | {"dynamic": {r"\.o_proj": {"bits": 8}}}, r"dynamic\[.*is {'bits': 8}, expected one setting"),
    "gptq dynamic list": (GPTQ | {"dynamic": ["-:x"]}, r"dynamic is \['-:x'\], expected a mapping"),
    "gptq bad regex": (GPTQ | {"dynamic": {"-:(": {}}}, r"dynamic is '\(', expected a regular expression"),
    "gptq sym as text": (GPTQ | {"sym": "yes"}, "sym is 'yes', expected true or false"),
    "gptq adapter": (GPTQ | {"adapter": {"rank": 8}}, "adapter is {'rank': 8}, expected none"),
    "gptq modules": (GPTQ | {"modules_in_block_to_quantize": "q_proj"}, "modules_in_block_to_quantize is 'q_proj', expected a list"),
    "gptq modules of numbers": (GPTQ | {"modules_in_block_to_quantize": [1]}, "modules_in_block_to_quantize is 1, expected a list"),
    "ct no format": (with_entry(COMPRESSED, "format", ...), "format is None, expected 'pack-quantized'"),
    "ct marlin-24": (with_entry(COMPRESSED, "format", "marlin-24"), "format is 'marlin-24', expected 'pack-quantized'"),
    "ct nvfp4": (with_entry(COMPRESSED, "format", "nvfp4-pack-quantized"), "format is 'nvfp4-pack-quantized', expected"),
    "ct int": (with_entry(COMPRESSED, "format", "int-quantized"), "format is 'int-quantized', expected"),
    "ct group format": (with_entry(COMPRESSED, "config_groups/group_0/format", "float-quantized"), r"config_groups\['group_0'\].format is 'float-quantized', expected"),
    "ct no groups": (with_entry(COMPRESSED, "config_groups", {}), "config_groups is {}, expected at least one group"),
    "ct preset": (with_entry(COMPRESSED, "config_groups", {"W4A16": ["Linear"]}), r"config_groups\['W4A16'\] is \['Linear'\], expected a mapping"),
    "ct two settings": (with_entry(TWO_GROUPS, "config_groups/group_1/weights", COMPRESSED["config_groups"]["group_0"]["weights"] | {"num_bits": 8}), "config_groups is .*W4 g128.*W8 g128.*expected one setting"),
    "ct activations": (with_entry(COMPRESSED, "config_groups/group_0/input_activations", {"num_bits": 8}), "input_activations is {'num_bits': 8}, expected null"),
    "ct float": (with_entry(COMPRESSED, f"{WEIGHTS}/type", "float"), r"weights.type is 'float', expected 'int'"),
    "ct 5 bits": (with_entry(COMPRESSED, f"{WEIGHTS}/num_bits", 5), r"weights.num_bits is 5, expected one of"),
    "ct group 16": (with_entry(COMPRESSED, f"{WEIGHTS}/group_size", 16), r"weights.group_size is 16, expected one of"),
    "ct group list": (with_entry(COMPRESSED, f"{WEIGHTS}/group_size", [128]), r"weights.group_size is \[128\], expected one of"),
    "ct group without size": (with_entry(COMPRESSED, f"{WEIGHTS}/group_size", None), r"weights.group_size is None, expected a number"),
    "ct channel with size": (with_entry(COMPRESSED, f"{WEIGHTS}/strategy", "channel"), r"weights.group_size is 128, expected null"),
    "ct tensor": (with_entry(COMPRESSED, f"{WEIGHTS}/strategy", "tensor"), r"weights.strategy is 'tensor', expected 'group' or 'channel'"),
    "ct block": (with_entry(COMPRESSED, f"{WEIGHTS}/strategy", "block"), r"weights.strategy is 'block', expected"),
    "ct dynamic": (with_entry(COMPRESSED, f"{WEIGHTS}/dynamic", True), r"weights.dynamic is True, expected false"),
    "ct actorder": (with_entry(COMPRESSED, f"{WEIGHTS}/actorder", "random"), r"weights.actorder is 'random', expected null, 'group' or 'weight'"),
    "ct no weights": (with_entry(COMPRESSED, WEIGHTS, None), r"weights is None, expected a mapping"),
    "ct kv cache": (with_entry(COMPRESSED, "kv_cache_scheme", {"num_bits": 8}), "kv_cache_scheme is {'num_bits': 8}, expected null"),
    "ct sparse": (with_entry(COMPRESSED, "sparsity_config", {"format": "sparse-24-bitmask"}), "sparsity_config is .*sparse-24.*expected none"),
    "ct rotated": (with_entry(COMPRESSED, "transform_config", {"config_groups": {"R1": {"type": "hadamard"}}}), "transform_config is .*hadamard.*expected none"),
    "ct calibrating": (with_entry(COMPRESSED, "quantization_status", "calibration"), "quantization_status is 'calibration', expected 'compressed'"),
    "ct bad regex": (with_entry(COMPRESSED, "ignore", ["re:["]), r"ignore is '\[', expected a regular expression"),
    "ct targets": (with_entry(COMPRESSED, "config_groups/group_0/targets", "Linear"), r"targets is 'Linear', expected a list"),
}  # fmt: skip


@pytest.mark.damaged
@pytest.mark.parametrize("case", REFUSED)
def test_refused_configurations(case):
    config, message = REFUSED[case]
    with pytest.raises(UnsupportedQuantization, match="^quantization_config: .*" + message):
        detect(config)


@pytest.mark.damaged
@pytest.mark.parametrize("config", [None, "awq", ["awq"], 4])
def test_no_mapping(config):
    with pytest.raises(
        TypeError, match=f"quantization_config is {type(config).__name__}, expected a mapping"
    ):
        detect(config)
