"""Training data: JSON lines, each a chat or a prompt with its response, as token ids."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, get_args

from qsun.errors import QsunError
from qsun.training.batch import Example

OnBadData = Literal["stop", "skip"]
OnLong = Literal["drop", "truncate"]

ON_BAD_DATA: tuple[OnBadData, ...] = get_args(OnBadData)
ON_LONG: tuple[OnLong, ...] = get_args(OnLong)

EXPECTED = 'an object with "messages" (the last one of the assistant) or "prompt" and "response"'


class DataError(QsunError):
    """A line of a data file is no example; the message names file and line."""


@dataclass(slots=True)
class DataReport:
    """What became of the lines: examples used, and what was left out and why.

    bad: "file:line: reason" of every damaged line.  dropped: examples longer than allowed; truncated: those
    that were cut at the end of the response.  digest: SHA-256 over all token ids, in order.
    """

    examples: int = 0
    bad: list[str] = field(default_factory=list)
    dropped: int = 0
    truncated: int = 0
    prompt_tokens: int = 0
    response_tokens: int = 0
    digest: str = ""

    def facts(self) -> dict[str, Any]:
        """For the module card."""
        return {
            "examples": self.examples,
            "bad_lines": len(self.bad),
            "dropped_as_too_long": self.dropped,
            "truncated": self.truncated,
            "prompt_tokens": self.prompt_tokens,
            "response_tokens": self.response_tokens,
            "sha256": self.digest,
        }


def load_examples(
    paths: Sequence[Path],
    tokenizer: Any,
    *,
    max_length: int,
    vocab_size: int,
    on_bad_data: OnBadData = "stop",
    on_long: OnLong = "drop",
) -> tuple[list[Example], DataReport]:
    """Read and tokenise every line of the files, in order.

    A line is {"messages": [...]}, through the tokenizer's chat template and split before the last assistant
    turn; {"prompt": text, "response": text}; or {"prompt": [ids], "response": [ids]}, taken as it is.  Text
    prompts are encoded with the tokenizer's own beginning, responses without one and with its end.  A file
    whose name ends in .gz is decompressed.

    tokenizer: None where every line holds ids.  max_length: most positions of an example.
    on_bad_data: "stop" raises DataError at the first damaged line, "skip" reports it and goes on.
    on_long: what happens to longer ones; a prompt that leaves no room for a response is dropped either way.
    Raises DataError when no example is left.
    """
    for name, value, allowed in (("on_bad_data", on_bad_data, ON_BAD_DATA), ("on_long", on_long, ON_LONG)):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}, expected one of {allowed}")
    report = DataReport()
    examples = []
    for path in paths:
        for number, line in _lines(path):
            where = f"{path}:{number}"
            try:
                example = _example(line, tokenizer, vocab_size)
            except DataError as error:
                if on_bad_data == "stop":
                    raise DataError(f"{where}: {error}") from None
                report.bad.append(f"{where}: {error}")
                continue
            if example.num_positions > max_length:
                room = max_length + 1 - len(example.prompt)
                if on_long == "drop" or room < 1:
                    report.dropped += 1
                    continue
                example = Example(example.prompt, example.response[:room])
                report.truncated += 1
            examples.append(example)
    if not examples:
        raise DataError(
            f"{', '.join(map(str, paths))}: no example is left ({len(report.bad)} damaged lines, "
            f"{report.dropped} longer than {max_length}), expected at least one"
        )
    report.examples = len(examples)
    report.prompt_tokens = sum(len(e.prompt) for e in examples)
    report.response_tokens = sum(len(e.response) for e in examples)
    report.digest = digest_of(examples)
    return examples, report


def digest_of(examples: Sequence[Example]) -> str:
    """SHA-256 over the token ids of examples, in order."""
    digest = sha256()
    for example in examples:
        digest.update(json.dumps([example.prompt, example.response]).encode())
    return digest.hexdigest()


def chat_ids(tokenizer: Any, messages: Sequence[Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Prompt and response of a chat whose last message is the assistant's.

    The prompt is what the engine submits for the messages before it.  Raises DataError when the template
    refuses the messages, or does not continue the prompt.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError('the line has "messages", but the model has no chat template')
    try:
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # a template is a program that raises what it likes
        raise DataError(f"the chat template refuses it: {' '.join(str(error).split())}") from None
    if not whole.startswith(prompt):
        raise DataError("the chat template writes the conversation otherwise once it is answered")
    # What a template puts behind the end of the answer (a line feed, mostly) is never drawn by the engine.
    end = tokenizer.eos_token
    answer = whole[len(prompt) :]
    if end is not None:
        cut = answer.rfind(end)
        answer = answer + end if cut < 0 else answer[: cut + len(end)]

    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    return encode(prompt), encode(answer)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be decompressed: {error}") from None


def _example(line: bytes, tokenizer: Any, vocab_size: int) -> Example:
    try:
        value = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON ({error}), expected {EXPECTED}") from None
    if not isinstance(value, dict):
        raise DataError(f"is a JSON {type(value).__name__}, expected {EXPECTED}")
    if "messages" in value:
        prompt, response = _chat(value["messages"], tokenizer)
    elif isinstance(value.get("prompt"), list) and isinstance(value.get("response"), list):
        prompt, response = tuple(value["prompt"]), tuple(value["response"])
    elif isinstance(value.get("prompt"), str) and isinstance(value.get("response"), str):
        if tokenizer is None:
            raise DataError("is text, but the model has no tokenizer: give lists of token ids")
        prompt = tuple(tokenizer.encode(value["prompt"]))
        ends = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        response = (*tokenizer.encode(value["response"], add_special_tokens=False), *ends)
    else:
        raise DataError(f"has the fields {sorted(value)}, expected {EXPECTED}")
    for name, ids in (("prompt", prompt), ("response", response)):
        if not ids:
            raise DataError(f"the {name} is empty, expected at least one token")
        for token in ids:
            if type(token) is not int or not 0 <= token < vocab_size:
                raise DataError(f"the {name} has token {token!r}, expected integers in 0..{vocab_size - 1}")
    return Example(prompt, response)


def _chat(messages: Any, tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if not isinstance(messages, list) or len(messages) < 2:
        raise DataError('"messages" is no list of at least two, expected a question and its answer')
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"message {message!r} has no role, expected an object with role and content")
        if not isinstance(message.get("content"), str):
            raise DataError(f"a message of {message['role']!r} has no content, expected text")
    if messages[-1]["role"] != "assistant":
        raise DataError(f"the last message is of {messages[-1]['role']!r}, expected 'assistant'")
    if not messages[-1]["content"]:
        raise DataError("the last message is empty, expected the answer")
    if tokenizer is None:
        raise DataError('has "messages", but the model has no tokenizer: give lists of token ids')
    return chat_ids(tokenizer, messages)
