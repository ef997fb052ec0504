"""The same bits whatever runs first: repeats, streams, graphs, and the order of threads in the emulator."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from qsun_kernels.backends import cuda
from qsun_kernels.quant import QuantSpec
from qsun_kernels.testing import inputs


@dataclass
class Step:
    """Arguments of every operator, and one call of all of them."""

    device: torch.device
    tokens: int
    seed: int
    scale: int  # 1 for the emulator, larger for a GPU

    def __post_init__(self) -> None:
        source = inputs.generator(self.seed)
        hidden, dtype, device = 64 * self.scale, torch.float16, self.device
        heads, kv_heads, head_dim = 6, 2, 64
        self.x = inputs.normal(source, (self.tokens, hidden), dtype, device)
        self.residual = inputs.normal(source, (self.tokens, hidden), dtype, device)
        self.weight = inputs.normal(source, (hidden,), dtype, device)
        self.packed = inputs.packed_weight(
            source, 2 * hidden, hidden, QuantSpec(4, 32, False), scale_dtype=dtype, device=device
        )
        self.prepared = cuda.IMPLEMENTATIONS["wna16_linear"].prepare(self.packed, dtype)
        self.q, self.k, self.v = inputs.qkv_views(
            source, self.tokens, heads, kv_heads, head_dim, dtype, device
        )
        self.positions = torch.randint(100, (self.tokens,), generator=source).to(device)
        self.cos_sin = torch.rand(100, head_dim, generator=source).to(device)
        lengths = torch.randint(0, 90 * self.scale, (self.tokens,), generator=source).tolist()
        self.attention = inputs.paged_attention_inputs(
            source,
            lengths,
            num_q_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            block_size=16,
            dtype=dtype,
            device=device,
            spare_blocks=9,
        )
        slots = self.attention.k_cache.shape[0] * 16
        self.slots = inputs.slot_mapping(source, self.tokens, slots, skip=0.2, device=device)
        # Written apart from the cache that is attended to: a repeat must find the same cache.
        self.caches = [torch.zeros_like(self.attention.k_cache) for _ in range(2)]
        codes = (*self.caches[0].shape[:3], head_dim // 2)
        self.caches += [torch.zeros(codes, dtype=torch.uint8, device=device) for _ in range(2)]
        self.caches += [torch.zeros(codes[:3], device=device) for _ in range(2)]
        self.norms = [inputs.normal(source, (head_dim,), dtype, device) for _ in range(2)]

    def run(self) -> list[torch.Tensor]:
        op = {name: implementation.run for name, implementation in cuda.IMPLEMENTATIONS.items()}
        norm, total = op["rms_norm"](self.x, self.weight, 1e-5, self.residual)
        wide = op["wna16_linear"](norm, self.prepared, None, None, None)
        gated = op["silu_and_mul"](wide)
        dense = op["dequantize"](self.packed, torch.float32)
        q, k = op["apply_rope"](self.q, self.k, self.positions, self.cos_sin)
        values, codes, scales = self.caches[:2], self.caches[2:4], self.caches[4:]
        op["write_kv_cache"](k, self.v, *values, self.slots)
        steps = (self.q, self.positions, self.cos_sin, *self.norms, 1e-6, True)
        rotated = op["write_kv_cache"](self.k, self.v, *codes, self.slots, *steps, *scales)
        a = self.attention
        out, lse = op["paged_attention_decode"](
            q, a.k_cache, a.v_cache, a.block_table, a.seq_lens, a.softmax_scale, a.window
        )
        written = [rotated, *(cache.clone() for cache in self.caches)]
        return [norm, total, wide, gated, dense, q, k, out, lse, *written]


def assert_same_bits(results: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for index, (got, right) in enumerate(zip(results, expected, strict=True)):
        assert torch.equal(got.view(torch.uint8), right.view(torch.uint8)), f"result {index} differs"


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", (1, 5, 40))
def test_a_hundred_repeats_give_the_same_bits(device, tokens) -> None:
    step = Step(device, tokens, 1, 12)
    expected = step.run()
    for _ in range(100):
        assert_same_bits(step.run(), expected)


@pytest.mark.slow
@pytest.mark.parametrize("order", ("reverse", "1", "2"))
@pytest.mark.parametrize("tokens", (1, 3, 9))
def test_the_order_of_threads_does_not_matter(emulated_kernels, monkeypatch, tokens, order) -> None:
    """A missing barrier lets a thread read what another has not written yet, in one order or another."""
    expected = Step(emulated_kernels.device, tokens, 1, 1).run()
    monkeypatch.setenv("QSUN_EMULATOR_ORDER", order)
    assert_same_bits(Step(emulated_kernels.device, tokens, 1, 1).run(), expected)


@pytest.mark.gpu
def test_two_streams_do_not_disturb_each_other(device) -> None:
    steps = [Step(device, tokens, seed, 12) for seed, tokens in enumerate((4, 9))]
    expected = [step.run() for step in steps]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in steps]
    for _ in range(30):
        results = []
        for step, stream in zip(steps, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(step.run())
        torch.cuda.synchronize()
        for got, right in zip(results, expected, strict=True):
            assert_same_bits(got, right)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", (1, 6))
def test_a_captured_graph_follows_its_inputs(device, tokens) -> None:
    """Lengths, positions, slots and values change between replays of one graph."""
    step = Step(device, tokens, 3, 12)
    step.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step.run()
    longest = step.attention.seq_lens.clone()
    source = inputs.generator(11)
    for trial in range(12):
        step.x.copy_(inputs.normal(source, step.x.shape, step.x.dtype))
        step.positions.copy_(torch.randint(100, (tokens,), generator=source))
        step.slots.copy_(step.slots.roll(1))
        shares = torch.rand(tokens, generator=source) if trial else torch.zeros(tokens)
        step.attention.seq_lens.copy_((longest.cpu() * shares).to(torch.int32))
        for cache in step.caches:
            cache.zero_()
        graph.replay()
        torch.cuda.synchronize()
        replayed = [result.clone() for result in captured]
        for cache in step.caches:
            cache.zero_()
        assert_same_bits(replayed, step.run())


@pytest.mark.gpu
def test_a_launch_never_waits_for_the_device(device) -> None:
    """Torch refuses what synchronises; a launcher that did would raise here."""
    step = Step(device, 4, 5, 12)
    step.run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
