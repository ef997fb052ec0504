"""Activation-aware scales: what they keep (the function, K and V) and what they gain (the error)."""

# One damaged case a line reads best, however long.
# ruff: noqa: E501

from __future__ import annotations

import math

import pytest
import torch

from qsun_kernels.quant import QuantSpec
from qsun_kernels.quant.awq_search import AwqOptions, quantize_layer, search_range_ratio, search_scale
from qsun_kernels.quant.calibration import InputStatistics
from qsun_kernels.quant.folding import DECODER_LAYER, InputFold, LinearGroup, fold_into_norm, fold_scales
from qsun_kernels.quant.formats import GGUFFile
from qsun_kernels.quant.rtn import fake_quantize

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 4, 2, 16


def decoder_layer(
    seed: int = 0, dtype: torch.dtype = torch.float32, bias: bool = True
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype) / math.sqrt(shape[-1])

    tensors = {
        "input_layernorm.weight": (torch.rand(HIDDEN, generator=generator) + 0.5).to(dtype),
        "post_attention_layernorm.weight": (torch.rand(HIDDEN, generator=generator) + 0.5).to(dtype),
        "self_attn.q_proj.weight": normal(HEADS * HEAD_DIM, HIDDEN),
        "self_attn.k_proj.weight": normal(KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.v_proj.weight": normal(KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.o_proj.weight": normal(HIDDEN, HEADS * HEAD_DIM),
        "mlp.gate_proj.weight": normal(FFN, HIDDEN),
        "mlp.up_proj.weight": normal(FFN, HIDDEN),
        "mlp.down_proj.weight": normal(HIDDEN, FFN),
    }
    if bias:
        tensors["self_attn.k_proj.bias"] = normal(KV_HEADS * HEAD_DIM)
        tensors["mlp.up_proj.bias"] = normal(FFN)
    return tensors


def run(tensors: dict[str, torch.Tensor], hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    """One decoder layer in float64; returns K, V, the output and the input of each group."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * (x.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt() * tensors[f"{name}.weight"].double()

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        y = x @ tensors[f"{name}.weight"].double().t()
        return y + tensors[f"{name}.bias"].double() if f"{name}.bias" in tensors else y

    x = norm(hidden.double(), "input_layernorm")
    q, k, v = (linear(x, f"self_attn.{name}_proj") for name in "qkv")
    T = x.shape[0]
    keys = k.view(T, KV_HEADS, HEAD_DIM).repeat_interleave(HEADS // KV_HEADS, dim=1)
    values = v.view(T, KV_HEADS, HEAD_DIM).repeat_interleave(HEADS // KV_HEADS, dim=1)
    scores = torch.einsum("thd,shd->hts", q.view(T, HEADS, HEAD_DIM), keys) / math.sqrt(HEAD_DIM)
    mixed = torch.einsum("hts,shd->thd", scores.softmax(dim=-1), values).reshape(T, -1)
    after = hidden.double() + linear(mixed, "self_attn.o_proj")
    y = norm(after, "post_attention_layernorm")
    gated = torch.nn.functional.silu(linear(y, "mlp.gate_proj")) * linear(y, "mlp.up_proj")
    return {
        "k": k,
        "v": v,
        "output": after + linear(gated, "mlp.down_proj"),
        "attention_input": x,
        "attention_output": mixed,
        "mlp_input": y,
        "mlp_output": gated,
    }


def hidden_states(T: int, seed: int = 1, outlier: float = 30.0) -> torch.Tensor:
    """Normal hidden states with a few channels far larger than the rest, as real models have them."""
    hidden = torch.randn(T, HIDDEN, generator=torch.Generator().manual_seed(seed))
    hidden[:, [3, 17, 40]] *= outlier
    return hidden


def statistics(tensors: dict[str, torch.Tensor], hidden: torch.Tensor) -> dict[str, InputStatistics]:
    found = run(tensors, hidden)
    collected = {}
    for group in DECODER_LAYER:
        collected[group.name] = InputStatistics(found[group.name].shape[1], max_samples=128)
        collected[group.name].update(found[group.name])
    return collected


def some_scales(seed: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"attention_input": HIDDEN, "mlp_input": HIDDEN, "mlp_output": FFN}
    return {name: torch.exp(torch.randn(size, generator=generator)) for name, size in sizes.items()}


def float_tensors(
    layer: object, tensors: dict[str, torch.Tensor], float_weight: object
) -> dict[str, torch.Tensor]:
    """The layer that runs at decode: dequantised weights, changed tensors in place of the old ones."""
    packed = {f"{name}.weight": float_weight(weight) for name, weight in layer.packed.items()}
    return tensors | packed | dict(layer.changed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_folded_layers_compute_the_same_function(dtype):
    """Also where the norm weights are rounded to 16 bits after the division: the columns make up for it."""
    tensors = decoder_layer(dtype=dtype, bias=dtype == torch.float32)
    changed, applied = fold_scales(tensors, some_scales())
    assert set(applied) == {"attention_input", "mlp_input", "mlp_output"}
    for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
        assert changed[name].dtype == dtype and not torch.equal(changed[name], tensors[name])
    hidden = hidden_states(20)
    before, after = run(tensors, hidden), run(tensors | changed, hidden)
    for name in ("k", "v", "output"):
        torch.testing.assert_close(after[name], before[name], rtol=1e-5, atol=1e-5)


def test_keys_and_values_keep_their_meaning():
    """What any module writes with the old weights is what the folded layer would have written: the KV cache is shared."""
    tensors = decoder_layer()
    changed, _ = fold_scales(tensors, some_scales())
    hidden = hidden_states(12)
    before, after = run(tensors, hidden), run(tensors | changed, hidden)
    torch.testing.assert_close(after["k"], before["k"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after["v"], before["v"], rtol=1e-5, atol=1e-5)
    # Folding the scale of o_proj into the rows of v_proj keeps the layer's output too, but not V: with a cache that
    # other modules wrote, the output is another one. Hence no such fold exists.
    scale = torch.linspace(0.5, 2.0, KV_HEADS * HEAD_DIM)
    per_head = scale.view(KV_HEADS, 1, HEAD_DIM).expand(-1, HEADS // KV_HEADS, -1).reshape(-1)
    forbidden = tensors | {
        "self_attn.v_proj.weight": tensors["self_attn.v_proj.weight"] / scale.unsqueeze(1),
        "self_attn.o_proj.weight": tensors["self_attn.o_proj.weight"] * per_head,
    }
    naive = run(forbidden, hidden)
    torch.testing.assert_close(naive["output"], before["output"], rtol=1e-5, atol=1e-5)
    assert (naive["v"] - before["v"]).abs().max() > 0.1 * before["v"].abs().max()


def test_no_scale_of_the_plan_touches_rows_of_keys_or_values():
    targets = {group.fold.module for group in DECODER_LAYER if group.fold is not None}
    assert targets == {"input_layernorm", "post_attention_layernorm", "mlp.up_proj"}
    assert next(group for group in DECODER_LAYER if group.linears == ("self_attn.o_proj",)).fold is None
    tensors = decoder_layer()
    changed, applied = fold_scales(tensors, some_scales())
    for name in ("k", "v"):
        weight = f"self_attn.{name}_proj.weight"
        assert torch.equal(changed[weight], tensors[weight] * applied["attention_input"])
    assert "self_attn.o_proj.weight" not in changed and "self_attn.k_proj.bias" not in changed


@pytest.mark.parametrize("spec", [QuantSpec(8, 32, True), QuantSpec(8, "channel", False)], ids=str)
def test_a_quantised_layer_gives_nearly_the_same_keys_values_and_output(spec, float_weight):
    """8 bits: what is left is rounding. The changed norms and biases belong to the packed weights."""
    tensors = decoder_layer()
    hidden = hidden_states(64)
    layer = quantize_layer(tensors, statistics(tensors, hidden), spec, options=AwqOptions(steps=5))
    assert set(layer.packed) == {f"self_attn.{n}_proj" for n in "qkvo"} | {
        f"mlp.{n}_proj" for n in ("gate", "up", "down")
    }
    assert all(name.endswith("norm.weight") or name == "mlp.up_proj.bias" for name in layer.changed)
    before, after = run(tensors, hidden), run(float_tensors(layer, tensors, float_weight), hidden)
    for name in ("k", "v", "output"):
        error = (after[name] - before[name]).norm() / before[name].norm()
        assert error < 0.02, (name, float(error))


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_outlier_channels_cost_less_than_with_plain_rounding(bits, symmetric, float_weight):
    """Errors as reported and as measured on hidden states that the search has not seen."""
    spec = QuantSpec(bits, 32, symmetric)
    tensors = decoder_layer(bias=False)
    inputs = statistics(tensors, hidden_states(256))
    scaled = quantize_layer(tensors, inputs, spec)
    plain = quantize_layer(tensors, inputs, spec, options=AwqOptions(families=(), range_ratios=()))
    for report in plain.reports:
        assert report.family is None and report.rtn_error == report.scaled_error
        assert report.error == pytest.approx(report.rtn_error)
    for report in scaled.reports:
        assert report.scaled_error <= report.rtn_error and report.error <= report.scaled_error * 1.001
        if report.name in ("attention_input", "mlp_input"):
            assert report.family is not None and report.error < 0.8 * report.rtn_error
    unseen = hidden_states(256, seed=9)
    exact = run(tensors, unseen)
    # The output has the errors of o_proj and down_proj too, whose inputs have no outliers here.
    for name, most in (("k", 0.95), ("v", 0.8), ("output", 1.0)):
        outputs = [
            run(float_tensors(layer, tensors, float_weight), unseen)[name] for layer in (scaled, plain)
        ]
        errors = [float((output - exact[name]).norm()) for output in outputs]
        assert errors[0] < most * errors[1], name


def test_search_is_the_best_of_its_candidates():
    """Each scale tried again here, from the formula of the paper; plain rounding is among them."""
    spec = QuantSpec(3, 32, True)
    weight = torch.randn(24, HIDDEN)
    inputs = InputStatistics(HIDDEN)
    inputs.update(hidden_states(100))
    x, mean = inputs.sample, inputs.mean_abs
    errors = {}
    for step in range(11):
        scale = mean ** (step / 10)
        scale = scale / (scale.max() * scale.min()).sqrt()
        output = (x / scale) @ fake_quantize(weight * scale, spec).t()
        errors[step / 10] = float((output - x @ weight.t()).double().square().sum())
    found = search_scale([weight], inputs, spec, options=AwqOptions(steps=10, families=("activation",)))
    best = min(errors, key=errors.get)
    assert found.exponent == best and best > 0
    assert found.error == pytest.approx(errors[best], rel=1e-3)
    assert found.rtn_error == pytest.approx(errors[0.0], rel=1e-3)


def test_search_minimises_the_sum_over_the_group():
    spec = QuantSpec(4, 32, True)
    weights = [torch.randn(8, HIDDEN), 3 * torch.randn(16, HIDDEN)]
    inputs = InputStatistics(HIDDEN)
    inputs.update(hidden_states(100))
    together = search_scale(weights, inputs, spec)
    stacked = search_scale([torch.cat(weights)], inputs, spec)
    assert torch.equal(together.scale, stacked.scale)
    assert together.error == pytest.approx(stacked.error, rel=1e-5)


def test_inputs_of_zero_leave_plain_rounding():
    inputs = InputStatistics(32)
    inputs.update(torch.zeros(5, 32))
    found = search_scale([torch.randn(4, 32)], inputs, QuantSpec(4, 32, True))
    assert found.family is None and torch.equal(found.scale, torch.ones(32)) and found.error == 0


def test_channels_that_are_never_active_keep_a_bounded_scale():
    x = torch.randn(50, 64)
    x[:, 7] = 0
    inputs = InputStatistics(64)
    inputs.update(x * torch.logspace(-3, 2, 64))
    found = search_scale([torch.randn(8, 64)], inputs, QuantSpec(4, 32, True))
    assert found.family is not None
    assert float(found.scale.max() / found.scale.min()) <= 1.01e4**2 and bool(found.scale.isfinite().all())


@pytest.mark.parametrize("rows", [8, 200])
@pytest.mark.parametrize("group_size", [32, 64, "channel"])
def test_range_ratios_lower_the_error_of_heavy_tailed_weights(rows, group_size):
    """Few rows and many go through different sums of the same numbers; K fills no whole group."""
    spec = QuantSpec(3, group_size, True)
    weight = torch.distributions.StudentT(3.0).sample((40, 80))
    x = torch.randn(rows, 80, generator=torch.Generator().manual_seed(0))
    ratio = search_range_ratio(weight, x, spec, (0.9, 0.8, 0.7, 0.6))
    assert ratio.shape == (40, spec.num_groups(80))
    assert set(ratio.unique().tolist()) <= {torch.tensor(r).item() for r in (1.0, 0.9, 0.8, 0.7, 0.6)}

    def error(**options: torch.Tensor) -> torch.Tensor:
        return (x @ (fake_quantize(weight, spec, **options) - weight).t()).norm()

    assert error(range_ratio=ratio) < error()
    # Each group by itself: no other ratio of the list has a smaller error of its own part.
    columns = spec.columns_per_group(80)
    candidates = [1.0, 0.9, 0.8, 0.7, 0.6]
    deltas = [fake_quantize(weight, spec, range_ratio=torch.full_like(ratio, r)) - weight for r in candidates]
    for g in range(spec.num_groups(80)):
        part = slice(g * columns, min((g + 1) * columns, 80))
        errors = torch.stack([(x[:, part] @ delta[:, part].t()).square().sum(dim=0) for delta in deltas])
        chosen = errors.gather(0, torch.tensor([[candidates.index(round(float(r), 2)) for r in ratio[:, g]]]))
        assert torch.all(chosen <= errors.amin(dim=0) * (1 + 1e-4))


def test_ranges_stay_whole_when_that_is_best():
    """Two levels: any narrower range is off for every weight."""
    weight = torch.tensor([[8.0, -8.0] * 16])
    assert search_range_ratio(weight, torch.randn(20, 32), QuantSpec(4, 32, True), (0.5, 0.25)) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_folding_into_a_norm_is_exact_after_rounding(dtype):
    norm = torch.randn(256).to(dtype)
    norm[5] = 0
    scale = torch.exp(3 * torch.randn(256))
    scale[7] = 1e30
    folded, applied = fold_into_norm(norm, scale)
    assert folded.dtype == dtype and applied.dtype == torch.float32 and bool((applied > 0).all())
    torch.testing.assert_close(folded.double() * applied.double(), norm.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(applied[:5], scale[:5], rtol=2**-7, atol=0)
    assert folded[5] == 0 and applied[5] == 1
    if dtype == torch.float16:
        assert folded[7] == norm[7] and applied[7] == 1


def test_tensors_are_not_modified():
    tensors = decoder_layer()
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    quantize_layer(
        tensors, statistics(tensors, hidden_states(32)), QuantSpec(4, 32, True), options=AwqOptions(steps=2)
    )
    for name, tensor in tensors.items():
        assert torch.equal(tensor, copies[name]), name


@pytest.mark.parametrize("scale_dtype", [None, torch.float16, torch.float32])
def test_scales_are_stored_as_asked(scale_dtype):
    tensors = decoder_layer(dtype=torch.bfloat16, bias=False)
    layer = quantize_layer(
        tensors, statistics(tensors, hidden_states(32)), QuantSpec(4, 32, True), scale_dtype=scale_dtype, options=AwqOptions(steps=2)
    )  # fmt: skip
    assert {weight.scales.dtype for weight in layer.packed.values()} == {scale_dtype or torch.bfloat16}


def test_real_weights_and_activations(smollm2_gguf):
    """q, k, v of the first layer of SmolLM2-135M-Instruct on what they really read: the norm of token embeddings.

    Its weights are 4-bit numbers dequantised, in groups of 32 that are not ours.
    """
    pytest.importorskip("gguf")
    with GGUFFile(smollm2_gguf) as file:
        weights = [file.read(f"blk.0.attn_{name}.weight") for name in "qkv"]
        embedding = file.read("token_embd.weight")
        norm = file.read("blk.0.attn_norm.weight")
    rows = torch.randperm(embedding.shape[0], generator=torch.Generator().manual_seed(0))[:1024]
    hidden = embedding[rows]
    x = hidden * (hidden.square().mean(dim=-1, keepdim=True) + 1e-5).rsqrt() * norm
    inputs = InputStatistics(576, max_samples=256)
    inputs.update(x[:512])
    spec = QuantSpec(4, 64, True)
    found = search_scale(weights, inputs, spec, scale_dtype=torch.bfloat16, options=AwqOptions(steps=10))
    assert found.error < 0.95 * found.rtn_error
    unseen = x[512:]
    scaled = plain = 0.0
    for weight in weights:
        exact = unseen @ weight.t()
        quantised = fake_quantize(weight * found.scale, spec, scale_dtype=torch.bfloat16)
        scaled += float(((unseen / found.scale) @ quantised.t() - exact).square().sum())
        plain += float(
            (unseen @ fake_quantize(weight, spec, scale_dtype=torch.bfloat16).t() - exact).square().sum()
        )
    assert scaled < 0.97 * plain


def inputs_of(K: int = 32, rows: int = 4) -> InputStatistics:
    made = InputStatistics(K)
    if rows:
        made.update(torch.randn(rows, K))
    return made


def without(mapping: dict, name: str) -> dict:
    return {key: value for key, value in mapping.items() if key != name}


def layer_with(tensors: dict | None = None, inputs: dict | None = None) -> object:
    base = decoder_layer()
    return quantize_layer(base if tensors is None else tensors, statistics(base, hidden_states(8)) if inputs is None else inputs, SPEC, options=AwqOptions(steps=1))  # fmt: skip


SPEC = QuantSpec(4, 32, True)
NAN_WEIGHT = torch.full((4, 32), math.nan)
DAMAGED = {
    "fold into v": (lambda: InputFold("rows", "self_attn.v_proj"), ValueError, "module is 'self_attn.v_proj', expected no projection of keys or values"),
    "fold into k": (lambda: InputFold("rows", "k_proj"), ValueError, "module is 'k_proj', expected no projection"),
    "fold into fused qkv": (lambda: InputFold("rows", "self_attn.qkv_proj"), ValueError, "expected no projection of keys or values"),
    "fold kind": (lambda: InputFold("columns", "mlp.up_proj"), ValueError, "kind is 'columns', expected 'norm' or 'rows'"),
    "scale for o": (lambda: fold_scales(decoder_layer(), {"attention_output": torch.ones(64)}), ValueError, "scales has 'attention_output', expected none"),
    "rows of another size": (lambda: fold_scales(decoder_layer(), {"mlp_output": torch.ones(95)}), ValueError, r"mlp.up_proj.weight has shape \(96, 64\), expected 95 rows"),
    "no weights": (lambda: search_scale([], inputs_of(), SPEC), ValueError, "weights is empty, expected at least one"),
    "other K": (lambda: search_scale([torch.ones(4, 33)], inputs_of(), SPEC), ValueError, r"weights\[0\] has shape \(4, 33\), expected \(N, 32\)"),
    "other device": (lambda: search_scale([torch.ones(4, 32, device="meta")], inputs_of(), SPEC), ValueError, r"weights\[0\] is on meta, expected cpu"),
    "NaN weight": (lambda: search_scale([NAN_WEIGHT], inputs_of(), SPEC), ValueError, r"weight\[0, 0\] is nan, expected finite"),
    "no calibration": (lambda: search_scale([torch.ones(4, 32)], inputs_of(rows=0), SPEC), ValueError, "no calibration activations were given, expected at least one row"),
    "no mean": (lambda: inputs_of(rows=0).mean_abs, ValueError, "no calibration activations were given"),
    "layer without down": (lambda: layer_with(without(decoder_layer(), "mlp.down_proj.weight")), ValueError, "tensors has no 'mlp.down_proj.weight', expected it"),
    "layer without norm": (lambda: fold_scales(without(decoder_layer(), "input_layernorm.weight"), some_scales()), ValueError, "tensors has no 'input_layernorm.weight', expected it"),
    "layer without statistics": (lambda: layer_with(inputs={"attention_input": inputs_of(64)}), ValueError, "inputs has no 'attention_output', expected one of each"),
    "statistics of other K": (lambda: layer_with(inputs={group.name: inputs_of(65) for group in DECODER_LAYER}), ValueError, r"weights\[0\] has shape \(64, 64\), expected \(N, 65\)"),
    "steps 0": (lambda: AwqOptions(steps=0), ValueError, "steps is 0, expected at least 1"),
    "unknown family": (lambda: AwqOptions(families=("gradient",)), ValueError, "families has 'gradient', expected 'activation' or"),
    "ratio 0": (lambda: AwqOptions(range_ratios=(0.0,)), ValueError, r"range_ratios has 0.0, expected numbers in \(0, 1\]"),
    "ratio NaN": (lambda: AwqOptions(range_ratios=(math.nan,)), ValueError, "range_ratios has nan, expected"),
    "activations NaN": (lambda: inputs_of(rows=0).update(torch.full((2, 32), math.nan)), ValueError, "x has a NaN or infinite value in channel 0, expected finite"),
    "activations inf": (lambda: inputs_of(rows=0).update(torch.tensor([[0.0] * 31 + [math.inf]])), ValueError, "x has a NaN or infinite value in channel 31"),
    "activations of other K": (lambda: inputs_of().update(torch.ones(4, 31)), ValueError, r"x has shape \(4, 31\), expected \(..., 32\)"),
    "statistics K 0": (lambda: InputStatistics(0), ValueError, "K is 0, expected at least 1"),
    "statistics of no rows": (lambda: InputStatistics(32, max_samples=0), ValueError, "max_samples is 0, expected at least 1"),
}  # fmt: skip


@pytest.mark.damaged
@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_calibration(case):
    build, error, message = DAMAGED[case]
    with pytest.raises(error, match=message):
        build()


def test_statistics_are_those_of_all_rows():
    batches = [
        torch.randn(3, 5, 16),
        torch.randn(1, 16),
        torch.randn(0, 16),
        torch.randn(40, 16).bfloat16(),
        torch.randn(16),
    ]
    few, many = (InputStatistics(16, max_samples=size, seed=3) for size in (20, 100))
    for batch in batches:
        few.update(batch)
        many.update(batch)
    rows = torch.cat([batch.reshape(-1, 16).float() for batch in batches])
    assert few.count == many.count == 57
    torch.testing.assert_close(few.mean_abs, rows.abs().mean(dim=0))
    # Nothing dropped: the sample is every row.
    matches = (many.sample.unsqueeze(1) == rows.unsqueeze(0)).all(dim=-1)
    assert matches.shape == (57, 57) and bool((matches.sum(dim=0) == 1).all())
    # Some dropped: 20 different rows, each along one of the originals and at least as long.
    directions = torch.nn.functional.normalize(few.sample) @ torch.nn.functional.normalize(rows).t()
    source = directions.argmax(dim=1)
    assert few.sample.shape == (20, 16) and len(source.unique()) == 20
    torch.testing.assert_close(directions.amax(dim=1), torch.ones(20))
    assert bool((few.sample.norm(dim=1) >= rows[source].norm(dim=1) * (1 - 1e-6)).all())
    again = InputStatistics(16, max_samples=20, seed=3)
    for batch in batches:
        again.update(batch)
    assert torch.equal(again.sample, few.sample)


def test_sums_of_squares_over_the_sample_are_unbiased():
    """The Gram matrix of 8 rows of 60, averaged over 1,000 seeds, is that of all rows: it carries every || X D.T ||**2."""
    rows = torch.randn(60, 4) * torch.logspace(-1, 1, 60).unsqueeze(1)
    exact = rows.t() @ rows
    total = torch.zeros(4, 4)
    for seed in range(1000):
        made = InputStatistics(4, max_samples=8, seed=seed)
        for part in (rows[:5], rows[5:50], rows[50:]):
            made.update(part)
        total += made.sample.t() @ made.sample
    assert float((total / 1000 - exact).norm() / exact.norm()) < 0.05


def test_the_heaviest_row_is_always_sampled():
    """One row in ten thousand, 300 times as long as the others, as an attention sink is."""
    for seed in range(20):
        rows = torch.randn(10000, 8, generator=torch.Generator().manual_seed(seed))
        rows[1234 + seed] *= 300
        made = InputStatistics(8, max_samples=16, seed=seed)
        for part in rows.split(777):
            made.update(part)
        assert bool((made.sample == rows[1234 + seed]).all(dim=1).any())


def test_rows_of_zeros_count_but_are_not_sampled():
    made = InputStatistics(4, max_samples=8)
    made.update(torch.cat((torch.zeros(3, 4), torch.ones(1, 4))))
    assert made.count == 4 and torch.equal(made.mean_abs, torch.full((4,), 0.25))
    assert torch.equal(made.sample, torch.ones(1, 4))


def test_a_row_that_is_seen_rarely_is_not_ruined():
    """Weights that only the rare heavy row reads keep their range: narrowing would cut what that row needs."""
    K = 64
    x = torch.randn(4000, K) * 0.1
    x[:, :4] = 0
    x[0, :4] = 500.0
    weight = torch.randn(32, K)
    weight[:, :4] = 6.0
    inputs = InputStatistics(K, max_samples=64)
    for part in x.split(500):
        inputs.update(part)
    spec = QuantSpec(4, "channel", True)
    ratio = search_range_ratio(weight, inputs.sample, spec, (0.8, 0.6, 0.4))
    quantised = fake_quantize(weight, spec, range_ratio=ratio)
    blind = search_range_ratio(weight, x[1:], spec, (0.8, 0.6, 0.4))
    exact = x[0] @ weight.t()
    error = (x[0] @ quantised.t() - exact).norm() / exact.norm()
    error_blind = (x[0] @ fake_quantize(weight, spec, range_ratio=blind).t() - exact).norm() / exact.norm()
    assert error < 0.1 and error_blind > 0.2


def test_a_group_of_ones_own():
    """Layers of another shape: groups are data."""
    groups = (LinearGroup("mlp", ("a", "b"), InputFold("norm", "n"), ("a",)),)
    tensors = {"a.weight": torch.randn(8, 32), "b.weight": torch.randn(4, 32), "n.weight": torch.ones(32)}
    inputs = InputStatistics(32)
    inputs.update(torch.randn(64, 32) * torch.logspace(-1, 1.5, 32))
    layer = quantize_layer(tensors, {"mlp": inputs}, SPEC, groups=groups)
    assert set(layer.packed) == {"a", "b"} and set(layer.changed) == {"n.weight"}
    assert layer.reports[0].error < layer.reports[0].rtn_error
