"""ModelConfig from a `config.json` of the Hugging Face convention, and back.

Both spellings of rotary parameters are read: `rope_theta` beside `rope_scaling`, and `rope_parameters`
holding both. Where a field is absent the architecture's own default holds, as in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from qsun.errors import CheckpointError, UnsupportedModel
from qsun.models.config import ARCHITECTURES, MAX_LAYERS, Architecture, ModelConfig
from qsun.models.fields import Fields
from qsun.models.rope_config import rope_from_fields, rope_to_hf

DTYPE_NAMES: Mapping[str, torch.dtype] = MappingProxyType(
    {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
)


@dataclass(frozen=True, slots=True)
class _Defaults:
    """What an architecture assumes where config.json is silent."""

    class_stem: str
    max_position_embeddings: int
    head_dim: int | None = None
    sliding_window: int | None = None


_DEFAULTS: Mapping[str, _Defaults] = MappingProxyType(
    {
        "llama": _Defaults("Llama", 2048),
        "qwen2": _Defaults("Qwen2", 32768, sliding_window=4096),
        "qwen3": _Defaults("Qwen3", 32768, head_dim=128, sliding_window=4096),
        "mistral": _Defaults("Mistral", 131072, sliding_window=4096),
    }
)

# Fields that change the model's function when they are set, and that are not implemented.
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "num_experts": (0,),
        "num_local_experts": (0,),
        "attn_logit_softcapping": (),
        "final_logit_softcapping": (),
        "logit_scale": (1, 1.0),
        "partial_rotary_factor": (1, 1.0),
        "is_encoder_decoder": (False,),
        "use_mrope": (False,),
        "rope_interleaved": (False,),
        "no_rope_layers": (),
        "dual_chunk_attention_config": (),
        "attention_chunk_size": (),
    }
)


def model_config_from_hf(raw: Mapping[str, Any], source: str) -> ModelConfig:
    """Read the contents of a config.json; `source` is what errors call it, usually its path.

    Raises UnsupportedModel naming the field for what is not implemented (another architecture, mixture of
    experts, another activation, another rotary type), CheckpointError for missing, mistyped or contradictory
    fields.
    """
    fields = Fields(raw, source)
    architecture = _architecture(fields)
    defaults = _DEFAULTS[architecture]
    _refuse_unsupported(fields)
    hidden_size = fields.integer("hidden_size")
    num_layers = fields.integer("num_hidden_layers", maximum=MAX_LAYERS)
    num_q_heads = fields.integer("num_attention_heads")
    max_positions = fields.integer("max_position_embeddings", defaults.max_position_embeddings)
    has_bias_switch = architecture in ("llama", "qwen3")
    bias = fields.boolean("attention_bias", False) if has_bias_switch else architecture == "qwen2"
    try:
        return ModelConfig(
            architecture=architecture,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_q_heads=num_q_heads,
            num_kv_heads=fields.integer("num_key_value_heads", num_q_heads),
            head_dim=fields.integer("head_dim", defaults.head_dim or hidden_size // num_q_heads),
            intermediate_size=fields.integer("intermediate_size"),
            vocab_size=fields.integer("vocab_size"),
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope=rope_from_fields(_rope_fields(fields), max_positions),
            tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
            attention_bias=bias,
            attention_output_bias=bias and has_bias_switch,
            mlp_bias=fields.boolean("mlp_bias", False) if architecture == "llama" else False,
            qk_norm=architecture == "qwen3",
            windows=_windows(fields, architecture, num_layers, defaults.sliding_window),
            max_position_embeddings=max_positions,
            bos_token_id=fields.integer("bos_token_id", minimum=0) if "bos_token_id" in fields else None,
            eos_token_ids=eos_token_ids(fields),
            dtype=_dtype(fields),
        )
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from error


def hf_config_from_model(config: ModelConfig) -> dict[str, Any]:
    """A config.json for this model, in the spelling of transformers 5; the inverse of `model_config_from_hf`.

    Raises UnsupportedModel when the architecture's config.json has no words for the configuration.
    """
    raw: dict[str, Any] = {
        "architectures": [f"{_DEFAULTS[config.architecture].class_stem}ForCausalLM"],
        "model_type": config.architecture,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_q_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.rms_norm_eps,
        "hidden_act": "silu",
        "rope_parameters": rope_to_hf(config.rope),
        "tie_word_embeddings": config.tie_word_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": _one_or_list(config.eos_token_ids),
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }
    windows = {window for window in config.windows if window is not None}
    if config.architecture == "mistral":
        raw["sliding_window"] = config.windows[0]
    elif windows:
        raw["use_sliding_window"] = True
        raw["sliding_window"] = max(windows)
        raw["layer_types"] = [
            "full_attention" if window is None else "sliding_attention" for window in config.windows
        ]
    if config.dtype is not None:
        raw["dtype"] = str(config.dtype).removeprefix("torch.")
    # What was written must say what was meant: some combinations have no spelling for some architectures.
    try:
        faithful = model_config_from_hf(raw, "config.json") == config
    except CheckpointError:
        faithful = False
    if not faithful:
        raise UnsupportedModel(
            f"config is {config}, expected one that a {config.architecture} config.json can state"
        )
    return raw


def _one_or_list(ids: tuple[int, ...]) -> int | list[int] | None:
    if not ids:
        return None
    return ids[0] if len(ids) == 1 else list(ids)


def _architecture(fields: Fields) -> Architecture:
    model_type = fields.string("model_type")
    if model_type not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{fields.source}: model_type is {model_type!r}, expected one of {', '.join(ARCHITECTURES)}"
        )
    architecture: Architecture = model_type
    stem = _DEFAULTS[architecture].class_stem
    for name in fields.strings("architectures", ()):
        if name not in (f"{stem}ForCausalLM", f"{stem}Model"):
            raise UnsupportedModel(f"{fields.source}: architectures has {name!r}, expected {stem}ForCausalLM")
    return architecture


def _refuse_unsupported(fields: Fields) -> None:
    for name, harmless in _UNSUPPORTED.items():
        if name in fields and fields.raw(name) not in harmless:
            expected = "its absence" if not harmless else f"{harmless[0]!r} or its absence"
            raise UnsupportedModel(f"{fields.source}: {name} is {fields.raw(name)!r}, expected {expected}")
    activation = fields.string("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedModel(f"{fields.source}: hidden_act is {activation!r}, expected 'silu'")


def _rope_fields(fields: Fields) -> Fields:
    """One object with rope_theta and the scaling fields, whichever spelling the file uses."""
    name = "rope_parameters" if "rope_parameters" in fields else "rope_scaling"
    nested = fields.mapping(name, {})
    values = {key: nested.raw(key) for key in nested.names()}
    if any(isinstance(value, Mapping) for value in values.values()):
        raise UnsupportedModel(
            f"{nested.source} is {values!r}, expected one set of parameters for all layers"
        )
    values.setdefault("rope_theta", fields.raw("rope_theta", 10000.0))
    if "partial_rotary_factor" in values and values.pop("partial_rotary_factor") != 1:
        raise UnsupportedModel(
            f"{nested.source}: partial_rotary_factor is {nested.raw('partial_rotary_factor')!r}, expected 1"
        )
    return Fields(values, nested.source)


def _windows(
    fields: Fields, architecture: Architecture, num_layers: int, default: int | None
) -> tuple[int | None, ...]:
    kinds = fields.strings("layer_types") if "layer_types" in fields else None
    if kinds is not None and (
        len(kinds) != num_layers or set(kinds) - {"full_attention", "sliding_attention"}
    ):
        raise fields.error(
            "layer_types", list(kinds), f"{num_layers} times 'full_attention' or 'sliding_attention'"
        )
    window: int | None
    if architecture == "llama":
        window = None
    elif architecture == "mistral":
        window = _sliding_window(fields, default)
        if kinds is not None and set(kinds) != {"full_attention" if window is None else "sliding_attention"}:
            raise UnsupportedModel(
                f"{fields.source}: layer_types is {sorted(set(kinds))}, expected one kind that agrees with "
                f"sliding_window {window} (transformers ignores layer_types for mistral)"
            )
        return (window,) * num_layers
    else:
        window = _sliding_window(fields, default) if fields.boolean("use_sliding_window", False) else None
    if kinds is None:
        first_sliding = fields.integer("max_window_layers", 28, minimum=0)
        return tuple(window if layer >= first_sliding else None for layer in range(num_layers))
    if window is None and "sliding_attention" in kinds:
        raise fields.error(
            "layer_types", list(kinds), "no 'sliding_attention', because sliding_window is off"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _sliding_window(fields: Fields, default: int | None) -> int | None:
    """The window; null switches it off, and only a file without the field means the default."""
    if "sliding_window" in fields:
        return fields.integer("sliding_window")
    return None if fields.has_key("sliding_window") else default


def eos_token_ids(fields: Fields) -> tuple[int, ...]:
    """eos_token_id of a config.json or generation_config.json: one id, a list of them, or absent."""
    value = fields.raw("eos_token_id", [])
    ids = value if isinstance(value, list) else [value]
    if not all(type(item) is int and item >= 0 for item in ids):
        raise fields.error("eos_token_id", value, "an integer from 0, or a list of them")
    return tuple(ids)


def _dtype(fields: Fields) -> torch.dtype | None:
    name = "dtype" if "dtype" in fields else "torch_dtype"
    if name not in fields:
        return None
    value = fields.string(name)
    if value not in DTYPE_NAMES:
        raise UnsupportedModel(
            f"{fields.source}: {name} is {value!r}, expected one of {', '.join(DTYPE_NAMES)}"
        )
    return DTYPE_NAMES[value]
