"""The outputs of one request as an iterator that steps the engine."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from qsun.core import StepOutput

if TYPE_CHECKING:
    from qsun.engine.answers import Answer
    from qsun.engine.book import RequestBook

__all__ = ["OutputStream"]


class OutputStream:
    """Iterates over what one request gains, until it ends or others have been told of its end.

    A class and not a generator: one that is dropped before its first output cancels its request as well, and
    one that is dropped after its end leaves alone whoever has the request's id by then.
    """

    def __init__(self, book: RequestBook, answer: Answer) -> None:
        self._book = book
        self._answer = answer
        self._request_id = answer.sequence.request_id
        self._ready: deque[StepOutput] = deque()
        self._over = False

    def __iter__(self) -> OutputStream:
        return self

    def __next__(self) -> StepOutput:
        while not self._ready:
            if self._over or not self._is_mine():
                self._over = True
                raise StopIteration
            self._ready.extend(self._book.next_of({self._request_id}))
        output = self._ready.popleft()
        if output.finish_reason is not None:
            self._over = True
        return output

    def close(self) -> None:
        """Cancel the request unless it has ended; nobody is told of what it gained since."""
        if not self._over and self._is_mine():
            self._book.withdraw({self._request_id})
        self._over = True
        self._ready.clear()

    def __del__(self) -> None:
        self.close()

    def _is_mine(self) -> bool:
        """Whether there is anything to come: the request runs, or its last outputs wait to be told."""
        running = self._book.answers.get(self._request_id)
        return running is self._answer or (running is None and self._book.is_untold(self._request_id))
