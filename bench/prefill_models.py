"""Several models on one decode module, for a machine that does not hold their weights several times.

One prefill stack is loaded and registered under several names, each with a card and a fingerprint of its own.
To the engine they are different models: it computes their prompts in separate passes and shares no KV block
between them. Since a stack is far larger than a GPU's cache, each pass reads its weights from memory as it
would read another stack's. What is saved is memory alone; records say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from qsun.models.build import Placement
from qsun.models.config import ModelConfig
from qsun.modules.decode import DecodeModule
from qsun.modules.prefill import PrefillModule, load_prefill_module
from qsun_bench.engine_models import Source, step_weight_bytes
from qsun_bench.random_model import random_stack

NOTE = "prefill: one 16-bit stack registered under every model's name, with distinct fingerprints"


def model_names(count: int) -> Sequence[str]:
    """The names of so many models, the most popular first."""
    return [f"model-{i}" for i in range(count)]


def prefill_modules(source: Source, decode: DecodeModule, names: Sequence[str]) -> Sequence[PrefillModule]:
    """One module a name, all on one stack: a checkpoint's own weights in 16 bits, or random ones."""
    first = _loaded(source, decode)
    return [
        PrefillModule(
            name, first.stack, replace(first.card, name=name), f"{first.fingerprint}/{name}", first.notices
        )
        for name in names
    ]


def _loaded(source: Source, decode: DecodeModule) -> PrefillModule:
    if source.checkpoint is not None:
        return load_prefill_module(
            "base", None, base_path=source.checkpoint, decode=decode, backend=source.backend
        )
    # Other weights than the decode module's: theirs would be the base's own, which no task has.
    generator = torch.Generator(source.device).manual_seed(1)
    placement = Placement(source.dtype, source.device, source.backend)
    stack = random_stack(decode.config, None, placement, source.dtype, generator)
    return PrefillModule("random", stack, decode.card, "random", ())


def prefill_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of a stack of 16-bit weights."""
    head = config.vocab_size * config.hidden_size * dtype.itemsize
    return step_weight_bytes(config, None, dtype) - head
