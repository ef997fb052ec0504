"""The engine's public face: prompts in all forms, streaming, cancelling, stopping, telling."""

from __future__ import annotations

import dataclasses

import pytest

import qsun.engine.step as step_module
from qsun import SamplingParams
from qsun.engine.runner import Runner

GREEDY = SamplingParams(temperature=0, max_tokens=6)


def drained(engine) -> dict[str, list]:
    outputs: dict[str, list] = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    return outputs


def tokens_of(outputs) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def test_prompts_in_every_form_and_in_order(make_engine) -> None:
    engine = make_engine()
    chat = [{"role": "user", "content": "hi"}]
    same = "u:hi;a:"
    forms = [chat, same, list(same.encode()), tuple(same.encode())]
    answers = engine.generate(forms, model="poet", params=GREEDY)
    assert len({a.token_ids for a in answers}) == 1
    assert {a.prompt_token_ids for a in answers} == {tuple(same.encode())}
    for single in forms:
        assert [a.token_ids for a in engine.generate(single, model="poet", params=GREEDY)] == [
            answers[0].token_ids
        ]
    mixed = engine.generate(["one", chat, [3, 4]], model=["cook", "poet", "clerk"], params=GREEDY)
    assert [a.model for a in mixed] == ["cook", "poet", "clerk"]
    assert mixed[1].token_ids == answers[0].token_ids
    assert engine.generate([], model="poet") == []


def test_params_for_each_prompt(make_engine) -> None:
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (1, 5, 3)]
    answers = make_engine().generate(["a", "b", "c"], model="poet", params=params)
    assert [len(a.token_ids) for a in answers] == [1, 5, 3]


def test_text_is_what_the_tokens_say(make_engine) -> None:
    engine = make_engine()
    (answer,) = engine.generate(
        "text", model="poet", params=SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    )
    assert answer.text == engine.tokenizer.decode(answer.token_ids, skip_special_tokens=True)


def test_a_seed_decides_and_its_absence_does_not(make_engine) -> None:
    engine = make_engine()
    hot = dict(temperature=2.0, max_tokens=12, ignore_eos=True)
    seeded = [SamplingParams(seed=3, **hot)] * 3 + [SamplingParams(seed=4, **hot)]
    a, b, c, d = (x.token_ids for x in engine.generate(["x"] * 4, model="poet", params=seeded))
    assert a == b == c != d
    free = engine.generate(["x"] * 6, model="poet", params=SamplingParams(**hot))
    assert len({x.token_ids for x in free}) > 1


def end_token_run(engine, **params):
    """An answer that is stopped at its third token: that token's id is its stop id."""
    (whole,) = engine.generate(
        "stop me", model="cook", params=SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    )
    third = whole.token_ids[2]
    assert third not in whole.token_ids[:2]
    settings = dict(temperature=0, max_tokens=12, ignore_eos=True, stop_token_ids=(third,))
    (answer,) = engine.generate("stop me", model="cook", params=SamplingParams(**{**settings, **params}))
    return whole, answer


def test_stop_token_ids_end_and_have_no_text(make_engine) -> None:
    engine = make_engine()
    whole, answer = end_token_run(engine)
    assert answer.finish_reason == "stop" and answer.token_ids == whole.token_ids[:3]
    assert answer.text == engine.tokenizer.decode(whole.token_ids[:2])


def test_min_tokens_puts_the_end_off(make_engine) -> None:
    whole, answer = end_token_run(make_engine(), min_tokens=5)
    assert len(answer.token_ids) > 5 and answer.token_ids[:2] == whole.token_ids[:2]
    assert whole.token_ids[2] not in answer.token_ids[:5]


def test_the_models_own_end_and_ignore_eos(make_engine, reference) -> None:
    engine = make_engine()
    # So hot that all 300 tokens are as likely, the end among them.
    params = [SamplingParams(temperature=1000.0, max_tokens=60, seed=seed) for seed in range(20)]
    answers = engine.generate(["x"] * 20, model="poet", params=params)
    stopped = [i for i, answer in enumerate(answers) if answer.finish_reason == "stop"]
    assert stopped and all(answers[i].token_ids[-1] == reference.eos for i in stopped)
    on = [dataclasses.replace(params[i], ignore_eos=True) for i in stopped]
    for i, answer in zip(stopped, engine.generate(["x"] * len(on), model="poet", params=on), strict=True):
        assert answer.finish_reason == "length" and len(answer.token_ids) == 60
        assert answer.token_ids[: len(answers[i].token_ids)] == answers[i].token_ids


def test_stop_strings_cut_the_text_and_not_the_tokens(make_engine) -> None:
    engine = make_engine()
    params = dict(temperature=0, max_tokens=30, ignore_eos=True)
    (whole,) = engine.generate("a stop string", model="clerk", params=SamplingParams(**params))
    position = next(i for i in range(4, len(whole.text) - 2) if whole.text[i : i + 2].isascii())
    stop = whole.text[position : position + 2]
    (answer,) = engine.generate("a stop string", model="clerk", params=SamplingParams(stop=(stop,), **params))
    assert answer.finish_reason == "stop"
    assert answer.text == whole.text[: whole.text.index(stop)]
    assert answer.token_ids == whole.token_ids[: len(answer.token_ids)]
    assert stop in engine.tokenizer.decode(answer.token_ids)


def test_logprobs(make_engine) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, logprobs=2, ignore_eos=True)
    engine = make_engine()
    (answer,) = engine.generate("log", model="poet", params=params)
    assert len(answer.logprobs) == 5
    for token, entry in zip(answer.token_ids, answer.logprobs, strict=True):
        assert entry.token_id == token == entry.top[0][0] and len(entry.top) == 2
        assert entry.logprob == entry.top[0][1] > entry.top[1][1]
    (silent,) = engine.generate("log", model="poet", params=GREEDY)
    assert silent.logprobs is None


def test_submit_and_step_from_a_server(make_engine) -> None:
    engine = make_engine()
    (alone,) = engine.generate("first", model="poet", params=GREEDY)
    first = engine.submit("first", model="poet", params=GREEDY)
    engine.step()
    second = engine.submit("second", model="cook", params=GREEDY, request_id="mine")
    assert second == "mine"
    outputs = drained(engine)
    assert outputs[first][-1].finish_reason == "length" and outputs["mine"][-1].finish_reason == "length"
    assert tokens_of(outputs[first]) == list(alone.token_ids[1:])
    assert engine.step() == []
    engine.submit("again", model="cook", params=GREEDY, request_id="mine")  # an ended request's id is free


def test_streams_side_by_side(make_engine) -> None:
    engine = make_engine()
    whole = engine.generate(["one", "two"], model=["poet", "cook"], params=GREEDY)
    other = engine.submit("three", model="clerk", params=GREEDY)
    streams = [
        engine.stream("one", model="poet", params=GREEDY),
        engine.stream("two", model="cook", params=GREEDY),
    ]
    heads = [next(stream) for stream in streams]
    rests = [list(stream) for stream in streams]
    for head, rest, expected in zip(heads, rests, whole, strict=True):
        assert tokens_of([head, *rest]) == list(expected.token_ids)
        assert "".join(output.text for output in [head, *rest]) == expected.text
        assert rest[-1].finish_reason == expected.finish_reason
    # What the third gained while the streams were read is not lost.
    assert tokens_of(drained(engine)[other]) and engine.stats().finished == 5


def test_a_stream_that_is_dropped_is_cancelled(make_engine) -> None:
    engine = make_engine()
    stream = engine.stream("long", model="poet", params=SamplingParams(max_tokens=100, ignore_eos=True))
    next(stream)
    stream.close()
    stats = engine.stats()
    assert stats.cancelled == 1 and stats.blocks_in_use == 0
    assert not engine.has_work, "nobody is left to be told"


def test_a_stream_that_is_dropped_before_it_began_is_cancelled(make_engine) -> None:
    engine = make_engine()
    stream = engine.stream("never read", model="poet", params=GREEDY, request_id="a")
    del stream
    assert engine.stats().cancelled == 1 and not engine.has_work
    assert engine.submit("another", model="poet", params=GREEDY, request_id="a") == "a"


def test_a_stream_that_has_ended_leaves_the_next_request_of_its_id_alone(make_engine) -> None:
    engine = make_engine()
    stream = engine.stream("first", model="poet", params=GREEDY, request_id="a")
    for output in stream:
        if output.finish_reason is not None:
            break
    engine.submit("second", model="poet", params=GREEDY, request_id="a")
    assert next(stream, None) is None
    del stream
    assert drained(engine)["a"][-1].finish_reason == "length"


def test_a_stream_ends_when_a_step_has_told_of_the_end(make_engine) -> None:
    engine = make_engine()
    stream = engine.stream("both", model="poet", params=GREEDY)
    (request_id,) = engine._book.answers
    next(stream)
    assert drained(engine)[request_id][-1].finish_reason == "length"
    assert list(stream) == []


def test_a_tokenizer_that_cannot_decode_a_token_ends_its_request_only(make_engine, monkeypatch) -> None:
    engine = make_engine()
    prompts, params = ["a", "b", "c"], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    good = engine.generate(prompts, model="poet", params=params)
    only_in_one = set(good[1].token_ids) - {*good[0].token_ids, *good[2].token_ids}
    right = type(engine.tokenizer).decode

    def decode(self, ids, **options):
        if only_in_one & set(ids):
            raise TypeError("sequence item 0: expected str instance, NoneType found")
        return right(self, ids, **options)

    monkeypatch.setattr(type(engine.tokenizer), "decode", decode)
    first, failed, third = engine.generate(prompts, model="poet", params=params)
    assert (first, third) == tuple(
        dataclasses.replace(g, request_id=c.request_id) for g, c in ((good[0], first), (good[2], third))
    )
    assert failed.finish_reason == "error" and "decoding token" in failed.error and "NoneType" in failed.error
    assert engine.stats().blocks_in_use == 0 and not engine.has_work


def test_generate_leaves_others_their_outputs(make_engine) -> None:
    engine = make_engine()
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    request_id = engine.submit("other", model="poet", params=params)
    engine.generate("mine", model="cook", params=GREEDY)
    assert engine.has_work
    assert len(tokens_of(drained(engine)[request_id])) == 3


def test_cancel_in_every_state(make_engine) -> None:
    engine = make_engine(blocks=12, prefill_chunk=4, max_batch_size=2)
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    for name in ("decoding", "prefilling", "queued"):
        engine.submit([1] * 10, model="poet", params=params, request_id=name)
    for _ in range(4):
        engine.step()
    live = engine._book.workspace.scheduler.live
    assert {name: live[name].state for name in live} == {name: name for name in live}
    for name in ("queued", "decoding", "prefilling"):
        assert engine.cancel(name)
        assert not engine.cancel(name)
    outputs = drained(engine)
    assert [outputs[n][-1].finish_reason for n in ("queued", "decoding", "prefilling")] == ["cancelled"] * 3
    assert engine.stats().blocks_in_use == 0 and engine.stats().cancelled == 3
    assert not engine.cancel("nobody")


def test_a_failing_decode_module_ends_the_batch_and_not_the_engine(make_engine, monkeypatch) -> None:
    engine = make_engine()
    (expected,) = engine.generate("after", model="poet", params=GREEDY)

    def broken(self, sequences):
        raise RuntimeError("a fuse blew")

    monkeypatch.setattr(Runner, "decode", broken)
    failed = engine.generate(["a", "b"], model=["poet", "cook"], params=GREEDY)
    assert all(c.finish_reason == "error" and "a fuse blew" in c.error for c in failed)
    monkeypatch.undo()
    (again,) = engine.generate("after", model="poet", params=GREEDY)
    assert again.token_ids == expected.token_ids and engine.stats().blocks_in_use == 0


def test_failing_sampling_and_failing_first_logits(make_engine, monkeypatch) -> None:
    def broken(*_):
        raise RuntimeError("no dice")

    engine = make_engine(first_token="prefill")
    monkeypatch.setattr(step_module, "sample", broken)
    (failed,) = engine.generate("a", model="poet", params=GREEDY)
    assert failed.finish_reason == "error" and "no dice" in failed.error
    monkeypatch.undo()
    monkeypatch.setattr(Runner, "logits", broken)
    (failed,) = engine.generate("a", model="poet", params=GREEDY)
    assert failed.finish_reason == "error" and "lm_head failed" in failed.error
    assert engine.stats().blocks_in_use == 0 and engine.stats().failed == 2


def test_a_failing_rebuild_ends_its_request_only(make_engine, monkeypatch) -> None:
    engine = make_engine(blocks=12, prefix_reuse=False)
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)

    def broken(self, chunks):
        raise RuntimeError("lost the plan")

    monkeypatch.setattr(Runner, "rebuild", broken)
    old, young = engine.generate([[1] * 9, [2] * 9], model=["poet", "cook"], params=params)
    assert old.finish_reason == "length" and young.finish_reason == "error"
    assert "decode module failed: RuntimeError: lost the plan" in young.error


def test_stats_count_what_happened(make_engine) -> None:
    engine = make_engine()
    empty = engine.stats()
    assert empty.blocks == 0 and empty.bytes_read_per_token == 0 and empty.mean_batch == 0
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    engine.generate([[1] * 9, [2] * 5], model="poet", params=params)
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.prefill_tokens, stats.output_tokens) == (14, 12, 6)
    assert (stats.decode_steps, stats.decode_tokens, stats.finished, stats.mean_batch) == (3, 6, 2, 2.0)
    # Three steps read the weights once each; the rows read lengths 9, 10, 11 and 5, 6, 7.
    decode = engine.decode_module
    per_token = 2 * 3 * 2 * 16 * 4
    expected = (3 * decode.bytes_per_step + (30 + 18) * per_token) / 6
    assert stats.bytes_read_per_token == expected
    assert stats.weight_bytes_per_step == decode.bytes_per_step
    assert stats.blocks_cached == 3 and stats.preemptions == 0
    assert stats.kv_bytes == 1000 * 4 * per_token and stats.graph_bytes == 0


def test_explain_tells_backends_models_and_memory(make_engine) -> None:
    engine = make_engine(blocks=50, swap_blocks=10)
    before = engine.explain()
    assert "the cache is made with the first request" in before
    engine.prepare()
    text = engine.explain()
    for part in (
        "decode module: llama, 3 layers",
        "paged_attention_decode",
        "chosen",
        "model poet: 'poet', first_token='decode', KV of sha256:",
        "50 blocks of 4 tokens",
        "= 10 blocks",
        "max_model_len 200",
        "decode step: eager: no CUDA device" if engine.decode_module.device.type == "cpu" else "decode step",
    ):
        assert part in text, part


def test_models_come_and_go(make_engine, tiny) -> None:
    engine = make_engine(models=("base",))
    (before,) = engine.generate("some text", model="base", params=GREEDY)
    engine.add_model("late", tiny.paths["poet"])
    engine.add_model("own", None)
    late, own = engine.generate(["some text"] * 2, model=["late", "own"], params=GREEDY)
    assert own.token_ids == before.token_ids != late.token_ids
    engine.remove_model("late")
    assert engine.models == ("base", "own") and engine.notices == ()
    # The name says nothing of the weights: what "late" left in the cache is another module's.
    engine.add_model("late", tiny.paths["cook"])
    engine.add_model("cook", tiny.paths["cook"])
    assert engine.stats().prefix_hit_tokens == 8  # "own" on what "base" had left
    again, cook = (engine.generate("some text", model=name, params=GREEDY)[0] for name in ("late", "cook"))
    assert again.token_ids == cook.token_ids != late.token_ids
    assert engine.stats().prefix_hit_tokens == 16


def test_two_names_for_the_same_weights_share_their_prefixes(make_engine, tiny) -> None:
    engine = make_engine(models=("poet",))
    engine.add_model("bard", tiny.paths["poet"])
    engine.generate([5] * 9, model="poet", params=GREEDY)
    engine.generate([5] * 9, model="bard", params=GREEDY)
    assert engine.stats().prefix_hit_tokens == 8


def test_a_remote_model_answers_from_given_kv(make_engine, tiny, reference) -> None:
    engine = make_engine(models=())
    engine.add_remote_model("far", fingerprint="sha256:far", first_token="prefill")
    (prompt,), (answer,) = reference.cases(
        1, 1, 9, lambda p: reference.sun(tiny.tasks["cook"], tiny.base, p, 6, "prefill"), [1, 2, 3]
    )
    k, v = reference.kv(tiny.tasks["cook"], prompt)
    engine.submit_kv(prompt, k, v, answer[0], model="far", fingerprint="sha256:far", params=GREEDY)
    (outputs,) = drained(engine).values()
    assert tokens_of(outputs) == answer


@pytest.mark.parametrize("ending", ["stop id", "max_tokens"])
def test_a_given_first_token_can_be_the_last(make_engine, tiny, reference, ending) -> None:
    engine = make_engine(first_token="prefill")
    k, v = reference.kv(tiny.tasks["cook"], [1, 2, 3])
    params = SamplingParams(max_tokens=1) if ending == "max_tokens" else SamplingParams(stop_token_ids=(77,))
    fingerprint = engine._registry.get("cook").fingerprint
    engine.submit_kv([1, 2, 3], k, v, 77, model="cook", fingerprint=fingerprint, params=params)
    (output,) = engine.step()
    assert output.token_ids == (77,) and output.finish_reason in ("stop", "length")
    assert not engine.has_work and engine.stats().finished == 1


def test_max_batch_size_is_kept(make_engine) -> None:
    engine = make_engine(max_batch_size=3)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    for i in range(7):
        engine.submit([i + 1] * 5, model="poet", params=params)
    while engine.has_work:
        engine.step()
        assert engine.stats().running <= 3
    assert engine.stats().finished == 7


def test_two_engines_take_turns(make_engine) -> None:
    one, two = make_engine(), make_engine(blocks=30)
    expected = [c.token_ids for c in one.generate(["a", "b"], model=["poet", "cook"], params=GREEDY)]
    first = one.submit("a", model="poet", params=GREEDY)
    second = two.submit("b", model="cook", params=GREEDY)
    told: dict[str, list] = {"one": [], "two": []}
    while one.has_work or two.has_work:
        told["one"] += [output for output in one.step() if output.request_id == first]
        told["two"] += [output for output in two.step() if output.request_id == second]
    assert [tuple(tokens_of(told[name])) for name in ("one", "two")] == expected
