"""The first part of the study: all that needs data, packages or a tokenizer, as token ids in a folder."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qsun.checkpoint.tokenizer import load_tokenizer
from qsun.errors import CheckpointError
from qsun.training.batch import Example
from qsun.training.data import DataError, chat_ids
from qsun.training.folder import whole_folder
from qsun.training.study.families import Chat, Family
from qsun.training.study.folder import PART_BYTES, TOKENIZER, WEIGHTS, split_file, write_manifest


def prepare(
    base: Path,
    families: Mapping[str, Family],
    target: Path,
    *,
    max_length: int = 1536,
    limit: int | None = None,
    held: int = 300,
    part_bytes: int = PART_BYTES,
) -> dict[str, Any]:
    """Write the study's folder; returns its settings.

    base: a GGUF file or a folder.  max_length: longest training example in tokens; longer ones are left out.
    limit: at most so many test items of a family, spread evenly.  held: the same, of the examples whose
    likelihood is measured.
    """
    tokenizer = load_tokenizer(base)
    settings: dict[str, Any] = {"base": base.name, "max_tokens": {}, "counts": {}}
    with whole_folder(target) as work:
        names = []
        for name, family in families.items():
            train = _tokenised(tokenizer, family.train, max_length)
            known = _tokenised(tokenizer, _spread(family.held, held), max_length)
            if not train or not known:
                raise DataError(f"family {name} has no example of at most {max_length} tokens, expected some")
            items = _spread(family.task.items, limit)
            for kind, examples in (("train", train), ("held", known)):
                names.append(f"{name}.{kind}.jsonl.gz")
                _write(work / names[-1], [{"prompt": e.prompt, "response": e.response} for e in examples])
            names.append(f"{name}.test.jsonl.gz")
            _write(
                work / names[-1],
                [{"id": item.id, "prompt": _prompt_ids(tokenizer, item.prompt)} for item in items],
            )
            settings["max_tokens"][name] = family.task.max_tokens
            settings["counts"][name] = {
                "train": len(train),
                "left_out_as_too_long": len(family.train) - len(train),
                "train_tokens": sum(e.num_positions for e in train),
                "held": len(known),
                "test": len(items),
            }
        (work / WEIGHTS).mkdir()
        weights = {path.name: split_file(path, work / WEIGHTS, part_bytes) for path in _weight_files(base)}
        names += [f"{WEIGHTS}/{part}" for parts in weights.values() for part in parts]
        tokenizer.save_pretrained(work / TOKENIZER)
        write_manifest(work, weights, settings, names)
    return settings


def _weight_files(base: Path) -> list[Path]:
    if base.is_file():
        return [base]
    files = sorted(p for p in base.iterdir() if p.suffix in (".gguf", ".safetensors", ".json"))
    if not files:
        raise CheckpointError(f"{base} has no weights, expected a GGUF file or a checkpoint folder")
    return files


def _tokenised(tokenizer: Any, chats: Sequence[Chat], max_length: int) -> list[Example]:
    examples = (Example(*chat_ids(tokenizer, chat)) for chat in chats)
    return [example for example in examples if example.num_positions <= max_length]


def _prompt_ids(tokenizer: Any, prompt: Any) -> list[int]:
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return [int(i) for i in tokenizer.encode(text, add_special_tokens=False)]


def _spread(values: Sequence[Any], count: int | None) -> list[Any]:
    """At most `count` values, evenly from all of them."""
    if count is None or len(values) <= count:
        return list(values)
    return [values[i * len(values) // count] for i in range(count)]


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    # Without the time of day, equal data are equal files.
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), mtime=0))
