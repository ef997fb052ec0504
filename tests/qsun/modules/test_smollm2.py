"""SmolLM2-135M-Instruct from its GGUF file, held against transformers' own reading of the same file."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from qsun.checkpoint.tokenizer import load_tokenizer
from qsun.modules.decode import load_decode_module
from qsun.modules.export import export_quantized
from qsun.modules.prefill import load_prefill_module

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    # One worker reads the file, once.
    pytest.mark.xdist_group("smollm2"),
    pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the package gguf is not installed"),
]

QUESTIONS = ["What is the capital of France?", "Write a haiku about rain."]


@pytest.fixture(scope="module")
def tokenizer(smollm2_gguf):
    return load_tokenizer(smollm2_gguf)


@pytest.fixture(scope="module")
def prompts(tokenizer) -> list[list[int]]:
    return [
        tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)[
            "input_ids"
        ]
        for question in QUESTIONS
    ]


def test_greedy_answers_equal_transformers_token_for_token(
    paged, prompts, smollm2_gguf, smollm2_by_transformers
):
    decode = load_decode_module(smollm2_gguf, dtype=torch.float32, device="cpu")
    assert decode.config.eos_token_ids == (2,)
    for prompt in prompts:
        expected = smollm2_by_transformers.generate(
            torch.tensor([prompt]), max_new_tokens=16, min_new_tokens=16, do_sample=False, pad_token_id=0
        )[0, len(prompt) :].tolist()
        # min_new_tokens forbids the end token there; the lm_head here is tied, so its row is masked in the
        # logits.
        sequence, tokens = paged(decode, length=len(prompt) + 20, block_size=16), []
        logits = sequence.prefill(prompt)[-1]
        for _ in range(16):
            logits[2] = -torch.inf
            tokens.append(int(logits.argmax()))
            logits = sequence.step(tokens[-1])[-1]
        assert tokens == expected


def test_four_bits_answer_sensibly_and_survive_an_export(paged, prompts, tokenizer, smollm2_gguf, tmp_path):
    decode = load_decode_module(smollm2_gguf, bits=4, dtype=torch.bfloat16, device="cpu")
    assert str(decode.quantization) == "W4 g64 symmetric"
    length = len(prompts[0]) + 10
    tokens = paged(decode, length=length, block_size=16).greedy(prompts[0], 7)
    assert "Paris" in tokenizer.decode(tokens)
    export_quantized(smollm2_gguf, tmp_path / "q", bits=4, dtype=torch.bfloat16, device="cpu")
    exported = load_decode_module(tmp_path / "q", device="cpu")
    assert exported.fingerprint == decode.fingerprint
    assert exported.fingerprint.tokenizer is not None
    assert paged(exported, length=length, block_size=16).greedy(prompts[0], 7) == tokens
    assert load_tokenizer(tmp_path / "q").encode(QUESTIONS[1]) == tokenizer.encode(QUESTIONS[1])
    assert json.loads((tmp_path / "q" / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    # The 16-bit file as the prefill module of the exported decode module.
    assert load_prefill_module("base", None, base_path=smollm2_gguf, decode=exported).notices == ()
