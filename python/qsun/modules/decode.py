"""The decode module: the frozen decoder that all tasks share, with its embedding and lm_head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from qsun.checkpoint.reader import CheckpointReader, open_checkpoint
from qsun.checkpoint.tokenizer import check_vocabulary
from qsun.checkpoint.weights import check_names, read_embedding, read_final_norm, read_lm_head
from qsun.errors import CheckpointError
from qsun.layers.linear import DenseLinear, Linear, QuantLinear
from qsun.layers.norm import RMSNorm
from qsun.models.build import Placement, build_layer
from qsun.models.config import WEIGHT_DTYPES, ModelConfig
from qsun.models.decoder import DecoderLayer, DecoderStack
from qsun.models.hf_config import DTYPE_NAMES
from qsun.models.weights import LayerWeights, is_finite
from qsun.modules.card import DecoderFingerprint, ModuleCard, check_card_fits_checkpoint
from qsun.modules.digest import base_digest, vocabulary_digest, weight_digest
from qsun.modules.quantize import DENSE_BITS, Progress, Quantizer, layer_source, plan_quantization
from qsun_kernels import QuantSpec, prepare_weight, rope_cache
from qsun_kernels.backends.dispatch import requested_backend
from qsun_kernels.backends.problems import BackendName
from qsun_kernels.quant import Bits, GroupSize, concatenate_rows, quantize_rtn

# Rows of the lm_head that are quantised at one time: float32 copies of all of them would be its largest use
# of memory.
_HEAD_ROWS = 16384


class DecodeModule:
    """A decoder stack with its embedding and lm_head, on one device.

    path: where it was read from.  config: the model's shape.  stack: the layers.  embed_tokens: (V, H) in
    `dtype`.  lm_head: the same of the lm_head, one tensor when they are tied; None where it is kept in few
    bits only.  head: the layer that computes logits with it.  lm_head_digest: `weight_digest` of an lm_head
    that is kept in few bits only.  quantization: the spec of its low-bit layers, None when all are dense.
    card: what the checkpoint says of itself.  fingerprint: what a prefill module must agree with; no number
    of bits is in it, for a prefill module's KV does not depend on any.
    """

    __slots__ = (
        "card",
        "config",
        "dtype",
        "embed_tokens",
        "fingerprint",
        "head",
        "lm_head",
        "lm_head_digest",
        "path",
        "quantization",
        "stack",
    )

    def __init__(
        self,
        path: Path,
        stack: DecoderStack,
        embed_tokens: Tensor,
        lm_head: Tensor | None,
        quantization: QuantSpec | None,
        card: ModuleCard,
        head: Linear | None = None,
        lm_head_digest: str | None = None,
    ) -> None:
        """head: by default `lm_head` as it is."""
        if head is None:
            if lm_head is None:
                raise ValueError("lm_head and head are None, expected at least one of them")
            head = DenseLinear(lm_head)
        if lm_head is None and lm_head_digest is None:
            raise ValueError("lm_head_digest is None, expected the digest of an lm_head that is not kept")
        self.path = path
        self.config: ModelConfig = stack.config
        self.stack = stack
        self.embed_tokens = embed_tokens
        self.lm_head = lm_head
        self.head = head
        self.lm_head_digest = lm_head_digest
        self.dtype = embed_tokens.dtype
        self.quantization = quantization
        self.card = card
        self.fingerprint: DecoderFingerprint = card.decoder

    def embed(self, token_ids: Tensor) -> Tensor:
        """Hidden states (T, H) of token ids int64 or int32 (T,)."""
        return functional.embedding(token_ids, self.embed_tokens)

    def raw_logits(self, hidden: Tensor) -> Tensor:
        """(n, V) in the module's dtype, which is what the sampler reads, of final hidden states (n, H)."""
        return self.head(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits float32 (T, V) of hidden states (T, H) after the final norm of any module's stack."""
        return self.raw_logits(hidden).float()

    @property
    def lm_head_bits(self) -> int:
        """Bits of a weight of the lm_head as logits are computed with it; 16 stands for `dtype`."""
        return self.head.weight.spec.bits if isinstance(self.head, QuantLinear) else DENSE_BITS

    @property
    def device(self) -> torch.device:
        """Where the module is."""
        return self.embed_tokens.device

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        is_head = isinstance(self.head, DenseLinear) and self.head.weight is self.embed_tokens
        return self.bytes_per_step + (0 if is_head else self.embed_tokens.nbytes)

    @property
    def bytes_per_step(self) -> int:
        """Bytes of weights that a decode step reads whatever the batch is; of the embedding only rows."""
        return self.stack.nbytes + self.head.nbytes


def load_decode_module(
    path: Path | str,
    *,
    bits: int | None = None,
    group_size: GroupSize | None = None,
    symmetric: bool = True,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    backend: BackendName | None = None,
    quantizer: Quantizer = "rtn",
    calibration: Sequence[Sequence[int]] | None = None,
    lm_head_bits: int = DENSE_BITS,
    progress: Progress | None = None,
) -> DecodeModule:
    """Read a decode module, quantising 16-bit weights on the way when asked to.

    path: a checkpoint directory or a GGUF file.
    bits: 2, 3, 4 or 8 quantises 16-bit weights; 16 keeps them; None takes the checkpoint as it is.
        For one that is quantised already (AWQ, GPTQ, compressed-tensors), bits and group_size must be its
        own or None.
    group_size, symmetric: see `QuantSpec`; None is the largest group that divides every projection.
    dtype: of activations and of all that is not quantised: float32, float16, bfloat16, by dtype or by name,
        or "auto" for the checkpoint's own (bfloat16 when it states none).
    device: "cuda" when there is one, else "cpu", by default.  backend: of the low-bit weights.
    quantizer: "rtn" rounds to nearest.  Two look at the activations of `calibration`, sequences of token ids:
        "awq" searches scales for input channels, "gptq" lets each column make up for those rounded before it.
    lm_head_bits: 8 or 4 rounds the lm_head to nearest, symmetric, in the largest groups that divide its
        rows; 16 keeps it.  An embedding that is tied to it stays as it is, beside it.
    progress: called with (layers done, layers in all, what is being done).

    The embedding is never quantised.  Peak memory is one layer in 32 bits above the module itself.
    Raises CheckpointError for a damaged or contradictory checkpoint, UnsupportedModel (a CheckpointError) for
    what is not implemented, ValueError for a bad argument, BackendUnavailable for a backend that cannot.
    """
    requested_backend(backend)  # an unknown name is the caller's mistake, not the checkpoint's
    check_lm_head_bits(lm_head_bits)
    reader = open_checkpoint(path)
    try:
        placement = Placement(resolve_dtype(dtype, reader.config), resolve_device(device), backend)
        plan = plan_quantization(
            reader,
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            quantizer=quantizer,
            calibration=calibration,
        )
        check_names(reader)
        card, embed_tokens, lm_head = read_frame(reader, placement.dtype)
        tied = lm_head is embed_tokens
        embed_tokens = embed_tokens.to(placement.device)
        digest: str | None = None
        if lm_head_bits != DENSE_BITS and not tied:
            digest = weight_digest(lm_head)
        head = _place_head(reader, embed_tokens if tied else lm_head, lm_head_bits, placement)
        kept = embed_tokens if tied else head.weight if isinstance(head, DenseLinear) else None
        # As stored it is large, and needed no more.
        del lm_head
        config = reader.config
        read = layer_source(reader, plan, placement, embed_tokens)
        layers = []
        for layer in range(config.num_layers):
            # The weights are passed on without a name, so that they are gone before the next layer is read.
            layers.append(_place_layer(reader, read(layer), layer, placement))
            if progress is not None:
                progress(layer + 1, config.num_layers, "decode layers")
        norm = RMSNorm(read_final_norm(reader, placement.dtype).to(placement.device), config.rms_norm_eps)
        table = rope_cache(config.rope, config.head_dim, config.max_position_embeddings, placement.device)
        if not is_finite(table):
            raise CheckpointError(
                f"{reader.path}: {config.rope} gives angles that are not finite, expected ones that float32 "
                "holds"
            )
        stored = None if reader.quantization is None else reader.quantization.spec
        return DecodeModule(
            reader.path,
            DecoderStack(config, layers, norm, table),
            embed_tokens,
            kept,
            stored if plan is None else plan.spec,
            card,
            head,
            digest,
        )
    finally:
        reader.close()


def _place_layer(
    reader: CheckpointReader, weights: LayerWeights, layer: int, placement: Placement
) -> DecoderLayer:
    """Build a layer; weights that the backend cannot hold are the checkpoint's fault."""
    try:
        return build_layer(weights, layer, reader.config, placement)
    except ValueError as error:
        raise CheckpointError(f"{reader.path}: layer {layer}: {error}") from error


def check_lm_head_bits(lm_head_bits: int) -> None:
    """Raise ValueError unless an lm_head can be kept in so many bits."""
    if type(lm_head_bits) is not int or lm_head_bits not in (4, 8, DENSE_BITS):
        raise ValueError(f"lm_head_bits is {lm_head_bits!r}, expected 16, 8 or 4")


def _place_head(reader: CheckpointReader, weight: Tensor, bits: int, placement: Placement) -> Linear:
    """The layer that computes logits from an lm_head (V, H), quantised on the device slice by slice."""
    if bits == DENSE_BITS:
        return DenseLinear(weight.to(placement.device))
    K = weight.shape[1]
    sizes: tuple[GroupSize, ...] = (128, 64, 32)
    group: GroupSize = next((size for size in sizes if K % cast(int, size) == 0), "channel")
    spec = QuantSpec(cast(Bits, bits), group, True)
    try:
        packed = [
            quantize_rtn(rows.to(placement.device), spec, scale_dtype=placement.dtype)
            for rows in weight.split(_HEAD_ROWS)
        ]
        prepared = prepare_weight(
            concatenate_rows(packed),
            dtype=placement.dtype,
            device=placement.device,
            backend=placement.backend,
        )
    except ValueError as error:
        raise CheckpointError(f"{reader.path}: the lm_head cannot be quantised: {error}") from error
    return QuantLinear(prepared)


def read_frame(reader: CheckpointReader, dtype: torch.dtype) -> tuple[ModuleCard, Tensor, Tensor]:
    """What stands around the layers: the card, the embedding and the lm_head (V, H), in host memory.

    The two are one tensor when they are tied.
    """
    card, stored = read_identity(reader)
    embed_tokens = stored.to(dtype)
    return card, embed_tokens, read_lm_head(reader, embed_tokens, dtype)


def read_identity(reader: CheckpointReader) -> tuple[ModuleCard, Tensor]:
    """A checkpoint's card, and its embedding (V, H) as stored.

    Without a card file the card is made from the checkpoint itself.
    Raises CheckpointError when the tokenizer has ids past the vocabulary, or the card describes other
    weights.
    """
    vocabulary = reader.vocabulary()
    if vocabulary is not None:
        check_vocabulary(vocabulary, reader.config.vocab_size, str(reader.path))
    tokenizer = None if vocabulary is None else vocabulary_digest(vocabulary.items())
    embed_tokens = read_embedding(reader, None)
    stored = base_digest(embed_tokens)
    card = ModuleCard.read(reader.path) if reader.path.is_dir() else None
    if card is None:
        decoder = DecoderFingerprint.of(reader.config, tokenizer, stored)
        return ModuleCard(reader.path.stem, "decode", decoder), embed_tokens
    check_card_fits_checkpoint(card, reader.config, tokenizer, reader.path)
    expected = card.decoder.base if card.embed_tokens is None else card.embed_tokens
    if stored != expected:
        raise CheckpointError(
            f"{reader.path}: the embedding has the digest {stored}, expected {expected} by the module card: "
            "the card was made for other weights"
        )
    return card, embed_tokens


def resolve_device(device: torch.device | str | None) -> torch.device:
    """The device of an argument; None is the current CUDA device, or the CPU where there is none."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    resolved = torch.device(device)
    if resolved == torch.device("cuda"):
        # Tensors report an index, so a device without one would compare unequal to theirs.
        resolved = torch.device("cuda", torch.cuda.current_device())
    return resolved


def resolve_dtype(dtype: torch.dtype | str, config: ModelConfig) -> torch.dtype:
    """The dtype of an argument, or of its name; "auto" is the checkpoint's own, else bfloat16."""
    if dtype == "auto":
        return config.dtype or torch.bfloat16
    resolved = DTYPE_NAMES.get(dtype) if isinstance(dtype, str) else dtype
    if resolved not in WEIGHT_DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected 'auto', one of {WEIGHT_DTYPES} or the name of one")
    return resolved
