"""The models of an engine: one prefill module a task, or the promise that its KV comes with the requests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qsun.core import FirstToken
from qsun.errors import IncompatibleModule, RequestError
from qsun.modules.card import CARD_FILE
from qsun.modules.prefill import PrefillModule, load_prefill_module, require_fit

if TYPE_CHECKING:
    from qsun.engine.options import EngineOptions
    from qsun.modules.decode import DecodeModule
    from qsun.modules.quantize import Progress

__all__ = ["Model", "Registry", "load_model"]


@dataclass(frozen=True, slots=True)
class Model:
    """One registered task.  module: None where prompts are prefilled elsewhere and come as KV."""

    name: str
    fingerprint: str
    first_token: FirstToken
    module: PrefillModule | None

    def __str__(self) -> str:
        origin = "prefilled elsewhere" if self.module is None else f"{self.module.card.name!r}"
        return f"{self.name}: {origin}, first_token={self.first_token!r}, KV of {self.fingerprint}"


class Registry:
    """Models by name."""

    def __init__(self) -> None:
        self._models: dict[str, Model] = {}

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models.values())

    def __contains__(self, name: object) -> bool:
        return name in self._models

    @property
    def notices(self) -> tuple[str, ...]:
        """What the modules' loaders noted."""
        return tuple(note for model in self if model.module is not None for note in model.module.notices)

    def check_new(self, name: str) -> None:
        """Raise ValueError when a name cannot be registered."""
        if not isinstance(name, str) or not name:
            raise ValueError(f"name must be a non-empty string, got {name!r}")
        if name in self._models:
            raise ValueError(f"name {name!r} is registered already, expected a new one")

    def add(self, model: Model) -> None:
        """Register a model under a new name."""
        self.check_new(model.name)
        self._models[model.name] = model

    def remove(self, name: str) -> None:
        """Forget a model."""
        del self._models[name]

    def get(self, name: object) -> Model:
        """The model of a name.  Raises RequestError listing the known ones."""
        model = self._models.get(name) if isinstance(name, str) else None
        if model is None:
            known = ", ".join(map(repr, self._models)) or "none: add_model comes first"
            raise RequestError(f"model is {name!r}, expected one of the registered ones ({known})")
        return model


def load_model(
    name: str,
    source: PrefillModule | Path | str | None,
    *,
    decode: DecodeModule,
    base_path: Path,
    options: EngineOptions,
    first_token: FirstToken | None,
    progress: Progress | None,
) -> Model:
    """A model from its prefill module: loaded already, at a path, or (None) the base's own weights.

    first_token: the convention to run under.  None is the module card's; a module without a card runs under
        the engine's.
    Raises IncompatibleModule when the card states another convention than the one asked for, or a loaded
    module was loaded for another decode module; and whatever `load_prefill_module` raises.
    """
    if first_token not in (None, "decode", "prefill"):
        raise ValueError(f"first_token must be 'decode', 'prefill' or None, got {first_token!r}")
    if isinstance(source, PrefillModule):
        module = source
        require_fit(module, decode)
        if first_token is not None and first_token != module.first_token:
            raise IncompatibleModule(
                f"model {name!r}: first_token is {first_token!r}, expected {module.first_token!r}, the"
                " convention that the module was loaded with"
            )
    else:
        path = None if source is None else Path(source)
        has_card = path is not None and (path / CARD_FILE).is_file()
        module = load_prefill_module(
            name,
            path,
            base_path=base_path,
            decode=decode,
            backend=options.backend,
            first_token=first_token if has_card else first_token or options.first_token,
            progress=progress,
        )
    return Model(name, module.fingerprint, module.first_token, module)
