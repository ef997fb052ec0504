"""Kernels for decoding with quantised weights: operators on torch tensors, with CUDA, Triton and torch behind one call."""

from __future__ import annotations

from qsun_kernels.backends.dispatch import use_backend
from qsun_kernels.errors import BackendUnavailable, KernelLaunchError

__all__ = ["BackendUnavailable", "KernelLaunchError", "use_backend"]
