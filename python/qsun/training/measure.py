"""`python -m qsun.training.measure`: how fast a training step is, and how far from the peak of the device.

Layers of a real model's shape with random weights, as many as are asked for; a step of SUN and a step of full
fine-tuning over the same tokens, each with its optimizer.  Counted are the multiplications that the method
needs, twice each: 2 a weight and token in the forward pass of whichever module computes the token, 2 more for
the gradient of its activations, 2 more for that of a trained weight, and those of causal attention (half of
the square, forward once and backward twice).  What checkpointing computes again does not count, nor what SUN
leaves out: past the keys and values of the last layer nothing of a prompt is read.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from qsun.models.config import ModelConfig
from qsun.models.weights import projection_shape
from qsun.modules.card import DecoderFingerprint, ModuleCard
from qsun.modules.decode import resolve_device
from qsun.training.base import Base, rotary_table
from qsun.training.batch import Example, Method, num_prefill_positions
from qsun.training.forward import Frame
from qsun.training.lora import LoraOptions, LoraPairs
from qsun.training.options import TrainOptions
from qsun.training.stack import JOINTS, LayerTensors, TrainingStack
from qsun.training.trainer import Trainer, announce_repeatable
from qsun_kernels import RopeParameters


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """The widths of a model."""

    hidden_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int


SHAPES = {
    "llama-3.1-8b": Shape(4096, 32, 8, 128, 14336, 128256),
    "qwen3-8b": Shape(4096, 32, 8, 128, 12288, 151936),
    "smollm2-135m": Shape(576, 9, 3, 64, 1536, 49152),
}


def random_config(shape: Shape, layers: int) -> ModelConfig:
    """A Llama of this shape."""
    return ModelConfig(
        architecture="llama",
        **dataclasses.asdict(shape),
        num_layers=layers,
        rms_norm_eps=1e-5,
        rope=RopeParameters(5e5),
        tie_word_embeddings=True,
        attention_bias=False,
        attention_output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        windows=(None,) * layers,
        max_position_embeddings=1 << 15,
    )


def random_base(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Base:
    """A base with a random embedding and no checkpoint behind it."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (config.vocab_size, config.hidden_size)
    embed_tokens = (torch.randn(shape, generator=generator, device=device) * 0.02).to(dtype)
    card = ModuleCard("random", "decode", DecoderFingerprint.of(config, None, "random"))
    frame = Frame(embed_tokens, embed_tokens, rotary_table(config, dtype, device))
    return Base(Path("random"), config, card, frame, dtype, device)


def random_stack(base: Base, kept: torch.dtype, seed: int) -> TrainingStack:
    """Layers of random weights, kept in the dtype `kept`."""
    config, device = base.config, base.device
    generator = torch.Generator(device).manual_seed(seed)
    layers = []
    for _ in range(config.num_layers):
        matrices = {}
        for joint, names in JOINTS.items():
            rows = sum(projection_shape(config, name)[0] for name in names)
            columns = projection_shape(config, names[0])[1]
            matrix = torch.randn((rows, columns), generator=generator, device=device)
            matrices[joint] = matrix.mul_(columns**-0.5).to(kept)
        norms = [torch.ones(config.hidden_size, device=device, dtype=kept) for _ in range(2)]
        layers.append(LayerTensors(norms[0], norms[1], **matrices))
    norm = torch.ones(config.hidden_size, device=device, dtype=kept)
    return TrainingStack(config, layers, norm, base.dtype)


def needed_flops(config: ModelConfig, examples: Sequence[Example], method: Method, *, pairs: bool) -> float:
    """Floating-point operations of a step's forward and backward pass, counted as told above."""
    sizes = {
        joint: sum(rows * columns for rows, columns in (projection_shape(config, name) for name in names))
        for joint, names in JOINTS.items()
    }
    layer = sum(sizes.values())
    total = 0.0
    for example in examples:
        positions = example.num_positions
        trained = num_prefill_positions(example, method, "decode")
        each = 4 if pairs else 6
        total += config.num_layers * layer * (each * trained + 4 * (positions - trained))
        if method == "sun":
            total -= (layer - sizes["qkv"]) * each * trained
        # q k and p v: 2 * 2 * heads * head_dim for each pair of positions, half of which are masked.
        total += config.num_layers * 3 * 2 * config.q_size * positions * positions
        # lm_head is frozen: forward, and the gradient of its input.
        total += 4 * config.vocab_size * config.hidden_size * len(example.response)
    return total


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """step_ms: median.  flops: needed by a step.  peak_bytes: of the device's allocator, 0 on a CPU."""

    method: str
    step_ms: float
    tokens_per_s: float
    flops: float
    tflops_per_s: float
    peak_bytes: int


def measure(
    base: Base,
    examples: Sequence[Example],
    method: Method,
    *,
    rank: int | None,
    steps: int,
    checkpointing: bool,
    compiled: bool,
) -> Measured:
    """Time steps of one method, the first three of them not counted."""
    device = base.device
    decode = random_stack(base, base.dtype, 2) if method == "sun" else None
    if rank is None:
        prefill = random_stack(base, torch.float32, 1)
        prefill.require_grad()
    else:
        frozen = decode or random_stack(base, base.dtype, 1)
        lora = LoraOptions(rank, 2.0 * rank)
        pairs = LoraPairs(lora, base.config, seed=0, device=device)
        prefill = TrainingStack(base.config, frozen.layers, frozen.norm, base.dtype, pairs)
    positions = sum(e.num_positions for e in examples)
    options = TrainOptions(
        method=method,
        lora=None if rank is None else LoraOptions(rank, 2.0 * rank),
        steps=steps + 3,
        batch_size=len(examples),
        pack_tokens=positions,
        dtype=base.dtype,
        checkpointing=checkpointing,
        compiled=compiled,
        warmup=0.0,
    )
    trainer = Trainer(base, prefill, decode, examples, options)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    marks: list[float] = []

    def mark(_: object) -> None:
        if on_gpu:
            torch.cuda.synchronize(device)
        marks.append(time.perf_counter())

    trainer.run(progress=mark)
    seconds = statistics.median(b - a for a, b in itertools.pairwise(marks[2:]))
    flops = needed_flops(base.config, examples, method, pairs=rank is not None)
    return Measured(
        method if rank is None else f"{method}, rank {rank}",
        seconds * 1e3,
        positions / seconds,
        flops,
        flops / seconds / 1e12,
        torch.cuda.max_memory_allocated(device) if on_gpu else 0,
    )


def random_examples(config: ModelConfig, count: int, length: int, prompt: float) -> list[Example]:
    """`count` examples of `length` positions, the share `prompt` of them the prompt's."""
    generator = torch.Generator().manual_seed(0)
    examples = []
    for _ in range(count):
        ids = torch.randint(0, config.vocab_size, (length + 1,), generator=generator).tolist()
        cut = min(length, max(2, round(prompt * length)))
        examples.append(Example(tuple(ids[:cut]), tuple(ids[cut:])))
    return examples


def product_peak(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a large square product, the best of ten: what this device gives at most."""
    size = 8192 if device.type == "cuda" else 512
    a = torch.randn((size, size), device=device).to(dtype)
    best = float("inf")
    for _ in range(10):
        begin = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best / 1e12


def main(argv: Sequence[str] | None = None) -> int:
    """Print what was measured."""
    parser = argparse.ArgumentParser(prog="python -m qsun.training.measure", description=__doc__)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--examples", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048, help="positions of an example (2048)")
    parser.add_argument("--prompt", type=float, default=0.75, help="share of them in the prompt (0.75)")
    parser.add_argument("--rank", type=int, help="train pairs of this rank")
    parser.add_argument("--method", choices=("sun", "full", "both"), default="both")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--peak", type=float, default=989.4, help="dense TFLOP/s of the device (H100)")
    parser.add_argument("--device")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    announce_repeatable()
    device = resolve_device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = random_config(SHAPES[arguments.shape], arguments.layers)
    examples = random_examples(config, arguments.examples, arguments.length, arguments.prompt)
    reachable = product_peak(device, dtype)
    methods: tuple[Method, ...] = ("full", "sun") if arguments.method == "both" else (arguments.method,)
    found = []
    for method in methods:
        base = random_base(config, dtype, device)
        found.append(
            measure(
                base,
                examples,
                method,
                rank=arguments.rank,
                steps=arguments.steps,
                checkpointing=arguments.checkpointing,
                compiled=arguments.compile,
            )
        )
        del base
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if arguments.json:
        rows = [dataclasses.asdict(row) for row in found]
        print(json.dumps({"reachable_tflops": reachable, "peak_tflops": arguments.peak, "rows": rows}))
        return 0
    what = (
        f"{arguments.shape}, {arguments.layers} layers, {arguments.examples} x {arguments.length} positions"
    )
    print(f"{what}, {arguments.prompt:.0%} prompt; a product reaches {reachable:.0f} TFLOP/s")
    for row in found:
        print(
            f"  {row.method:14} {row.step_ms:8.1f} ms  {row.tokens_per_s:9.0f} tokens/s  "
            f"{row.tflops_per_s:6.1f} TFLOP/s ({row.tflops_per_s / arguments.peak:.1%} of the peak)  "
            f"{row.peak_bytes / 1e9:.1f} GB"
        )
    if len(found) == 2:
        print(f"  a step of sun takes {found[1].step_ms / found[0].step_ms:.2f} of a full one")
    return 0


if __name__ == "__main__":
    sys.exit(main())
