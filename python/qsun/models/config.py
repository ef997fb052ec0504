"""ModelConfig: what the decoder needs to know of a model, whatever file it was read from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from qsun_kernels import RopeParameters

Architecture = Literal["llama", "qwen2", "qwen3", "mistral"]

ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)

WEIGHT_DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes that dense weights and activations may have."""

MAX_LAYERS = 4096
"""Ten times the deepest model there is; checked before anything is made a layer at a time."""

MAX_POSITIONS = 1 << 24
"""Sixteen times the longest context there is: the rotary table has a row for every position."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape and constants of a decoder-only transformer.

    attention_bias: a bias on the query, key and value projections; attention_output_bias: on the output
    projection; mlp_bias: on gate, up and down.  qk_norm: queries and keys are normalised over head_dim.
    windows: for every layer the number of positions a token attends to, itself included, or None for all.
    max_position_embeddings: the longest sequence the model is meant for, in tokens.
    eos_token_ids: tokens that end an answer, possibly none.
    dtype: what the checkpoint says its weights are; None when it says nothing.

    Raises ValueError naming the field when the values do not make a model.
    """

    architecture: Architecture
    hidden_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope: RopeParameters
    tie_word_embeddings: bool
    attention_bias: bool
    attention_output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    max_position_embeddings: int
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture is {self.architecture!r}, expected one of {ARCHITECTURES}")
        for name in (
            "hidden_size",
            "num_layers",
            "num_q_heads",
            "num_kv_heads",
            "head_dim",
            "intermediate_size",
            "vocab_size",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}, expected an integer of at least 1")
        if self.num_layers > MAX_LAYERS or self.max_position_embeddings > MAX_POSITIONS:
            raise ValueError(
                f"num_layers is {self.num_layers} and max_position_embeddings "
                f"{self.max_position_embeddings}, "
                f"expected at most {MAX_LAYERS} and {MAX_POSITIONS}"
            )
        if self.num_q_heads % self.num_kv_heads:
            raise ValueError(
                f"num_q_heads is {self.num_q_heads}, expected a multiple of {self.num_kv_heads} KV heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}, expected an even number (rotary pairs)")
        if not 0.0 < self.rms_norm_eps < 1.0:
            raise ValueError(f"rms_norm_eps is {self.rms_norm_eps!r}, expected a number between 0 and 1")
        if len(self.windows) != self.num_layers:
            raise ValueError(
                f"windows has {len(self.windows)} entries, expected {self.num_layers}, one a layer"
            )
        for layer, window in enumerate(self.windows):
            if window is not None and (type(window) is not int or window < 1):
                raise ValueError(f"windows[{layer}] is {window!r}, expected None or an integer of at least 1")
        special = (*self.eos_token_ids, *(() if self.bos_token_id is None else (self.bos_token_id,)))
        for token in special:
            if type(token) is not int or not 0 <= token < self.vocab_size:
                raise ValueError(f"special token {token!r} is outside the vocabulary of {self.vocab_size}")

    @property
    def q_size(self) -> int:
        """Output features of the query projection."""
        return self.num_q_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Output features of the key projection, and of the value projection."""
        return self.num_kv_heads * self.head_dim
