"""Which backend runs a problem.

`backend=` of a call beats the context (`use_backend`), which beats the environment variable ``QSUN_BACKEND``.
A backend named in any of the three ways is taken literally: it runs the problem or `BackendUnavailable` says
why it cannot. Without a name the first of `BACKENDS` that supports the problem is taken; cuda and
triton are considered only for tensors on a CUDA device.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, cast

import torch

from qsun_kernels.backends.problems import BACKENDS, BackendName, Implementation, Problem
from qsun_kernels.errors import BackendUnavailable

__all__ = [
    "ENVIRONMENT_VARIABLE",
    "Backend",
    "Choice",
    "forget_choices",
    "launcher",
    "launcher_of",
    "load_backend",
    "passed_over",
    "refusal",
    "requested_backend",
    "select",
    "use_backend",
]

ENVIRONMENT_VARIABLE = "QSUN_BACKEND"

_MODULES: Mapping[BackendName, str] = {
    "cuda": "qsun_kernels.backends.cuda",
    "triton": "qsun_kernels.backends.triton",
    "torch": "qsun_kernels.backends.reference",
}

_context_backend: ContextVar[BackendName | None] = ContextVar("qsun_backend", default=None)


class Backend(Protocol):
    """What every backend module exposes."""

    IMPLEMENTATIONS: Mapping[str, Implementation]

    def unavailable(self) -> str | None:
        """Why the whole backend cannot run here; None when it can."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend that was chosen for a problem, and its implementation."""

    backend: BackendName
    implementation: Implementation


def load_backend(name: BackendName) -> Backend:
    """The module of a backend, imported at its first use: triton alone takes most of a second."""
    return cast(Backend, importlib.import_module(_MODULES[name]))


def checked_name(name: str, source: str) -> BackendName:
    """`name` as a BackendName; ValueError naming `source` (where the name came from) when it is none."""
    if name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}; expected one of {', '.join(map(repr, BACKENDS))}")
    return name


def requested_backend(backend: str | None = None) -> BackendName | None:
    """The backend asked for by the call, else by the context, else by the environment; None when nobody
    asked.
    """
    if backend is not None:
        return checked_name(backend, "backend")
    from_context = _context_backend.get()
    if from_context is not None:
        return from_context
    from_environment = os.environ.get(ENVIRONMENT_VARIABLE)
    if from_environment:
        return checked_name(from_environment, f"environment variable {ENVIRONMENT_VARIABLE}")
    return None


@contextmanager
def use_backend(name: BackendName) -> Iterator[None]:
    """Ask for one backend in every operator call of the block (of this thread or task) that names none
    itself.

    Raises ValueError for an unknown name. Enter it around a compiled function, not inside: a compiled graph
    reads the context when it runs, so a block inside it would be gone by then, and raises RuntimeError
    instead.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "use_backend was entered inside a function that torch.compile traces, where it would have no "
            "effect; enter it around the compiled call, or pass backend= to the operator"
        )
    token = _context_backend.set(checked_name(name, "name"))
    try:
        yield
    finally:
        _context_backend.reset(token)


@lru_cache(maxsize=4096)
def refusal(backend: BackendName, problem: Problem) -> str | None:
    """Why `backend` cannot run `problem`, in one line; None when it can."""
    module = load_backend(backend)
    reason = module.unavailable()
    if reason is not None:
        return reason
    implementation = module.IMPLEMENTATIONS.get(problem.operator)
    if implementation is None:
        return f"it has no {problem.operator}"
    return implementation.supports(problem)


def passed_over(backend: BackendName, problem: Problem) -> str | None:
    """Why the automatic choice passes over `backend`; None when it may take it."""
    if backend != "torch" and problem.device.type != "cuda":
        return f"considered for CUDA tensors only, device is {problem.device}"
    return refusal(backend, problem)


@lru_cache(maxsize=4096)
def select(problem: Problem, requested: BackendName | None = None) -> Choice:
    """The implementation that runs `problem`.

    requested: a backend to take literally, None for the automatic choice; callers pass what
    `requested_backend` says.
    Raises BackendUnavailable with the reason, or with every backend's reason when the choice was automatic.
    """
    if requested is not None:
        reason = refusal(requested, problem)
        if reason is not None:
            raise BackendUnavailable(problem.operator, requested, reason)
        return Choice(requested, load_backend(requested).IMPLEMENTATIONS[problem.operator])
    reasons: list[str] = []
    for backend in BACKENDS:
        reason = passed_over(backend, problem)
        if reason is None:
            return Choice(backend, load_backend(backend).IMPLEMENTATIONS[problem.operator])
        reasons.append(f"{backend}: {reason}")
    raise BackendUnavailable(problem.operator, None, "; ".join(reasons))


@lru_cache(maxsize=4096)
def launcher(
    requested: BackendName | None, problem_type: Callable[..., Problem], *fields: Any
) -> Callable[..., Any]:
    """`run` of the implementation chosen for ``problem_type(*fields)``.

    The eager path of an operator calls this at every step: a remembered answer costs one hash of the plain
    fields, where making and hashing the problem itself would cost several times that.
    """
    return select(problem_type(*fields), requested).implementation.run


@lru_cache(maxsize=64)
def launcher_of(backend: BackendName, operator: str) -> Callable[..., Any]:
    """`run` of an operator of one backend, for a weight that was prepared for it: no choice is left."""
    reason = load_backend(backend).unavailable()
    if reason is not None:
        raise BackendUnavailable(operator, backend, reason)
    return load_backend(backend).IMPLEMENTATIONS[operator].run


def forget_choices() -> None:
    """Forget every remembered choice, so that the next call asks the backends again."""
    for remembered in (refusal, select, launcher, launcher_of):
        remembered.cache_clear()
