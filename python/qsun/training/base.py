"""What training starts from: the base's weights as a trainable stack, and the decoder as a frozen one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qsun.checkpoint.quantization import describe
from qsun.checkpoint.reader import CheckpointReader, open_checkpoint
from qsun.checkpoint.weights import check_names, read_final_norm, read_layer
from qsun.errors import IncompatibleModule
from qsun.models.build import Placement
from qsun.models.config import ModelConfig
from qsun.modules.card import ModuleCard
from qsun.modules.decode import read_frame
from qsun.modules.quantize import Progress, Quantizer, layer_source, plan_quantization
from qsun.training.forward import Frame
from qsun.training.stack import LayerTensors, TrainingStack
from qsun_kernels import QuantSpec, rope_cache
from qsun_kernels.quant import GroupSize


@dataclass(frozen=True, slots=True)
class DecoderChoice:
    """Which decoder the module is trained against.

    path: its checkpoint; None is the base's own.  The others are those of `load_decode_module`: bits None
    takes a checkpoint as it is, 16 keeps 16-bit weights, 2, 3, 4, 8 quantises them.
    """

    path: Path | None = None
    bits: int | None = None
    group_size: GroupSize | None = None
    symmetric: bool = True
    quantizer: Quantizer = "rtn"
    calibration: Sequence[Sequence[int]] | None = None


@dataclass(frozen=True, slots=True)
class Base:
    """The base checkpoint, read once.

    path: its checkpoint.  card: its identity.  frame: embedding, lm_head and rotary table.
    """

    path: Path
    config: ModelConfig
    card: ModuleCard
    frame: Frame
    dtype: torch.dtype
    device: torch.device


@contextmanager
def _opened(path: Path) -> Iterator[CheckpointReader]:
    reader = open_checkpoint(path)
    try:
        check_names(reader)
        yield reader
    finally:
        reader.close()


def load_base(path: Path, *, dtype: torch.dtype, device: torch.device) -> Base:
    """Read what stands around the layers.

    Raises CheckpointError for damage, IncompatibleModule when the checkpoint is quantised: there is nothing
    to train in codes.
    """
    with _opened(path) as reader:
        if reader.quantization is not None:
            raise IncompatibleModule(
                f"base {path} is quantised ({describe(reader.quantization)}), "
                "expected 16-bit weights to train"
            )
        card, embed_tokens, lm_head = read_frame(reader, dtype)
        tied = lm_head is embed_tokens
        embed_tokens = embed_tokens.to(device)
        frame = Frame(
            embed_tokens,
            embed_tokens if tied else lm_head.to(device),
            rotary_table(reader.config, dtype, device),
        )
        return Base(path, reader.config, card, frame, dtype, device)


def rotary_table(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(max_positions, head_dim): float32 as in serving, float64 for float64."""
    table = rope_cache(config.rope, config.head_dim, config.max_position_embeddings, device)
    return table.double() if dtype == torch.float64 else table


def load_trained_stack(
    base: Base, *, weights_dtype: torch.dtype, source: Path | None = None
) -> TrainingStack:
    """The base's layers (or those of a fine-tuned `source` of the same shape) kept in `weights_dtype`.

    float32 for weights that are trained, the dtype of computation for those that are not.
    """
    with _opened(base.path if source is None else source) as reader:
        if reader.config.num_layers != base.config.num_layers or reader.config.hidden_size != (
            base.config.hidden_size
        ):
            raise IncompatibleModule(
                f"{reader.path} has {reader.config.num_layers} layers of width {reader.config.hidden_size}, "
                f"expected {base.config.num_layers} of {base.config.hidden_size} like the base"
            )
        layers = [
            LayerTensors.of(read_layer(reader, layer, torch.float32), weights_dtype, base.device)
            for layer in range(base.config.num_layers)
        ]
        norm = read_final_norm(reader, torch.float32).to(device=base.device, dtype=weights_dtype)
    return TrainingStack(base.config, layers, norm, base.dtype)


def require_descent(what: str, card: ModuleCard, base: Base) -> None:
    """Raise IncompatibleModule for the first value in which a checkpoint's card and the base's differ."""
    found = card.decoder.differences(base.card.decoder)
    if found:
        name, value, expected = found[0]
        raise IncompatibleModule(
            f"{what} does not fit the base {base.path}: {name} is {value!r}, expected {expected!r}"
        )


def load_frozen_decoder(
    base: Base, choice: DecoderChoice, progress: Progress | None = None
) -> tuple[TrainingStack, QuantSpec | None]:
    """The decoder's layers in the dtype of computation, low-bit ones as the weights their codes stand for.

    Returns them with their quantisation, None for 16 bits.
    Raises IncompatibleModule, naming the field, when the decoder does not descend from the base.
    """
    with _opened(base.path if choice.path is None else choice.path) as reader:
        # Scales are served in the dtype of computation; float64 exists for checks alone.
        serving = torch.float32 if base.dtype == torch.float64 else base.dtype
        placement = Placement(serving, base.device)
        plan = plan_quantization(
            reader,
            bits=choice.bits,
            group_size=choice.group_size,
            symmetric=choice.symmetric,
            quantizer=choice.quantizer,
            calibration=choice.calibration,
        )
        card, embed_tokens, _ = read_frame(reader, serving)
        require_descent(f"decoder {reader.path}", card, base)
        read = layer_source(reader, plan, placement, embed_tokens.to(base.device))
        layers = []
        for layer in range(base.config.num_layers):
            layers.append(LayerTensors.of(read(layer), base.dtype, base.device))
            if progress is not None:
                progress(layer + 1, base.config.num_layers, "frozen decoder")
        norm = read_final_norm(reader, serving).to(device=base.device, dtype=base.dtype)
        stored = None if reader.quantization is None else reader.quantization.spec
    return TrainingStack(base.config, layers, norm, base.dtype), stored if plan is None else plan.spec
