"""The decoder stack against transformers, in float32: logits, and tokens under greedy decoding."""

from __future__ import annotations

import pytest
import torch

from qsun.core import DecodeAttention, ForwardContext, PrefillAttention, PrefillChunk
from qsun.kv_cache.tensors import KVCache
from qsun.layers import attention as attention_layer
from qsun.layers.linear import DenseLinear
from qsun.models.decoder import DecoderStack
from qsun.modules.decode import load_decode_module
from qsun_kernels import write_kv_cache

# Logits reach 10 to 20 here, and two orders of float32 summation differ by a few units in the last place of
# each layer.
TOLERANCE = 2e-5

VARIANTS = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0}}),
    (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    ("llama", {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12, "hidden_size": 72}),
    ("qwen2", {}),
    ("qwen2", {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    ("qwen2", {"use_sliding_window": False, "tie_word_embeddings": False}),
    ("qwen3", {}),
    ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    ("mistral", {}),
    ("mistral", {"sliding_window": None}),
]


@pytest.mark.parametrize(("kind", "changes"), VARIANTS, ids=lambda value: str(value)[:60])
def test_logits_equal_transformers(tiny, paged, kind, changes):
    model = tiny(kind, **changes)
    decode = load_decode_module(model.path, dtype=torch.float32, device="cpu")
    ids = torch.randint(3, 96, (37,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.no_grad():
        expected = model.hf(torch.tensor([ids])).logits[0]
    sequence = paged(decode)
    # Chunks that end inside a block, on its edge, and after less than a window; then token by token.
    got = [sequence.prefill(ids[a:b]) for a, b in ((0, 7), (7, 8), (8, 11), (11, 28))]
    got += [sequence.step(token) for token in ids[28:]]
    assert expected.abs().max() > 3
    torch.testing.assert_close(torch.cat(got), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
def test_greedy_tokens_equal_transformers(tiny, paged, kind):
    model = tiny(kind)
    decode = load_decode_module(model.path, dtype=torch.float32, device="cpu")
    generator = torch.Generator().manual_seed(2)
    for length in (1, 13):
        prompt = torch.randint(3, 96, (length,), generator=generator).tolist()
        expected = model.hf.generate(
            torch.tensor([prompt]), max_new_tokens=24, min_new_tokens=24, do_sample=False, pad_token_id=0
        )[0, length:]
        sequence, tokens = paged(decode), []
        logits = sequence.prefill(prompt)[-1]
        for _ in range(24):
            logits[2] = -torch.inf  # the end token, which min_new_tokens forbids
            tokens.append(int(logits.argmax()))
            logits = sequence.step(tokens[-1])[-1]
        assert tokens == expected.tolist()


def test_rows_of_a_decode_batch_do_not_touch_each_other(tiny, paged):
    """Sequences of several lengths, and a padding row, give bit for bit what each gives alone."""
    decode = load_decode_module(tiny("llama").path, dtype=torch.float32, device="cpu")
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 96, (n,), generator=generator).tolist() for n in (1, 4, 9, 22)]
    block_size, blocks = 4, 7
    cache = KVCache.allocate(decode.config, len(prompts) * blocks, block_size, torch.float32, "cpu")
    order = torch.randperm(len(prompts) * blocks, generator=generator).view(len(prompts), blocks)
    alone = []
    for prompt, table in zip(prompts, order, strict=True):
        sequence = paged(decode, length=28, block_size=block_size)
        sequence.prefill(prompt)
        alone.append(sequence.step(50))
        positions = torch.arange(len(prompt))
        slots = table[positions // block_size] * block_size + positions % block_size
        chunk = PrefillChunk(0, len(prompt), 0, table[: -(-len(prompt) // block_size)])
        ctx = ForwardContext(positions, slots, PrefillAttention((chunk,)))
        decode.stack(decode.embed(torch.tensor(prompt)), ctx, cache)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    slots = order[torch.arange(4), lengths // block_size] * block_size + lengths % block_size
    before = cache.layer(0).k.clone()
    ctx = ForwardContext(
        torch.cat((lengths, torch.tensor([0]))),
        torch.cat((slots, torch.tensor([-1]))),
        DecodeAttention(
            torch.cat((order, torch.zeros(1, blocks, dtype=torch.int64))).int(),
            torch.cat((lengths + 1, torch.tensor([0]))).int(),
        ),
    )
    got = decode.logits(decode.stack(decode.embed(torch.tensor([50] * 5)), ctx, cache))
    torch.testing.assert_close(got[:4], torch.cat(alone), rtol=0, atol=TOLERANCE)
    assert torch.isfinite(got[4]).all()
    # One token a sequence was written, and nothing for the padding row.
    changed = (cache.layer(0).k != before).any(dim=3).any(dim=1).sum()
    assert int(changed) == 4


def test_only_what_is_behind_a_layers_write_counts_as_settled(tiny, paged, monkeypatch) -> None:
    """The inputs of a pass may still be on their way when its first layer writes, not when others do."""
    decode = load_decode_module(tiny("llama").path, dtype=torch.float32, device="cpu")
    seen: list[bool] = []

    def write(*arguments, settled, **options):
        seen.append(settled)
        return write_kv_cache(*arguments, settled=settled, **options)

    monkeypatch.setattr(attention_layer, "write_kv_cache", write)
    sequence = paged(decode)
    sequence.prefill([5, 6, 7])
    sequence.step(8)
    others = decode.config.num_layers - 1
    assert others > 0 and seen == [False, *[True] * others] * 2


def test_two_sequences_in_one_prefill_see_only_themselves(tiny, paged):
    decode = load_decode_module(tiny("mistral").path, dtype=torch.float32, device="cpu")
    first, second = [5, 6, 7, 8, 9], [30, 31, 32]
    expected = torch.cat([paged(decode).prefill(first), paged(decode).prefill(second)])
    cache = KVCache.allocate(decode.config, 8, 4, torch.float32, "cpu")
    blocks = torch.tensor([6, 2]), torch.tensor([3])
    slots = torch.tensor([24, 25, 26, 27, 8, 12, 13, 14])
    positions = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    chunks = (PrefillChunk(0, 5, 0, blocks[0]), PrefillChunk(5, 3, 0, blocks[1]))
    ctx = ForwardContext(positions, slots, PrefillAttention(chunks))
    got = decode.logits(decode.stack(decode.embed(torch.tensor(first + second)), ctx, cache))
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "mistral"])
def test_keys_and_values_alone_are_those_of_the_whole_pass(tiny, paged, kind, monkeypatch):
    """Bit for bit, in two chunks; the last layer computes nothing that they do not need."""
    decode = load_decode_module(tiny(kind).path, dtype=torch.float32, device="cpu")
    whole, alone = paged(decode), paged(decode)
    ids = list(range(5, 26))
    for part in (ids[:9], ids[9:]):
        whole.prefill(part)
    ended: list[int] = []
    right = DenseLinear.end_block

    def watched(self, x, stream, norm):
        ended.append(1)
        return right(self, x, stream, norm)

    monkeypatch.setattr(DenseLinear, "end_block", watched)
    monkeypatch.setattr(decode.stack, "__class__", KeysAndValues)
    for part in (ids[:9], ids[9:]):
        alone.prefill(part)
    assert len(ended) == 2 * 2 * (decode.config.num_layers - 1)
    for mine, theirs in zip(alone.cache.layers, whole.cache.layers, strict=True):
        for got, expected in zip(mine, theirs, strict=True):
            assert torch.equal(got.isnan(), expected.isnan())
            assert torch.equal(got.nan_to_num(), expected.nan_to_num())


class KeysAndValues(DecoderStack):
    """A stack that is asked for nothing else."""

    __slots__ = ()

    def __call__(self, hidden, ctx, kv_cache):
        self.write_kv(hidden, ctx, kv_cache)
        return torch.zeros_like(hidden)


def test_empty_batch(tiny):
    decode = load_decode_module(tiny("llama").path, dtype=torch.float32, device="cpu")
    cache = KVCache.allocate(decode.config, 2, 4, torch.float32, "cpu")
    none = torch.empty(0, dtype=torch.int64)
    for attention in (
        PrefillAttention(()),
        DecodeAttention(torch.empty(0, 2, dtype=torch.int32), torch.empty(0, dtype=torch.int32)),
    ):
        out = decode.stack(decode.embed(none), ForwardContext(none, none, attention), cache)
        assert out.shape == (0, decode.config.hidden_size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_error_is_that_of_transformers(tiny, paged, dtype):
    """Against float64, 16-bit logits are at most twice as far off as those of transformers."""
    model = tiny("llama", dtype=dtype)
    decode = load_decode_module(model.path, dtype=dtype, device="cpu")
    ids = torch.randint(3, 96, (40,), generator=torch.Generator().manual_seed(4)).tolist()
    from transformers import AutoModelForCausalLM

    exact = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float64)
    with torch.no_grad():
        expected = exact(torch.tensor([ids])).logits[0]
        theirs = (model.hf(torch.tensor([ids])).logits[0].double() - expected).norm()
    sequence = paged(decode)
    got = torch.cat([sequence.prefill(ids[:24]), *(sequence.step(token) for token in ids[24:])])
    assert (got.double() - expected).norm() <= 2 * theirs


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
def test_gpu_equals_cpu(tiny, paged, kind, bits):
    """In float32, dense and with low-bit weights; prompts in chunks and single tokens."""
    path = tiny(kind).path
    modules = [load_decode_module(path, bits=bits, dtype=torch.float32, device=d) for d in ("cpu", "cuda")]
    ids = torch.randint(3, 96, (40,), generator=torch.Generator().manual_seed(5)).tolist()
    logits = []
    for module in modules:
        sequence = paged(module)
        chunks = [sequence.prefill(ids[a:b]) for a, b in ((0, 7), (7, 24))]
        logits.append(torch.cat([*chunks, *(sequence.step(token) for token in ids[24:])]))
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=5 * TOLERANCE)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [None, 4])
def test_a_captured_step_serves_every_length(tiny, paged, bits):
    """One CUDA graph of the decode step, replayed with other tokens, positions and lengths."""
    decode = load_decode_module(tiny("qwen3").path, bits=bits, dtype=torch.bfloat16, device="cuda")
    ids = list(range(10, 50))
    eager, replayed = paged(decode), paged(decode)
    eager.prefill(ids[:10])
    replayed.prefill(ids[:10])
    token = torch.tensor([ids[10]], device="cuda")
    ctx = replayed.step_context()

    def step() -> torch.Tensor:
        return decode.logits(decode.stack(decode.embed(token), ctx, replayed.cache))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # what is set up at a first call is no part of the graph; writes what the replay writes again
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()
    for next_token in ids[10:]:
        now = replayed.step_context()
        token.fill_(next_token)
        ctx.positions.copy_(now.positions)
        ctx.slot_mapping.copy_(now.slot_mapping)
        ctx.attention.seq_lens.copy_(now.attention.seq_lens)
        graph.replay()
        replayed.length += 1
        assert torch.equal(logits.cpu(), eager.step(next_token))
