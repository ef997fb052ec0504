"""ModelConfig from the metadata of a GGUF file of Llama, Mistral, Qwen2 or Qwen3 (llama.cpp's names)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from qsun.errors import CheckpointError, UnsupportedModel
from qsun.models.config import MAX_LAYERS, Architecture, ModelConfig
from qsun.models.fields import Fields
from qsun.models.rope_config import rope_from_fields, rope_from_frequency_factors
from qsun_kernels import RopeParameters

GGUF_ARCHITECTURES: tuple[Architecture, ...] = ("llama", "qwen2", "qwen3")
"""What GGUF calls them; a Mistral file says "llama"."""

_KNOWN_ROPE = {
    "dimension_count",
    "freq_base",
    "scaling.type",
    "scaling.factor",
    "scaling.original_context_length",
    "scaling.finetuned",
}


def model_config_from_gguf(
    metadata: Mapping[str, Any],
    tensor_names: Collection[str],
    frequency_factors: Tensor | None,
    source: str,
) -> ModelConfig:
    """Read the header of a GGUF file.

    tensor_names: the names of its tensors, which tell what metadata does not: biases and tied embeddings.
    frequency_factors: float32 (head_dim / 2,), the tensor rope_freqs.weight, None when there is none.
    Raises UnsupportedModel naming the entry for what is not implemented, CheckpointError for missing,
    mistyped or contradictory entries; `source` is what errors call the file.
    """
    fields = Fields(metadata, source)
    name = fields.string("general.architecture")
    if name not in GGUF_ARCHITECTURES:
        raise UnsupportedModel(
            f"{source}: general.architecture is {name!r}, expected one of {', '.join(GGUF_ARCHITECTURES)}"
        )
    for entry in ("expert_count", "attention.sliding_window"):
        value = fields.raw(f"{name}.{entry}", 0)
        if value != 0:
            raise UnsupportedModel(f"{source}: {name}.{entry} is {value!r}, expected 0 or its absence")
    hidden_size = fields.integer(f"{name}.embedding_length")
    num_layers = fields.integer(f"{name}.block_count", maximum=MAX_LAYERS)
    num_q_heads = fields.integer(f"{name}.attention.head_count")
    max_positions = fields.integer(f"{name}.context_length")
    head_dim = fields.integer(f"{name}.attention.key_length", hidden_size // num_q_heads)
    for entry in ("attention.value_length", "rope.dimension_count"):
        value = fields.integer(f"{name}.{entry}", head_dim)
        if value != head_dim:
            raise UnsupportedModel(f"{source}: {name}.{entry} is {value}, expected the head size {head_dim}")
    tokens = fields.raw("tokenizer.ggml.tokens", [])
    if not isinstance(tokens, list):
        raise fields.error("tokenizer.ggml.tokens", tokens, "a list of tokens")
    bos, eos = "tokenizer.ggml.bos_token_id", ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    try:
        return ModelConfig(
            architecture=name,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_q_heads=num_q_heads,
            num_kv_heads=fields.integer(f"{name}.attention.head_count_kv", num_q_heads),
            head_dim=head_dim,
            intermediate_size=fields.integer(f"{name}.feed_forward_length"),
            vocab_size=fields.integer(f"{name}.vocab_size", len(tokens) or None),
            rms_norm_eps=fields.number(f"{name}.attention.layer_norm_rms_epsilon"),
            rope=_rope(fields, name, head_dim, max_positions, frequency_factors),
            tie_word_embeddings="output.weight" not in tensor_names,
            attention_bias="blk.0.attn_q.bias" in tensor_names,
            attention_output_bias="blk.0.attn_output.bias" in tensor_names,
            mlp_bias="blk.0.ffn_down.bias" in tensor_names,
            qk_norm="blk.0.attn_q_norm.weight" in tensor_names,
            windows=(None,) * num_layers,
            max_position_embeddings=max_positions,
            bos_token_id=fields.integer(bos, minimum=0) if bos in fields else None,
            eos_token_ids=tuple(
                dict.fromkeys(fields.integer(entry, minimum=0) for entry in eos if entry in fields)
            ),
        )
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from error


def _rope(
    fields: Fields, name: str, head_dim: int, max_positions: int, frequency_factors: Tensor | None
) -> RopeParameters:
    prefix = f"{name}.rope."
    for entry in fields.names():
        if entry.startswith(prefix) and entry.removeprefix(prefix) not in _KNOWN_ROPE:
            raise UnsupportedModel(f"{fields.source}: {entry} is {fields.raw(entry)!r}, expected its absence")
    theta = fields.number(prefix + "freq_base", 10000.0)
    kind = fields.string(prefix + "scaling.type", "none")
    if frequency_factors is not None:
        if kind != "none":
            raise UnsupportedModel(
                f"{fields.source}: rope_freqs.weight stands beside {prefix}scaling.type {kind!r}, "
                "expected one of them"
            )
        return rope_from_frequency_factors(theta, frequency_factors, head_dim, fields.source)
    values: dict[str, Any] = {"rope_theta": theta, "rope_type": "default" if kind == "none" else kind}
    if kind != "none":
        values["factor"] = fields.number(prefix + "scaling.factor")
        original = prefix + "scaling.original_context_length"
        if kind == "yarn" and original in fields:
            values["original_max_position_embeddings"] = fields.integer(original)
    return rope_from_fields(Fields(values, f"{fields.source}: {prefix}scaling"), max_positions)
