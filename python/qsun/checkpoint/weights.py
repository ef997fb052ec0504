"""The decoder's weights out of a checkpoint, layer by layer, each tensor checked before it is used."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from qsun.checkpoint.quantization import PACKED_TENSORS
from qsun.checkpoint.reader import CheckpointReader
from qsun.errors import CheckpointError
from qsun.models.config import ModelConfig
from qsun.models.weights import (
    ATTENTION_NORM,
    EMBED_TOKENS,
    FINAL_NORM,
    K_NORM,
    LM_HEAD,
    MLP_NORM,
    PROJECTIONS,
    Q_NORM,
    LayerWeights,
    Projection,
    ProjectionName,
    is_finite,
    layer_prefix,
    projection_has_bias,
    projection_path,
    projection_shape,
)

DENSE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# Old checkpoints store the rotary frequencies, which follow from the configuration.
_IGNORED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def check_names(reader: CheckpointReader) -> None:
    """Raise CheckpointError unless the checkpoint holds the decoder's tensors, all of them and no others.

    A tensor that would be ignored is a weight that its author meant to matter: a bias that the configuration
    denies, a layer past the last.  The embedding and lm_head may be absent here; a decode module asks for
    them itself.
    """
    required, optional = _decoder_names(reader)
    present = reader.names()
    missing = sorted(required - present)
    if missing:
        raise CheckpointError(
            f"{reader.path} has no tensor {missing[0]!r}{_more(missing)}, expected every tensor of a "
            f"{reader.config.architecture} model of {reader.config.num_layers} layers"
        )
    unknown = sorted(name for name in present - required - optional if _IGNORED.fullmatch(name) is None)
    if unknown:
        raise CheckpointError(
            f"{reader.path} holds tensor {unknown[0]!r}{_more(unknown)}, "
            f"expected only tensors of a {reader.config.architecture} model of "
            f"{reader.config.num_layers} layers as its configuration describes it"
        )


def read_layer(reader: CheckpointReader, layer: int, dtype: torch.dtype) -> LayerWeights:
    """Read one layer into host memory.

    dtype: of norms, biases and dense weights; packed weights keep their own.
    Raises CheckpointError for a missing tensor, a wrong shape or dtype, a value that is not finite.
    """
    config, prefix = reader.config, layer_prefix(layer)
    hidden, head = (config.hidden_size,), (config.head_dim,)
    return LayerWeights(
        attention_norm=read_dense(reader, prefix + ATTENTION_NORM, hidden, dtype),
        mlp_norm=read_dense(reader, prefix + MLP_NORM, hidden, dtype),
        projections={name: _read_projection(reader, prefix, name, dtype) for name in PROJECTIONS},
        q_norm=read_dense(reader, prefix + Q_NORM, head, dtype) if config.qk_norm else None,
        k_norm=read_dense(reader, prefix + K_NORM, head, dtype) if config.qk_norm else None,
    )


def read_final_norm(reader: CheckpointReader, dtype: torch.dtype) -> Tensor:
    """The weight (hidden_size,) of the norm after the last layer."""
    return read_dense(reader, FINAL_NORM, (reader.config.hidden_size,), dtype)


def read_embedding(reader: CheckpointReader, dtype: torch.dtype | None) -> Tensor:
    """The embedding (vocab_size, hidden_size); dtype None leaves it as it is stored."""
    return read_dense(reader, EMBED_TOKENS, _vocabulary_shape(reader.config), dtype)


def read_lm_head(reader: CheckpointReader, embed_tokens: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The lm_head (vocab_size, hidden_size): its own tensor, or `embed_tokens` itself when the two are tied.

    embed_tokens: (vocab_size, hidden_size) in `dtype`, None when the checkpoint brings none.
    Raises CheckpointError when the configuration says that they are tied and the file holds another lm_head.
    """
    if not reader.config.tie_word_embeddings or embed_tokens is None:
        return read_dense(reader, LM_HEAD, _vocabulary_shape(reader.config), dtype)
    if LM_HEAD in reader.names():
        stored = read_dense(reader, LM_HEAD, _vocabulary_shape(reader.config), dtype)
        if not torch.equal(stored, embed_tokens):
            raise CheckpointError(
                f"{reader.path}: {LM_HEAD} differs from {EMBED_TOKENS}, "
                "expected equality because tie_word_embeddings is true"
            )
    return embed_tokens


def read_dense(
    reader: CheckpointReader, name: str, shape: tuple[int, ...], dtype: torch.dtype | None
) -> Tensor:
    """A floating-point tensor of that shape, rounded to `dtype` (None: as stored), every value finite."""
    if name in reader.names() and reader.shape(name) != shape:
        raise CheckpointError(
            f"{reader.path}: tensor {name!r} has shape {reader.shape(name)}, "
            f"expected {shape} by the configuration"
        )
    stored = reader.get(name)
    if stored.dtype not in DENSE_DTYPES:
        raise CheckpointError(
            f"{reader.path}: tensor {name!r} has dtype {stored.dtype}, expected one of "
            f"{', '.join(str(item).removeprefix('torch.') for item in DENSE_DTYPES)}"
        )
    tensor = stored if dtype is None else stored.to(dtype)
    if not is_finite(tensor):
        bad = (~torch.isfinite(tensor)).nonzero()[0]
        index = tuple(int(i) for i in bad)
        raise CheckpointError(
            f"{reader.path}: tensor {name!r} is {float(stored[index])!r} at {index}, "
            f"expected a finite number that {tensor.dtype} can hold"
        )
    return tensor


def _read_projection(
    reader: CheckpointReader, prefix: str, name: ProjectionName, dtype: torch.dtype
) -> Projection:
    path = prefix + projection_path(name)
    shape = projection_shape(reader.config, name)
    bias = _read_bias(reader, path, name, shape[0], dtype)
    if reader.quantization is None or f"{path}.weight" in reader.names():
        return Projection(read_dense(reader, f"{path}.weight", shape, dtype), bias)
    stored = {
        part: reader.get(f"{path}.{part}")
        for part in PACKED_TENSORS[reader.quantization.name]
        if f"{path}.{part}" in reader.names()
    }
    try:
        weight = reader.quantization.read(stored, path)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{reader.path}: {error}") from error
    if shape != (weight.N, weight.K):
        raise CheckpointError(
            f"{reader.path}: {path} is a packed weight of (N, K) = {(weight.N, weight.K)}, "
            f"expected {shape} by the configuration"
        )
    return Projection(weight, bias)


def _read_bias(
    reader: CheckpointReader, path: str, name: ProjectionName, N: int, dtype: torch.dtype
) -> Tensor | None:
    stored = f"{path}.bias"
    if projection_has_bias(reader.config, name):
        return read_dense(reader, stored, (N,), dtype)
    if stored in reader.names():
        # Some GPTQ writers give every layer a bias of zeros; any other bias would be lost.
        bias = read_dense(reader, stored, (N,), dtype)
        if bool(bias.any()):
            raise CheckpointError(
                f"{reader.path}: tensor {stored!r} is not zero, expected no bias there by the configuration"
            )
    return None


def _decoder_names(reader: CheckpointReader) -> tuple[set[str], set[str]]:
    """Names that must be there, and names that may."""
    config, present = reader.config, reader.names()
    required, optional = {FINAL_NORM}, {EMBED_TOKENS, LM_HEAD}
    for layer in range(config.num_layers):
        prefix = layer_prefix(layer)
        required.update((prefix + ATTENTION_NORM, prefix + MLP_NORM))
        if config.qk_norm:
            required.update((prefix + Q_NORM, prefix + K_NORM))
        for name in PROJECTIONS:
            path = prefix + projection_path(name)
            if reader.quantization is None or f"{path}.weight" in present:
                required.add(f"{path}.weight")
            else:
                # Which parts beside the codes must be there depends on the format, whose reader names what is
                # missing.
                required.add(f"{path}.{reader.quantization.codes_name}")
                optional.update(f"{path}.{part}" for part in PACKED_TENSORS[reader.quantization.name])
            if projection_has_bias(config, name):
                required.add(f"{path}.bias")
            elif reader.quantization is not None:
                optional.add(f"{path}.bias")
    return required, optional


def _vocabulary_shape(config: ModelConfig) -> tuple[int, int]:
    return config.vocab_size, config.hidden_size


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
