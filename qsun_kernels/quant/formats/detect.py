"""Which quantisation a checkpoint has, from the "quantization_config" entry of its config.json.

Whatever changes what the stored numbers mean and is not understood here is refused by name: an option that is
skipped gives another model, fluently.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from qsun_kernels.quant.formats.awq import from_awq
from qsun_kernels.quant.formats.compressed_tensors import from_compressed_tensors
from qsun_kernels.quant.formats.gptq import ZeroVersion, from_gptq
from qsun_kernels.quant.packed import PackedWeight
from qsun_kernels.quant.spec import SUPPORTED_BITS, SUPPORTED_GROUP_SIZES, QuantSpec

FormatName = Literal["awq", "gptq", "compressed-tensors"]

SUPPORTED = (
    "awq (4 bits, version gemm), gptq and gptq_v2 (2, 3, 4, 8 bits, act-order too), "
    "compressed-tensors (format pack-quantized, integers of 2, 3, 4, 8 bits, 16-bit activations), "
    "groups of 32, 64, 128 or one per channel"
)


class UnsupportedQuantization(ValueError):
    """A quantization_config that asks for what is not supported, or contradicts itself.

    The message names the entry, what was got and what is supported.
    """


@dataclass(frozen=True, slots=True)
class CheckpointFormat:
    """How the quantised layers of a checkpoint are stored.

    name: "awq", "gptq" or "compressed-tensors". spec: bits, group size and symmetry of every quantised layer.
    targets, ignored: patterns for module names, full names or "re:" and a regular expression that must
    match from the name's start; a module is quantised when a target and no ignored pattern matches it
    ("Linear" among the targets stands for every linear layer). act_order: layers come with a g_idx. zeros:
    how GPTQ zero points are stored.
    """

    name: FormatName
    spec: QuantSpec
    targets: tuple[str, ...] = ("Linear",)
    ignored: tuple[str, ...] = ("lm_head",)
    act_order: bool = False
    zeros: ZeroVersion = "v1"

    @property
    def codes_name(self) -> str:
        """The tensor within a module that holds its codes: a module that has it is quantised."""
        return "weight_packed" if self.name == "compressed-tensors" else "qweight"

    def quantizes(self, module: str) -> bool:
        """Whether the configuration says that this linear layer (full module name) is quantised."""
        targeted = "Linear" in self.targets or _matches(module, self.targets)
        return targeted and not _matches(module, self.ignored)

    def read(self, tensors: Mapping[str, Tensor], module: str = "linear") -> PackedWeight:
        """One quantised linear layer.

        tensors: the module's tensors by their names within it ("qweight", ...; "bias" is ignored); module:
        its full name, for messages. Raises ValueError or TypeError naming what is wrong (see the readers
        of each format).
        """
        if self.name == "awq":
            return from_awq(tensors, self.spec, module)
        if self.name == "gptq":
            return from_gptq(tensors, self.spec, module, zeros=self.zeros, act_order=self.act_order)
        return from_compressed_tensors(tensors, self.spec, module, act_order=self.act_order)


def detect(quantization_config: Mapping[str, Any]) -> CheckpointFormat:
    """Read a quantization_config.

    quantization_config: the entry of config.json, or the content of a quantize_config.json (GPTQ) or
    quant_config.json (AWQ) of older checkpoints.
    Raises TypeError when it is no mapping, UnsupportedQuantization (a ValueError) naming the entry, what
    was got and what is supported otherwise.
    """
    if not isinstance(quantization_config, Mapping):
        raise TypeError(f"quantization_config is {type(quantization_config).__name__}, expected a mapping")
    config = dict(quantization_config)
    method = config.get("quant_method")
    if method is None and "w_bit" in config:
        method = "awq"
    elif method is None and "desc_act" in config:
        method = "gptq"
    if method == "awq":
        return _detect_awq(config)
    if method == "gptq":
        return _detect_gptq(config)
    if method == "compressed-tensors":
        return _detect_compressed_tensors(config)
    raise _unsupported("quant_method", method)


def _unsupported(entry: str, got: object, expected: str | None = None) -> UnsupportedQuantization:
    expected = f"supported: {SUPPORTED}" if expected is None else f"expected {expected}"
    return UnsupportedQuantization(f"quantization_config: {entry} is {got!r}, {expected}")


def _matches(module: str, patterns: Iterable[str]) -> bool:
    for pattern in patterns:
        if pattern.startswith("re:"):
            if re.match(pattern[3:], module):
                return True
        elif pattern == module:
            return True
    return False


def _pattern(regex: str, entry: str) -> str:
    """A "re:" pattern, once the regular expression was found to be one."""
    try:
        re.compile(regex)
    except re.error as error:
        raise _unsupported(entry, regex, f"a regular expression ({error})") from error
    return "re:" + regex


def _names(value: object, entry: str) -> list[str]:
    """A list of module names; None is an empty one."""
    if value is None:
        return []
    if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) for name in value):
        raise _unsupported(entry, value, "a list of module names")
    return list(value)


def _flag(config: Mapping[str, Any], entry: str, default: bool) -> bool:
    value = config.get(entry, default)
    if not isinstance(value, bool):
        raise _unsupported(entry, value, "true or false")
    return value


def _spec(
    bits: object, group_size: object, symmetric: bool, entries: tuple[str, str] = ("bits", "group_size")
) -> QuantSpec:
    """A QuantSpec from configuration values, which `entries` names; group size -1 or None is per channel."""
    if type(bits) is not int or bits not in SUPPORTED_BITS:
        raise _unsupported(entries[0], bits, f"one of {SUPPORTED_BITS}")
    if group_size in (-1, None):
        group_size = "channel"
    if type(group_size) not in (int, str) or group_size not in SUPPORTED_GROUP_SIZES:
        raise _unsupported(entries[1], group_size, f"one of {SUPPORTED_GROUP_SIZES} (-1: channel)")
    return QuantSpec(bits, group_size, symmetric)


def _detect_awq(config: Mapping[str, Any]) -> CheckpointFormat:
    version = config.get("version", config.get("checkpoint_format", config.get("format", "gemm")))
    if not isinstance(version, str) or version.lower() != "gemm":
        raise _unsupported("version", version, "'gemm' for AWQ")
    if not _flag(config, "zero_point", True):
        raise _unsupported("zero_point", False, "true for AWQ: the gemm layout always has zero points")
    spec = _spec(
        config.get("bits", config.get("w_bit")), config.get("group_size", config.get("q_group_size")), False
    )
    if spec.bits != 4:
        raise _unsupported("bits", spec.bits, "4 for AWQ")
    # AutoAWQ leaves a module alone when one of these is anywhere in its name, and lm_head always.
    kept = _names(config.get("modules_to_not_convert"), "modules_to_not_convert")
    ignored = ("lm_head", *("re:.*" + re.escape(name) for name in kept))
    return CheckpointFormat("awq", spec, ignored=ignored)


def _detect_gptq(config: Mapping[str, Any]) -> CheckpointFormat:
    stored = config.get("checkpoint_format") or config.get("format") or "gptq"
    if stored not in ("gptq", "gptq_v2"):
        raise _unsupported("checkpoint_format", stored, "'gptq' or 'gptq_v2'")
    if config.get("is_marlin_format"):
        raise _unsupported("is_marlin_format", config["is_marlin_format"], "false")
    if config.get("adapter"):
        raise _unsupported("adapter", config["adapter"], "none")
    if config.get("pack_dtype", "int32") not in ("int32", "torch.int32"):
        raise _unsupported("pack_dtype", config["pack_dtype"], "'int32'")
    # Without an entry the stored zero points decide.
    spec = _spec(config.get("bits"), config.get("group_size"), _flag(config, "sym", False))
    ignored = [] if _flag(config, "lm_head", False) else ["lm_head"]
    overrides = config.get("dynamic") or {}
    if not isinstance(overrides, Mapping):
        raise _unsupported("dynamic", overrides, "a mapping")
    for rule, settings in overrides.items():
        # "-:regex" leaves modules alone, "+:regex" or "regex" quantises them in another way.
        if not str(rule).startswith("-:"):
            raise _unsupported(f"dynamic[{rule!r}]", settings, "one setting for all modules")
        ignored.append(_pattern(str(rule)[2:], "dynamic"))
    inside = config.get("modules_in_block_to_quantize")
    targets = ["Linear"]
    if inside is not None:
        # One list, or a list of lists in the order in which they were quantised.
        entry = "modules_in_block_to_quantize"
        if not isinstance(inside, (list, tuple)):
            raise _unsupported(entry, inside, "a list of module names")
        lists = [[part] if isinstance(part, str) else part for part in inside]
        targets = [rf"re:.*\.{re.escape(name)}$" for part in lists for name in _names(part, entry)]
    return CheckpointFormat(
        "gptq",
        spec,
        targets=tuple(targets),
        ignored=tuple(ignored),
        act_order=_flag(config, "desc_act", False),
        zeros="v2" if stored == "gptq_v2" else "v1",
    )


def _detect_compressed_tensors(config: Mapping[str, Any]) -> CheckpointFormat:
    stored = config.get("format")
    if stored not in ("pack-quantized", "mixed-precision"):
        raise _unsupported("format", stored, "'pack-quantized' for compressed-tensors")
    if config.get("quantization_status", "compressed") not in ("compressed", "frozen"):
        raise _unsupported("quantization_status", config["quantization_status"], "'compressed'")
    if config.get("kv_cache_scheme") is not None:
        raise _unsupported("kv_cache_scheme", config["kv_cache_scheme"], "null")
    sparsity = config.get("sparsity_config") or {}
    if not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") != "dense":
        raise _unsupported("sparsity_config", sparsity, "none")
    transform = config.get("transform_config") or {}
    if not isinstance(transform, Mapping) or transform.get("config_groups"):
        raise _unsupported("transform_config", transform, "none: the weights are stored rotated")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise _unsupported("config_groups", groups, "at least one group")
    schemes: dict[str, tuple[QuantSpec, bool]] = {}
    targets: list[str] = []
    for name, group in groups.items():
        entry = f"config_groups[{name!r}]"
        if not isinstance(group, Mapping):
            raise _unsupported(entry, group, "a mapping with 'targets' and 'weights'")
        if (group.get("format") or stored) != "pack-quantized":
            raise _unsupported(f"{entry}.format", group.get("format") or stored, "'pack-quantized'")
        for side in ("input_activations", "output_activations"):
            if group.get(side) is not None:
                raise _unsupported(f"{entry}.{side}", group[side], "null: activations stay in 16 bits")
        schemes[entry] = _weight_scheme(group.get("weights"), f"{entry}.weights")
        targets += _patterns(_names(group.get("targets"), f"{entry}.targets"), f"{entry}.targets")
    if len(set(schemes.values())) != 1:
        described = {entry: str(spec) for entry, (spec, _) in schemes.items()}
        raise _unsupported("config_groups", described, "one setting for all groups")
    spec, act_order = next(iter(schemes.values()))
    ignored = _patterns(_names(config.get("ignore"), "ignore"), "ignore")
    return CheckpointFormat(
        "compressed-tensors", spec, targets=tuple(targets), ignored=tuple(ignored), act_order=act_order
    )


def _patterns(names: list[str], entry: str) -> list[str]:
    return [_pattern(name[3:], entry) if name.startswith("re:") else name for name in names]


def _weight_scheme(weights: object, entry: str) -> tuple[QuantSpec, bool]:
    """QuantSpec and act-order of the "weights" of a config group."""
    if not isinstance(weights, Mapping):
        raise _unsupported(entry, weights, "a mapping with 'num_bits', 'strategy', ...")
    if weights.get("type", "int") != "int":
        raise _unsupported(f"{entry}.type", weights["type"], "'int'")
    if weights.get("dynamic"):
        raise _unsupported(f"{entry}.dynamic", weights["dynamic"], "false")
    group_size = weights.get("group_size")
    strategy = weights.get("strategy")
    if strategy is None and group_size is not None:
        strategy = "channel" if group_size == -1 else "group"
    if strategy not in ("group", "channel"):
        raise _unsupported(f"{entry}.strategy", strategy, "'group' or 'channel'")
    if strategy == "group" and group_size in (None, -1):
        raise _unsupported(f"{entry}.group_size", group_size, "a number for the strategy 'group'")
    if strategy == "channel" and group_size not in (None, -1):
        raise _unsupported(f"{entry}.group_size", group_size, "null for the strategy 'channel'")
    actorder = weights.get("actorder")
    if actorder not in (None, False, True, "group", "dynamic", "weight", "static"):
        raise _unsupported(f"{entry}.actorder", actorder, "null, 'group' or 'weight'")
    spec = _spec(
        weights.get("num_bits"),
        None if strategy == "channel" else group_size,
        _flag(weights, "symmetric", True),
        (f"{entry}.num_bits", f"{entry}.group_size"),
    )
    # With "weight" the order only guided the quantiser: columns are stored grouped in order.
    return spec, actorder in (True, "group", "dynamic")
