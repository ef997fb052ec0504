"""Whole runs: what they leave is what the engine serves, they resume to the bit, and they stop safely."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qsun import DecodeEngine, SamplingParams
from qsun.checkpoint.tokenizer import load_tokenizer
from qsun.core import ForwardContext, PrefillAttention, PrefillChunk
from qsun.errors import CheckpointError, IncompatibleModule
from qsun.evaluation.perplexity import response_losses
from qsun.kv_cache.tensors import KVCache
from qsun.modules.decode import load_decode_module
from qsun.modules.prefill import load_prefill_module
from qsun.training import state as state_module
from qsun.training.base import DecoderChoice
from qsun.training.batch import Example, Pack
from qsun.training.data import load_examples
from qsun.training.forward import forward
from qsun.training.lora import LoraOptions
from qsun.training.loss import Distillation
from qsun.training.options import TrainOptions
from qsun.training.run import prepare, train
from qsun.training.state import TrainingStopped, latest

CPU = torch.device("cpu")
BASIC = {"dtype": torch.float32, "batch_size": 6, "learning_rate": 3e-3, "steps": 20, "pack_tokens": 64}


def examples_of(bench) -> list[Example]:
    return load_examples([bench.data], load_tokenizer(bench.base), max_length=200, vocab_size=264)[0]


def options(**changes) -> TrainOptions:
    return TrainOptions(**{**BASIC, **changes})


CASES = {
    "all weights": {},
    "prefill convention": {"first_token": "prefill"},
    "low-bit decoder": {"decoder": DecoderChoice(bits=3, group_size=32)},
    "pairs": {"lora": LoraOptions(4, 8.0), "learning_rate": 2e-2},
    "pairs, low-bit decoder": {
        "lora": LoraOptions(4, 8.0, ("q_proj", "v_proj", "down_proj")),
        "decoder": DecoderChoice(bits=4, group_size=32),
        "learning_rate": 2e-2,
        "first_token": "prefill",
    },
}


@pytest.mark.parametrize("case", CASES)
def test_a_trained_module_is_served_as_it_is(bench, tmp_path: Path, case: str) -> None:
    examples = examples_of(bench)
    chosen = options(**CASES[case])
    before = prepare(bench.base, examples, chosen, device=CPU).trainer.mean_loss(examples)
    reports = []
    train(bench.base, examples, chosen, tmp_path / "task", device=CPU, progress=reports.append)
    assert len(reports) == 20 and reports[-1].loss < reports[0].loss
    assert not (tmp_path / "task.training").exists()
    bits = chosen.decoder.bits or 16
    engine = DecodeEngine.from_pretrained(
        bench.base, bits=bits, group_size=chosen.decoder.group_size, dtype=torch.float32, memory="8MiB"
    )
    engine.add_model("task", tmp_path / "task")
    engine.add_model("base")
    assert engine.notices == ()
    # By the served module itself, the training loss went down.
    module = load_prefill_module("task", tmp_path / "task", base_path=bench.base, decode=engine.decode_module)
    assert module.first_token == chosen.first_token
    losses = response_losses(engine.decode_module, module, examples, chosen.first_token)
    after = sum(loss.total for loss in losses) / sum(loss.tokens for loss in losses)
    assert after < 0.7 * before
    prompt = [{"role": "user", "content": "sun 1?"}]
    answers = engine.generate(
        [prompt, prompt], model=["task", "base"], params=SamplingParams(temperature=0.0, max_tokens=8)
    )
    assert all(answer.error is None for answer in answers)
    assert answers[0].token_ids != answers[1].token_ids
    card = json.loads((tmp_path / "task" / "qsun_module.json").read_text())
    training = card["training"]
    assert card["first_token"] == chosen.first_token and training["steps"] == 20
    expected = "16-bit" if bits == 16 else f"W{bits}"
    assert training["decoder"]["quantization"].startswith(expected)


def test_training_and_serving_compute_one_loss(bench, tmp_path: Path) -> None:
    """The loss that training reports is the loss of the served module: the same model in both places."""
    examples = examples_of(bench)
    chosen = options(steps=5, decoder=DecoderChoice(bits=4, group_size=32))
    prepared = prepare(bench.base, examples, chosen, device=CPU)
    prepared.trainer.run()
    from qsun.training.output import write_prefill_module

    trainer = prepared.trainer
    write_prefill_module(
        tmp_path / "task", trainer.base, trainer.prefill, name="task", first_token="decode", facts={}
    )
    decode = load_decode_module(bench.base, bits=4, group_size=32, dtype=torch.float32, device="cpu")
    module = load_prefill_module("task", tmp_path / "task", base_path=bench.base, decode=decode)
    losses = response_losses(decode, module, examples, "decode")
    served = sum(loss.total for loss in losses) / sum(loss.tokens for loss in losses)
    assert served == pytest.approx(trainer.mean_loss(examples), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_keys_and_values_of_training_are_those_of_serving(bench, tmp_path: Path, dtype) -> None:
    """Same module, same prompt: in bfloat16 both lie equally close to the float32 values."""
    from qsun.training import forward as module_under_test

    chosen = options(steps=3, dtype=dtype)
    train(bench.base, examples_of(bench), chosen, tmp_path / "task", device=CPU)
    decode = load_decode_module(bench.base, bits=16, dtype=dtype, device="cpu")
    served = load_prefill_module("task", tmp_path / "task", base_path=bench.base, decode=decode)
    prompt = tuple(range(30, 70))
    n = len(prompt)

    cache = KVCache.allocate(decode.config, 4, 16, dtype, "cpu")
    positions = torch.arange(n)
    ctx = ForwardContext(positions, positions, PrefillAttention((PrefillChunk(0, n, 0, torch.arange(3)),)))
    served.stack.forward(decode.embed(torch.tensor(prompt)), ctx, cache)
    expected = [
        tuple(part.transpose(0, 1).reshape(part.shape[1], -1, part.shape[3])[:, :n] for part in kv)
        for kv in cache.layers
    ]

    from qsun.training.base import load_base, load_trained_stack
    from qsun.training.kernels import eager_kernels

    def training_kv(dtype):
        base = load_base(bench.base, dtype=dtype, device=CPU)
        stack = load_trained_stack(base, weights_dtype=torch.float32, source=tmp_path / "task")
        seen = []
        original = module_under_test.packed_attention

        def watch(q, k, v, plan, **arguments):
            seen.append((k.transpose(0, 1), v.transpose(0, 1)))
            return original(q, k, v, plan, **arguments)

        pack = Pack.of([Example(prompt, (1,))], method="full", first_token="decode")
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(module_under_test, "packed_attention", watch)
            forward(pack, base.frame, stack, None, eager_kernels())
        return seen

    exact = training_kv(torch.float32)
    for found, wanted, reference in zip(training_kv(dtype), expected, exact, strict=True):
        for mine, theirs, right in zip(found, wanted, reference, strict=True):
            if dtype == torch.float32:
                torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
            else:
                served_error = (theirs.float() - right).abs().max()
                assert (mine.float() - right).abs().max() <= 2 * served_error + 1e-6


@pytest.mark.parametrize("lora", [None, LoraOptions(4, 8.0)])
def test_the_frozen_decoder_stays_as_it_is_to_the_bit(bench, lora) -> None:
    prepared = prepare(bench.base, examples_of(bench), options(steps=3, lora=lora), device=CPU)
    trainer = prepared.trainer
    frozen = {
        f"{n}.{name}": t.clone() for n, layer in enumerate(trainer.decode.layers) for name, t in layer.named()
    }
    frame = [t.clone() for t in (trainer.base.frame.embed_tokens, trainer.base.frame.lm_head)]
    start = {name: t.detach().clone() for name, t in trainer.prefill.parameters().items()}
    trainer.run()
    for n, layer in enumerate(trainer.decode.layers):
        for name, tensor in layer.named():
            assert torch.equal(tensor, frozen[f"{n}.{name}"]) and tensor.grad is None
    assert torch.equal(trainer.base.frame.embed_tokens, frame[0])
    assert torch.equal(trainer.base.frame.lm_head, frame[1])
    changed = [name for name, t in trainer.prefill.parameters().items() if not torch.equal(t, start[name])]
    assert "layers.0.qkv" in changed or any(name.endswith("lora_B.weight") for name in changed)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*model.safetensors")))


@pytest.mark.parametrize("lora", [None, LoraOptions(4, 8.0)])
def test_an_interrupted_run_resumes_to_the_same_bits(bench, tmp_path: Path, lora) -> None:
    examples = examples_of(bench)
    chosen = options(steps=7, lora=lora, save_every=2)
    whole = train(bench.base, examples, chosen, tmp_path / "whole", device=CPU)
    steps = []
    stopped = train(
        bench.base, examples, chosen, tmp_path / "parts", device=CPU,
        progress=steps.append, should_stop=lambda: len(steps) == 3,
    )  # fmt: skip
    assert not stopped.finished and not (tmp_path / "parts").exists()
    with pytest.raises(ValueError, match="holds a run already"):
        train(bench.base, examples, chosen, tmp_path / "parts", device=CPU)
    with pytest.raises(CheckpointError, match=r"learning_rate is 0.003 there and 0.1 now"):
        train(
            bench.base, examples, options(steps=7, lora=lora, learning_rate=0.1), tmp_path / "parts",
            device=CPU, resume=True,
        )  # fmt: skip
    with pytest.raises(CheckpointError, match="of another run: data is"):
        train(bench.base, examples[1:], chosen, tmp_path / "parts", device=CPU, resume=True)
    resumed = train(bench.base, examples, chosen, tmp_path / "parts", device=CPU, resume=True)
    assert resumed.losses == whole.losses
    first, second = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_a_loss_that_is_no_number_leaves_the_last_checkpoint(bench, tmp_path: Path) -> None:
    chosen = options(steps=50, learning_rate=1e18, clip=0.0, warmup=0.0, save_every=1, schedule="constant")
    with pytest.raises(TrainingStopped, match=r"step \d+: the loss is .*the last good checkpoint is .*step-"):
        train(bench.base, examples_of(bench), chosen, tmp_path / "task", device=CPU)
    kept = latest(tmp_path / "task.training")
    assert kept is not None and state_module.load_state(kept).weights
    assert not (tmp_path / "task").exists()


def test_a_full_disk_leaves_the_last_checkpoint(bench, tmp_path: Path, monkeypatch) -> None:
    import safetensors.torch

    real, calls = safetensors.torch.save_file, []

    def full(tensors, path, **more):
        calls.append(path)
        if len(calls) > 3:  # the second checkpoint's optimizer
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(tensors, path, **more)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(TrainingStopped, match=r"No space left.*the last good one is .*step-00000002"):
        train(bench.base, examples_of(bench), options(steps=6, save_every=2), tmp_path / "task", device=CPU)
    monkeypatch.undo()
    folder = tmp_path / "task.training"
    assert [path.name for path in folder.iterdir()] == ["step-00000002"]
    assert train(
        bench.base, examples_of(bench), options(steps=6, save_every=2), tmp_path / "task", device=CPU,
        resume=True,
    ).finished  # fmt: skip


def test_a_damaged_state_is_named(bench, tmp_path: Path) -> None:
    chosen = options(steps=4, save_every=1)
    steps = []
    train(
        bench.base, examples_of(bench), chosen, tmp_path / "task", device=CPU,
        progress=steps.append, should_stop=lambda: len(steps) == 2,
    )  # fmt: skip
    path = latest(tmp_path / "task.training") / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors cannot be read"):
        train(bench.base, examples_of(bench), chosen, tmp_path / "task", device=CPU, resume=True)


def test_accumulation_is_one_large_pack(bench) -> None:
    examples = examples_of(bench)
    grads = []
    for pack_tokens in (20, 100_000):
        trainer = prepare(bench.base, examples, options(pack_tokens=pack_tokens), device=CPU).trainer
        loss = trainer.backward(examples)
        grads.append((loss, {n: t.grad for n, t in trainer.prefill.parameters().items()}))
    assert grads[0][0] == pytest.approx(grads[1][0], rel=1e-6)
    for name, grad in grads[0][1].items():
        other = grads[1][1][name]
        if grad is None:
            assert other is None
        else:
            torch.testing.assert_close(grad, other, rtol=0, atol=1e-5 * float(other.abs().max()) + 1e-9)


@pytest.mark.parametrize("lora", [None, LoraOptions(4, 8.0)])
def test_full_fine_tuning_gives_a_model_of_its_own(bench, tmp_path: Path, lora) -> None:
    """The baseline serves as a decoder, and as the prefill module of the naive combination."""
    from transformers import AutoModelForCausalLM

    examples = examples_of(bench)
    chosen = options(method="full", lora=lora, learning_rate=3e-3 if lora is None else 2e-2)
    train(bench.base, examples, chosen, tmp_path / "tuned", device=CPU)
    tuned = DecodeEngine.from_pretrained(tmp_path / "tuned", bits=16, dtype=torch.float32, memory="8MiB")
    tuned.add_model("tuned")
    naive = DecodeEngine.from_pretrained(bench.base, bits=16, dtype=torch.float32, memory="8MiB")
    naive.add_model("naive", tmp_path / "tuned")
    assert naive.notices == ()
    # What was written is what was trained: pairs merged with their scale.
    trainer = prepare(bench.base, examples, chosen, device=CPU).trainer
    trainer.run()
    module = load_prefill_module("tuned", base_path=tmp_path / "tuned", decode=tuned.decode_module)
    losses = response_losses(tuned.decode_module, module, examples, "decode")
    served = sum(loss.total for loss in losses) / sum(loss.tokens for loss in losses)
    assert served == pytest.approx(trainer.mean_loss(examples), rel=1e-4)
    prompt = [{"role": "user", "content": "moon 2?"}]
    params = SamplingParams(temperature=0.0, max_tokens=6)
    answer = tuned.generate(prompt, model="tuned", params=params)[0]
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", dtype=torch.float32)
    ids = torch.tensor([answer.prompt_token_ids])
    expected = hf.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    assert list(answer.token_ids) == expected.tolist()
    assert naive.generate(prompt, model="naive", params=params)[0].error is None


def test_pairs_are_read_by_peft(bench, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    chosen = options(lora=LoraOptions(4, 8.0), learning_rate=2e-2, steps=6)
    prepared = prepare(bench.base, examples_of(bench), chosen, device=CPU)
    prepared.trainer.run()
    from qsun.training.kernels import eager_kernels
    from qsun.training.output import write_prefill_module

    trainer = prepared.trainer
    write_prefill_module(
        tmp_path / "task", trainer.base, trainer.prefill, name="task", first_token="decode", facts={}
    )
    hf = AutoModelForCausalLM.from_pretrained(bench.base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(hf, tmp_path / "task").eval()
    example = examples_of(bench)[0]
    with torch.no_grad():
        ids = torch.tensor([[*example.prompt, *example.response[:-1]]])
        expected = model(ids).logits[0, len(example.prompt) - 1 :]
        pack = Pack.of([example], method="full", first_token="decode")
        hidden = forward(pack, trainer.base.frame, trainer.prefill, None, eager_kernels())
    got = hidden @ trainer.base.frame.lm_head.T
    torch.testing.assert_close(got, expected, rtol=0, atol=5e-5)


def test_a_module_of_one_decoder_is_refused_by_another(bench, tmp_path: Path) -> None:
    train(bench.base, examples_of(bench), options(steps=1), tmp_path / "task", device=CPU)
    engine = DecodeEngine.from_pretrained(bench.other, bits=16, dtype=torch.float32, memory="8MiB")
    with pytest.raises(IncompatibleModule, match=r"does not fit the decode module: base is 'sha256:"):
        engine.add_model("task", tmp_path / "task")


def test_no_examples_are_named(bench) -> None:
    with pytest.raises(ValueError, match="examples is empty, expected at least one"):
        prepare(bench.base, [], options(), device=CPU)


def test_a_teacher_of_another_base_is_refused(bench) -> None:
    with pytest.raises(IncompatibleModule, match=r"teacher .* does not fit the base .*: base is 'sha256:"):
        prepare(bench.base, examples_of(bench), options(teacher=str(bench.other)), device=CPU)


def test_what_else_lies_in_the_folder_of_a_run_stays(bench, tmp_path: Path) -> None:
    state = tmp_path / "mine"
    (state / "step-notes").mkdir(parents=True)
    (state / "thesis.txt").write_text("x")
    train(
        bench.base, examples_of(bench), options(steps=2, save_every=1), tmp_path / "task", device=CPU,
        state=state, resume=True,
    )  # fmt: skip
    assert sorted(path.name for path in state.iterdir()) == ["step-notes", "thesis.txt"]


def test_calibration_texts_and_fusing_are_part_of_the_run() -> None:
    facts = [
        options(compiled=compiled, decoder=DecoderChoice(bits=4, quantizer="awq", calibration=texts)).facts()
        for compiled, texts in ((False, [[1, 2]]), (False, [[1, 3]]), (True, [[1, 2]]))
    ]
    assert facts[0] != facts[1] and facts[0] != facts[2]
    assert facts[0] == options(decoder=DecoderChoice(bits=4, quantizer="awq", calibration=[(1, 2)])).facts()


def test_a_decoder_of_another_base_is_refused(bench) -> None:
    with pytest.raises(IncompatibleModule, match=r"decoder .* does not fit the base .*: base is 'sha256:"):
        prepare(bench.base, examples_of(bench), options(decoder=DecoderChoice(bench.other)), device=CPU)


@pytest.mark.parametrize("teacher", ["base", "tuned"])
def test_distillation_from_a_teacher(bench, tmp_path: Path, teacher: str) -> None:
    examples = examples_of(bench)
    source = "base"
    if teacher == "tuned":
        train(bench.base, examples, options(method="full"), tmp_path / "tuned", device=CPU)
        source = str(tmp_path / "tuned")
    chosen = options(teacher=source, distillation=Distillation(1.0), steps=20)
    trainer = prepare(bench.base, examples, chosen, device=CPU).trainer
    first = trainer.backward(examples)
    for tensor in trainer.prefill.parameters().values():
        tensor.grad = None
    trainer.run()
    last = trainer.backward(examples)
    if teacher == "base":  # the untrained module is its teacher already
        assert first == pytest.approx(0, abs=1e-5)
    else:
        assert last < 0.5 * first


def test_two_seeds_are_two_orders_and_one_seed_is_one(bench, tmp_path: Path) -> None:
    examples = examples_of(bench)
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(bench.base, examples, options(steps=3, seed=seed), tmp_path / name, device=CPU)
        found.append(weights_of(tmp_path / name))
    first, again, other = found
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": "half"}, "method is 'half'"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"warmup": 1.0}, "warmup is 1.0"),
        ({"dtype": torch.float16}, "gradients underflow"),
        ({"method": "full", "decoder": DecoderChoice(bits=4)}, "expected none for method 'full'"),
        ({"method": "full", "first_token": "prefill"}, "expected 'decode' for method 'full'"),
    ],
)
def test_bad_options_are_named(changes, says) -> None:
    with pytest.raises(ValueError, match=says):
        options(**changes)


def test_an_existing_target_is_left_alone(bench, tmp_path: Path) -> None:
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="exists already"):
        train(bench.base, examples_of(bench), options(steps=1), tmp_path / "task", device=CPU)
    assert [path.name for path in (tmp_path / "task").iterdir()] == ["mine.txt"]
    shutil.rmtree(tmp_path / "task")
