"""The two-module forward against the engine's path, and its gradients against finite differences."""

from __future__ import annotations

import copy
import random
from dataclasses import replace

import pytest
import torch

from qsun.modules.decode import load_decode_module
from qsun.training.base import DecoderChoice, load_base, load_frozen_decoder, load_trained_stack
from qsun.training.batch import Example, Pack
from qsun.training.forward import forward
from qsun.training.kernels import eager_kernels
from qsun.training.loss import Distillation, Teacher, response_loss, token_losses

CPU = torch.device("cpu")
KINDS = ["llama", "qwen2", "qwen3", "mistral"]
# Logits reach 10 to 20; two orders of float32 summation differ by some units in the last place of each layer.
TOLERANCE = 3e-5


def examples(seed: int = 0) -> list[Example]:
    """Prompts and answers of every kind of length: one token, less and more than a window of 8."""
    draw = random.Random(seed)
    shapes = [(1, 1), (1, 5), (7, 1), (2, 2), (12, 9), (25, 14), (9, 3)]
    return [
        Example(
            tuple(draw.randrange(3, 96) for _ in range(N)), tuple(draw.randrange(3, 96) for _ in range(R))
        )
        for N, R in shapes
    ]


def loaded(path, task_path=None, *, dtype=torch.float32, bits=16):
    base = load_base(path, dtype=dtype, device=CPU)
    decode, _ = load_frozen_decoder(base, DecoderChoice(bits=bits))
    prefill = load_trained_stack(
        base, weights_dtype=torch.promote_types(dtype, torch.float32), source=task_path
    )
    return base, prefill, decode


def logits_of(base, prefill, decode, pack, **options):
    hidden = forward(pack, base.frame, prefill, decode, eager_kernels(), **options)
    return torch.nn.functional.linear(hidden, base.frame.lm_head)


def engine_logits(paged, decode, stack, example: Example, first_token: str) -> torch.Tensor:
    """Logits that predict the answer, as the engine computes them: prompt by the task, one token a step."""
    sequence = paged(decode, length=64)
    N = len(example.prompt)
    cut = N - 1 if first_token == "decode" else N
    found = []
    if cut:
        found.append(sequence.prefill(example.prompt[:cut], stack)[-1:])
    rest = (*example.prompt, *example.response[:-1])[cut:]
    steps = [sequence.step(token) for token in rest]
    return torch.cat(([] if first_token == "decode" else found) + steps)


@pytest.mark.parametrize("first_token", ["decode", "prefill"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [16, 4])
def test_logits_equal_those_of_the_engine(tiny, paged, kind, first_token, bits):
    path, task = tiny(kind).path, tiny(kind, seed=5).path
    base, prefill, decoder = loaded(path, task, bits=bits)
    decode = load_decode_module(path, dtype=torch.float32, device="cpu", bits=bits)
    module = load_any(task, path, decode)
    pack = Pack.of(examples(), method="sun", first_token=first_token)
    with torch.no_grad():
        got = logits_of(base, prefill, decoder, pack)
    expected = torch.cat([engine_logits(paged, decode, module, e, first_token) for e in examples()])
    assert expected.abs().max() > 3
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


def load_any(task, base, decode):
    """The stack of another random model, which as a stranger to the base no loader would accept."""
    return load_decode_module(task, dtype=torch.float32, device="cpu").stack


def naive_gradients(task_hf, base_hf, example: Example, first_token: str):
    """Two passes of transformers, one after the other, with autograd through the cache between them."""
    from transformers import DynamicCache

    task, base = copy.deepcopy(task_hf), base_hf
    cache = DynamicCache(config=base.config)
    N = len(example.prompt)
    cut = N - 1 if first_token == "decode" else N
    logits = []
    if cut:
        hidden = task.model(
            inputs_embeds=base.model.embed_tokens(torch.tensor([example.prompt[:cut]])),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        if first_token == "prefill":
            logits.append(base.lm_head(hidden[:, -1:]))
    rest = (*example.prompt, *example.response[:-1])[cut:]
    if rest:
        logits.append(base(torch.tensor([rest]), past_key_values=cache, use_cache=True).logits)
    loss = torch.nn.functional.cross_entropy(
        torch.cat(logits, 1)[0], torch.tensor(example.response), reduction="sum"
    )
    loss.backward()
    return loss.detach(), task


@pytest.mark.parametrize("first_token", ["decode", "prefill"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_gradients_equal_two_passes_of_transformers(tiny, kind, first_token):
    plain = {"use_sliding_window": False} if kind == "qwen2" else {}
    model, other = tiny(kind, **plain), tiny(kind, seed=5, **plain)
    base, prefill, decode = loaded(model.path, other.path)
    prefill.require_grad()
    some = [e for e in examples() if len(e.prompt) > 1][:3]
    pack = Pack.of(some, method="sun", first_token=first_token)
    hidden = forward(pack, base.frame, prefill, decode, eager_kernels())
    loss = response_loss(hidden, base.frame.lm_head, pack.targets)
    loss.backward()
    base_hf = copy.deepcopy(model.hf).requires_grad_(False)
    totals: dict[str, torch.Tensor] = {}
    expected_loss = torch.zeros(())
    for example in some:
        one, task = naive_gradients(other.hf, base_hf, example, first_token)
        expected_loss += one
        for name, parameter in task.named_parameters():
            if parameter.grad is not None:
                totals[name] = totals.get(name, 0) + parameter.grad
    torch.testing.assert_close(loss.detach(), expected_loss, rtol=1e-5, atol=0)
    compared = 0
    sizes = {"qkv": ("self_attn", ["q", "k", "v"]), "gate_up": ("mlp", ["gate", "up"])}
    for layer in range(3):
        tensors, prefix = prefill.layers[layer], f"model.layers.{layer}"
        last_is_unread = first_token == "decode" and layer == 2
        for joint, (part, names) in sizes.items():
            wanted = [totals.get(f"{prefix}.{part}.{name}_proj.weight") for name in names]
            if last_is_unread and joint == "gate_up":
                assert tensors.gate_up.grad is None and all(w is None or not w.any() for w in wanted)
                continue
            shapes = [other.hf.get_parameter(f"{prefix}.{part}.{n}_proj.weight") for n in names]
            grads = [torch.zeros_like(s) if w is None else w for s, w in zip(shapes, wanted, strict=True)]
            found = getattr(tensors, joint).grad
            scale = max(float(g.abs().max()) for g in grads)
            torch.testing.assert_close(found, torch.cat(grads), rtol=0, atol=2e-5 * scale)
            compared += 1
        norm = totals[f"{prefix}.input_layernorm.weight"]
        scale = float(norm.abs().max())
        torch.testing.assert_close(tensors.attention_norm.grad, norm, rtol=0, atol=2e-5 * scale)
    assert compared >= 5
    assert all(tensor.grad is None for layer in decode.layers for _, tensor in layer.named())


@pytest.mark.parametrize("first_token", ["decode", "prefill"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_finite_differences_in_float64(tiny, kind, first_token):
    base, prefill, decode = loaded(tiny(kind).path, tiny(kind, seed=5).path, dtype=torch.float64, bits=3)
    prefill.require_grad()
    pack = Pack.of(examples(3), method="sun", first_token=first_token)

    def loss() -> torch.Tensor:
        hidden = forward(pack, base.frame, prefill, decode, eager_kernels())
        return response_loss(hidden, base.frame.lm_head, pack.targets)

    loss().backward()
    generator = torch.Generator().manual_seed(9)
    for name, tensor in prefill.parameters().items():
        if tensor.grad is None:
            assert first_token == "decode" and (name == "norm" or name.startswith("layers.2."))
            continue
        direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        direction /= direction.norm()
        step = 1e-5
        with torch.no_grad():
            tensor += step * direction
            above = loss()
            tensor -= 2 * step * direction
            below = loss()
            tensor += step * direction
        numeric = float((above - below) / (2 * step))
        analytic = float((tensor.grad * direction).sum())
        assert analytic == pytest.approx(numeric, rel=1e-5, abs=1e-6 * float(tensor.grad.norm() + 1)), name


def test_a_mask_one_position_off_is_noticed(tiny, paged, monkeypatch):
    """The comparison with the engine has the power to see one key too few."""
    from qsun.training import attention

    def shifted(q, k, v, *, scale, window):
        length = q.shape[2]
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
        mask = (distance >= 1) | (torch.arange(length)[:, None] + torch.arange(length)[None, :] == 0)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)

    monkeypatch.setattr(attention, "_attend", shifted)
    with pytest.raises(AssertionError, match="not close"):
        test_logits_equal_those_of_the_engine(tiny, paged, "llama", "decode", 16)


@pytest.mark.parametrize("wrong", ["all by the task", "all by the decoder"])
def test_the_naive_forward_is_noticed(tiny, paged, wrong):
    """One module for all positions is another model: what ordinary fine-tuning would train."""
    path, task = tiny("llama").path, tiny("llama", seed=5).path
    base, prefill, decoder = loaded(path, task)
    decode = load_decode_module(path, dtype=torch.float32, device="cpu")
    module = load_any(task, path, decode)
    pack = Pack.of(examples(), method="full", first_token="decode")
    with torch.no_grad():
        got = logits_of(base, prefill if wrong == "all by the task" else decoder, None, pack)
    expected = torch.cat([engine_logits(paged, decode, module, e, "decode") for e in examples()])
    assert (got - expected).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_full_fine_tuning_is_the_model_itself(tiny, kind):
    model = tiny(kind)
    base, prefill, _ = loaded(model.path)
    some = examples()
    with torch.no_grad():
        got = logits_of(base, prefill, None, Pack.of(some, method="full", first_token="decode"))
        expected = [
            model.hf(torch.tensor([[*e.prompt, *e.response[:-1]]])).logits[0, len(e.prompt) - 1 :]
            for e in some
        ]
    torch.testing.assert_close(got, torch.cat(expected), rtol=0, atol=TOLERANCE)


def test_examples_of_a_pack_do_not_touch_each_other(tiny):
    base, prefill, decode = loaded(tiny("mistral").path, tiny("mistral", seed=5).path)
    some = examples()
    with torch.no_grad():
        together = logits_of(base, prefill, decode, Pack.of(some, method="sun", first_token="prefill"))
        alone = [
            logits_of(base, prefill, decode, Pack.of([e], method="sun", first_token="prefill")) for e in some
        ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("method", ["sun", "full"])
def test_checkpointing_changes_no_bit(tiny, method):
    base, prefill, decode = loaded(tiny("qwen3").path)
    prefill.require_grad()
    pack = Pack.of(examples(), method=method, first_token="decode")
    found = []
    for checkpointing in (False, True):
        for tensor in prefill.parameters().values():
            tensor.grad = None
        hidden = forward(
            pack,
            base.frame,
            prefill,
            decode if method == "sun" else None,
            eager_kernels(),
            checkpointing=checkpointing,
        )
        loss = response_loss(hidden, base.frame.lm_head, pack.targets)
        loss.backward()
        found.append([loss.detach(), *(t.grad for t in prefill.parameters().values())])
    for plain, saved in zip(*found, strict=True):
        assert (plain is None and saved is None) or torch.equal(plain, saved)


def test_checkpointing_keeps_little_and_computes_twice(tiny):
    base, prefill, decode = loaded(tiny("llama").path)
    prefill.require_grad()
    pack = Pack.of(examples(), method="sun", first_token="decode")
    eager, kept = eager_kernels(), {}
    for checkpointing in (False, True):
        calls, saved = [], []

        def gate(x, calls=calls):
            calls.append(x.shape)
            return eager.gate(x)

        def keep(tensor, saved=saved):
            saved.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden = forward(
                pack, base.frame, prefill, decode, replace(eager, gate=gate), checkpointing=checkpointing
            )
        hidden.sum().backward()
        kept[checkpointing] = sum(saved), len(calls)
    # Two modules in three layers, but for the prompt's part of the last one, which nothing reads.
    assert kept[False][1] == 5 and kept[True][1] == 10
    assert kept[True][0] < 0.2 * kept[False][0]


def test_a_pack_says_which_rows_belong_to_whom():
    some = [Example((5, 6, 7), (8, 9)), Example((4,), (3,))]
    pack = Pack.of(some, method="sun", first_token="decode")
    assert pack.split == 2 and pack.tokens.tolist() == [5, 6, 7, 8, 4]
    assert pack.positions.tolist() == [0, 1, 2, 3, 0]
    assert pack.predicting.tolist() == [2, 3, 4] and pack.targets.tolist() == [8, 9, 3]
    assert not pack.needs_prefill_output
    pack = Pack.of(some, method="sun", first_token="prefill")
    assert pack.split == 4 and pack.tokens.tolist() == [5, 6, 7, 4, 8]
    assert pack.predicting.tolist() == [2, 4, 3] and pack.needs_prefill_output
    assert Pack.of(some, method="full", first_token="decode").split == 5
    with pytest.raises(ValueError, match=r"examples\[0\] has 0 prompt"):
        Pack.of([Example((), (1,))], method="sun", first_token="decode")


def test_token_losses_sum_to_the_loss(tiny, monkeypatch):
    from qsun.training import loss as module

    generator = torch.Generator().manual_seed(0)
    hidden, lm_head = torch.randn(23, 16, generator=generator), torch.randn(50, 16, generator=generator)
    targets = torch.randint(0, 50, (23,), generator=generator)
    whole = hidden.clone().requires_grad_(True)
    expected = torch.nn.functional.cross_entropy(whole @ lm_head.T, targets, reduction="sum")
    expected.backward()
    for limit in (module.LOGIT_BYTES, 4 * 50 * 7):  # all at once, and in chunks of seven rows
        monkeypatch.setattr(module, "LOGIT_BYTES", limit)
        mine = hidden.clone().requires_grad_(True)
        loss = response_loss(mine, lm_head, targets)
        (2 * loss).backward()
        torch.testing.assert_close(loss.detach(), expected.detach())
        torch.testing.assert_close(mine.grad, 2 * whole.grad)
        torch.testing.assert_close(token_losses(hidden, lm_head, targets).sum(), expected.detach())


@pytest.mark.parametrize(("weight", "temperature"), [(0.3, 1.0), (1.0, 2.0)])
def test_distillation_against_its_formula(weight, temperature):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(9, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    guide = torch.randn(9, 16, generator=generator, dtype=torch.float64)
    lm_head = torch.randn(20, 16, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 20, (9,), generator=generator)
    teacher = Teacher(guide, lm_head, Distillation(weight, temperature))
    loss = response_loss(hidden, lm_head, targets, teacher=teacher)
    p = torch.softmax(hidden @ lm_head.T / temperature, -1)
    q = torch.softmax(guide @ lm_head.T / temperature, -1)
    divergence = (q * (q / p).log()).sum() * temperature**2
    plain = -torch.log_softmax(hidden @ lm_head.T, -1)[torch.arange(9), targets].sum()
    expected = (1 - weight) * plain + weight * divergence
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(value, hidden, retain_graph=True)[0] for value in (loss, expected))
    )
    for name, value in (("weight", 1.5), ("temperature", 0.0)):
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            Distillation(**{name: value})
