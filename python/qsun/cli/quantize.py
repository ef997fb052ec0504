"""`qsun quantize`: a low-bit copy of a checkpoint, in the compressed-tensors format."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qsun.cli import exits
from qsun.cli.exits import UsageError
from qsun.cli.loading import device_of, dtype_of, progress_bar
from qsun.cli.values import check_calibration
from qsun.errors import CheckpointError

# What a search sees: enough for its statistics, and minutes rather than hours on one CPU.
_SEQUENCES = 128
_SEQUENCE_TOKENS = 512


def quantize(arguments: argparse.Namespace) -> int:
    """Quantise, export, and say what came out."""
    from qsun.checkpoint.tokenizer import load_tokenizer
    from qsun.engine.sources import local_checkpoint
    from qsun.modules.export import export_quantized

    check_calibration("--method", arguments.method, arguments.calibration)
    out: Path = arguments.out
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out} exists already, expected a new or empty folder")
    source = local_checkpoint(arguments.model)
    calibration = None
    if arguments.calibration is not None:
        calibration = calibration_tokens(arguments.calibration, load_tokenizer(source))
    begin = time.perf_counter()
    with progress_bar("quantising", quiet=arguments.json) as progress:
        try:
            card = export_quantized(
                source,
                out,
                bits=arguments.bits,
                group_size=arguments.group_size,
                symmetric=not arguments.asymmetric,
                dtype=dtype_of(arguments.dtype),
                device=device_of(arguments.device),
                quantizer=arguments.method,
                calibration=calibration,
                progress=progress,
            )
        except ValueError as error:
            # A group that does not divide, calibration that does not fit: the options and the model disagree.
            raise UsageError(str(error)) from error
    summary = {
        "source": str(source),
        "target": str(out),
        "name": card.name,
        "method": arguments.method,
        "quantization_config": json.loads((out / "config.json").read_text())["quantization_config"],
        "source_bytes": checkpoint_bytes(source),
        "target_bytes": checkpoint_bytes(out),
        "calibration_tokens": sum(map(len, calibration or ())),
        "seconds": round(time.perf_counter() - begin, 1),
    }
    if arguments.json:
        print(json.dumps(summary, indent=2))
    else:
        _show(summary)
    return exits.OK


def checkpoint_bytes(path: Path) -> int:
    """Bytes of the weight files of a checkpoint."""
    if path.is_file():
        return path.stat().st_size
    weights = (entry for entry in path.iterdir() if entry.suffix in (".safetensors", ".gguf"))
    return sum(entry.stat().st_size for entry in weights)


def calibration_tokens(path: Path, tokenizer: Any) -> Sequence[Sequence[int]]:
    """Sequences of at most 512 tokens from a file of texts, at most 128 of them, spread over the file.

    path: `.jsonl`, where every line is a text or an object with "text" or "messages"; anything else is plain
    text whose paragraphs (separated by empty lines) are the texts.
    Raises CheckpointError naming the line when it is none of these, or when there is no text at all.
    """
    texts = list(_jsonl_texts(path, tokenizer) if path.suffix == ".jsonl" else _paragraphs(path))
    if not texts:
        raise CheckpointError(f"{path} holds no text, expected at least one")
    # Evenly from the whole file: files are often sorted by topic or length.
    count = min(len(texts), _SEQUENCES)
    chosen = [texts[i * len(texts) // count] for i in range(count)]
    return [ids for text in chosen if (ids := [int(t) for t in tokenizer.encode(text)][:_SEQUENCE_TOKENS])]


def _paragraphs(path: Path) -> Iterator[str]:
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text: {error}") from None
    for paragraph in content.split("\n\n"):
        if paragraph.strip():
            yield paragraph.strip()


def _jsonl_texts(path: Path, tokenizer: Any) -> Iterator[str]:
    expected = 'expected a string, or an object with "text" or "messages"'
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{path}:{number} is not JSON ({error}), {expected}") from None
        if isinstance(value, dict) and isinstance(value.get("messages"), list):
            if not getattr(tokenizer, "chat_template", None):
                raise CheckpointError(f'{path}:{number} has "messages", but the model has no chat template')
            try:
                value = tokenizer.apply_chat_template(value["messages"], tokenize=False)
            except Exception as error:  # a template is a program that raises what it likes
                raise CheckpointError(f"{path}:{number}: the chat template refuses it: {error}") from None
        elif isinstance(value, dict):
            value = value.get("text")
        if not isinstance(value, str):
            raise CheckpointError(f"{path}:{number} is {line[:60]!r}, {expected}")
        if value:
            yield value


def _show(summary: dict[str, Any]) -> None:
    before, after = summary["source_bytes"], summary["target_bytes"]
    print(f"{summary['source']} -> {summary['target']} ({summary['name']})")
    print(f"  method   {summary['method']}", end="")
    print(f", {summary['calibration_tokens']} calibration tokens" if summary["calibration_tokens"] else "")
    weights = summary["quantization_config"]["config_groups"]["group_0"]["weights"]
    group = weights["group_size"] or "one a row"
    kind = "symmetric" if weights["symmetric"] else "with zero points"
    print(f"  weights  {weights['num_bits']} bits, group {group}, {kind}; embedding and lm_head as they were")
    print(f"  size     {before / 1e6:.1f} MB -> {after / 1e6:.1f} MB")
    print(f"  time     {summary['seconds']} s", flush=True)
    print(f"qsun generate --model {summary['target']} ... loads it", file=sys.stderr)
