"""Errors that the operators raise beside ValueError and TypeError."""

from __future__ import annotations

__all__ = ["BackendUnavailable", "CacheIndexError", "CapturedCallError", "KernelLaunchError"]


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot run the problem, or no backend can.

    operator: the operator's name, for example ``"rms_norm"``.
    backend: the backend that was asked for; None when the choice was automatic and every backend refused.
    reason: one line that says why, with the values that decided.
    """

    def __init__(self, operator: str, backend: str | None, reason: str) -> None:
        self.operator = operator
        self.backend = backend
        self.reason = reason
        who = "no backend" if backend is None else f"backend {backend!r}"
        verb = "can run" if backend is None else "cannot run"
        super().__init__(f"{who} {verb} {operator}: {reason}")

    def __reduce__(self) -> tuple[type[BackendUnavailable], tuple[str, str | None, str]]:
        return type(self), (self.operator, self.backend, self.reason)


class CacheIndexError(ValueError):
    """An index in a tensor's data leads outside of what it points into; raised in checked mode alone.

    operator: the operator's name. argument: the tensor of indices, for example ``"block_table"``.
    place: where in it, (request, column), (request,) or (token,). value: what stands there.
    expected: what may stand there, and what it is for.
    """

    def __init__(
        self, operator: str, argument: str, place: tuple[int, ...], value: int, expected: str
    ) -> None:
        self.operator = operator
        self.argument = argument
        self.place = place
        self.value = value
        self.expected = expected
        where = ", ".join(map(str, place))
        super().__init__(f"{operator}: {argument}[{where}] is {value}, expected {expected}")

    def __reduce__(self) -> tuple[type[CacheIndexError], tuple[str, str, tuple[int, ...], int, str]]:
        return type(self), (self.operator, self.argument, self.place, self.value, self.expected)


class CapturedCallError(RuntimeError):
    """Checked mode met a call under CUDA graph capture, where nothing on the device can be read.

    operator: the operator's name. variable: the environment variable that asked for the mode.
    """

    def __init__(self, operator: str, variable: str) -> None:
        self.operator = operator
        self.variable = variable
        super().__init__(
            f"{operator} was called while a CUDA graph is captured, and {variable}=1 asks to read its "
            f"indices, which waits for the device; run without CUDA graphs, or without {variable}"
        )

    def __reduce__(self) -> tuple[type[CapturedCallError], tuple[str, str]]:
        return type(self), (self.operator, self.variable)


class KernelLaunchError(RuntimeError):
    """A kernel did not launch.

    operator: the operator's name.
    shapes: the sizes it was launched with, for example ``"M=3 N=4096 K=4096 bits=4"``.
    error: what the driver or the launcher reported.
    """

    def __init__(self, operator: str, shapes: str, error: str) -> None:
        self.operator = operator
        self.shapes = shapes
        self.error = error
        super().__init__(f"{operator} failed to launch with {shapes}: {error}")

    def __reduce__(self) -> tuple[type[KernelLaunchError], tuple[str, str, str]]:
        return type(self), (self.operator, self.shapes, self.error)
