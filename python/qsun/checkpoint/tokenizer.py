"""Tokenizers of checkpoints: the tokenizer itself (transformers), and its vocabulary without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qsun.errors import CheckpointError
from qsun.models.fields import Fields, read_json_object

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""What belongs to a tokenizer in a checkpoint directory."""


def load_tokenizer(path: Path | str) -> Any:
    """The transformers tokenizer of a checkpoint directory or a GGUF file; nothing is fetched, no code of the
    checkpoint is run.

    Raises CheckpointError when there is none or transformers cannot read it.
    """
    from transformers import AutoTokenizer

    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist, expected a checkpoint directory or a GGUF file")
    gguf = path if path.suffix == ".gguf" else _only_gguf(path)
    try:
        if gguf is not None:
            return AutoTokenizer.from_pretrained(
                str(gguf.parent), gguf_file=gguf.name, local_files_only=True, trust_remote_code=False
            )
        # Said outright: without a word transformers asks at the terminal whether to run it.
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its parsers raise
        raise CheckpointError(
            f"{path} has no tokenizer that transformers can read ({type(error).__name__}: {error}), "
            "expected tokenizer files or a GGUF file with one"
        ) from error


def read_vocabulary(path: Path) -> dict[int, str] | None:
    """Token by id of a checkpoint directory with a tokenizer.json; None when it has no tokenizer at all.

    Added tokens are included, as in transformers' `get_vocab`.  A directory whose tokenizer has another form
    is read through transformers.  Raises CheckpointError when a file is damaged or two tokens claim one id.
    """
    file = path / "tokenizer.json"
    if not file.exists():
        if not any((path / name).exists() for name in ("tokenizer.model", "vocab.json")):
            return None
        return _by_id(load_tokenizer(path).get_vocab().items(), str(path))
    fields = Fields(read_json_object(file), str(file))
    vocab = fields.mapping("model").raw("vocab")
    pairs: list[tuple[Any, Any]]
    if isinstance(vocab, dict):
        pairs = list(vocab.items())
    elif isinstance(vocab, list):
        # Unigram: [token, score] in order of id.
        pairs = [
            (entry[0] if isinstance(entry, list) and entry else entry, i) for i, entry in enumerate(vocab)
        ]
    else:
        raise fields.error("model.vocab", type(vocab).__name__, "an object or a list")
    added = fields.raw("added_tokens", [])
    if not isinstance(added, list):
        raise fields.error("added_tokens", added, "a list of objects")
    for entry in added:
        if not isinstance(entry, dict):
            raise fields.error("added_tokens", entry, "a list of objects")
        pairs.append((entry.get("content"), entry.get("id")))
    return _by_id(pairs, str(file))


def check_vocabulary(vocabulary: dict[int, str], vocab_size: int, source: str) -> None:
    """Raise CheckpointError when a token's id is outside an embedding of `vocab_size` rows.

    An embedding with more rows than tokens is ordinary: it is padded.
    """
    if vocabulary and max(vocabulary) >= vocab_size:
        last = max(vocabulary)
        raise CheckpointError(
            f"{source}: the tokenizer has token {vocabulary[last]!r} with id {last}, "
            f"expected ids below vocab_size {vocab_size}"
        )


def _by_id(pairs: Any, source: str) -> dict[int, str]:
    by_id: dict[int, str] = {}
    for token, token_id in pairs:
        if not isinstance(token, str) or type(token_id) is not int or token_id < 0:
            raise CheckpointError(
                f"{source}: token {token!r} has id {token_id!r}, expected a string and an id from 0"
            )
        if by_id.setdefault(token_id, token) != token:
            raise CheckpointError(
                f"{source}: id {token_id} is {by_id[token_id]!r} and {token!r}, expected one token an id"
            )
    return by_id


def _only_gguf(path: Path) -> Path | None:
    """The GGUF file of a directory that has no tokenizer files of its own."""
    if any((path / name).exists() for name in TOKENIZER_FILES):
        return None
    files = sorted(path.glob("*.gguf"))
    return files[0] if len(files) == 1 else None
