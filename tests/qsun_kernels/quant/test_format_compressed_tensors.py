"""compressed-tensors checkpoints against the package compressed-tensors itself."""

# One damaged case a line reads best, however long.
# ruff: noqa: E501

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qsun_kernels.quant import PackedWeight, QuantSpec, quantize_rtn
from qsun_kernels.quant.formats import (
    detect,
    from_compressed_tensors,
    quantization_config,
    to_compressed_tensors,
)

BITS = (2, 3, 4, 8)


@pytest.fixture(scope="module")
def package():
    """The reference implementation: (compress, decompress) of one layer, given a spec."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    def scheme(spec: QuantSpec, act_order: bool = False) -> QuantizationScheme:
        channel = spec.group_size == "channel"
        weights = QuantizationArgs(
            num_bits=spec.bits,
            symmetric=spec.symmetric,
            strategy="channel" if channel else "group",
            group_size=None if channel else spec.group_size,
            actorder="group" if act_order else None,
        )
        return QuantizationScheme(targets=["Linear"], weights=weights)

    class Package:
        @staticmethod
        def compress(tensors, spec, act_order=False):
            return PackedQuantizationCompressor.compress(tensors, scheme(spec, act_order))

        @staticmethod
        def decompress(tensors, spec, act_order=False):
            return PackedQuantizationCompressor.decompress(tensors, scheme(spec, act_order))["weight"]

    return Package


def full_groups(K: int, group: int, generator: torch.Generator) -> torch.Tensor:
    """A random g_idx with equal groups."""
    return (torch.randperm(K, generator=generator) // group).int()


def random_packed(bits: int, group_size: object, symmetric: bool, N: int, K: int, seed: int, dtype: torch.dtype, act_order: bool) -> PackedWeight:  # fmt: skip
    spec = QuantSpec(bits, group_size, symmetric)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (N, K), generator=generator, dtype=torch.uint8)
    shape = (N, spec.num_groups(K))
    scales = ((torch.rand(shape, generator=generator) + 0.1) * torch.randint(0, 2, shape, generator=generator).mul(2).sub(1)).to(dtype)  # fmt: skip
    qzeros = None if symmetric else torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.uint8)
    g_idx = full_groups(K, spec.columns_per_group(K), generator) if act_order else None
    return PackedWeight.from_codes(codes, scales, spec, qzeros, g_idx).validate()


def weight_in_scale_dtype(packed: PackedWeight) -> torch.Tensor:
    """(code - zero) * scale, rounded once to the dtype of the scales."""
    g = packed.column_groups()
    zeros = packed.spec.zero_point if packed.qzeros is None else packed.qzeros.float()[:, g]
    return ((packed.codes().float() - zeros) * packed.scales.float()[:, g]).to(packed.scales.dtype)


layers = given(
    st.sampled_from(BITS),
    st.sampled_from([32, 64, "channel"]),
    st.booleans(),
    st.integers(1, 25),
    st.integers(1, 3),
    st.integers(0, 2**32 - 1),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    st.booleans(),
)


@settings(max_examples=40, deadline=None)
@layers
def test_exported_layers_are_read_back_by_the_package(package, bits, group_size, symmetric, N, groups, seed, dtype, act_order):  # fmt: skip
    K = 37 * groups if group_size == "channel" else group_size * groups
    act_order = act_order and group_size != "channel"
    packed = random_packed(bits, group_size, symmetric, N, K, seed, dtype, act_order)
    tensors = to_compressed_tensors(packed)
    decompressed = package.decompress(tensors, packed.spec, act_order)
    assert decompressed.dtype == dtype
    assert torch.equal(decompressed, weight_in_scale_dtype(packed))


@settings(max_examples=40, deadline=None)
@layers
def test_layers_round_trip_bit_for_bit(bits, group_size, symmetric, N, groups, seed, dtype, act_order):
    K = 37 * groups if group_size == "channel" else group_size * groups
    act_order = act_order and group_size != "channel" and groups > 1
    packed = random_packed(bits, group_size, symmetric, N, K, seed, dtype, act_order)
    again = from_compressed_tensors(to_compressed_tensors(packed), packed.spec, act_order=False)
    assert (again.spec, again.N, again.K) == (packed.spec, packed.N, packed.K)
    for name in ("qweight", "scales", "qzeros", "g_idx"):
        before, after = getattr(packed, name), getattr(again, name)
        if name == "g_idx" and after is None:
            assert torch.equal(again.column_groups(), packed.column_groups())
            continue
        assert (before is None) == (after is None), name
        assert before is None or (torch.equal(before, after) and before.dtype == after.dtype), name


@settings(max_examples=40, deadline=None)
@layers
def test_layers_of_the_package_are_read(package, bits, group_size, symmetric, N, groups, seed, dtype, act_order):  # fmt: skip
    K = 37 * groups if group_size == "channel" else group_size * groups
    act_order = act_order and group_size != "channel"
    spec = QuantSpec(bits, group_size, symmetric)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=generator).to(dtype)
    half = 1 << (bits - 1)
    shape = (N, spec.num_groups(K))
    local = {
        "weight": weight,
        "weight_scale": (torch.rand(shape, generator=generator) + 0.1).to(dtype),
        "weight_zero_point": torch.zeros(shape, dtype=torch.int8)
        if symmetric
        else torch.randint(-half, half, shape, generator=generator).to(torch.int8),
    }
    if act_order:
        local["weight_g_idx"] = full_groups(K, spec.columns_per_group(K), generator)
    tensors = package.compress(local, spec, act_order)
    packed = from_compressed_tensors(tensors, spec, act_order=act_order)
    assert torch.equal(weight_in_scale_dtype(packed), package.decompress(tensors, spec, act_order))


@pytest.mark.parametrize("bits", BITS)
def test_zero_points_of_older_versions(bits, float_weight):
    """Stored unpacked as int8, and for symmetric weights too."""
    packed = random_packed(bits, 32, False, 5, 64, bits, torch.float32, False)
    tensors = to_compressed_tensors(packed)
    tensors["weight_zero_point"] = (packed.qzeros.short() - (1 << (bits - 1))).to(torch.int8)
    assert torch.equal(float_weight(from_compressed_tensors(tensors, packed.spec)), float_weight(packed))
    packed = random_packed(bits, 32, True, 5, 64, bits, torch.float32, False)
    tensors = to_compressed_tensors(packed) | {"weight_zero_point": torch.zeros(5, 2, dtype=torch.int8)}
    assert torch.equal(float_weight(from_compressed_tensors(tensors, packed.spec)), float_weight(packed))


def test_an_unset_g_idx_means_order():
    packed = random_packed(4, 32, True, 3, 64, 0, torch.float32, False)
    tensors = to_compressed_tensors(packed) | {"weight_g_idx": torch.full((64,), -1, dtype=torch.int32)}
    assert from_compressed_tensors(tensors, packed.spec).g_idx is None


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("group_size", "act_order"),
    [(32, True), (64, True), (128, True), (32, False), (64, False), (128, False), ("channel", False)],
)
def test_configuration_is_detected_as_written(bits, symmetric, group_size, act_order):
    spec = QuantSpec(bits, group_size, symmetric)
    config = quantization_config(spec, ignore=["lm_head", "re:.*visual.*"], act_order=act_order)
    found = detect(json.loads(json.dumps(config)))
    assert (found.name, found.spec, found.act_order) == ("compressed-tensors", spec, act_order)
    assert found.ignored == ("lm_head", "re:.*visual.*") and found.targets == ("Linear",)


@pytest.mark.parametrize("spec", [QuantSpec(4, 128, True), QuantSpec(3, "channel", False)])
def test_configuration_is_what_the_package_understands(spec):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig.model_validate(quantization_config(spec))
    weights = config.config_groups["group_0"].weights
    assert (weights.num_bits, weights.symmetric, weights.type) == (spec.bits, spec.symmetric, "int")
    assert (weights.strategy, weights.group_size) == (
        ("channel", None) if spec.group_size == "channel" else ("group", spec.group_size)
    )
    assert config.format == "pack-quantized" and config.quantization_status == "compressed"
    # What the package would write itself is detected too.
    found = detect(json.loads(config.model_dump_json()))
    assert found.spec == spec and found.ignored == ("lm_head",)


@pytest.mark.parametrize("spec", [QuantSpec(4, 32, True), QuantSpec(3, 32, False)], ids=str)
def test_transformers_loads_an_exported_model(spec, tmp_path):
    """A whole checkpoint: written with our tensors and configuration, loaded by AutoModelForCausalLM."""
    pytest.importorskip("compressed_tensors")
    transformers = pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors.torch")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=50, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    tensors: dict[str, torch.Tensor] = {}
    expected: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        if not name.endswith("_proj.weight"):
            tensors[name] = value
            continue
        packed = quantize_rtn(value, spec)
        expected[name] = weight_in_scale_dtype(packed)
        for part, tensor in to_compressed_tensors(packed).items():
            tensors[name.removesuffix("weight") + part] = tensor.contiguous()
    safetensors.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    entries = config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    entries["quantization_config"] = quantization_config(spec)
    (tmp_path / "config.json").write_text(json.dumps(entries))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.arange(7).unsqueeze(0)
    with torch.no_grad():
        logits = loaded(ids).logits
        state = loaded.state_dict()
        assert len(expected) == 7
        for name, weight in expected.items():
            assert torch.equal(state[name], weight), name
        model.load_state_dict(expected, strict=False)
        torch.testing.assert_close(model(ids).logits, logits)


SPEC = QuantSpec(4, 32, False)


def broken(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    tensors = to_compressed_tensors(random_packed(4, 32, False, 12, 64, 0, torch.float32, True))
    tensors.update({name: value for name, value in changes.items() if value is not None})
    return {name: value.clone() for name, value in tensors.items() if changes.get(name, value) is not None}


def changed(name: str, index: tuple[int, ...], value: float) -> dict[str, torch.Tensor]:
    tensors = broken()
    tensors[name][index] = value
    return tensors


DAMAGED = {
    "packed missing": (broken(weight_packed=None), SPEC, {}, ValueError, "expected weight_packed too"),
    "scale missing": (broken(weight_scale=None), SPEC, {}, ValueError, "expected weight_scale too"),
    "shape missing": (broken(weight_shape=None), SPEC, {}, ValueError, "expected weight_shape too"),
    "zero point missing": (broken(weight_zero_point=None), SPEC, {}, ValueError, "expected weight_zero_point too"),
    "g_idx missing": (broken(weight_g_idx=None), SPEC, {"act_order": True}, ValueError, "m has no weight_g_idx, expected one: the configuration says actorder"),
    "shape lies": (broken(weight_shape=torch.tensor([12, 96])), SPEC, {}, ValueError, r"m.weight_packed has shape \(12, 8\), expected \(12, 12\) for weight_shape \[12, 96\]"),
    "shape negative": (broken(weight_shape=torch.tensor([12, -64])), SPEC, {}, ValueError, r"m.weight_shape is \[12, -64\], expected two sizes of at least 1"),
    "shape of three": (broken(weight_shape=torch.tensor([12, 8, 8])), SPEC, {}, ValueError, r"m.weight_shape has shape \(3,\), expected \(2\)"),
    "shape float": (broken(weight_shape=torch.tensor([12.0, 64.0])), SPEC, {}, TypeError, "m.weight_shape has dtype torch.float32, expected torch.int64"),
    "packed truncated": (broken(weight_packed=torch.zeros(11, 8, dtype=torch.int32)), SPEC, {}, ValueError, r"m.weight_packed has shape \(11, 8\), expected \(12, 8\)"),
    "packed int8": (broken(weight_packed=torch.zeros(12, 8, dtype=torch.int8)), SPEC, {}, TypeError, "m.weight_packed has dtype torch.int8, expected torch.int32"),
    "config says 8 bits": (broken(), QuantSpec(8, 32, False), {}, ValueError, r"m.weight_packed has shape \(12, 8\), expected \(12, 16\)"),
    "config says symmetric": (broken(), QuantSpec(4, 32, True), {}, ValueError, "m.weight_zero_point has values other than 0, expected none for W4 g32 symmetric"),
    "config says channel": (broken(), QuantSpec(4, "channel", False), {}, ValueError, r"m.weight_scale has shape \(12, 2\), expected \(12, 1\)"),
    "scale int": (broken(weight_scale=torch.ones(12, 2, dtype=torch.int32)), SPEC, {}, TypeError, "m.weight_scale has dtype torch.int32"),
    "scale NaN": (changed("weight_scale", (4, 1), float("nan")), SPEC, {}, ValueError, r"m: scales\[4, 1\] is nan, expected a finite number"),
    "scale inf": (changed("weight_scale", (4, 1), float("inf")), SPEC, {}, ValueError, r"m: scales\[4, 1\] is inf"),
    "scale zero": (changed("weight_scale", (4, 1), 0.0), SPEC, {}, ValueError, r"m: scales\[4, 1\] is 0.0"),
    "zero point truncated": (broken(weight_zero_point=torch.zeros(1, 2, dtype=torch.int32)), SPEC, {}, ValueError, r"m.weight_zero_point has shape \(1, 2\), expected \(2, 2\)"),
    "zero point float": (broken(weight_zero_point=torch.zeros(2, 2)), SPEC, {}, TypeError, "m.weight_zero_point has dtype torch.float32, expected torch.int32"),
    "int8 zero point out of range": (broken(weight_zero_point=torch.full((12, 2), 8, dtype=torch.int8)), SPEC, {}, ValueError, "m.weight_zero_point spans 8 to 8, expected -8 to 7 for 4 bits"),
    "g_idx out of range": (changed("weight_g_idx", (3,), 2), SPEC, {}, ValueError, "m.weight_g_idx spans 0 to 2, expected groups 0 to 1"),
    "g_idx partly unset": (changed("weight_g_idx", (3,), -1), SPEC, {}, ValueError, "m.weight_g_idx spans -1 to 1, expected groups 0 to 1"),
    "g_idx unequal": (broken(weight_g_idx=torch.tensor([0] * 33 + [1] * 31, dtype=torch.int32)), SPEC, {}, ValueError, "m.weight_g_idx puts 33 columns in group 0, expected 32"),
    "g_idx short": (broken(weight_g_idx=torch.zeros(63, dtype=torch.int32)), SPEC, {}, ValueError, r"m.weight_g_idx has shape \(63,\), expected \(64\)"),
    "a float layer": ({"weight": torch.zeros(2, 2)}, SPEC, {}, ValueError, "m.weight is no tensor of compressed-tensors checkpoints"),
    "an nvfp4 layer": (broken(weight_global_scale=torch.ones(1)), SPEC, {}, ValueError, "m.weight_global_scale is no tensor of compressed-tensors checkpoints"),
}  # fmt: skip


@pytest.mark.damaged
@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_compressed_layers(case):
    tensors, spec, options, error, message = DAMAGED[case]
    with pytest.raises(error, match=message):
        from_compressed_tensors(tensors, spec, "m", **options)


@pytest.mark.damaged
def test_export_refuses_a_short_last_group():
    with pytest.raises(
        ValueError, match=r"weight has K = 576 and groups of 128, expected .*: 64 or 32 or channel"
    ):
        to_compressed_tensors(quantize_rtn(torch.randn(2, 576), QuantSpec(4, 128, True)))


@pytest.mark.damaged
def test_export_refuses_unequal_groups():
    g_idx = torch.tensor([0] * 33 + [1] * 31, dtype=torch.int32)
    packed = dataclasses.replace(quantize_rtn(torch.randn(2, 64), QuantSpec(4, 32, True)), g_idx=g_idx)
    with pytest.raises(ValueError, match="g_idx puts 33 columns in group 0, expected 32"):
        to_compressed_tensors(packed)


@pytest.mark.damaged
def test_configuration_refuses_an_order_of_one_group():
    with pytest.raises(ValueError, match="act_order is True with group_size 'channel', expected groups"):
        quantization_config(QuantSpec(4, "channel", True), act_order=True)
