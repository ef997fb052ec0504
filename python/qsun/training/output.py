"""What a run leaves: a prefill-module folder, or a whole fine-tuned checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qsun.checkpoint.reader import open_checkpoint
from qsun.checkpoint.safetensors_reader import SafetensorsReader
from qsun.checkpoint.tokenizer import TOKENIZER_FILES, load_tokenizer
from qsun.checkpoint.weights import read_embedding, read_lm_head
from qsun.checkpoint.writer import CheckpointWriter
from qsun.core import FirstToken
from qsun.models.hf_config import hf_config_from_model
from qsun.models.weights import EMBED_TOKENS, LM_HEAD
from qsun.modules.card import ModuleCard
from qsun.modules.digest import base_digest
from qsun.modules.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from qsun.training.base import Base
from qsun.training.folder import whole_folder
from qsun.training.stack import TrainingStack


def write_prefill_module(
    target: Path,
    base: Base,
    stack: TrainingStack,
    *,
    name: str,
    first_token: FirstToken,
    facts: Mapping[str, Any],
    dtype: torch.dtype | None = None,
) -> ModuleCard:
    """Write what `DecodeEngine.add_model` takes: an adapter in PEFT's format, or all weights of the layers.

    dtype: of the stored weights; None is that of computation.  The pairs of an adapter are stored in it too.
    Embedding and lm_head are not written: they belong to the decoder.
    Raises ValueError when `target` exists.
    """
    dtype = base.dtype if dtype is None else dtype
    card = replace(base.card, name=name, first_token=first_token, training=dict(facts), embed_tokens=None)
    if stack.lora is not None:
        _write_adapter(target, base, stack, card, dtype)
        return card
    with CheckpointWriter(target) as writer:
        for key, tensor in stack.named_weights():
            writer.add(key, tensor.to(dtype))
        writer.write_json("config.json", _config(base, dtype))
        card.write(writer.directory)
    return card


def write_whole_model(
    target: Path,
    base: Base,
    stack: TrainingStack,
    *,
    name: str,
    facts: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    with_tokenizer: bool = True,
) -> ModuleCard:
    """Write a fine-tuned model with its embedding and lm_head, pairs merged: a decoder of its own.

    Raises ValueError when `target` exists.
    """
    dtype = base.dtype if dtype is None else dtype
    reader = open_checkpoint(base.path)
    try:
        with CheckpointWriter(target) as writer:
            embed_tokens = read_embedding(reader, dtype)
            digest = base_digest(embed_tokens)
            card = replace(
                base.card,
                name=name,
                training=dict(facts),
                embed_tokens=None if digest == base.card.decoder.base else digest,
            )
            writer.add(EMBED_TOKENS, embed_tokens)
            if not base.config.tie_word_embeddings:
                writer.add(LM_HEAD, read_lm_head(reader, None, dtype))
            for key, tensor in stack.named_weights():
                writer.add(key, tensor.to(dtype))
            writer.write_json("config.json", _config(base, dtype))
            ends = list(base.config.eos_token_ids)
            writer.write_json("generation_config.json", {"eos_token_id": ends} if ends else {})
            if with_tokenizer:
                _copy_tokenizer(writer, base.path)
            card.write(writer.directory)
        return card
    finally:
        reader.close()


def _write_adapter(
    target: Path, base: Base, stack: TrainingStack, card: ModuleCard, dtype: torch.dtype
) -> None:
    from safetensors.torch import save_file

    assert stack.lora is not None
    with whole_folder(target) as work:
        pairs = stack.lora.parameters()
        save_file(
            {name: tensor.detach().to(dtype).cpu().contiguous() for name, tensor in pairs.items()},
            work / ADAPTER_WEIGHTS,
            metadata={"format": "pt"},
        )
        config = stack.lora.options.peft_config(base.card.name)
        (work / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        card.write(work)


def _config(base: Base, dtype: torch.dtype) -> dict[str, Any]:
    """The base's own config.json where it has one, with the dtype of what is written."""
    reader = open_checkpoint(base.path)
    try:
        if isinstance(reader, SafetensorsReader):
            config = dict(reader.raw_config)
            config.pop("torch_dtype", None)
        else:
            config = hf_config_from_model(reader.config)
    finally:
        reader.close()
    config["dtype"] = str(dtype).removeprefix("torch.")
    return config


def _copy_tokenizer(writer: CheckpointWriter, source: Path) -> None:
    """The tokenizer's files as they are, or those that transformers makes of a GGUF file's."""
    if source.is_dir() and any((source / name).is_file() for name in TOKENIZER_FILES):
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                writer.copy(source / name)
        return
    reader = open_checkpoint(source)
    try:
        has_one = reader.vocabulary() is not None
    finally:
        reader.close()
    if has_one:
        load_tokenizer(source).save_pretrained(writer.directory)
