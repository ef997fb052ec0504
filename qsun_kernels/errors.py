"""Errors that the operators raise beside ValueError and TypeError."""

from __future__ import annotations

__all__ = ["BackendUnavailable", "KernelLaunchError"]


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
