"""The module card: what a module was made for, in one JSON file beside its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, cast

from qsun.core import FirstToken
from qsun.errors import CheckpointError
from qsun.models.config import ModelConfig
from qsun.models.fields import Fields, read_json_object
from qsun.models.rope_config import rope_to_hf

CARD_FILE = "qsun_module.json"
CARD_FORMAT = 1


@dataclass(frozen=True, slots=True)
class DecoderFingerprint:
    """What two modules must share to work on one KV cache.

    rope: the rotary parameters that matter, as `rope_to_hf` writes them.  tokenizer: digest of the
    vocabulary, None when the checkpoint has no tokenizer.  base: `base_digest` of the embedding of the model
    that both descend from.
    """

    architecture: str
    hidden_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rope: Mapping[str, Any]
    vocab_size: int
    tokenizer: str | None
    base: str

    @classmethod
    def of(cls, config: ModelConfig, tokenizer: str | None, base: str) -> DecoderFingerprint:
        """The fingerprint of a model with this configuration, vocabulary digest and base digest."""
        return cls(
            architecture=config.architecture,
            hidden_size=config.hidden_size,
            num_layers=config.num_layers,
            num_q_heads=config.num_q_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            intermediate_size=config.intermediate_size,
            rope=rope_to_hf(config.rope),
            vocab_size=config.vocab_size,
            tokenizer=tokenizer,
            base=base,
        )

    def differences(
        self, other: DecoderFingerprint, *, base: bool = True
    ) -> tuple[tuple[str, Any, Any], ...]:
        """(field, own value, other's value) of every field that disagrees.

        An unknown tokenizer disagrees with none.  base False leaves out which base the two descend from.
        """
        found = []
        for item in fields(self):
            mine, theirs = getattr(self, item.name), getattr(other, item.name)
            if item.name == "tokenizer" and (mine is None or theirs is None):
                continue
            if item.name == "base" and not base:
                continue
            if mine != theirs:
                found.append((item.name, mine, theirs))
        return tuple(found)

    @classmethod
    def from_fields(cls, source: Fields) -> DecoderFingerprint:
        """Read the "decoder" object of a card; CheckpointError names what is missing or mistyped."""
        sizes = {item.name: source.integer(item.name) for item in fields(cls) if item.type in ("int", int)}
        rope = source.mapping("rope")
        return cls(
            architecture=source.string("architecture"),
            rope={name: rope.raw(name) for name in rope.names()},
            tokenizer=source.string("tokenizer") if "tokenizer" in source else None,
            base=source.string("base"),
            **sizes,
        )


@dataclass(frozen=True, slots=True)
class ModuleCard:
    """A module's card.

    first_token: who predicts the first new token; the module was trained for this and no other.
    decoder: the decode module that it belongs to.  training: free facts about how it was made.
    embed_tokens: for a checkpoint that stores an embedding rounded from its base's, the digest of what is
    stored: it ties the claim `decoder.base` to these very weights.  None when the stored embedding speaks for
    itself.
    """

    name: str
    first_token: FirstToken
    decoder: DecoderFingerprint
    training: Mapping[str, Any] = field(default_factory=dict)
    embed_tokens: str | None = None

    def write(self, directory: Path) -> None:
        """Write the card into a directory."""
        content: dict[str, Any] = {
            "format": CARD_FORMAT,
            "name": self.name,
            "first_token": self.first_token,
            "decoder": {**asdict(self.decoder), "rope": dict(self.decoder.rope)},
            "training": dict(self.training),
        }
        if self.embed_tokens is not None:
            content["embed_tokens"] = self.embed_tokens
        (directory / CARD_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> ModuleCard | None:
        """The card of a directory, None when it has none.

        Raises CheckpointError when it is damaged, of another format version, or lacks a field.
        """
        path = directory / CARD_FILE
        if not path.is_file():
            return None
        source = Fields(read_json_object(path), str(path))
        version = source.raw("format")
        if version != CARD_FORMAT or isinstance(version, bool):
            raise source.error(
                "format", version, f"{CARD_FORMAT}, the version of module cards that this release reads"
            )
        first_token = source.string("first_token")
        if first_token not in ("decode", "prefill"):
            raise source.error("first_token", first_token, "'decode' or 'prefill'")
        training = source.mapping("training", {})
        return cls(
            name=source.string("name"),
            first_token=cast(FirstToken, first_token),
            decoder=DecoderFingerprint.from_fields(source.mapping("decoder")),
            training={name: training.raw(name) for name in training.names()},
            embed_tokens=source.string("embed_tokens") if "embed_tokens" in source else None,
        )


def check_card_fits_checkpoint(
    card: ModuleCard, config: ModelConfig, tokenizer: str | None, source: Path
) -> None:
    """Raise CheckpointError when a card describes another model or tokenizer than what is beside it."""
    own = DecoderFingerprint.of(config, tokenizer, card.decoder.base)
    for name, stated, actual in card.decoder.differences(own):
        raise CheckpointError(
            f"{source / CARD_FILE}: decoder.{name} is {stated!r}, "
            f"expected {actual!r} as in the files beside it"
        )
