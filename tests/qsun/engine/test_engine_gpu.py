"""On a GPU: graph replays, several engines on their own streams, agreement with the CPU."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from qsun import DecodeEngine, SamplingParams

pytestmark = pytest.mark.gpu

GREEDY = SamplingParams(temperature=0, max_tokens=24)
TASKS = ("poet", "clerk", "cook")


def gpu_engine(base: Path, tasks: dict[str, Path], **options) -> DecodeEngine:
    settings = dict(
        bits=16, dtype=torch.float32, device="cuda", block_size=16, memory="16MiB", max_batch_size=12
    )
    engine = DecodeEngine.from_pretrained(base, **{**settings, **options})
    for name, path in tasks.items():
        engine.add_model(name, path)
    return engine


@pytest.fixture
def make_gpu_engine(tiny):
    def make(**options) -> DecodeEngine:
        return gpu_engine(tiny.paths["base"], {name: tiny.paths[name] for name in TASKS}, **options)

    return make


@pytest.fixture(scope="module")
def cases(tiny, reference):
    """Prompts of three tasks and what transformers answers on the CPU, with no near ties."""
    prompts, models, expected = [], [], []
    for seed, task in enumerate(TASKS):
        some, answers = reference.cases(
            seed, 5, 60, lambda p, t=task: reference.sun(tiny.tasks[t], tiny.base, p, 24)
        )
        prompts += some
        models += [task] * len(some)
        expected += answers
    return prompts, models, expected


def answers(engine, prompts, models, params=GREEDY) -> list[list[int]]:
    completions = engine.generate(prompts, model=models, params=params)
    assert [c.error for c in completions if c.error] == []
    return [list(c.token_ids) for c in completions]


@pytest.fixture(autouse=True)
def exact_matmul():
    """float32 means float32 here: TF32 would turn comparisons into luck."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("cuda_graphs", ["on", "off"])
def test_tokens_equal_the_cpu_reference(make_gpu_engine, cases, cuda_graphs) -> None:
    prompts, models, expected = cases
    engine = make_gpu_engine(cuda_graphs=cuda_graphs)
    assert answers(engine, prompts, models) == expected
    stats = engine.stats()
    assert (cuda_graphs == "on") == ("CUDA graphs for batches" in engine.explain())
    # What the graphs take depends on the backends: Triton's attention needs no scratch.
    assert stats.graph_bytes == 0 or cuda_graphs == "on"


def test_replays_follow_lengths_batches_and_preemptions(make_gpu_engine, cases) -> None:
    """Batches shrink and grow through every bucket while blocks move to the host and back."""
    prompts, models, expected = cases
    block = 2 * 3 * 2 * 16 * 4 * 4
    for swap in (0, 100):
        engine = make_gpu_engine(
            cuda_graphs="on", block_size=4, memory=60 * block, swap_memory=swap * block, prefill_chunk=16
        )
        assert answers(engine, prompts, models) == expected
        stats = engine.stats()
        assert stats.preemptions > 0 and bool(stats.swaps) == bool(swap)
        assert answers(engine, prompts[::-1], models[::-1]) == expected[::-1]


def test_graphs_and_eager_steps_draw_the_same(make_gpu_engine, cases) -> None:
    prompts, models, _ = cases
    params = [
        SamplingParams(temperature=0.8, top_p=0.9, top_k=40, seed=i, max_tokens=20, repetition_penalty=1.2)
        for i in range(len(prompts))
    ]
    graphs, eager = (
        answers(make_gpu_engine(cuda_graphs=mode), prompts, models, params) for mode in ("on", "off")
    )
    assert graphs == eager


def test_two_engines_on_two_streams_in_turn(make_gpu_engine, cases) -> None:
    prompts, models, expected = cases
    one, two = make_gpu_engine(cuda_graphs="on"), make_gpu_engine(cuda_graphs="on")
    assert one._stream != two._stream
    told: list[dict[str, list[int]]] = [{}, {}]
    for engine, tokens in zip((one, two), told, strict=True):
        for prompt, model in zip(prompts, models, strict=True):
            tokens[engine.submit(prompt, model=model, params=GREEDY)] = []
    while one.has_work or two.has_work:
        for engine, tokens in zip((one, two), told, strict=True):
            for output in engine.step():
                tokens[output.request_id] += output.token_ids
    assert [list(tokens.values()) for tokens in told] == [expected, expected]


def test_two_engines_in_two_threads(make_gpu_engine, cases) -> None:
    """Capture, replay and sampling of one beside those of the other."""
    prompts, models, expected = cases
    results: dict[int, object] = {}

    def work(number: int) -> None:
        try:
            engine = make_gpu_engine(cuda_graphs="on")
            results[number] = [answers(engine, prompts, models) for _ in range(3)]
        except BaseException as failure:
            results[number] = failure

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    assert results == {0: [expected] * 3, 1: [expected] * 3}


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_engine_agrees_with_the_cpu(tiny, bits: int) -> None:
    """bfloat16 on both: probabilities of the first token agree within what bfloat16 leaves."""
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=5)
    prompts = [[7] * 20, [3, 1, 4, 1, 5, 9, 2, 6], list(range(40))]
    told = {}
    for device in ("cpu", "cuda"):
        engine = DecodeEngine.from_pretrained(
            tiny.paths["base"],
            bits=bits,
            group_size=32,
            dtype=torch.bfloat16,
            device=device,
            block_size=16,
            memory="4MiB",
        )
        engine.add_model("poet", tiny.paths["poet"])
        told[device] = engine.generate(prompts, model="poet", params=params)
    for cpu, gpu in zip(told["cpu"], told["cuda"], strict=True):
        by_cpu, by_gpu = dict(cpu.logprobs[0].top), dict(gpu.logprobs[0].top)
        common = by_cpu.keys() & by_gpu.keys()
        assert len(common) >= 3
        assert all(abs(by_cpu[token] - by_gpu[token]) < 0.15 for token in common)


def test_memory_as_a_fraction_leaves_room_for_a_step(make_gpu_engine, cases) -> None:
    prompts, models, expected = cases
    engine = make_gpu_engine(memory=0.05, cuda_graphs="on")
    assert answers(engine, prompts, models) == expected
    plan = engine._book.workspace.plan
    assert plan.kv_bytes <= 0.05 * torch.cuda.mem_get_info()[1]
    assert "5% of" in str(plan) and "for a step" in str(plan)


def test_given_kv_may_lie_on_the_gpu(make_gpu_engine, tiny, reference) -> None:
    engine = make_gpu_engine()
    (prompt,), (answer,) = reference.cases(
        6, 1, 30, lambda p: reference.sun(tiny.tasks["cook"], tiny.base, p, 12), [1, 2]
    )
    for device in ("cpu", "cuda"):
        k, v = (part.to(device) for part in reference.kv(tiny.tasks["cook"], prompt[:-1]))
        fingerprint = engine._registry.get("cook").fingerprint
        engine.submit_kv(
            prompt,
            k,
            v,
            prompt[-1],
            model="cook",
            fingerprint=fingerprint,
            params=SamplingParams(temperature=0, max_tokens=12),
        )
        outputs = []
        while engine.has_work:
            outputs += engine.step()
        assert [token for output in outputs for token in output.token_ids] == answer
