"""Low-rank pairs that are trained in place of the weights (Hu et al. 2021, arXiv 2106.09685, section 4.1).

y = W x + (alpha / r) B (A x).  A starts from the uniform distribution of Kaiming with a = sqrt(5), B from
zero, as in PEFT: the first step starts from the base.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qsun.models.config import ModelConfig
from qsun.models.weights import (
    PROJECTIONS,
    ProjectionName,
    layer_prefix,
    projection_path,
    projection_shape,
)


@dataclass(frozen=True, slots=True)
class LoraOptions:
    """rank, alpha: of every pair.  targets: the projections that get one.

    Raises ValueError naming the field.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[ProjectionName, ...] = field(default=PROJECTIONS)

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"rank is {self.rank!r}, expected an integer of at least 1")
        if type(self.alpha) not in (int, float) or not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha is {self.alpha!r}, expected a finite number above 0")
        unknown = [name for name in self.targets if name not in PROJECTIONS]
        if unknown or not self.targets or len(set(self.targets)) != len(self.targets):
            raise ValueError(f"targets is {self.targets!r}, expected distinct names among {PROJECTIONS}")

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.alpha / self.rank

    def peft_config(self, base: str) -> dict[str, Any]:
        """adapter_config.json as PEFT reads it.  base: what it calls the base model."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "target_modules": sorted(self.targets),
            "lora_dropout": 0.0,
            "bias": "none",
            "init_lora_weights": True,
            "use_rslora": False,
            "fan_in_fan_out": False,
            "modules_to_save": None,
            "inference_mode": True,
        }


class LoraPairs:
    """The pairs of all layers: A (r, K) and B (N, r), float32, trained."""

    def __init__(
        self,
        options: LoraOptions,
        config: ModelConfig,
        *,
        seed: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """dtype: of the pairs; computation takes place in the dtype of what goes through them."""
        self.options = options
        # Drawn on the CPU: the same start on every device.
        generator = torch.Generator().manual_seed(seed)
        self._a: dict[tuple[int, ProjectionName], Tensor] = {}
        self._b: dict[tuple[int, ProjectionName], Tensor] = {}
        for layer in range(config.num_layers):
            for name in PROJECTIONS:
                if name not in options.targets:
                    continue
                N, K = projection_shape(config, name)
                bound = 1 / math.sqrt(K)  # Kaiming's uniform bound with a = sqrt(5)
                a = torch.rand((options.rank, K), generator=generator, dtype=torch.float32)
                a = (2 * a - 1) * bound
                self._a[layer, name] = a.to(device=device, dtype=dtype).requires_grad_(True)
                self._b[layer, name] = torch.zeros(
                    (N, options.rank), device=device, dtype=dtype, requires_grad=True
                )

    def parameters(self) -> dict[str, Tensor]:
        """The pairs under the names that PEFT gives them."""
        named = {}
        for layer, name in self._a:
            path = f"base_model.model.{layer_prefix(layer)}{projection_path(name)}"
            named[f"{path}.lora_A.weight"] = self._a[layer, name]
            named[f"{path}.lora_B.weight"] = self._b[layer, name]
        return named

    def apply(
        self, layer: int, names: Sequence[ProjectionName], sizes: Sequence[int], x: Tensor
    ) -> Tensor | None:
        """What the pairs of projections side by side add for x (T, K); None when none has a pair.

        sizes: the output features of each projection.
        """
        active = [name for name in names if (layer, name) in self._a]
        if not active:
            return None
        # One product for all A: they read the same x.
        down = functional.linear(x, torch.cat([self._a[layer, name] for name in active]).to(x.dtype))
        low = dict(zip(active, down.split(self.options.rank, dim=-1), strict=True))
        outputs = [
            functional.linear(low[name], (self._b[layer, name] * self.options.scale).to(x.dtype))
            if name in low
            else x.new_zeros((x.shape[0], size))
            for name, size in zip(names, sizes, strict=True)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def delta(self, layer: int, name: ProjectionName) -> Tensor | None:
        """What a pair adds to its weight, float32 (N, K); None without a pair."""
        if (layer, name) not in self._a:
            return None
        b, a = self._b[layer, name].detach().float(), self._a[layer, name].detach().float()
        return (b @ a) * self.options.scale
