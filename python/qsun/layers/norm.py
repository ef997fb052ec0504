"""Root-mean-square normalisation with its residual add."""

from __future__ import annotations

from torch import Tensor

from qsun_kernels import rms_norm


class RMSNorm:
    """Unit root mean square for every row, then times `weight` (H,) (Zhang and Sennrich 2019, equation 4).

    weight: not written by anything that runs on the device while norms are computed.
    """

    __slots__ = ("eps", "weight")

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., H) -> (..., H)."""
        return rms_norm(x, self.weight, eps=self.eps, prefetch_weight=True)

    def add(self, x: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
        """Add x (..., H) to the residual stream and normalise the sum: (normalised, new residual stream)."""
        return rms_norm(x, self.weight, eps=self.eps, residual=stream, prefetch_weight=True)
