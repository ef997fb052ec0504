"""A run that is told to end, as `timeout` tells it, ends with what it has measured."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(BaseException):
    """The process was asked to end. No Exception: nobody on the way may take it for a failure of his own."""


@contextmanager
def termination_raises() -> Iterator[None]:
    """SIGTERM raises Terminated inside, and again ends the process outside."""

    def told() -> None:
        raise Terminated

    with _on_termination(told):
        yield


@contextmanager
def termination_is_noted() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM makes what is yielded return True, for those who look when it suits them."""
    noted: list[None] = []
    with _on_termination(lambda: noted.append(None)):
        yield lambda: bool(noted)


@contextmanager
def _on_termination(told: Callable[[], None]) -> Iterator[None]:
    """Only the main thread is told of signals: in another nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, frame: FrameType | None) -> None:
        told()

    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
