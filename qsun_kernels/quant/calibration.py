"""Statistics of the activations that a group of linear layers reads, gathered over a calibration set."""

from __future__ import annotations

import torch
from torch import Tensor


class InputStatistics:
    """The mean magnitude of every input channel and a sample of input rows, over all `update` calls.

    K: input channels. max_samples: rows kept; errors of candidates are measured on them. seed: which rows are
    kept depends on it, on the rows and on the sizes of the batches, so a run can be repeated. device: where
    the statistics live.

    What is measured on the sample is || X D.T ||**2 for some D, summed over all rows of X, and rows differ:
    the input of down_proj at the first token of a sequence can be hundreds of times larger than at any other
    (an attention sink), and a quantiser that never sees that row may ruin it, and with it the model. So rows
    are taken by priority sampling (Duffield, Lund, Thorup, "Priority sampling for estimation of arbitrary
    subset sums", J. ACM 54(6), 2007) with their squared norm as mass: row t gets the priority mass_t /
    u_t, u_t uniform in (0, 1], the rows of highest priority stay, and with the highest priority that was
    dropped, tau, a kept row stands for max(mass_t, tau). Rows heavier than tau are always there, and a sum
    of squares over the sample is an unbiased estimate of the sum over all rows, in one pass and at any
    batch sizes.
    """

    def __init__(
        self, K: int, *, max_samples: int = 512, seed: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        if K < 1:
            raise ValueError(f"K is {K}, expected at least 1")
        if max_samples < 1:
            raise ValueError(f"max_samples is {max_samples}, expected at least 1")
        self.K = K
        self.max_samples = max_samples
        self.count = 0
        self._sum_abs = torch.zeros(K, dtype=torch.float64, device=device)
        self._rows = torch.empty(0, K, dtype=torch.float32, device=device)
        self._masses = torch.empty(0, dtype=torch.float64, device=device)
        self._priorities = torch.empty(0, dtype=torch.float64, device=device)
        self._dropped_priority = 0.0
        # Drawn on the CPU: the same numbers on every device.
        self._generator = torch.Generator().manual_seed(seed)

    def update(self, x: Tensor) -> None:
        """Take in activations x, float (..., K). Raises ValueError for another width, NaN or infinity."""
        rows = _rows(x, self.K, self._rows.device)
        self._sum_abs += rows.abs().sum(dim=0, dtype=torch.float64)
        self.count += rows.shape[0]
        uniform = 1 - torch.rand(rows.shape[0], dtype=torch.float64, generator=self._generator)
        masses = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square()
        # Rows of zeros add nothing to any sum and take no place.
        present = masses > 0
        rows, masses = rows[present], masses[present]
        priorities = masses / uniform.to(rows.device)[present]

        kept = len(self._priorities)
        priorities = torch.cat((self._priorities, priorities))
        order = priorities.argsort(descending=True)
        if len(order) > self.max_samples:
            dropped = float(priorities[order[self.max_samples]])
            self._dropped_priority = max(self._dropped_priority, dropped)
            order = order[: self.max_samples]
        # Of this batch only the rows that stay are copied.
        old, new = order[order < kept], order[order >= kept]
        self._rows = torch.cat((self._rows[old], rows[new - kept]))
        self._masses = torch.cat((self._masses[old], masses[new - kept]))
        self._priorities = torch.cat((priorities[old], priorities[new]))

    @property
    def mean_abs(self) -> Tensor:
        """Mean magnitude of each channel, float32 (K,). Raises ValueError before the first row."""
        _require_rows(self.count)
        return (self._sum_abs / self.count).float()

    @property
    def sample(self) -> Tensor:
        """The sampled rows, each scaled to stand for its share of all rows, float32 (S, K), S <= max_samples.

        While no row was dropped these are all rows that are not zero, as they are. Raises ValueError before
        the first row.
        """
        _require_rows(self.count)
        share = (self._dropped_priority / self._masses).clamp(min=1).sqrt()
        return self._rows * share.float().unsqueeze(1)


class InputGram:
    """The Gram matrix X.T X of the rows of all `update` calls: how the input channels go together.

    K: input channels. device: where the matrix lives, float64 (K, K); every row counts, none is sampled.
    """

    def __init__(self, K: int, *, device: torch.device | str = "cpu") -> None:
        if K < 1:
            raise ValueError(f"K is {K}, expected at least 1")
        self.K = K
        self.count = 0
        self._sum = torch.zeros(K, K, dtype=torch.float64, device=device)

    @property
    def device(self) -> torch.device:
        """Where the matrix is."""
        return self._sum.device

    def update(self, x: Tensor) -> None:
        """Take in activations x, float (..., K). Raises ValueError for another width, NaN or infinity."""
        rows = _rows(x, self.K, self._sum.device)
        self._sum += rows.t() @ rows
        self.count += rows.shape[0]

    @property
    def matrix(self) -> Tensor:
        """X.T X, float64 (K, K). Raises ValueError before the first row."""
        _require_rows(self.count)
        return self._sum


def _rows(x: Tensor, K: int, device: torch.device) -> Tensor:
    """x as float32 (rows, K) on a device; ValueError for another width, NaN or infinity."""
    if x.dim() < 1 or x.shape[-1] != K:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (..., {K})")
    rows = x.detach().reshape(-1, K).to(device, torch.float32)
    sums = rows.abs().sum(dim=0, dtype=torch.float64)
    if not bool(sums.isfinite().all()):
        channel = int((~sums.isfinite()).nonzero()[0])
        raise ValueError(f"x has a NaN or infinite value in channel {channel}, expected finite activations")
    return rows


def _require_rows(count: int) -> None:
    if count == 0:
        raise ValueError("no calibration activations were given, expected at least one row in update()")
