"""On a GPU: graph replays, several engines on their own streams, agreement with the CPU."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from qsun import DecodeEngine, SamplingParams
from qsun.engine.runner import Runner
from qsun.engine.step import StepExecutor

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


@pytest.mark.parametrize("overlap", ["on", "off"])
@pytest.mark.parametrize("cuda_graphs", ["on", "off"])
def test_tokens_equal_the_cpu_reference(make_gpu_engine, cases, cuda_graphs, overlap) -> None:
    prompts, models, expected = cases
    engine = make_gpu_engine(cuda_graphs=cuda_graphs, overlap=overlap)
    assert answers(engine, prompts, models) == expected
    stats = engine.stats()
    assert (stats.graph_seconds > 0) == (cuda_graphs == "on") and stats.wait_seconds > 0
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


@pytest.mark.parametrize("penalty", [1.0, 1.2], ids=["device", "host"])
def test_graphs_and_eager_steps_draw_the_same(make_gpu_engine, cases, penalty) -> None:
    """Rows that the device draws, and rows that the host draws."""
    prompts, models, _ = cases
    params = [
        SamplingParams(
            temperature=0.8, top_p=0.9, top_k=40, seed=i, max_tokens=20, repetition_penalty=penalty
        )
        for i in range(len(prompts))
    ]
    first, *others = (
        answers(make_gpu_engine(cuda_graphs=mode, overlap=overlap), prompts, models, params)
        for mode in ("on", "off")
        for overlap in ("on", "off")
    )
    assert others == [first] * 3


def test_launching_ahead_never_waits_for_the_device(make_gpu_engine, monkeypatch) -> None:
    """Whatever would wait while a step is under way raises, and most steps are launched so."""
    ahead = []
    right = StepExecutor._follow

    def watched(self):
        torch.cuda.set_sync_debug_mode("error")
        try:
            following = right(self)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        ahead.append(following is not None)
        return following

    monkeypatch.setattr(StepExecutor, "_follow", watched)
    engine = make_gpu_engine(cuda_graphs="on", block_size=4)
    params = [
        SamplingParams(temperature=0.7 * (i % 2), seed=i, max_tokens=20 + i, ignore_eos=True)
        for i in range(8)
    ]
    told = engine.generate([[i + 1] * 9 for i in range(8)], model="poet", params=params)
    assert [c.error for c in told] == [None] * 8 and [len(c.token_ids) for c in told] == [*range(20, 28)]
    assert sum(ahead) > 15


def test_chunks_are_begun_without_waiting_for_the_device(make_gpu_engine, monkeypatch) -> None:
    """As above, for prompts that are read while others decode."""
    begun = []
    right = StepExecutor._begin

    def watched(self):
        torch.cuda.set_sync_debug_mode("error")
        try:
            chunks = right(self)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        begun.append(len(chunks))
        return chunks

    monkeypatch.setattr(StepExecutor, "_begin", watched)
    engine = make_gpu_engine(cuda_graphs="on", dtype=torch.bfloat16, prefill_chunk=8)
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    told = engine.generate([[i + 1] * 40 for i in range(6)], model=[*TASKS, *TASKS], params=params)
    assert [c.error for c in told] == [None] * 6 and {len(c.token_ids) for c in told} == {30}
    assert sum(begun) > 20


def test_the_device_does_not_wait_for_the_host(make_gpu_engine, monkeypatch) -> None:
    """With a slow step, the next one is on the stream before the first has ended."""
    running: list[bool] = []
    right = Runner._launch

    def slow(self, *, from_host):
        if not from_host:
            running.append(not last.query())
        torch.cuda._sleep(20_000_000)  # some ten milliseconds
        step = right(self, from_host=from_host)
        last.record()
        return step

    engine = make_gpu_engine(cuda_graphs="on")
    last = torch.cuda.Event()
    monkeypatch.setattr(Runner, "_launch", slow)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    engine.generate([[1, 2, 3]] * 4, model="poet", params=params)
    assert len(running) > 15 and sum(running) > 0.8 * len(running)


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


@pytest.mark.parametrize(
    ("bits", "lm_head_bits"), [(16, 16), (4, 16), (8, 16), (4, 8), (4, 4)], ids=lambda bits: f"{bits}"
)
def test_a_quantised_engine_agrees_with_the_cpu(tiny, bits: int, lm_head_bits: int) -> None:
    """bfloat16 on both: probabilities of the first token agree within what bfloat16 leaves."""
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=5)
    prompts = [[7] * 20, [3, 1, 4, 1, 5, 9, 2, 6], list(range(40))]
    told = {}
    for device in ("cpu", "cuda"):
        engine = DecodeEngine.from_pretrained(
            tiny.paths["base"],
            bits=bits,
            group_size=None if bits == 16 else 32,
            lm_head_bits=lm_head_bits,
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
