"""The rules that make SUN right, each checked, and each check shown to catch the naive variant.

A check runs engines and returns a list of complaints.  It has to be empty for the engine as it is, and must
not be once the one function that the rule depends on does what an ordinary engine does.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable

import pytest
import torch

from qsun import DecodeEngine, IncompatibleModule, SamplingParams
from qsun.core import Sequence
from qsun.engine.registry import Model
from qsun.engine.runner import Runner
from qsun.engine.scheduler import Scheduler
from qsun.kv_cache import prefix_index
from qsun.kv_cache.block_pool import BlockPool
from qsun.modules.prefill import PrefillModule

SHORT = SamplingParams(temperature=0, max_tokens=8)
Check = Callable[[], list[str]]


def complaints(completions, expected: list[list[int]]) -> list[str]:
    return [
        f"{c.model}: got {c.token_ids or c.error}, expected {tuple(e)}"
        for c, e in zip(completions, expected, strict=True)
        if list(c.token_ids) != e
    ]


# Rule 1: a block belongs to the prefill module that wrote it.


@pytest.fixture
def provenance_check(make_engine, tiny, reference) -> Check:
    tasks = ("poet", "clerk", "cook")

    def all_tasks(prompt):
        return [reference.sun(tiny.tasks[task], tiny.base, prompt, 8) for task in tasks]

    (prompt,), (expected,) = reference.cases(1, 1, 5, all_tasks, beginning=[3, 1, 4, 1, 5, 9, 2, 6] * 3)

    def check() -> list[str]:
        engine = make_engine()
        found = []
        for _ in range(2):
            # One after another, so that each could find what the one before has left.
            for task, answer in zip(tasks, expected, strict=True):
                found += complaints(engine.generate(prompt, model=task, params=SHORT), [answer])
        hits = engine.stats().prefix_hit_tokens
        blocks = (len(prompt) - 1) // 4
        if hits != 3 * 4 * blocks:
            found.append(
                f"{hits} tokens found in the cache, expected {3 * 4 * blocks}: each task its own, once"
            )
        return found

    return check


def test_rule_1_provenance(provenance_check) -> None:
    assert provenance_check() == []


def test_rule_1_a_key_without_the_fingerprint_is_caught(provenance_check, monkeypatch) -> None:
    monkeypatch.setattr(prefix_index, "block_key", lambda parent, tokens, fingerprint: (parent, tokens, ""))
    # The pool refuses to share, whatever the index says ...
    with pytest.raises(ValueError, match="cannot be shared with module"):
        provenance_check()

    def unguarded(self, blocks, provenance):
        for block in blocks:
            self._idle.pop(block, None)
            self._owners[block] += 1

    # ... and without that the answers are another model's: fluent, and wrong.
    monkeypatch.setattr(BlockPool, "share", unguarded)
    assert any("clerk: got" in complaint for complaint in provenance_check())


# Rule 2: a preempted prompt is rebuilt by its own prefill module, the response by the decode module.


@pytest.fixture
def rebuild_check(make_engine, tiny, reference) -> Check:
    tasks = ["poet", "clerk", "cook", "poet"]
    cases = [
        reference.cases(seed, 1, 20, lambda p, t=t: reference.sun(tiny.tasks[t], tiny.base, p, 20), [8] * 6)
        for seed, t in enumerate(tasks)
    ]
    prompts, expected = [c[0][0] for c in cases], [c[1][0] for c in cases]

    def check() -> list[str]:
        # Prefixes are not reused, or the prompt could be found instead of rebuilt.
        engine = make_engine(blocks=16, prefix_reuse=False)
        params = SamplingParams(temperature=0, max_tokens=20)
        found = complaints(engine.generate(prompts, model=tasks, params=params), expected)
        stats = engine.stats()
        if not (stats.rebuilds and stats.rebuilt_tokens):
            found.append("nothing was rebuilt")
        return found

    return check


def test_rule_2_preemption(rebuild_check) -> None:
    assert rebuild_check() == []


def test_rule_2_a_prompt_rebuilt_by_the_decode_module_is_caught(rebuild_check, monkeypatch) -> None:
    right = Sequence.writer
    monkeypatch.setattr(
        Sequence,
        "writer",
        lambda self, position: "decode" if self.num_preemptions else right(self, position),
    )
    assert any("got" in complaint for complaint in rebuild_check())


def test_rule_2_a_response_rebuilt_by_the_prefill_module_is_caught(rebuild_check, monkeypatch) -> None:
    """What an engine of one model does: the whole text so far is a new prompt."""
    right = Scheduler._preempt

    def naive(self, victim):
        done = right(self, victim)
        victim.prefill_length = len(victim.tokens) - 1
        return done

    monkeypatch.setattr(Scheduler, "_preempt", naive)
    assert any("got" in complaint for complaint in rebuild_check())


# Rule 3: no KV, no answer.


class BrokenStack:
    """A prefill stack that fails in the middle of its work."""

    def forward(self, hidden, ctx, kv_cache):
        raise RuntimeError("out of paper")

    write_kv = forward


class PoisonedStack:
    """A prefill stack whose KV comes out as not-a-number."""

    def __init__(self, stack) -> None:
        self.stack = stack

    def write_kv(self, hidden, ctx, kv_cache):
        self.stack.write_kv(hidden, ctx, kv_cache)
        for chunk in ctx.attention.chunks:
            kv_cache.layers[-1][1][chunk.block_ids] = float("nan")


def with_stack(engine: DecodeEngine, name: str, stack) -> None:
    old = engine._registry.get(name)
    module = PrefillModule(name, stack, old.module.card, old.fingerprint, ())
    engine._registry.remove(name)
    engine._registry.add(Model(name, old.fingerprint, old.first_token, module))


@pytest.fixture
def missing_kv_check(make_engine, tiny, reference) -> Check:
    tasks = ["poet", "cook", "clerk", "cook"]
    prompts, expected = [], []
    for seed, task in enumerate(tasks):
        (prompt,), (answer,) = reference.cases(
            seed, 1, 12, lambda p, t=task: reference.sun(tiny.tasks[t], tiny.base, p, 8), [2, 2]
        )
        prompts.append(prompt)
        expected.append(answer)

    def check() -> list[str]:
        engine = make_engine(prefill_chunk=6)
        with_stack(engine, "cook", BrokenStack())
        completions = engine.generate(prompts, model=tasks, params=SHORT)
        found = complaints([completions[0], completions[2]], [expected[0], expected[2]])
        for completion in (completions[1], completions[3]):
            if completion.finish_reason != "error" or completion.token_ids:
                found.append(f"{completion.request_id} was answered without its KV: {completion.token_ids}")
            elif not all(
                word in completion.error for word in ("cook", "out of paper", completion.request_id)
            ):
                found.append(f"the error names neither module nor reason: {completion.error}")
        if engine.stats().blocks_in_use:
            found.append("the failed requests hold blocks")
        return found

    return check


def test_rule_3_no_kv_no_answer(missing_kv_check) -> None:
    assert missing_kv_check() == []


def test_rule_3_a_silent_recomputation_by_the_decode_module_is_caught(missing_kv_check, monkeypatch) -> None:
    right = Runner.prefill

    def naive(self, stack, chunks):
        try:
            return right(self, stack, chunks)
        except RuntimeError:
            return right(self, self.decode_module.stack, chunks)

    monkeypatch.setattr(Runner, "prefill", naive)
    assert any("answered without its KV" in complaint for complaint in missing_kv_check())


def test_rule_3_kv_that_is_not_finite_ends_its_request_only(make_engine, tiny, modules, reference) -> None:
    engine = make_engine()
    with_stack(engine, "cook", PoisonedStack(modules["cook"].stack))
    (prompt,), (answer,) = reference.cases(
        5, 1, 12, lambda p: reference.sun(tiny.tasks["poet"], tiny.base, p, 8), [2, 2]
    )
    good, bad = engine.generate([prompt, prompt], model=["poet", "cook"], params=SHORT)
    assert list(good.token_ids) == answer
    assert bad.finish_reason == "error" and "not finite" in bad.error and bad.request_id in bad.error


@pytest.fixture
def given_kv_check(make_engine, tiny, reference) -> Check:
    (old,), (old_answer,) = reference.cases(
        3, 1, 4, lambda p: reference.sun(tiny.tasks["poet"], tiny.base, p, 30, eos=None), [4] * 8
    )
    (prompt,), _ = reference.cases(
        4, 1, 4, lambda p: reference.sun(tiny.tasks["cook"], tiny.base, p, 20, eos=None), [6] * 9
    )

    def check() -> list[str]:
        engine = make_engine(blocks=12, swap_blocks=12)
        params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
        engine.submit(old, model="poet", params=params, request_id="old")
        k, v = reference.kv(tiny.tasks["cook"], prompt[:-1])
        engine.submit_kv(
            prompt,
            k,
            v,
            prompt[-1],
            model="cook",
            fingerprint=engine._registry.get("cook").fingerprint,
            params=SamplingParams(temperature=0, max_tokens=20, ignore_eos=True),
            request_id="given",
        )
        tokens, ends = {"old": [], "given": []}, {}
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
        # It entered since it could be saved; then that room was taken.
        engine._book.workspace.swap.capacity = 0
        while engine.has_work:
            for output in engine.step():
                tokens[output.request_id] += output.token_ids
                if output.finish_reason is not None:
                    ends[output.request_id] = output
        found = [] if tokens["old"] == old_answer else ["the older request has another answer"]
        error = ends["given"].error or ""
        if ends["given"].finish_reason != "error":
            found.append("KV that came with the request was recomputed")
        elif not (
            "MissingKV" in error and "'given'" in error and f"{len(prompt) - 1} prompt positions" in error
        ):
            found.append(f"the error does not say what is missing: {error}")
        return found

    return check


def test_rule_3_given_kv_that_is_lost_ends_in_missing_kv(given_kv_check) -> None:
    assert given_kv_check() == []


def test_rule_3_recomputing_given_kv_is_caught(given_kv_check, monkeypatch) -> None:
    monkeypatch.setattr(
        Sequence, "writer", lambda self, position: "prefill" if position < self.prefill_length else "decode"
    )
    right = Scheduler._preempt

    def naive(self, victim):
        given, victim.given = victim.given, False
        done = right(self, victim)
        victim.given = given
        return done

    monkeypatch.setattr(Scheduler, "_preempt", naive)
    assert "KV that came with the request was recomputed" in given_kv_check()


# Rule 4: who predicts the first token is the module's convention, not the engine's taste.


@pytest.fixture(params=["decode", "prefill"])
def first_token_check(request, make_engine, tiny, reference) -> Callable[[str], list[str]]:
    convention = request.param
    prompts, expected = reference.cases(
        2, 6, 20, lambda p: reference.sun(tiny.tasks["clerk"], tiny.base, p, 8, convention)
    )

    def check(run_under: str | None = None) -> list[str]:
        engine = make_engine(first_token=run_under or convention)
        return complaints(engine.generate(prompts, model="clerk", params=SHORT), expected)

    return check


def test_rule_4_first_token(first_token_check) -> None:
    assert first_token_check() == []


def test_rule_4_the_other_convention_is_caught(first_token_check) -> None:
    # One of the two is the module's; under the other at least one answer differs.
    assert first_token_check("decode") or first_token_check("prefill")


@pytest.mark.parametrize("first_token_check", ["decode"], indirect=True)
def test_rule_4_reading_the_last_prompt_token_twice_is_caught(first_token_check, monkeypatch) -> None:
    """What one gets by prefilling everything and then decoding from the last prompt token again."""
    init = Sequence.__init__

    def naive(self, request, fingerprint, prefill_length, tokens, **rest):
        init(self, request, fingerprint, prefill_length, [*tokens, tokens[-1]], **rest)
        self.tokens.pop()
        if rest.get("first_token") == "decode":
            self.prefill_length = len(tokens)
            self.tokens.append(tokens[-1])

    monkeypatch.setattr(Sequence, "__init__", naive)
    assert any("got" in complaint for complaint in first_token_check())


@pytest.fixture
def card_of_prefill(tiny, modules, tmp_path):
    """The poet's checkpoint with a card that says it was trained with the "prefill" convention."""
    folder = tmp_path / "poet"
    shutil.copytree(tiny.paths["poet"], folder)
    card = dataclasses.replace(modules["poet"].card, first_token="prefill")
    card.write(folder)
    return folder


def test_rule_4_the_card_decides(make_engine, card_of_prefill, tiny, reference) -> None:
    engine = make_engine()
    engine.add_model("poet by its card", card_of_prefill)
    prompts, expected = reference.cases(
        2, 3, 20, lambda p: reference.sun(tiny.tasks["poet"], tiny.base, p, 8, "prefill")
    )
    assert complaints(engine.generate(prompts, model="poet by its card", params=SHORT), expected) == []


@pytest.mark.damaged
def test_rule_4_a_convention_against_the_card_is_refused(make_engine, card_of_prefill) -> None:
    engine = make_engine()
    with pytest.raises(IncompatibleModule, match="first_token is 'decode', expected 'prefill'"):
        engine.add_model("wrong", card_of_prefill, first_token="decode")
    assert "wrong" not in engine.models


def test_rule_4_without_a_card_the_caller_decides(make_engine, tiny) -> None:
    engine = make_engine(first_token="decode")
    engine.add_model("asked", tiny.paths["poet"], first_token="prefill")
    engine.add_model("default", tiny.paths["poet"])
    conventions = {model.name: model.first_token for model in engine._registry}
    assert (conventions["asked"], conventions["default"]) == ("prefill", "decode")


@pytest.mark.parametrize("convention", ["decode", "prefill"])
def test_given_kv_continues_like_local_kv(make_engine, tiny, reference, convention) -> None:
    """KV by transformers, handed in; the layout is the documented one, keys after rotation."""
    engine = make_engine(first_token=convention)
    prompts, expected = reference.cases(
        6, 4, 20, lambda p: reference.sun(tiny.tasks["cook"], tiny.base, p, 8, convention), [1, 2]
    )
    for prompt, answer in zip(prompts, expected, strict=True):
        known = prompt[:-1] if convention == "decode" else prompt
        k, v = reference.kv(tiny.tasks["cook"], known)
        next_token = prompt[-1] if convention == "decode" else answer[0]
        fingerprint = engine._registry.get("cook").fingerprint
        request_id = engine.submit_kv(
            prompt, k, v, next_token, model="cook", fingerprint=fingerprint, params=SHORT
        )
        outputs = []
        while engine.has_work:
            outputs += engine.step()
        assert [token for output in outputs for token in output.token_ids] == answer
        assert {output.request_id for output in outputs} == {request_id}
    # Nothing was prefilled here, and what came from outside is never offered to others.
    assert engine.stats().prefill_tokens == 0 and engine.stats().blocks_cached == 0


@pytest.mark.parametrize("swap_blocks", [0, 40], ids=["kept", "swapped"])
def test_given_kv_survives_pressure(make_engine, tiny, reference, swap_blocks) -> None:
    """With swap room it is preempted and comes back; without, it waits until nobody can need its blocks."""
    engine = make_engine(blocks=14, swap_blocks=swap_blocks)
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    tasks = ["poet", "cook", "cook"]
    cases = [
        reference.cases(
            s, 1, 4, lambda p, t=t: reference.sun(tiny.tasks[t], tiny.base, p, 16, eos=None), [4] * 8
        )
        for s, t in enumerate(tasks)
    ]
    answers: dict[str, list[int]] = {}
    for (prompts, _), task in zip(cases, tasks, strict=True):
        (prompt,) = prompts
        if task == "poet":
            answers[engine.submit(prompt, model=task, params=params)] = []
            continue
        k, v = reference.kv(tiny.tasks[task], prompt[:-1])
        fingerprint = engine._registry.get(task).fingerprint
        request_id = engine.submit_kv(
            prompt, k, v, prompt[-1], model=task, fingerprint=fingerprint, params=params
        )
        answers[request_id] = []
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            answers[output.request_id] += output.token_ids
    assert list(answers.values()) == [answer for _, (answer,) in cases]
    assert bool(engine.stats().swaps) == bool(swap_blocks)


def test_the_quantised_decode_module_is_the_dequantised_model(tiny, modules, reference) -> None:
    """W4 decode, float32 prefill: transformers with the decode model's weights replaced by what W4 means."""
    import copy

    from qsun_kernels import QuantSpec, dequantize
    from qsun_kernels.quant import quantize_rtn

    rounded = copy.deepcopy(tiny.base)
    spec = QuantSpec(4, 32, True)
    with torch.no_grad():
        for parameter in rounded.model.layers.parameters():
            if parameter.dim() == 2:
                packed = quantize_rtn(parameter.data, spec)
                parameter.copy_(dequantize(packed, torch.float32))
    engine = DecodeEngine.from_pretrained(
        tiny.paths["base"], bits=4, group_size=32, dtype=torch.float32, device="cpu", memory="4MiB"
    )
    engine.add_model("poet", tiny.paths["poet"])
    prompts, expected = reference.cases(8, 6, 20, lambda p: reference.sun(tiny.tasks["poet"], rounded, p, 16))
    params = SamplingParams(temperature=0, max_tokens=16)
    assert complaints(engine.generate(prompts, model="poet", params=params), expected) == []
    assert "4-bit weights, group 32" in engine.explain()
