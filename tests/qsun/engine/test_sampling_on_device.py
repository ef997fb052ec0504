"""Tokens drawn without the host against tokens drawn with it: the same, row by row."""

from __future__ import annotations

import numpy
import pytest
import torch

from qsun.core import SamplingParams
from qsun.engine.noise import STATE_STEP, mix_states, row_key, row_state
from qsun.engine.sampler import SamplerRow, needs_host, sample
from qsun_kernels import sample_tokens

KINDS = (
    dict(temperature=0.0),
    dict(temperature=1.0),
    dict(temperature=0.25, top_k=7),
    dict(temperature=2.0, top_p=0.5),
    dict(temperature=1.5, min_p=0.125),
    dict(temperature=0.5, top_k=30, top_p=0.75, min_p=0.0625),
    dict(temperature=4.0, top_k=1),
    dict(temperature=4.0, top_k=10**6),
)


def tensors(rows: list[SamplerRow]) -> tuple[torch.Tensor, ...]:
    params = [row.params for row in rows]
    return (
        torch.tensor([p.temperature for p in params]),
        torch.tensor([p.top_k for p in params], dtype=torch.int32),
        torch.tensor([p.top_p for p in params]),
        torch.tensor([p.min_p for p in params]),
        torch.tensor([row_key(row.seed, row.step) for row in rows]),
    )


def rows_of(count: int, kinds=KINDS) -> list[SamplerRow]:
    return [SamplerRow(SamplingParams(**kinds[i % len(kinds)]), i, [0] * (i % 5), 0) for i in range(count)]


@pytest.mark.parametrize("kinds", [KINDS, KINDS[:1], KINDS[1:2], KINDS[2:4]], ids=["all", "0", "1", "2-3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_tokens_as_the_host(kinds, dtype) -> None:
    rows = rows_of(64, kinds)
    logits = (torch.randn(64, 500, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    tokens, valid = sample_tokens(logits, *tensors(rows))
    assert tokens.dtype == torch.int64 and valid.dtype == torch.bool and valid.all()
    assert tokens.tolist() == sample(logits.float(), rows).token_ids


def test_equals_go_to_the_lowest_index() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0]])
    assert sample_tokens(logits, *tensors(rows_of(1, KINDS[:1])))[0].tolist() == [1]


def test_logits_that_are_not_finite_are_told() -> None:
    logits = torch.zeros(5, 9)
    logits[0, 3] = float("nan")
    logits[1, 3] = float("inf")
    logits[2] = float("-inf")
    logits[3, 1:] = float("-inf")
    for kind in KINDS:
        tokens, valid = sample_tokens(logits, *tensors(rows_of(5, (kind,))))
        assert valid.tolist() == [False, False, False, True, True]
        assert tokens[:4].tolist() == [0, 0, 0, 0] and 0 <= tokens[4] < 9


def test_keys_of_many_rows_are_those_of_each() -> None:
    seeds = [0, 1, 77, 2**63, 2**64 - 1]
    states = numpy.array([row_state(seed, 0) for seed in seeds], dtype=numpy.uint64)
    keys, work = numpy.zeros_like(states), numpy.zeros_like(states)
    for step in range(50):
        mix_states(states, keys, work)
        assert keys.view(numpy.int64).tolist() == [row_key(seed, step) for seed in seeds]
        states += numpy.uint64(STATE_STEP)


@pytest.mark.parametrize(
    ("params", "num_output", "expected"),
    [
        ({}, 0, False),
        (dict(temperature=0.0, top_k=5, stop=("a",)), 3, False),
        (dict(repetition_penalty=1.1), 0, True),
        (dict(presence_penalty=0.1), 0, True),
        (dict(frequency_penalty=-0.1), 9, True),
        (dict(logprobs=0), 9, True),
        (dict(min_tokens=4), 3, True),
        (dict(min_tokens=4), 4, False),
    ],
)
def test_who_needs_the_host(params, num_output, expected) -> None:
    assert needs_host(SamplingParams(**params), num_output) is expected


@pytest.mark.gpu
def test_a_graph_draws_what_the_cpu_draws() -> None:
    """Captured once, replayed on other logits, parameters and keys."""
    rows = rows_of(64)
    inputs = [torch.zeros(64, 500, device="cuda"), *(part.cuda() for part in tensors(rows))]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        sample_tokens(*inputs)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            tokens, valid = sample_tokens(*inputs)
    for seed in range(3):
        logits = torch.randn(64, 500, generator=torch.Generator().manual_seed(seed)) * 3
        own = [rows[(i + seed) % 64] for i in range(64)]
        for part, new in zip(inputs, (logits, *tensors(own)), strict=True):
            part.copy_(new)
        torch.cuda.current_stream().synchronize()
        graph.replay()
        torch.cuda.synchronize()
        assert tokens.tolist() == sample(logits, own).token_ids and valid.all()
