"""LoRA adapters in PEFT's format, merged into the base: W + scale * B @ A (Hu et al. 2021, equation 3).

scale is alpha / r, or alpha / sqrt(r) with use_rslora (Kalajdzievski 2023).  The merge is computed in float32
and rounded once.  What the adapter asks for beyond that is refused by name: silently leaving it out would
serve another model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from qsun.checkpoint.reader import refuse_pickles
from qsun.checkpoint.safetensors_file import SafetensorsFile
from qsun.errors import CheckpointError, IncompatibleModule, UnsupportedModel
from qsun.models.config import ModelConfig
from qsun.models.fields import Fields, read_json_object
from qsun.models.weights import (
    PROJECTIONS,
    LayerWeights,
    Projection,
    ProjectionName,
    is_finite,
    layer_prefix,
    projection_path,
    projection_shape,
)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

SHARED_MODULES = ("embed_tokens", "lm_head")
"""modules_to_save that are tolerated: what an adapter holds of the decode module's parts is not used."""

_PREFIX = "base_model.model."
_LORA_KEY = re.compile(re.escape(_PREFIX) + r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_SHARED_KEY = re.compile(
    re.escape(_PREFIX) + r"(model\.)?(?P<module>embed_tokens|lm_head)\.(modules_to_save\.)?(default\.)?weight"
)

# Fields that say how the adapter was trained or kept, not what it computes.
_HARMLESS = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
        "inference_mode", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version",
        "qalora_group_size", "revision", "runtime_config", "task_type",
    }
)  # fmt: skip
# Fields that are read below.
_READ = frozenset(
    {
        "alpha_pattern", "bias", "exclude_modules", "init_lora_weights", "layers_pattern",
        "layers_to_transform", "lora_alpha", "modules_to_save", "peft_type", "r", "rank_pattern",
        "target_modules", "use_rslora",
    }
)  # fmt: skip
# Initialisations that leave the base as it is; the others (PiSSA, OLoRA, LoftQ, CorDA) subtract from it.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The part of adapter_config.json that decides the merge.

    rank_pattern, alpha_pattern: rank and alpha of modules whose name matches a key, a regular expression for
    its end.
    shared_modules: which of embed_tokens and lm_head the adapter also carries.
    """

    fields: Fields
    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, Any]
    alpha_pattern: Mapping[str, Any]
    shared_modules: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> LoraConfig:
        """Read adapter_config.json.

        Raises UnsupportedModel naming the option that a plain merge cannot express, CheckpointError for
        damage.
        """
        fields = Fields(read_json_object(path), str(path))
        kind = fields.string("peft_type")
        if kind != "LORA":
            raise UnsupportedModel(f"{path}: peft_type is {kind!r}, expected 'LORA'")
        for name in fields.names():
            value = fields.raw(name)
            if name not in _HARMLESS | _READ and value not in (False, [], {}, ""):
                raise UnsupportedModel(f"{path}: {name} is {value!r}, expected it off: it cannot be merged")
        bias = fields.string("bias", "none")
        if bias != "none":
            raise UnsupportedModel(f"{path}: bias is {bias!r}, expected 'none'")
        init = fields.raw("init_lora_weights", True)
        if init not in _PLAIN_INITS:
            raise UnsupportedModel(
                f"{path}: init_lora_weights is {init!r}, "
                "expected one that leaves the base weights as they are"
            )
        shared = fields.strings("modules_to_save", ())
        for name in shared:
            if name not in SHARED_MODULES:
                raise UnsupportedModel(
                    f"{path}: modules_to_save has {name!r}, expected only {SHARED_MODULES}"
                )
        return cls(
            fields=fields,
            rank=fields.integer("r"),
            alpha=fields.number("lora_alpha"),
            use_rslora=fields.boolean("use_rslora", False),
            rank_pattern=fields.raw("rank_pattern", {}),
            alpha_pattern=fields.raw("alpha_pattern", {}),
            shared_modules=shared,
        )

    def targets(self, module: str) -> bool:
        """Whether the adapter has a pair for the module of this full name."""
        if self._matches("exclude_modules", module):
            return False
        target = self.fields.raw("target_modules")
        if isinstance(target, str) and target.lower() == "all-linear":
            return module != "lm_head"
        if target is None:
            raise self.fields.error("target_modules", None, "a list of names or a regular expression")
        return self._matches("target_modules", module) and (
            isinstance(target, str) or self._in_layers(module)
        )

    def rank_and_scale(self, module: str) -> tuple[int, float]:
        """The rank of a module's pair and the factor of B @ A."""
        rank = self._by_pattern("rank_pattern", self.rank_pattern, module, self.rank)
        alpha = self._by_pattern("alpha_pattern", self.alpha_pattern, module, self.alpha)
        if type(rank) is not int or rank < 1:
            raise self.fields.error("rank_pattern", rank, f"integers of at least 1 ({module})")
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise self.fields.error("alpha_pattern", alpha, f"finite numbers ({module})")
        return rank, alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def _matches(self, field: str, module: str) -> bool:
        wanted = self.fields.raw(field, [])
        if isinstance(wanted, str):
            return self._regex(field, wanted, module)
        return any(module == name or module.endswith(f".{name}") for name in self.fields.strings(field, ()))

    def _in_layers(self, module: str) -> bool:
        layers = self.fields.raw("layers_to_transform")
        if layers is None or layers == []:
            return True
        numbers = layers if isinstance(layers, list) else [layers]
        if not all(type(number) is int for number in numbers):
            raise self.fields.error("layers_to_transform", layers, "an integer or a list of integers")
        pattern = self.fields.raw("layers_pattern")
        if pattern not in (None, "", [], "layers", ["layers"]):
            raise UnsupportedModel(f"{self.fields.source}: layers_pattern is {pattern!r}, expected 'layers'")
        found = re.search(r"(?:^|\.)layers\.(\d+)\.", module)
        return found is not None and int(found.group(1)) in numbers

    def _by_pattern(self, field: str, patterns: Mapping[str, Any], module: str, default: Any) -> Any:
        if not isinstance(patterns, Mapping):
            raise self.fields.error(field, patterns, "an object")
        for pattern, value in patterns.items():
            if self._regex(field, rf"(.*\.)?({pattern})", module):
                return value
        return default

    def _regex(self, field: str, pattern: str, module: str) -> bool:
        try:
            return re.fullmatch(pattern, module) is not None
        except re.error as error:
            raise self.fields.error(field, pattern, f"a regular expression ({error})") from error


class LoraAdapter:
    """An adapter directory, checked against the model it is to be merged into; pairs are read as layers are
    merged.

    Raises CheckpointError for damage, a missing half of a pair, a pair of another rank than stated or for a
    module that is no target; UnsupportedModel for what cannot be merged; IncompatibleModule when the
    adapter's shapes are those of another base.
    """

    def __init__(self, path: Path, config: ModelConfig) -> None:
        self.path = path
        self.lora = LoraConfig.read(path / ADAPTER_CONFIG)
        if not (path / ADAPTER_WEIGHTS).exists():
            refuse_pickles(path, sorted(entry.name for entry in path.iterdir()))
            raise CheckpointError(f"{path / ADAPTER_WEIGHTS} is missing, expected it beside {ADAPTER_CONFIG}")
        self._file = SafetensorsFile(path / ADAPTER_WEIGHTS)
        try:
            self._shared = self._check(config)
        except BaseException:
            self.close()
            raise

    def shared_parts(self) -> Mapping[str, Tensor]:
        """What the adapter carries of "embed_tokens" and "lm_head", as stored."""
        return MappingProxyType({module: self._file.get(key) for module, key in self._shared.items()})

    def merge(self, layer: int, weights: LayerWeights) -> LayerWeights:
        """The layer with every pair of this adapter added; `weights` are dense float32, as is the result."""
        merged = dict(weights.projections)
        for name in PROJECTIONS:
            module = layer_prefix(layer) + projection_path(name)
            if self.lora.targets(module):
                base = weights.projections[name]
                assert isinstance(base.weight, Tensor) and base.weight.dtype == torch.float32
                merged[name] = Projection(base.weight + self._delta(module), base.bias)
        return LayerWeights(weights.attention_norm, weights.mlp_norm, merged, weights.q_norm, weights.k_norm)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _delta(self, module: str) -> Tensor:
        """scale * B @ A in float32."""
        pair = []
        for side in ("A", "B"):
            key = f"{_PREFIX}{module}.lora_{side}.weight"
            tensor = self._file.get(key)
            if not tensor.is_floating_point() or not is_finite(tensor.float()):
                raise CheckpointError(
                    f"{self._file.path}: tensor {key!r} ({tensor.dtype}) has values that are not finite, "
                    "expected finite floating-point numbers"
                )
            pair.append(tensor.float())
        return (pair[1] @ pair[0]) * self.lora.rank_and_scale(module)[1]

    def _check(self, config: ModelConfig) -> dict[str, str]:
        """Check every key, rank and shape; returns the keys of shared parts by module."""
        where = self._file.path
        pairs: dict[str, dict[str, tuple[int, ...]]] = {}
        shared: dict[str, str] = {}
        for key, entry in self._file.entries.items():
            found = _LORA_KEY.fullmatch(key)
            if found is not None:
                pairs.setdefault(found["module"], {})[found["side"]] = entry.shape
                continue
            kept = _SHARED_KEY.fullmatch(key)
            if kept is None or kept["module"] not in self.lora.shared_modules:
                raise UnsupportedModel(
                    f"{where} holds tensor {key!r}, expected only {_PREFIX}*.lora_A.weight and .lora_B.weight"
                )
            shared[kept["module"]] = key
        expected = {
            layer_prefix(layer) + projection_path(name): name
            for layer in range(config.num_layers)
            for name in PROJECTIONS
            if self.lora.targets(layer_prefix(layer) + projection_path(name))
        }
        for module in ("model.embed_tokens", "lm_head"):
            if self.lora.targets(module):
                raise UnsupportedModel(
                    f"{self.lora.fields.source}: target_modules match {module!r}, expected "
                    "projections of the layers only: embedding and lm_head belong to the decode module"
                )
        if not expected:
            raise IncompatibleModule(
                f"{self.lora.fields.source}: target_modules {self.lora.fields.raw('target_modules')!r} "
                f"match nothing in the base, expected some of {', '.join(PROJECTIONS)}"
            )
        for module in pairs:
            if module not in expected:
                raise IncompatibleModule(
                    f"{where} has a pair for {module!r}, expected pairs only for modules of the base "
                    f"({config.num_layers} layers) that target_modules match"
                )
        for module, name in expected.items():
            self._check_pair(module, name, pairs.get(module, {}), config)
        return shared

    def _check_pair(
        self, module: str, name: ProjectionName, pair: dict[str, tuple[int, ...]], config: ModelConfig
    ) -> None:
        rank, _ = self.lora.rank_and_scale(module)
        N, K = projection_shape(config, name)
        for side in ("A", "B"):
            key = f"{_PREFIX}{module}.lora_{side}.weight"
            if side not in pair:
                raise CheckpointError(
                    f"{self._file.path} has no tensor {key!r}, expected it by target_modules"
                )
            shape, wanted = pair[side], (rank, K) if side == "A" else (N, rank)
            if len(shape) != 2 or shape[0 if side == "A" else 1] != rank:
                raise CheckpointError(
                    f"{self._file.path}: tensor {key!r} has shape {shape}, "
                    f"expected {wanted} for the rank {rank} stated"
                )
            if shape != wanted:
                raise IncompatibleModule(
                    f"{self._file.path}: tensor {key!r} has shape {shape}, expected {wanted} for this base: "
                    "the adapter was made for another one"
                )
