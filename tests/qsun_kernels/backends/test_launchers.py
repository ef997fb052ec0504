"""The launchers of an operator take the same arguments in every backend: `Implementation.run` says so."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from inspect import Parameter
from typing import Any

import pytest

from qsun_kernels.backends import cuda, reference, triton

OPERATORS = sorted(reference.IMPLEMENTATIONS)


def differences(run: Callable[..., Any], expected: Callable[..., Any]) -> list[str]:
    """Where `run` cannot stand for `expected`, whose arguments come by position."""
    own, its = inspect.signature(run), inspect.signature(expected)
    first, more = list(own.parameters.values()), list(own.parameters.values())[len(its.parameters) :]
    found = [
        f"takes {one.name}: {one.annotation}, expected {right.name}: {right.annotation}"
        for one, right in zip(first, its.parameters.values(), strict=False)
        if (one.name, one.annotation) != (right.name, right.annotation) or one.kind == Parameter.KEYWORD_ONLY
    ]
    if len(first) < len(its.parameters):
        found.append(f"takes {len(first)} arguments, expected {len(its.parameters)}")
    found += [f"{one.name} has no default" for one in more if one.default is Parameter.empty]
    if own.return_annotation != its.return_annotation:
        found.append(f"returns {own.return_annotation}, expected {its.return_annotation}")
    return found


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("backend", (cuda, triton), ids=lambda backend: backend.__name__.rpartition(".")[2])
def test_launchers_take_what_the_reference_takes(backend, operator) -> None:
    if not backend.IMPLEMENTATIONS:
        pytest.skip(f"{backend.unavailable()}")
    run = backend.IMPLEMENTATIONS[operator].run
    assert differences(run, reference.IMPLEMENTATIONS[operator].run) == []


def test_differences_are_found() -> None:
    def expected(x: int, scale: float | None) -> int: ...
    def same(x: int, scale: float | None = None, config: str | None = None) -> int: ...
    def renamed(y: int, scale: float | None) -> int: ...
    def reordered(scale: float | None, x: int) -> int: ...
    def narrower(x: int, scale: float) -> int: ...
    def shorter(x: int) -> int: ...
    def by_name(x: int, *, scale: float | None) -> int: ...
    def longer(x: int, scale: float | None, config: str) -> int: ...
    def other_result(x: int, scale: float | None) -> float: ...

    assert differences(same, expected) == []
    for other in (renamed, reordered, narrower, shorter, by_name, longer, other_result):
        assert differences(other, expected), other.__name__
