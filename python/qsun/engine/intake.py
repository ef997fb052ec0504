"""From what a caller submits to a checked `Request`; nothing is changed before everything is checked."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping
from collections.abc import Sequence as Items
from numbers import Integral
from typing import Any, TypeAlias

import torch
from torch import Tensor

from qsun.core import FirstToken, Request, SamplingParams
from qsun.engine.swap import finite_values
from qsun.errors import RequestError
from qsun.kv_cache.block_tables import blocks_for
from qsun.models.config import ModelConfig

__all__ = ["ChatMessage", "Limits", "Prompt", "check_given_kv", "make_request", "split_prompts", "tokenize"]

ChatMessage: TypeAlias = Mapping[str, Any]
# Text, token ids, or the messages of a chat.
Prompt: TypeAlias = str | Items[int] | Items[ChatMessage]


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What a request must fit into."""

    vocab_size: int
    max_model_len: int
    block_size: int
    num_blocks: int


def split_prompts(prompts: Any) -> list[Prompt]:
    """One prompt or a list of prompts, as a list of prompts.

    Raises RequestError when it is neither.
    """
    if isinstance(prompts, str) or _is_token_ids(prompts) or _is_chat(prompts):
        return [prompts]
    if isinstance(prompts, (list, tuple)):
        return list(prompts)
    raise RequestError(
        f"prompts must be a prompt or a list of prompts (text, token ids, chat messages), got {prompts!r}"
    )


def _is_token_ids(value: Any) -> bool:
    if isinstance(value, Tensor):
        return True
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], Integral)


def _is_chat(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], Mapping)


def tokenize(prompt: Any, tokenizer: Any) -> tuple[int, ...]:
    """Token ids of a prompt: text as the tokenizer encodes it, a chat through its template, ids as they are.

    Raises RequestError when the prompt is of another kind, is empty, or needs what the tokenizer lacks.
    """
    expected = "prompt must be text, token ids or chat messages"
    ids: list[Any]
    if isinstance(prompt, str) or _is_chat(prompt):
        if tokenizer is None:
            raise RequestError(f"{expected}, got {prompt!r}, but the model has no tokenizer: give token ids")
        ids = _encode(prompt, tokenizer)
    elif isinstance(prompt, Tensor):
        if (
            prompt.dim() != 1
            or prompt.is_floating_point()
            or prompt.is_complex()
            or prompt.dtype == torch.bool
        ):
            raise RequestError(f"{expected}, got a {prompt.dtype} tensor of shape {tuple(prompt.shape)}")
        ids = prompt.tolist()
    elif isinstance(prompt, (list, tuple)):
        ids = list(prompt)
    else:
        raise RequestError(f"{expected}, got {prompt!r}")
    if not ids:
        raise RequestError("prompt is empty, expected at least one token")
    for index, token in enumerate(ids):
        if isinstance(token, bool) or not isinstance(token, Integral):
            raise RequestError(f"prompt token {index} is {token!r}, expected an integer")
    # numpy's integers, too, are plain ones from here on.
    return tuple(map(int, ids))


def _encode(prompt: str | Items[ChatMessage], tokenizer: Any) -> list[int]:
    if isinstance(prompt, str):
        try:
            return [int(token) for token in tokenizer.encode(prompt)]
        except Exception as failure:  # half of a surrogate pair, for one, is no character
            raise RequestError(f"prompt is text that the tokenizer refuses: {failure}") from failure
    for index, message in enumerate(prompt):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise RequestError(f"chat message {index} is {message!r}, expected a dict with role and content")
    if not getattr(tokenizer, "chat_template", None):
        raise RequestError("prompt is a chat, but the tokenizer has no chat template: give text or token ids")
    try:
        ids = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, return_dict=False)
    except Exception as failure:  # a template is a program that raises what it likes
        raise RequestError(f"prompt is a chat that the tokenizer's template refuses: {failure}") from failure
    return [int(token) for token in ids]


def make_request(
    request_id: str,
    model: str,
    prompt: tuple[int, ...],
    params: Any,
    arrival: int,
    limits: Limits,
    tokenizer: Any,
) -> Request:
    """Check a tokenized prompt and its parameters against what the engine can do.

    Raises RequestError naming the argument, with the numbers.
    """
    if params is None:
        params = SamplingParams()
    if not isinstance(params, SamplingParams):
        raise RequestError(f"params must be SamplingParams or None, got {params!r}")
    vocabulary = f"0..{limits.vocab_size - 1} (the vocabulary)"
    for index, token in enumerate(prompt):
        if not 0 <= token < limits.vocab_size:
            raise RequestError(f"prompt token {index} is {token}, expected an id in {vocabulary}")
    for token in params.stop_token_ids:
        if token >= limits.vocab_size:
            raise RequestError(f"stop_token_ids has {token}, expected ids in {vocabulary}")
    if params.stop and tokenizer is None:
        raise RequestError(f"stop is {params.stop!r}, but the model has no tokenizer: use stop_token_ids")
    length = len(prompt)
    if length >= limits.max_model_len:
        raise RequestError(
            f"prompt has {length} tokens, expected at most {limits.max_model_len - 1}"
            f" (max_model_len {limits.max_model_len}, less one for the answer)"
        )
    max_tokens = min(params.max_tokens, limits.max_model_len - length)
    if params.min_tokens > max_tokens:
        raise RequestError(
            f"min_tokens is {params.min_tokens}, but {length} prompt tokens leave room for {max_tokens}"
            f" (max_model_len {limits.max_model_len})"
        )
    # The last token is never read again, so its keys and values are never written.
    needed = blocks_for(length + max_tokens - 1, limits.block_size)
    if needed > limits.num_blocks:
        raise RequestError(
            f"prompt of {length} tokens with max_tokens {max_tokens} needs {needed} cache blocks of"
            f" {limits.block_size} tokens, expected at most {limits.num_blocks}: it could never run; ask for"
            " fewer tokens or give the engine more memory"
        )
    seed = secrets.randbits(64) if params.seed is None else params.seed
    return Request(request_id, model, prompt, params, arrival, seed, max_tokens)


def check_given_kv(
    k: Any,
    v: Any,
    next_token: Any,
    prompt: tuple[int, ...],
    first_token: FirstToken,
    *,
    model: str,
    config: ModelConfig,
    dtype: torch.dtype,
) -> None:
    """Check KV that comes with a request against the model's shape and its first-token convention.

    Raises RequestError naming the argument, what was got and what is expected.
    """
    length = len(prompt) - (first_token == "decode")
    convention = f"model {model!r} has first_token={first_token!r}"
    if length < 1:
        raise RequestError(
            f"prompt has {len(prompt)} tokens, of which none has KV of its own ({convention}): use submit"
        )
    expected = (config.num_layers, length, config.num_kv_heads, config.head_dim)
    for name, values in (("k", k), ("v", v)):
        if not isinstance(values, Tensor):
            raise RequestError(f"{name} must be a tensor of shape {expected}, got {type(values).__name__}")
        if tuple(values.shape) != expected:
            raise RequestError(
                f"{name} has shape {tuple(values.shape)}, expected {expected}: (num_layers, positions,"
                f" num_kv_heads, head_dim) for {len(prompt)} prompt tokens, as {convention}"
            )
        if values.dtype != dtype:
            raise RequestError(f"{name} has dtype {values.dtype}, expected {dtype}, which the cache takes")
        problem = finite_values(name, values)
        if problem is not None:
            raise RequestError(problem)
    if isinstance(next_token, bool) or not isinstance(next_token, int):
        raise RequestError(f"next_token must be a token id, got {next_token!r}")
    if not 0 <= next_token < config.vocab_size:
        raise RequestError(f"next_token is {next_token}, expected an id in 0..{config.vocab_size - 1}")
    if first_token == "decode" and next_token != prompt[-1]:
        raise RequestError(
            f"next_token is {next_token}, expected {prompt[-1]}: {convention}, so the decode module reads the"
            " last prompt token next"
        )
