"""Statistics of the activations that a group of linear layers reads, gathered over a calibration set."""

from __future__ import annotations

import torch
from torch import Tensor


class InputStatistics:
    """The mean magnitude of every input channel and a uniform sample of input rows, over all `update` calls.

    K: input channels. max_samples: rows kept; the error of a candidate is measured on them. seed: which
    rows are kept depends on it and on the rows seen alone, so a run can be repeated. device: where the
    statistics live.

    Every row gets a random key and the rows with the smallest keys stay: a uniform sample without
    replacement of all rows so far, in one pass, whatever the sizes of the batches.
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
        self._keys = torch.empty(0, dtype=torch.float64)
        # The keys are drawn on the CPU: the same rows are kept on every device.
        self._generator = torch.Generator().manual_seed(seed)

    def update(self, x: Tensor) -> None:
        """Take in activations x, float (..., K). Raises ValueError for another width, NaN or infinity."""
        if x.dim() < 1 or x.shape[-1] != self.K:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected (..., {self.K})")
        rows = x.detach().reshape(-1, self.K).to(self._rows.device, torch.float32)
        sums = rows.abs().sum(dim=0, dtype=torch.float64)
        if not bool(sums.isfinite().all()):
            channel = int((~sums.isfinite()).nonzero()[0])
            raise ValueError(
                f"x has a NaN or infinite value in channel {channel}, expected finite activations"
            )
        self._sum_abs += sums
        self.count += rows.shape[0]
        keys = torch.rand(rows.shape[0], dtype=torch.float64, generator=self._generator)
        keys = torch.cat((self._keys, keys))
        kept = keys.argsort()[: self.max_samples]
        # Rows of this batch are copied only when they are kept.
        old = kept[kept < self._keys.shape[0]].to(rows.device)
        new = (kept[kept >= self._keys.shape[0]] - self._keys.shape[0]).to(rows.device)
        self._rows = torch.cat((self._rows[old], rows[new]))
        self._keys = torch.cat(
            (keys[kept[kept < self._keys.shape[0]]], keys[kept[kept >= self._keys.shape[0]]])
        )

    @property
    def mean_abs(self) -> Tensor:
        """Mean magnitude of each channel, float32 (K,). Raises ValueError before the first row."""
        self._require_rows()
        return (self._sum_abs / self.count).float()

    @property
    def sample(self) -> Tensor:
        """The sampled rows, float32 (min(count, max_samples), K). Raises ValueError before the first row."""
        self._require_rows()
        return self._rows

    def _require_rows(self) -> None:
        if self.count == 0:
            raise ValueError("no calibration activations were given, expected at least one row in update()")
