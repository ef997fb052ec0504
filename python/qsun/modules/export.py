"""A decode module as a checkpoint: compressed-tensors safetensors that qsun, transformers and vLLM read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qsun.checkpoint.reader import CheckpointReader, open_checkpoint
from qsun.checkpoint.safetensors_reader import SafetensorsReader
from qsun.checkpoint.tokenizer import TOKENIZER_FILES, load_tokenizer
from qsun.checkpoint.weights import check_names, read_final_norm
from qsun.checkpoint.writer import MAX_SHARD_BYTES, CheckpointWriter
from qsun.models.build import Placement
from qsun.models.hf_config import hf_config_from_model
from qsun.models.weights import (
    EMBED_TOKENS,
    FINAL_NORM,
    LM_HEAD,
    LayerWeights,
    Projection,
    layer_prefix,
    projection_path,
)
from qsun.modules.card import ModuleCard
from qsun.modules.decode import read_frame, resolve_device, resolve_dtype
from qsun.modules.digest import base_digest
from qsun.modules.quantize import (
    Progress,
    Quantizer,
    layer_source,
    plan_quantization,
)
from qsun_kernels import PackedWeight, QuantSpec
from qsun_kernels.quant import GroupSize
from qsun_kernels.quant.formats import quantization_config, to_compressed_tensors

GENERATION_CONFIG = "generation_config.json"


def export_quantized(
    source: Path | str,
    target: Path | str,
    *,
    bits: int | None = 4,
    group_size: GroupSize | None = None,
    symmetric: bool = True,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    quantizer: Quantizer = "rtn",
    calibration: Sequence[Sequence[int]] | None = None,
    name: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> ModuleCard:
    """Quantise a checkpoint and write the result, layer by layer.

    source: a checkpoint directory or a GGUF file; one that is quantised already (AWQ, GPTQ) is converted as
    it is.
    target: a directory that does not exist yet (or is empty); it appears when all is written, or not at all.
    Other arguments are those of `load_decode_module`; name is the module card's, by default the target's.

    Beside the weights are config.json with its quantization_config, the tokenizer, generation_config.json and
    the module card, which is returned.  Loading the result gives the module that `load_decode_module` gives
    with the same arguments, and the same fingerprint as the source.
    Raises what `load_decode_module` raises, and ValueError when `target` exists or the format cannot express
    the weights (a group size that does not divide a projection's input features).
    """
    source, target = Path(source), Path(target)
    reader = open_checkpoint(source)
    try:
        placement = Placement(resolve_dtype(dtype, reader.config), resolve_device(device))
        plan = plan_quantization(
            reader,
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            quantizer=quantizer,
            calibration=calibration,
        )
        stored = reader.quantization
        if plan is None and stored is None:
            raise ValueError(f"bits is {bits!r}, expected 2, 3, 4 or 8 to quantise {source}")
        spec = plan.spec if plan is not None else None
        if stored is not None:
            spec = stored.spec
        assert spec is not None
        act_order = stored is not None and stored.act_order
        check_names(reader)
        card, embed_tokens, lm_head = read_frame(reader, placement.dtype)
        digest = base_digest(embed_tokens)
        card = replace(
            card,
            name=name or target.name,
            embed_tokens=None if digest == card.decoder.base else digest,
        )
        read = layer_source(reader, plan, placement, embed_tokens)
        with CheckpointWriter(target, max_shard_bytes) as writer:
            writer.add(EMBED_TOKENS, embed_tokens)
            for layer in range(reader.config.num_layers):
                try:
                    # Without a name of its own a layer is gone before the next one is read.
                    _add_layer(writer, layer, read(layer), spec, act_order)
                except ValueError as error:
                    raise ValueError(f"{source}: layer {layer}: {error}") from error
                if progress is not None:
                    progress(layer + 1, reader.config.num_layers, "quantised layers")
            writer.add(FINAL_NORM, read_final_norm(reader, placement.dtype))
            if not reader.config.tie_word_embeddings:
                writer.add(LM_HEAD, lm_head)
            writer.write_json("config.json", _config(reader, spec, act_order, placement.dtype))
            _write_generation_config(writer, reader)
            _write_tokenizer(writer, reader)
            card.write(writer.directory)
        return card
    finally:
        reader.close()


def _add_layer(
    writer: CheckpointWriter, layer: int, weights: LayerWeights, spec: QuantSpec, act_order: bool
) -> None:
    prefix = layer_prefix(layer)
    for name, norm in weights.norms():
        writer.add(prefix + name, norm)
    for projection_name, part in weights.projections.items():
        path = prefix + projection_path(projection_name)
        for tensor_name, tensor in _projection_tensors(part, path, spec, act_order).items():
            writer.add(f"{path}.{tensor_name}", tensor)


def _projection_tensors(part: Projection, path: str, spec: QuantSpec, act_order: bool) -> dict[str, Any]:
    if not isinstance(part.weight, PackedWeight):
        raise ValueError(f"{path} is not quantised, expected {spec} in every projection")
    weight = part.weight
    if act_order and weight.g_idx is None:
        # The configuration promises a group index in every layer, the trivial one included.
        weight = replace(weight, g_idx=weight.column_groups().int())
    elif weight.g_idx is not None and not act_order:
        raise ValueError(f"{path} has a group index of its own, expected none without act-order")
    tensors: dict[str, Any] = dict(to_compressed_tensors(weight))
    if part.bias is not None:
        tensors["bias"] = part.bias
    return tensors


def _config(reader: CheckpointReader, spec: QuantSpec, act_order: bool, dtype: torch.dtype) -> dict[str, Any]:
    """The source's own config.json, so that nothing in it is lost, with what has changed."""
    if isinstance(reader, SafetensorsReader):
        config = dict(reader.raw_config)
        for stale in ("quantization_config", "compression_config", "torch_dtype"):
            config.pop(stale, None)
    else:
        config = hf_config_from_model(reader.config)
    config["dtype"] = str(dtype).removeprefix("torch.")
    config["quantization_config"] = quantization_config(spec, act_order=act_order)
    return config


def _write_generation_config(writer: CheckpointWriter, reader: CheckpointReader) -> None:
    stored = reader.path / GENERATION_CONFIG
    if stored.is_file():
        writer.copy(stored)
        return
    ends = reader.config.eos_token_ids
    content: dict[str, Any] = {"bos_token_id": reader.config.bos_token_id}
    content["eos_token_id"] = (ends[0] if len(ends) == 1 else list(ends)) if ends else None
    writer.write_json(GENERATION_CONFIG, {key: value for key, value in content.items() if value is not None})


def _write_tokenizer(writer: CheckpointWriter, reader: CheckpointReader) -> None:
    """The tokenizer's files as they are, or those that transformers makes of a GGUF file's."""
    if reader.path.is_dir():
        for name in TOKENIZER_FILES:
            if (reader.path / name).is_file():
                writer.copy(reader.path / name)
    elif reader.vocabulary() is not None:
        load_tokenizer(reader.path).save_pretrained(writer.directory)
