"""`qsun generate`: several models, one batch."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from qsun.cli import exits
from qsun.cli.answers import Question, display_for, run
from qsun.cli.exits import UsageError
from qsun.cli.loading import device_of, dtype_of, progress_bar
from qsun.errors import RequestError

if TYPE_CHECKING:
    from qsun.engine.intake import Prompt

BASE = "base"
_SAMPLING = (
    "max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p",
    "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "ignore_eos",
)  # fmt: skip


def generate(arguments: argparse.Namespace) -> int:
    """Load the shared decoder and the prefill modules that are asked for, and answer every prompt."""
    from qsun import DecodeEngine, SamplingParams
    from qsun.engine.options import EngineOptions
    from qsun.engine.sources import local_checkpoint

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

    device = device_of(arguments.device)
    options = {
        "max_batch_size": arguments.max_batch_size,
        "backend": arguments.backend,
        "kv_cache_dtype": arguments.kv_cache_dtype,
    }
    try:
        EngineOptions(**options)
    except ValueError as error:
        raise UsageError(str(error)) from None
    asked = {name for name, _ in arguments.prompt}
    path = local_checkpoint(arguments.model)
    with progress_bar("decode module", quiet=arguments.json) as progress:
        engine = DecodeEngine.from_pretrained(
            path,
            bits=_stored_bits(path) if arguments.bits is None else arguments.bits,
            group_size=arguments.group_size,
            symmetric=not arguments.asymmetric,
            dtype=dtype_of(arguments.dtype),
            device=device,
            progress=progress,
            **options,
        )
    # A module that nobody asks is not loaded.
    for name, path in {BASE: None, **modules}.items():
        if name in asked:
            engine.add_model(name, path)
    for notice in engine.notices:
        print(f"qsun: notice: {notice}", file=sys.stderr)
    chat = not arguments.raw and bool(getattr(engine.tokenizer, "chat_template", None))
    questions = [Question(name, text, _prompt(text, chat)) for name, text in arguments.prompt]
    with display_for(len(questions), as_json=arguments.json) as display:
        answers, pace = run(engine, questions, params, display)
    if pace.decode_tokens and not arguments.json:
        print(f"{pace.decode_tokens / pace.decode_s:.1f} tokens/s in decode", file=sys.stderr)
    return exits.REQUEST_FAILED if any(answer.failed for answer in answers) else exits.OK


def _stored_bits(path: Path) -> int:
    """The bits of a checkpoint that is quantised already, else 4."""
    from qsun.checkpoint.reader import open_checkpoint

    reader = open_checkpoint(path)
    try:
        return 4 if reader.quantization is None else reader.quantization.spec.bits
    finally:
        reader.close()


def _prompt(text: str, chat: bool) -> Prompt:
    """The text itself, or a chat with it as its one message."""
    return [{"role": "user", "content": text}] if chat else text
