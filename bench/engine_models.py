"""The modules that the engine's benchmarks run: of random weights or of a checkpoint, in every setting.

A setting is what a user chooses: the bits of the projections, of the lm_head and of the KV cache. What the
installed engine does not take is told in the engine's own words (`refusal`), and never run as something else.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from qsun.checkpoint.reader import open_checkpoint
from qsun.engine.options import EngineOptions
from qsun.errors import QsunError
from qsun.layers.linear import QuantLinear
from qsun.models.build import Placement
from qsun.models.config import ModelConfig
from qsun.models.weights import PROJECTIONS, projection_shape
from qsun.modules.decode import DecodeModule, load_decode_module
from qsun.modules.quantize import DENSE_BITS, default_group_size
from qsun_bench.cases import Json
from qsun_bench.engine_suites import DENSE, KvDtype
from qsun_bench.random_model import model_config, random_decode_module
from qsun_bench.random_weights import weight_bytes
from qsun_bench.shapes import ModelShape, shape
from qsun_kernels.backends.problems import BackendName
from qsun_kernels.quant import Bits, GroupSize, QuantSpec

_KV_BITS = {"fp8": 8, "int8": 8, "int4": 4}
_SCALE_BYTES = 4

BLOCK_SIZE = 16
"""Tokens in a block of every cache here."""


@dataclass(frozen=True, slots=True)
class Setting:
    """bits: of the projections, 16 keeps them dense. kv: the cache's dtype. lm_head_bits: 16 is dense."""

    bits: int = 4
    kv: KvDtype = "auto"
    lm_head_bits: int = DENSE_BITS

    @property
    def is_default(self) -> bool:
        """Whether every engine takes it."""
        return self.kv == "auto" and self.lm_head_bits == DENSE_BITS

    def __str__(self) -> str:
        head = "" if self.lm_head_bits == DENSE_BITS else f" head{self.lm_head_bits}"
        return f"w{self.bits} kv-{self.kv}{head}"


@dataclass(frozen=True, slots=True)
class Source:
    """Where weights come from, and what they are put into.

    model: the name of a shape, for random weights, or a checkpoint; None is the device's default shape.
    layers: only so many of the shape's. group_size None is the largest that fits.
    """

    device: torch.device
    model: str | Path | None = None
    layers: int | None = None
    group_size: GroupSize | None = None
    symmetric: bool = True
    dtype: torch.dtype = torch.bfloat16
    backend: BackendName | None = None
    smoke: bool = False

    @property
    def at_scale(self) -> bool:
        """Whether defaults are those of a figure on a GPU."""
        return self.device.type == "cuda" and not self.smoke

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint, if it is one."""
        return self.model if isinstance(self.model, Path) else None


@dataclass(frozen=True, slots=True)
class Description:
    """What a source holds. stored: how a checkpoint is quantised already; None for 16-bit weights.

    of_layers: layers of the whole model, of which `config` may have fewer.
    """

    label: str
    of_layers: int
    config: ModelConfig
    stored: QuantSpec | None


def describe(source: Source, longest: int) -> Description:
    """What is to be loaded. longest: positions that a shape's rotary table covers.

    Raises ValueError for more layers than the shape has, and whatever opening a checkpoint raises.
    """
    if source.checkpoint is None:
        sizes, layers = sizes_and_layers(source)
        return Description(sizes.name, sizes.layers, model_config(sizes, layers, longest), None)
    reader = open_checkpoint(source.checkpoint)
    try:
        stored = None if reader.quantization is None else reader.quantization.spec
        return Description(source.checkpoint.stem, reader.config.num_layers, reader.config, stored)
    finally:
        reader.close()


def sizes_and_layers(source: Source) -> tuple[ModelShape, int]:
    """The shape, and how many of its layers are made. Raises ValueError when it has fewer."""
    name = source.model or ("llama-3.1-8b" if source.at_scale else "smollm2-135m")
    assert isinstance(name, str)
    sizes = shape(name)
    layers = source.layers or (2 if source.smoke else sizes.layers)
    if layers > sizes.layers:
        raise ValueError(f"layers is {layers}, expected at most {sizes.layers}, those of {sizes.name}")
    return sizes, layers


def refusal(setting: Setting, **options: Any) -> str | None:
    """Why the installed engine does not take a setting, by the error it raises itself; None when it does.

    options: further fields of EngineOptions.
    """
    options["kv_cache_dtype"] = setting.kv
    for name, value in options.items():
        try:
            EngineOptions(**{name: value})
        except (TypeError, ValueError) as error:
            return f"this engine takes no {name}={value!r}: {type(error).__name__}: {error}"
    if setting.lm_head_bits != DENSE_BITS:
        try:
            # What it takes it looks for in a checkpoint that is not there.
            load_decode_module(Path(os.devnull) / "nowhere", **_head_argument(setting))
        except QsunError:
            return None
        except (TypeError, ValueError) as error:
            return (
                f"this engine takes no lm_head_bits={setting.lm_head_bits}: {type(error).__name__}: {error}"
            )
    return None


def _head_argument(setting: Setting) -> dict[str, Any]:
    """Not named at 16 bits, so that an engine without the argument still loads what it can."""
    return {} if setting.lm_head_bits == DENSE_BITS else {"lm_head_bits": setting.lm_head_bits}


def spec_of(bits: int, source: Source, config: ModelConfig) -> QuantSpec | None:
    """How weights of so many bits are quantised; None at 16."""
    if bits == DENSE_BITS:
        return None
    group = source.group_size or default_group_size(config)
    return QuantSpec(cast(Bits, bits), group, source.symmetric)


def head_spec_of(bits: int, config: ModelConfig) -> QuantSpec | None:
    """How an lm_head of so many bits is quantised, as the engine does: symmetric, in the largest groups."""
    if bits == DENSE_BITS:
        return None
    sizes: tuple[GroupSize, ...] = (128, 64, 32)
    fitting = (size for size in sizes if config.hidden_size % cast(int, size) == 0)
    return QuantSpec(cast(Bits, bits), next(fitting, "channel"), True)


def load(source: Source, setting: Setting, config: ModelConfig) -> DecodeModule:
    """The decode module. Random weights are drawn on the device; a checkpoint raises what loading raises."""
    if source.checkpoint is None:
        return random_decode_module(
            config,
            spec_of(setting.bits, source, config),
            Placement(source.dtype, source.device, source.backend),
            source.dtype,
            head_spec=head_spec_of(setting.lm_head_bits, config),
        )
    return load_decode_module(
        source.checkpoint,
        bits=setting.bits,
        group_size=None if setting.bits == DENSE_BITS else source.group_size,
        symmetric=source.symmetric,
        dtype=source.dtype,
        device=source.device,
        backend=source.backend,
        **_head_argument(setting),
    )


def release(device: torch.device) -> None:
    """Give back the memory of engines that nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        # A step may still be under way, launched ahead of the tokens that were asked for.
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int:
    """Bytes that are free for weights and KV, with a tenth left for the step itself."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * 0.9)
    return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 0.9)


def backend_name(module: DecodeModule) -> str:
    """The backend of the matrix products, which are nearly all of a step; dense without quantisation."""
    linear = module.stack.layers[0].mlp.down
    return linear.weight.backend if isinstance(linear, QuantLinear) else DENSE


def step_weight_bytes(
    config: ModelConfig, spec: QuantSpec | None, dtype: torch.dtype, head_spec: QuantSpec | None = None
) -> int:
    """Algorithmic bytes of the weights that one step reads: every projection, the norms and the lm_head."""
    projections = [projection_shape(config, name) for name in PROJECTIONS]
    layer = sum(weight_bytes(N, K, spec, dtype) for N, K in projections)
    norms = (2 * config.num_layers + 1) * config.hidden_size * dtype.itemsize
    head = weight_bytes(config.vocab_size, config.hidden_size, head_spec, dtype)
    return config.num_layers * layer + norms + head


def kv_token_bytes(config: ModelConfig, kv: KvDtype, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one token, all layers: codes, and a float32 scale a head where coded.

    What memory is planned with, before there is an engine that tells what its cache takes.
    """
    heads = 2 * config.num_layers * config.num_kv_heads
    if kv == "auto":
        return heads * config.head_dim * dtype.itemsize
    return heads * (config.head_dim * _KV_BITS[kv] // 8 + _SCALE_BYTES)


def setting_names(description: Description, spec: QuantSpec | None, setting: Setting) -> Sequence[str]:
    """The parts of a case's name that tell the module and the setting."""
    names = [description.label, f"L{description.config.num_layers}"]
    names.append(f"w{DENSE_BITS}" if spec is None else f"w{spec.bits}g{spec.group_size}")
    if setting.kv != "auto":
        names.append(f"kv-{setting.kv}")
    if setting.lm_head_bits != DENSE_BITS:
        names.append(f"head{setting.lm_head_bits}")
    return names


def setting_fields(
    description: Description, spec: QuantSpec | None, setting: Setting, dtype: torch.dtype
) -> dict[str, Json]:
    """The module and the setting, as a record carries them."""
    name = str(dtype).removeprefix("torch.")
    return {
        "model": description.label,
        "layers": description.config.num_layers,
        "of_layers": description.of_layers,
        "bits": DENSE_BITS if spec is None else spec.bits,
        "group_size": None if spec is None else spec.group_size,
        "symmetric": None if spec is None else spec.symmetric,
        "dtype": name,
        "kv_dtype": name if setting.kv == "auto" else setting.kv,
        "lm_head_bits": setting.lm_head_bits,
        "block_size": BLOCK_SIZE,
    }
