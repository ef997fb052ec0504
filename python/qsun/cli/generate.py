"""`qsun generate`: several models, one batch."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from qsun.cli import exits
from qsun.cli.answers import Question, display_for, run
from qsun.cli.exits import UsageError
from qsun.errors import RequestError

BASE = "base"
_SAMPLING = (
    "max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p",
    "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "ignore_eos",
)  # fmt: skip


def generate(arguments: argparse.Namespace) -> int:
    """Load the shared decoder and the prefill modules that are asked for, and answer every prompt."""
    from qsun import DecodeEngine, SamplingParams

    try:
        params = SamplingParams(
            stop=tuple(arguments.stop), **{name: getattr(arguments, name) for name in _SAMPLING}
        )
    except RequestError as error:
        raise UsageError(str(error)) from None
    modules = dict(arguments.prefill)
    if len(modules) != len(arguments.prefill) or BASE in modules:
        raise UsageError(
            f"--prefill: got {[name for name, _ in arguments.prefill]}, expected distinct names, not {BASE}"
        )
    for name, _ in arguments.prompt:
        if name != BASE and name not in modules:
            raise UsageError(
                f"--prompt: got the model {name!r}, expected one of {', '.join((BASE, *modules))}"
            )

    engine = DecodeEngine.from_pretrained(
        arguments.model,
        bits=arguments.bits,
        group_size=arguments.group_size,
        symmetric=not arguments.asymmetric,
        dtype=arguments.dtype,
        device=arguments.device,
        max_batch_size=arguments.max_batch_size,
        backend=arguments.backend,
    )
    # A module that nobody asks is not loaded.
    asked = {name for name, _ in arguments.prompt}
    if BASE in asked:
        engine.add_model(BASE)
    for name, path in modules.items():
        if name in asked:
            engine.add_model(name, path)
    questions = [
        Question(name, text, _prompt(engine, text, arguments.raw)) for name, text in arguments.prompt
    ]
    with display_for(len(questions), as_json=arguments.json) as display:
        answers, pace = run(engine, questions, params, display)
    if pace.decode_s > 0 and pace.decode_tokens and not arguments.json:
        print(f"{pace.decode_tokens / pace.decode_s:.1f} tokens/s in decode", file=sys.stderr)
    return exits.REQUEST_FAILED if any(answer.failed for answer in answers) else exits.OK


def _prompt(engine: Any, text: str, raw: bool) -> str | list[int]:
    """Token ids of a chat with `text` as its one message; the text itself when raw or without a template."""
    tokenizer = engine.tokenizer
    if raw or not getattr(tokenizer, "chat_template", None):
        return text
    messages = [{"role": "user", "content": text}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return [int(token) for token in ids]
