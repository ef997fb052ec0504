"""Training on a GPU: the fused attention against the CPU's float64, and runs that repeat to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qsun.checkpoint.tokenizer import load_tokenizer
from qsun.training.attention import AttentionPlan, packed_attention
from qsun.training.base import DecoderChoice
from qsun.training.data import load_examples
from qsun.training.lora import LoraOptions
from qsun.training.options import TrainOptions
from qsun.training.run import prepare, train
from qsun.training.trainer import announce_repeatable, repeatable

pytestmark = pytest.mark.gpu

announce_repeatable()  # before the first product of this process


def examples_of(bench):
    return load_examples([bench.data], load_tokenizer(bench.base), max_length=200, vocab_size=264)[0]


@pytest.mark.parametrize("window", [None, 16])
def test_attention_and_its_gradients_against_float64(device, window) -> None:
    lengths = [1, 33, 34, 120, 5]
    order = torch.randperm(sum(lengths), generator=torch.Generator().manual_seed(0))
    rows = list(order.split(lengths))
    found = {}
    for place, dtype in ((torch.device("cpu"), torch.float64), (device, torch.bfloat16)):
        generator = torch.Generator().manual_seed(1)
        q, k, v, weight = (
            torch.randn((sum(lengths), heads, 64), generator=generator).to(torch.bfloat16).to(place, dtype)
            for heads in (6, 2, 2, 6)
        )
        for tensor in (q, k, v):
            tensor.requires_grad_(True)
        with repeatable(place):
            plan = AttentionPlan.of(rows, place)
            out = packed_attention(q, k, v, plan, scale=0.125, window=window)
            (out * weight).sum().backward()
        found[place.type] = [t.detach().cpu().double() for t in (out, q.grad, k.grad, v.grad)]
    for mine, exact in zip(found["cuda"], found["cpu"], strict=True):
        assert (mine - exact).abs().max() <= 0.02 * exact.abs().max()


@pytest.mark.parametrize("lora", [None, LoraOptions(4, 8.0)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_interrupted_run_resumes_to_the_same_bits(
    bench, tmp_path: Path, device, lora, checkpointing
) -> None:
    examples = examples_of(bench)
    options = TrainOptions(
        decoder=DecoderChoice(bits=4, group_size=32), lora=lora, steps=8, batch_size=5, pack_tokens=64,
        learning_rate=3e-3, dtype=torch.bfloat16, checkpointing=checkpointing,
    )  # fmt: skip
    whole = train(bench.base, examples, options, tmp_path / "whole", device=device)
    steps = []
    train(
        bench.base, examples, options, tmp_path / "parts", device=device, progress=steps.append,
        should_stop=lambda: len(steps) == 3,
    )  # fmt: skip
    resumed = train(bench.base, examples, options, tmp_path / "parts", device=device, resume=True)
    assert resumed.losses == whole.losses and whole.losses[-1] < whole.losses[0]
    first, second = (
        load_file(next((tmp_path / name).glob("*model.safetensors"))) for name in ("whole", "parts")
    )
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_bfloat16_on_the_gpu_is_close_to_float32_on_the_cpu(bench, device) -> None:
    examples = examples_of(bench)
    losses = []
    for place, dtype in ((torch.device("cpu"), torch.float32), (device, torch.bfloat16)):
        options = TrainOptions(steps=1, dtype=dtype)
        losses.append(prepare(bench.base, examples, options, device=place).trainer.mean_loss(examples))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
