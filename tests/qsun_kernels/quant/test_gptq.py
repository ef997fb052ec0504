"""Error-compensating rounding: against the definition in float64, and what it gains."""

from __future__ import annotations

import pytest
import torch

from qsun_kernels import dequantize
from qsun_kernels.quant import (
    GptqOptions,
    InputGram,
    QuantSpec,
    quantize_gptq,
    quantize_layer_gptq,
    quantize_rtn,
)
from qsun_kernels.quant import gptq as module
from qsun_kernels.quant.packed import PackedWeight


def correlated(T: int, K: int, seed: int = 0) -> torch.Tensor:
    """Inputs in which channels go together, some far larger than others, as in real models."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(T, K // 4, generator=generator) @ torch.randn(K // 4, K, generator=generator)
    x = mixed + torch.randn(T, K, generator=generator)
    return x * torch.logspace(-1, 1, K)[torch.randperm(K, generator=generator)]


def gram_of(x: torch.Tensor) -> InputGram:
    gram = InputGram(x.shape[1], device=x.device)
    gram.update(x)
    return gram


def weight_of(N: int, K: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) / K**0.5


def dense(weight: PackedWeight) -> torch.Tensor:
    return dequantize(weight, dtype=torch.float32)


def output_error(x: torch.Tensor, packed: PackedWeight, weight: torch.Tensor) -> float:
    return float((x.double() @ (dense(packed) - weight).double().t()).norm())


def by_definition(weight: torch.Tensor, x: torch.Tensor, spec: QuantSpec, damping: float) -> torch.Tensor:
    """Codes (N, K): after each column the rest moves to the minimum, solved for anew in float64.

    d is what is known of Q - W; the free columns f minimise d_k H_kf + d_f H_ff.
    """
    start = quantize_rtn(weight, spec)
    K = weight.shape[1]
    H = x.double().t() @ x.double()
    H += damping * H.diagonal().mean() * torch.eye(K)
    order = (x.double().square().sum(dim=0)).argsort(descending=True, stable=True)
    group = start.column_groups()
    zero = (
        start.qzeros.double()
        if start.qzeros is not None
        else torch.full(start.scales.shape, spec.zero_point, dtype=torch.float64)
    )
    scale = start.scales.double()
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    deltas = torch.zeros(weight.shape, dtype=torch.float64)
    for step, k in enumerate(order):
        done, free = order[:step], order[step:]
        wanted = weight.double()[:, k]
        if step:
            pull = deltas[:, done] @ H[done][:, free]
            wanted = wanted - torch.linalg.solve(H[free][:, free], pull.t()).t()[:, 0]
        s, z = scale[:, group[k]], zero[:, group[k]]
        code = ((wanted / s).round() + z).clamp(0, spec.max_code)
        codes[:, k] = code.to(torch.uint8)
        deltas[:, k] = (code - z) * s - weight.double()[:, k]
    return codes


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "group_size", "K"), [(4, 32, 64), (3, 32, 80), (2, "channel", 48), (4, 64, 136)]
)
def test_codes_are_those_of_the_definition(bits, group_size, K, symmetric, monkeypatch):
    """Over block edges and a short last group: the recursion is the minimum, taken after every column."""
    monkeypatch.setattr(module, "BLOCK_COLUMNS", 24)
    spec = QuantSpec(bits, group_size, symmetric)
    x, weight = correlated(300, K), weight_of(12, K)
    options = GptqOptions(damping=0.05, range_ratios=())
    (packed,) = quantize_gptq([weight], gram_of(x), spec, options=options)
    packed.validate()
    expected = by_definition(weight, x, spec, 0.05)
    # Float32 against float64: a weight that lies between two codes may go either way, and little follows.
    assert (packed.codes() == expected).float().mean() > 0.995
    assert packed.g_idx is None
    plain = quantize_rtn(weight, spec)
    if plain.qzeros is not None:
        assert torch.equal(packed.qzeros, plain.qzeros)
    torch.testing.assert_close(
        packed.scales.double(), best_scales(packed, weight, x, 0.05), rtol=2e-3, atol=0
    )


def best_scales(packed: PackedWeight, weight: torch.Tensor, x: torch.Tensor, damping: float) -> torch.Tensor:
    """For the codes as they are: least squares over [X; sqrt(damping)], row by row, in float64."""
    square = x.double().square().sum(dim=0)
    rows = torch.cat((x.double(), (damping * square.mean()).sqrt() * torch.eye(packed.K)))
    group = packed.column_groups()
    zero = packed.spec.zero_point if packed.qzeros is None else packed.qzeros[:, group].double()
    steps = packed.codes().double() - zero
    found = torch.empty(packed.scales.shape, dtype=torch.float64)
    for n in range(packed.N):
        columns = [rows[:, group == g] @ steps[n, group == g] for g in range(found.shape[1])]
        wanted = rows @ weight[n].double()
        found[n] = torch.linalg.lstsq(torch.stack(columns, dim=1), wanted.unsqueeze(1)).solution[:, 0]
    return found


@pytest.mark.parametrize("symmetric", [True, False])
def test_narrower_ranges_pay_at_two_bits(symmetric):
    """Found by trying every part of every group's range, and then better on inputs that were not seen."""
    spec = QuantSpec(2, 32, symmetric)
    # A few weights are far larger than the others, as in real models.
    x, weight = correlated(2000, 80), weight_of(48, 80) ** 3
    gram = gram_of(x[:1500])
    chosen = module._range_ratio(weight, gram.matrix.diagonal().float(), spec, None, module.NARROWER)
    importance = x[:1500].square().sum(dim=0)
    for n in range(3):
        for g, columns in enumerate((slice(0, 32), slice(32, 64), slice(64, 80))):
            errors = {}
            for ratio in (1.0, *module.NARROWER):
                part = weight[n : n + 1, columns]
                group = QuantSpec(2, "channel", symmetric)
                rounded = dense(quantize_rtn(part, group, range_ratio=torch.tensor([[ratio]])))
                errors[ratio] = float(((rounded - part).square() * importance[columns]).sum())
            assert float(chosen[n, g]) == pytest.approx(min(errors, key=errors.__getitem__))
    whole, narrow = (
        quantize_gptq([weight], gram, spec, options=GptqOptions(range_ratios=ratios))[0]
        for ratios in ((), None)
    )
    assert output_error(x[1500:], narrow, weight) < 0.97 * output_error(x[1500:], whole, weight)
    assert GptqOptions().ratios_for(QuantSpec(4, 32, symmetric)) == ()


def test_a_row_whose_codes_say_too_little_keeps_its_scales():
    """Inputs that are nearly one direction, and next to no damping: least squares alone would turn signs."""
    spec = QuantSpec(2, 32, False)
    x, weight = correlated(100, 64, 3), weight_of(32, 64, 103)
    x += 20 * x.mean(dim=1, keepdim=True)
    options = GptqOptions(1e-4, range_ratios=())
    (packed,) = quantize_gptq([weight], gram_of(x), spec, options=options)
    free = best_scales(packed, weight, x, 1e-4)
    before = quantize_rtn(weight, spec).scales
    wild = ((free / before < 0.4) | (free / before > 2.5)).any(dim=1)
    assert wild.any() and not wild.all()
    assert torch.equal(packed.scales[wild], before[wild])
    assert (packed.scales[~wild] != before[~wild]).any()


def test_a_group_whose_codes_are_all_the_zero_point():
    """It has no scale to find, and its row's other group still gains."""
    spec = QuantSpec(4, 32, True)
    weight, x = weight_of(3, 64), correlated(200, 64)
    weight[0, :32] = 0
    x[:, :32] = torch.eye(200)[:, :32]  # nothing of the other group's errors goes there
    (packed,) = quantize_gptq([weight], gram_of(x), spec)
    packed.validate()
    assert (dense(packed)[0, :32] == 0).all()
    assert packed.scales[0, 0] == 1 and packed.scales[0, 1] != quantize_rtn(weight, spec).scales[0, 1]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_output_is_closer_than_that_of_rounding_on_held_out_inputs(bits):
    spec = QuantSpec(bits, 32, True)
    x, weight = correlated(2000, 128), weight_of(48, 128)
    seen, held = x[:1500], x[1500:]
    (packed,) = quantize_gptq([weight], gram_of(seen), spec)
    rounded = output_error(held, quantize_rtn(weight, spec), weight)
    assert output_error(held, packed, weight) < 0.6 * rounded
    # The weights themselves are further off: that is where the errors were put.
    assert (dense(packed) - weight).norm() > (dense(quantize_rtn(weight, spec)) - weight).norm()


def test_without_correlations_it_is_rounding():
    spec = QuantSpec(4, 32, False)
    weight = weight_of(16, 64)
    x = torch.eye(64) * torch.linspace(1, 4, 64)
    (packed,) = quantize_gptq([weight], gram_of(x), spec)
    rounded = quantize_rtn(weight, spec)
    assert torch.equal(packed.qweight, rounded.qweight) and torch.equal(packed.qzeros, rounded.qzeros)
    # Scales of least error, which lie close to those of the range.
    torch.testing.assert_close(packed.scales, rounded.scales, rtol=0.1, atol=0)
    assert output_error(x, packed, weight) < output_error(x, rounded, weight)


@pytest.mark.parametrize("dead", [slice(3, 9), slice(None)])
def test_inputs_that_are_never_active(dead):
    """Their columns are rounded to nearest, the others as without them; all of them dead is no failure."""
    spec = QuantSpec(4, 32, True)
    weight, x = weight_of(16, 64), correlated(200, 64)
    x[:, dead] = 0
    (packed,) = quantize_gptq([weight], gram_of(x), spec)
    assert torch.equal(packed.codes()[:, dead], quantize_rtn(weight, spec).codes()[:, dead])


def test_fewer_rows_than_channels():
    spec = QuantSpec(4, 32, True)
    weight, x = weight_of(16, 128), correlated(9, 128)
    (packed,) = quantize_gptq([weight], gram_of(x), spec)
    packed.validate()
    assert output_error(x, packed, weight) < 0.5 * output_error(x, quantize_rtn(weight, spec), weight)


def test_weights_of_one_input_do_not_see_each_other():
    spec, gram = QuantSpec(4, 32, True), gram_of(correlated(300, 64))
    weights = [weight_of(8, 64, 1), weight_of(24, 64, 2).to(torch.float64)]
    before = [weight.clone() for weight in weights]
    together = quantize_gptq(weights, gram, spec, scale_dtype=torch.float16)
    for weight, kept, packed in zip(weights, before, together, strict=True):
        assert torch.equal(weight, kept)
        assert packed.scales.dtype == torch.float16
        (alone,) = quantize_gptq([weight], gram, spec, scale_dtype=torch.float16)
        for x, y in zip(packed.tensors, alone.tensors, strict=True):
            assert torch.equal(x, y)


def test_the_gram_matrix_is_a_sum_over_all_rows():
    x = correlated(50, 16)
    gram = InputGram(16)
    for part in (x[:1], x[1:20].view(1, 19, 16), x[20:].to(torch.bfloat16)):
        gram.update(part)
    rows = torch.cat((x[:20], x[20:].to(torch.bfloat16).float())).double()
    torch.testing.assert_close(gram.matrix, rows.t() @ rows, rtol=1e-5, atol=1e-3)
    assert gram.count == 50 and gram.matrix.dtype == torch.float64


def test_a_decoder_layer():
    groups = {"attention_input": 64, "attention_output": 64, "mlp_input": 64, "mlp_output": 96}
    grams = {name: gram_of(correlated(200, K)) for name, K in groups.items()}
    shapes = {
        "self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64),
        "self_attn.o_proj": (64, 64), "mlp.gate_proj": (96, 64), "mlp.up_proj": (96, 64),
        "mlp.down_proj": (64, 96),
    }  # fmt: skip
    tensors = {f"{name}.weight": weight_of(*shape) for name, shape in shapes.items()}
    spec = QuantSpec(4, 32, True)
    packed = quantize_layer_gptq(tensors, grams, spec)
    assert set(packed) == set(shapes)
    (down,) = quantize_gptq([tensors["mlp.down_proj.weight"]], grams["mlp_output"], spec)
    assert torch.equal(packed["mlp.down_proj"].qweight, down.qweight)
    del tensors["mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"tensors has no 'mlp.up_proj.weight', expected it among"):
        quantize_layer_gptq(tensors, grams, spec)
    with pytest.raises(ValueError, match="grams has no 'attention_input', expected one of each"):
        quantize_layer_gptq(tensors, {}, spec)


def test_bad_arguments():
    spec, gram = QuantSpec(4, 32, True), gram_of(correlated(20, 64))
    with pytest.raises(ValueError, match="weights is empty, expected at least one"):
        quantize_gptq([], gram, spec)
    with pytest.raises(ValueError, match=r"weights\[1\] has shape \(8, 32\), expected \(N, 64\)"):
        quantize_gptq([weight_of(8, 64), weight_of(8, 32)], gram, spec)
    with pytest.raises(ValueError, match=r"weights\[0\] is on meta, expected cpu like gram"):
        quantize_gptq([weight_of(8, 64).to("meta")], gram, spec)
    with pytest.raises(ValueError, match=r"weight\[2, 5\] is nan, expected finite"):
        damaged = weight_of(8, 64)
        damaged[2, 5] = torch.nan
        quantize_gptq([damaged], gram, spec)
    with pytest.raises(ValueError, match="no calibration activations were given"):
        quantize_gptq([weight_of(8, 64)], InputGram(64), spec)
    with pytest.raises(ValueError, match="K is 0, expected at least 1"):
        InputGram(0)
    with pytest.raises(ValueError, match=r"x has shape \(3, 5\), expected \(\.\.\., 64\)"):
        gram.update(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="x has a NaN or infinite value in channel 2"):
        gram.update(torch.tensor([0.0, 1.0, torch.inf] + [0.0] * 61))
    for damping in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"damping is .*, expected a number in"):
            GptqOptions(damping)
    with pytest.raises(ValueError, match=r"range_ratios has 0.0, expected numbers in \(0, 1\]"):
        GptqOptions(range_ratios=(0.5, 0.0))


@pytest.mark.gpu
def test_a_gpu_rounds_like_the_cpu_and_repeats_bit_for_bit():
    spec = QuantSpec(4, 64, True)
    x, weight = correlated(1000, 256), weight_of(64, 256)
    (on_cpu,) = quantize_gptq([weight], gram_of(x), spec)
    first, second = (quantize_gptq([weight.cuda()], gram_of(x.cuda()), spec)[0] for _ in range(2))
    for a, b in zip(first.tensors, second.tensors, strict=True):
        assert torch.equal(a, b)
    # Sums in another order: a weight between two codes may go the other way.
    assert (first.codes().cpu() == on_cpu.codes()).float().mean() > 0.98
    assert output_error(x, first.to("cpu"), weight) < 1.05 * output_error(x, on_cpu, weight)
