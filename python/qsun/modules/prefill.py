"""Prefill modules: one a task, each a decoder stack that writes the prompt's keys and values."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from qsun.checkpoint.quantization import describe
from qsun.checkpoint.reader import CheckpointReader, open_checkpoint
from qsun.checkpoint.tokenizer import check_vocabulary
from qsun.checkpoint.weights import (
    check_names,
    read_embedding,
    read_final_norm,
    read_layer,
    read_lm_head,
)
from qsun.core import FirstToken
from qsun.errors import CheckpointError, IncompatibleModule, SharedPartsWarning
from qsun.layers.norm import RMSNorm
from qsun.models.build import Placement, build_layer
from qsun.models.config import ModelConfig
from qsun.models.decoder import DecoderLayer, DecoderStack
from qsun.models.rope_config import rope_to_hf
from qsun.models.weights import EMBED_TOKENS, FINAL_NORM, LM_HEAD, LayerWeights
from qsun.modules.card import DecoderFingerprint, ModuleCard, check_card_fits_checkpoint
from qsun.modules.decode import DecodeModule, read_identity, resolve_device, resolve_dtype
from qsun.modules.digest import WeightDigest, vocabulary_digest, weight_digest
from qsun.modules.lora import ADAPTER_CONFIG, LoraAdapter
from qsun.modules.quantize import LayerSource, Progress
from qsun_kernels.backends.problems import BackendName


class PrefillModule:
    """The stack of one task.  Embedding and lm_head are the decode module's.

    name: what requests call the model.  card: what the module was made for.  fingerprint: unique to these
    weights and constants, the provenance of every KV block that the module writes.  notices: what its user
    should know.
    """

    __slots__ = ("card", "fingerprint", "name", "notices", "stack")

    def __init__(
        self, name: str, stack: DecoderStack, card: ModuleCard, fingerprint: str, notices: tuple[str, ...]
    ) -> None:
        self.name = name
        self.stack = stack
        self.card = card
        self.fingerprint = fingerprint
        self.notices = notices

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return self.stack.config

    @property
    def first_token(self) -> FirstToken:
        """Who predicts the first new token."""
        return self.card.first_token

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return self.stack.nbytes


def load_prefill_module(
    name: str,
    path: Path | str | None = None,
    *,
    base_path: Path | str,
    decode: DecodeModule,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    backend: BackendName | None = None,
    first_token: FirstToken | None = None,
    progress: Progress | None = None,
) -> PrefillModule:
    """Read a prefill module and check that it fits the decode module.

    path: None takes the base's own weights; a directory with adapter_config.json is a LoRA adapter, merged
        into the base; any other directory, or a GGUF file, is a full checkpoint.
    base_path: the 16-bit checkpoint that the decode module was made of.
    dtype, device: the decode module's own by default.  backend: of low-bit weights, if there are any.
    first_token: the convention to run under; None is the module card's, or "decode" without a card.
    progress: called with (layers done, layers in all, what is being done).

    Raises IncompatibleModule, telling both values, when architecture, sizes, rotary parameters, vocabulary,
    tokenizer or base are not the decode module's, or first_token is not the card's; CheckpointError for
    damage. Warns with SharedPartsWarning, and records a notice, when the checkpoint's embedding or lm_head
    differs from the decode module's, which is the one that is used.
    """
    if first_token not in (None, "decode", "prefill"):
        raise ValueError(f"first_token is {first_token!r}, expected 'decode', 'prefill' or None")
    placement = Placement(
        resolve_dtype(decode.dtype if dtype is None else dtype, decode.config),
        decode.device if device is None else resolve_device(device),
        backend,
    )
    # A card, where there is one, states the convention; elsewhere the caller does.
    unstated: FirstToken = first_token or "decode"
    source = None if path is None else Path(path)
    is_adapter = source is not None and (source / ADAPTER_CONFIG).is_file()
    reader = open_checkpoint(base_path if source is None or is_adapter else source)
    try:
        check_names(reader)
        if source is None or not is_adapter:
            card = (
                _base_card(reader, decode, unstated)
                if source is None
                else _own_card(reader, decode, unstated)
            )
            parts = {} if source is None else _shared_parts(reader, decode)

            def read(layer: int) -> LayerWeights:
                return read_layer(reader, layer, placement.dtype)

            return _build(name, reader, read, decode, placement, card, first_token, parts, progress)
        card = _adapter_card(source, reader, decode, unstated)
        adapter = LoraAdapter(source, reader.config)
        try:
            merged = _merged_layers(reader, adapter, placement.dtype)
            return _build(
                name, reader, merged, decode, placement, card, first_token, adapter.shared_parts(), progress
            )
        finally:
            adapter.close()
    finally:
        reader.close()


def _merged_layers(reader: CheckpointReader, adapter: LoraAdapter, dtype: torch.dtype) -> LayerSource:
    def read_and_merge(layer: int) -> LayerWeights:
        merged = adapter.merge(layer, read_layer(reader, layer, torch.float32))
        try:
            return merged.cast(dtype)
        except ValueError as error:
            raise CheckpointError(f"{adapter.path}: merged layer {layer}: {error}") from error

    return read_and_merge


def _build(
    name: str,
    reader: CheckpointReader,
    read: LayerSource,
    decode: DecodeModule,
    placement: Placement,
    card: ModuleCard,
    first_token: FirstToken | None,
    shared_parts: Mapping[str, Tensor],
    progress: Progress | None,
) -> PrefillModule:
    if first_token is not None and first_token != card.first_token:
        raise IncompatibleModule(
            f"prefill module {name!r}: first_token is {first_token!r}, "
            f"expected {card.first_token!r}, the convention that its module card says it was trained with"
        )
    notices = (*_compare_training(name, card, decode), *_compare_shared_parts(name, shared_parts, decode))
    if reader.quantization is not None:
        notices = (*notices, f"{name}: prefill weights are quantised ({describe(reader.quantization)})")
    config = reader.config
    layers = []
    with WeightDigest(_constants(config)) as digest:
        for layer in range(config.num_layers):
            # Without a name of its own a layer is gone before the next one is read.
            layers.append(_place_layer(read(layer), layer, digest, config, placement))
            if progress is not None:
                progress(layer + 1, config.num_layers, f"prefill layers of {name}")
        norm = read_final_norm(reader, placement.dtype)
        digest.add([(FINAL_NORM, norm)])
        fingerprint = digest.value()
    stack = DecoderStack(
        config,
        layers,
        RMSNorm(norm.to(placement.device), config.rms_norm_eps),
        # Equal rotary parameters are part of what fits, so the table is the decode module's.
        decode.stack.cos_sin.to(placement.device),
    )
    return PrefillModule(name, stack, replace(card, name=name), fingerprint, notices)


def _place_layer(
    weights: LayerWeights, layer: int, digest: WeightDigest, config: ModelConfig, placement: Placement
) -> DecoderLayer:
    digest.add(weights.named_tensors(layer))
    return build_layer(weights, layer, config, placement)


def _constants(config: ModelConfig) -> str:
    """What decides the keys and values beside the weights."""
    return json.dumps(
        {
            "sizes": [config.hidden_size, config.num_q_heads, config.num_kv_heads, config.head_dim],
            "rms_norm_eps": config.rms_norm_eps,
            "rope": rope_to_hf(config.rope),
            "qk_norm": config.qk_norm,
            "windows": config.windows,
        },
        sort_keys=True,
    )


def require_fit(module: PrefillModule, decode: DecodeModule) -> None:
    """Raise IncompatibleModule unless a loaded module can work on the cache of this decode module.

    It was held against the decode module that it was loaded for, which may have been another one.
    """
    _require_fit(f"prefill module {module.name!r}", module.card.decoder, decode, base=True)
    weight = module.stack.norm.weight
    if (weight.dtype, weight.device) != (decode.dtype, decode.device):
        raise IncompatibleModule(
            f"prefill module {module.name!r} does not fit the decode module: it is {weight.dtype} on "
            f"{weight.device}, expected {decode.dtype} on {decode.device}"
        )


def _require_fit(what: str, mine: DecoderFingerprint, decode: DecodeModule, *, base: bool) -> None:
    """Raise IncompatibleModule for the first value in which a module and the decode module differ."""
    found = mine.differences(decode.fingerprint, base=base)
    if found:
        field, value, expected = found[0]
        others = f" (and {', '.join(item[0] for item in found[1:])})" if len(found) > 1 else ""
        raise IncompatibleModule(
            f"{what} does not fit the decode module: {field} is {value!r}, expected {expected!r}{others}"
        )


def _base_card(reader: CheckpointReader, decode: DecodeModule, unstated: FirstToken) -> ModuleCard:
    """The card of the base's own weights, which were trained for no convention."""
    card, _ = read_identity(reader)
    _require_fit(str(reader.path), card.decoder, decode, base=True)
    return replace(card, first_token=unstated, training={})


def _adapter_card(
    source: Path, reader: CheckpointReader, decode: DecodeModule, unstated: FirstToken
) -> ModuleCard:
    """The card of an adapter: its own where it has one."""
    if reader.quantization is not None:
        raise IncompatibleModule(
            f"base {reader.path} is quantised ({describe(reader.quantization)}), expected 16-bit weights "
            f"to merge the adapter {source} into"
        )
    base = _base_card(reader, decode, unstated)
    card = ModuleCard.read(source)
    if card is None:
        return base
    _require_fit(f"adapter {source}", card.decoder, decode, base=True)
    return card


def _own_card(reader: CheckpointReader, decode: DecodeModule, unstated: FirstToken) -> ModuleCard:
    """The card of a full checkpoint: its own where it has one, else what its files say.

    Without a card nothing tells the base: the embedding may be missing, or fine-tuned, which is a notice.
    """
    vocabulary = reader.vocabulary()
    if vocabulary is not None:
        check_vocabulary(vocabulary, reader.config.vocab_size, str(reader.path))
    tokenizer = None if vocabulary is None else vocabulary_digest(vocabulary.items())
    files = DecoderFingerprint.of(reader.config, tokenizer, decode.fingerprint.base)
    _require_fit(str(reader.path), files, decode, base=False)
    card = ModuleCard.read(reader.path) if reader.path.is_dir() else None
    if card is None:
        return ModuleCard(reader.path.stem, unstated, files)
    check_card_fits_checkpoint(card, reader.config, tokenizer, reader.path)
    _require_fit(f"{reader.path} by its card", card.decoder, decode, base=True)
    return card


def _shared_parts(reader: CheckpointReader, decode: DecodeModule) -> dict[str, Tensor]:
    """The embedding and lm_head that a full checkpoint brings, if any, in the decode module's dtype."""
    names = reader.names()
    parts: dict[str, Tensor] = {}
    if EMBED_TOKENS in names:
        parts["embed_tokens"] = read_embedding(reader, decode.dtype)
    embed_tokens = parts.get("embed_tokens")
    if LM_HEAD in names or (reader.config.tie_word_embeddings and embed_tokens is not None):
        parts["lm_head"] = read_lm_head(reader, embed_tokens, decode.dtype)
    return parts


def _compare_shared_parts(name: str, parts: Mapping[str, Tensor], decode: DecodeModule) -> tuple[str, ...]:
    """A notice, and a warning, for every part that is not the decode module's."""
    notices = []
    for part, theirs in parts.items():
        if theirs.shape != decode.embed_tokens.shape:
            raise IncompatibleModule(
                f"prefill module {name!r}: {part} has shape {tuple(theirs.shape)}, "
                f"expected {tuple(decode.embed_tokens.shape)} like the decode module's"
            )
        ours = decode.embed_tokens if part == "embed_tokens" else decode.lm_head
        theirs = theirs.to(decode.dtype)
        if ours is None:
            # Of an lm_head in few bits only the digest of what it was made from is left to compare.
            if weight_digest(theirs) == decode.lm_head_digest:
                continue
            what = "differs from the one that the decode module's was quantised from"
        else:
            ours = ours.cpu()
            if torch.equal(theirs, ours):
                continue
            rows, largest = _difference(theirs, ours)
            what = (
                f"differs from the decode module's in {rows} of {ours.shape[0]} rows, "
                f"by at most {largest:.3g}"
            )
        notices.append(
            f"{name}: its {part} {what}; the decode module's is used, for it belongs there and is frozen"
        )
        warnings.warn(notices[-1], SharedPartsWarning, stacklevel=4)
    return tuple(notices)


def _compare_training(name: str, card: ModuleCard, decode: DecodeModule) -> tuple[str, ...]:
    """A notice where a module was trained against a decoder of other bits: it runs, and answers less well."""
    trained = card.training.get("decoder")
    if not isinstance(trained, Mapping) or "quantization" not in trained:
        return ()
    theirs, ours = (str(spec or "16-bit") for spec in (trained["quantization"], decode.quantization))
    if theirs == ours:
        return ()
    return (f"{name}: trained against a decoder of {theirs}, and this one has {ours}",)


def _difference(theirs: Tensor, ours: Tensor) -> tuple[int, float]:
    """How many rows differ, and the largest difference; in slices, for these are the largest tensors."""
    rows, largest = 0, 0.0
    for mine, other in zip(theirs.split(4096), ours.split(4096), strict=True):
        gap = (mine.float() - other.float()).abs().amax(dim=1)
        rows += int((~(gap == 0)).sum())
        largest = max(largest, float(gap.max()))
    return rows, largest
