"""Requests and settings that cannot be: each a named error with got and expected, the engine as it was."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qsun import DecodeEngine, IncompatibleModule, RequestError, SamplingParams
from qsun.engine.options import EngineOptions
from qsun.errors import CheckpointError
from qsun.modules.decode import load_decode_module
from qsun.modules.prefill import load_prefill_module

OK = SamplingParams(temperature=0, max_tokens=4)


@pytest.fixture
def busy_engine(make_engine):
    """An engine in the middle of a request, so that there is something to damage."""
    engine = make_engine(blocks=20, max_model_len=200)
    engine.submit([1, 2, 3, 4, 5, 6], model="poet", params=SamplingParams(max_tokens=20), request_id="busy")
    engine.step()
    engine.add_remote_model("remote", fingerprint="sha256:elsewhere")
    return engine


def state(engine: DecodeEngine):
    tables = engine._book.workspace.scheduler.tables
    tables.check(list(engine._book.workspace.scheduler.live.values()))
    return dataclasses.replace(engine.stats()), engine.has_work, engine.models


def params(**changes) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 4, **changes})


BAD_SUBMISSIONS = {
    "unknown model": (dict(model="pirate"), r"model is 'pirate', expected .*'poet', 'clerk'"),
    "model of another type": (dict(model=["poet"]), r"model is \['poet'\], expected one of"),
    "model without a module": (dict(model="remote"), r"'remote' has no prefill module here: .*submit_kv"),
    "empty text": (dict(prompt=""), r"prompt is empty, expected at least one token"),
    "half of a surrogate pair": (dict(prompt="\ud800"), r"prompt is text that the tokenizer refuses"),
    "no tokens": (dict(prompt=[]), r"prompt is empty, expected at least one token"),
    "empty tensor": (dict(prompt=torch.zeros(0, dtype=torch.int64)), r"prompt is empty"),
    "no prompt": (dict(prompt=None), r"prompt must be text, token ids or chat messages, got None"),
    "a number": (dict(prompt=17), r"prompt must be text, token ids or chat messages, got 17"),
    "bytes": (dict(prompt=b"text"), r"prompt must be text, token ids or chat messages, got b'text'"),
    "a float among ids": (dict(prompt=[1, 2.5]), r"prompt token 1 is 2.5, expected an integer"),
    "a bool among ids": (dict(prompt=[1, True]), r"prompt token 1 is True, expected an integer"),
    "text among ids": (dict(prompt=[1, "two"]), r"prompt token 1 is 'two', expected an integer"),
    "a matrix": (
        dict(prompt=torch.ones(2, 2, dtype=torch.int64)),
        r"got a torch.int64 tensor of shape \(2, 2\)",
    ),
    "a float tensor": (dict(prompt=torch.ones(2)), r"got a torch.float32 tensor of shape \(2,\)"),
    "an id past the vocabulary": (dict(prompt=[1, 300]), r"prompt token 1 is 300, expected an id in 0..299"),
    "a negative id": (dict(prompt=[-1]), r"prompt token 0 is -1, expected an id in 0..299"),
    "a message without content": (dict(prompt=[{"role": "user"}]), r"chat message 0 is .* role and content"),
    "a chat of mixed things": (
        dict(prompt=[{"role": "user", "content": "a"}, "b"]),
        r"chat message 1 is 'b', expected a dict",
    ),
    "a prompt over the context": (dict(prompt=[1] * 200), r"prompt has 200 tokens, expected at most 199"),
    "what could never fit": (
        dict(prompt=[1] * 70, params=params(max_tokens=50)),
        r"prompt of 70 tokens with max_tokens 50 needs 30 cache blocks of 4 tokens, expected at most 20",
    ),
    "min_tokens past the context": (
        dict(prompt=[1] * 190, params=params(max_tokens=50, min_tokens=20)),
        r"min_tokens is 20, but 190 prompt tokens leave room for 10",
    ),
    "parameters of another type": (dict(params={"temperature": 0}), r"params must be SamplingParams or None"),
    "a stop id past the vocabulary": (
        dict(params=params(stop_token_ids=(300,))),
        r"stop_token_ids has 300, expected ids in 0..299",
    ),
    "an id in use": (dict(request_id="busy"), r"request_id 'busy' is in use, expected a new one"),
    "an id of another type": (dict(request_id=7), r"request_id must be a non-empty string or None, got 7"),
    "an empty id": (dict(request_id=""), r"request_id must be a non-empty string or None, got ''"),
}


@pytest.mark.damaged
@pytest.mark.parametrize("case", BAD_SUBMISSIONS)
def test_a_refused_request_changes_nothing(busy_engine, case) -> None:
    arguments, message = BAD_SUBMISSIONS[case]
    before = state(busy_engine)
    arguments = {"prompt": [1, 2, 3], "model": "poet", "params": OK, **arguments}
    with pytest.raises(RequestError, match=message):
        busy_engine.submit(arguments.pop("prompt"), **arguments)
    assert state(busy_engine) == before


def given(engine, **changes):
    config = engine.decode_module.config
    shape = (config.num_layers, 3, config.num_kv_heads, config.head_dim)
    arguments = dict(
        prompt=[1, 2, 3, 4],
        k=torch.zeros(shape),
        v=torch.zeros(shape),
        next_token=4,
        model="poet",
        fingerprint=engine._registry.get("poet").fingerprint,
        params=OK,
    )
    arguments.update(changes)
    return arguments


NAN = torch.zeros(3, 3, 2, 16)
NAN[1, 2, 0, 3] = float("nan")
BAD_KV = {
    "another module's KV": (
        dict(fingerprint="sha256:0"),
        r"fingerprint is 'sha256:0', expected 'sha256:\w+'",
    ),
    "no fingerprint": (dict(fingerprint=None), r"fingerprint is None, expected 'sha256:\w+'"),
    "one position too many": (
        dict(k=torch.zeros(3, 4, 2, 16)),
        r"k has shape \(3, 4, 2, 16\), expected \(3, 3, 2, 16\)",
    ),
    "a layer too few": (
        dict(v=torch.zeros(2, 3, 2, 16)),
        r"v has shape \(2, 3, 2, 16\), expected \(3, 3, 2, 16\)",
    ),
    "heads first": (dict(k=torch.zeros(3, 2, 3, 16)), r"k has shape \(3, 2, 3, 16\)"),
    "another dtype": (
        dict(v=torch.zeros(3, 3, 2, 16, dtype=torch.float16)),
        r"v has dtype torch.float16, expected torch.float32",
    ),
    "not a tensor": (dict(k=[[0.0]]), r"k must be a tensor of shape \(3, 3, 2, 16\), got list"),
    "not finite": (dict(k=NAN), r"k holds 1 values that are not finite, expected none"),
    "a next token past the vocabulary": (
        dict(next_token=999),
        r"next_token is 999, expected an id in 0..299",
    ),
    "a next token of another type": (dict(next_token="4"), r"next_token must be a token id, got '4'"),
    "a next token that is not the prompt's last": (dict(next_token=5), r"next_token is 5, expected 4"),
    "text as a prompt": (dict(prompt="text"), r"prompt must be .*no tokenizer: give token ids"),
    "a prompt without KV": (dict(prompt=[4]), r"prompt has 1 tokens, of which none has KV of its own"),
    "KV for an unknown model": (dict(model="pirate"), r"model is 'pirate', expected"),
}


@pytest.mark.damaged
@pytest.mark.parametrize("case", BAD_KV)
def test_refused_kv_changes_nothing(busy_engine, case) -> None:
    changes, message = BAD_KV[case]
    before = state(busy_engine)
    with pytest.raises(RequestError, match=message):
        busy_engine.submit_kv(**given(busy_engine, **changes))
    assert state(busy_engine) == before
    busy_engine.submit_kv(**given(busy_engine))  # what the cases damage is sound


BAD_GENERATE = {
    "a number": (dict(prompts=3, model="poet"), r"prompts must be a prompt or a list of prompts"),
    "one bad among good": (
        dict(prompts=[[1, 2], [3], [999]], model="poet"),
        r"prompts\[2\]: prompt token 0 is 999, expected an id in 0..299",
    ),
    "too few models": (
        dict(prompts=[[1], [2], [3]], model=["poet", "cook"]),
        r"model is a list of 2, expected one for each of 3 prompts",
    ),
    "too many params": (
        dict(prompts=[[1]], model="poet", params=[OK, OK]),
        r"params is a list of 2, expected one for each of 1 prompts",
    ),
}


@pytest.mark.damaged
@pytest.mark.parametrize("case", BAD_GENERATE)
def test_a_refused_batch_leaves_no_request_behind(make_engine, case) -> None:
    arguments, message = BAD_GENERATE[case]
    engine = make_engine()
    engine.prepare()
    with pytest.raises(RequestError, match=message):
        engine.generate(**arguments)
    stats = engine.stats()
    assert not engine.has_work and stats.blocks_in_use == 0 and stats.output_tokens == 0


@pytest.mark.damaged
def test_text_and_stop_strings_need_a_tokenizer(make_engine) -> None:
    engine = make_engine(tokenizer=False)
    with pytest.raises(RequestError, match="the model has no tokenizer: give token ids"):
        engine.submit("text", model="poet")
    with pytest.raises(RequestError, match=r"stop is \('a',\), but the model has no tokenizer"):
        engine.submit([1], model="poet", params=SamplingParams(stop=("a",)))
    (completion,) = engine.generate([1, 2], model="poet", params=OK)
    assert len(completion.token_ids) == 4 and completion.text == ""
    assert "no tokenizer" in engine.explain()


@pytest.mark.damaged
@pytest.mark.parametrize(
    "template", [None, "{{ raise_exception('no users, please') }}"], ids=["none", "raises"]
)
def test_a_chat_that_the_tokenizer_cannot_format(make_engine, template) -> None:
    engine = make_engine()
    engine.tokenizer.chat_template = template
    with pytest.raises(RequestError, match=r"prompt is a chat.*(no chat template|no users, please)"):
        engine.submit([{"role": "user", "content": "hello"}], model="poet")


BAD_OPTIONS = {
    "no batch": (dict(max_batch_size=0), "max_batch_size must be an integer of at least 1, got 0"),
    "half a batch": (dict(max_batch_size=0.5), "max_batch_size must be an integer of at least 1, got 0.5"),
    "no block": (dict(block_size=0), "block_size must be an integer of at least 1, got 0"),
    "no prefill": (dict(prefill_chunk=-1), "prefill_chunk must be an integer of at least 1, got -1"),
    "no context": (dict(max_model_len=1), "max_model_len must be an integer of at least 2, got 1"),
    "a memory of words": (dict(memory="a lot"), "memory must be bytes .* got 'a lot'"),
    "an unknown unit": (dict(memory="3 parsec"), "memory must be bytes .* got '3 parsec'"),
    "a negative memory": (dict(memory=-5), "memory must be bytes .* got -5"),
    "more than everything": (dict(memory=1.5), "memory must be bytes .* got 1.5"),
    "an infinite memory": (dict(memory="9" * 400 + "GB"), "memory must be bytes .* got '999"),
    "memory that is true": (dict(memory=True), "memory must be bytes .* got True"),
    "swap of words": (dict(swap_memory="disk"), "swap_memory must be bytes .* got 'disk'"),
    "a convention of nobody": (
        dict(first_token="both"),
        "first_token must be one of 'decode', 'prefill', got 'both'",
    ),
    "a backend of nobody": (dict(backend="abacus"), "backend must be one of None, 'cuda', .* got 'abacus'"),
    "graphs of nobody": (dict(cuda_graphs=True), "cuda_graphs must be one of .* got True"),
    "an integer cache": (
        dict(kv_cache_dtype=torch.int8),
        "kv_cache_dtype must be one of 'auto', .* got torch.int8",
    ),
    "an unknown dtype": (
        dict(kv_cache_dtype="float7"),
        "kv_cache_dtype must be one of 'auto', .* got 'float7'",
    ),
}


@pytest.mark.damaged
@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_absurd_settings_are_refused_before_anything_is_loaded(case) -> None:
    options, message = BAD_OPTIONS[case]
    with pytest.raises(ValueError, match=message):
        EngineOptions(**options)
    with pytest.raises(ValueError, match=message):
        DecodeEngine.from_pretrained("/nowhere", **options)


@pytest.mark.damaged
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(memory=1000),
            r"memory leaves 1000 bytes for the KV cache \(memory=1000\), expected at least 3072",
        ),
        (dict(memory=0), r"memory leaves 0 bytes for the KV cache"),
    ],
    ids=["less than a block", "nothing"],
)
def test_memory_that_is_too_small_is_told_when_the_cache_is_made(make_engine, options, message) -> None:
    engine = make_engine(**options)
    with pytest.raises(ValueError, match=message):
        engine.prepare()
    with pytest.raises(ValueError, match=message):
        engine.submit([1], model="poet")
    assert not engine.has_work


@pytest.mark.damaged
def test_settings_that_the_model_cannot_serve_are_refused(make_engine) -> None:
    with pytest.raises(ValueError, match=r"max_model_len is 257, expected at most 256"):
        make_engine(max_model_len=257)
    with pytest.raises(ValueError, match=r"memory is the fraction 0.5 on cpu, expected bytes"):
        make_engine(memory=0.5)
    with pytest.raises(ValueError, match=r"cuda_graphs is 'on' on cpu, expected 'auto' or 'off'"):
        make_engine(cuda_graphs="on")


@pytest.mark.damaged
@pytest.mark.parametrize("name", ["poet", "", 3])
def test_names_of_models(make_engine, tiny, name) -> None:
    engine = make_engine()
    before = engine.models
    with pytest.raises(ValueError, match=r"name (must be|'poet' is registered already)"):
        engine.add_model(name, tiny.paths["poet"])
    assert engine.models == before


@pytest.mark.damaged
def test_models_that_cannot_be_had(make_engine, tiny, tmp_path) -> None:
    engine = make_engine()
    with pytest.raises(CheckpointError, match="does not exist"):
        engine.add_model("new", tmp_path / "nothing")
    with pytest.raises(ValueError, match="first_token must be 'decode', 'prefill' or None, got 'both'"):
        engine.add_model("new", tiny.paths["poet"], first_token="both")
    with pytest.raises(ValueError, match="fingerprint must be a non-empty string, got ''"):
        engine.add_remote_model("new", fingerprint="")
    with pytest.raises(
        CheckpointError, match="no_such_model does not exist, expected a checkpoint directory"
    ):
        DecodeEngine.from_pretrained("no_such_model")
    assert "new" not in engine.models


@pytest.mark.damaged
def test_a_loaded_module_of_the_other_convention_is_refused(make_engine, modules) -> None:
    with pytest.raises(IncompatibleModule, match="first_token is 'prefill', expected 'decode'"):
        make_engine(models=()).add_model("poet", modules["poet"], first_token="prefill")


@pytest.mark.damaged
@pytest.mark.parametrize(
    ("changes", "dtype", "message"),
    [
        (dict(num_hidden_layers=2), "float32", r"'other' does not fit .*: num_layers is 2, expected 3"),
        (dict(initializer_range=0.3), "float32", r"'other' does not fit .*: base is 'sha256:\w+', expected"),
        ({}, "bfloat16", r"it is torch.bfloat16 on cpu, expected torch.float32 on cpu"),
    ],
    ids=["shape", "base", "dtype"],
)
def test_a_module_loaded_for_another_decoder_is_refused(make_engine, tiny, tmp_path, changes, dtype, message):
    path = tiny.paths["base"]
    if changes:
        path = tmp_path / "another"
        LlamaForCausalLM(LlamaConfig(**{**tiny.base.config.to_dict(), **changes})).save_pretrained(path)
    decode = load_decode_module(path, dtype=dtype, device="cpu")
    module = load_prefill_module("other", base_path=path, decode=decode)
    engine = make_engine()
    with pytest.raises(IncompatibleModule, match=message):
        engine.add_model("other", module)
    assert "other" not in engine.models


@pytest.mark.damaged
def test_removing_models(busy_engine) -> None:
    with pytest.raises(RequestError, match="model is 'pirate', expected one of"):
        busy_engine.remove_model("pirate")
    with pytest.raises(ValueError, match="model 'poet' has 1 unfinished requests, expected none"):
        busy_engine.remove_model("poet")
    busy_engine.cancel("busy")
    busy_engine.remove_model("poet")
    with pytest.raises(RequestError, match="model is 'poet'"):
        busy_engine.submit([1], model="poet")
