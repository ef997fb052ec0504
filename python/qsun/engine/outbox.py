"""Outputs that were computed and not yet told: whoever steps the engine does so for all requests."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from qsun.core import StepOutput

__all__ = ["Outbox"]


class Outbox:
    """Outputs in the order in which they came."""

    def __init__(self) -> None:
        self._outputs: list[StepOutput] = []

    def __bool__(self) -> bool:
        return bool(self._outputs)

    def __contains__(self, request_id: object) -> bool:
        return any(output.request_id == request_id for output in self._outputs)

    def put(self, outputs: Iterable[StepOutput]) -> None:
        """Keep outputs for whoever asks."""
        self._outputs.extend(outputs)

    def take_all(self) -> list[StepOutput]:
        """Everything there is."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def take(self, request_ids: Collection[str]) -> list[StepOutput]:
        """The outputs of some requests; the others stay."""
        taken = [output for output in self._outputs if output.request_id in request_ids]
        self._outputs = [output for output in self._outputs if output.request_id not in request_ids]
        return taken
