"""AdamW on float32 weights, the learning rate over the steps, and the limit of the gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

Schedule = Literal["cosine", "linear", "constant"]

SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


def learning_rate(
    step: int, *, peak: float, warmup: int, total: int, schedule: Schedule, floor: float = 0.0
) -> float:
    """The rate of step 0 .. total - 1: up linearly over `warmup` steps, then down to floor * peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    done = (step - warmup) / max(1, total - warmup)
    share = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
    return peak * (floor + (1 - floor) * share)


def make_optimizer(
    parameters: Mapping[str, Tensor], *, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101); norms and biases do not decay."""
    matrices = [tensor for tensor in parameters.values() if tensor.dim() == 2]
    vectors = [tensor for tensor in parameters.values() if tensor.dim() != 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    fused = all(tensor.is_cuda for tensor in parameters.values())
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=betas, fused=fused)


def set_learning_rate(optimizer: torch.optim.AdamW, rate: float) -> None:
    """The rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_gradients(parameters: Mapping[str, Tensor], limit: float) -> float:
    """Scale all gradients so that their common norm is at most `limit` (0: leave them); returns the norm."""
    grads = [tensor.grad for tensor in parameters.values() if tensor.grad is not None]
    if not grads:
        return 0.0
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad) for grad in grads]))
    value = float(norm)
    if limit > 0 and value > limit:
        for grad in grads:
            grad.mul_(limit / value)
    return value


def optimizer_tensors(optimizer: torch.optim.AdamW, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The optimizer's state as named tensors: `NAME.exp_avg`, `NAME.exp_avg_sq`, `NAME.step`."""
    return {
        f"{name}.{part}": torch.as_tensor(value)
        for name, tensor in parameters.items()
        for part, value in optimizer.state.get(tensor, {}).items()
    }


def restore_optimizer(
    optimizer: torch.optim.AdamW, parameters: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave."""
    for key, value in state.items():
        name, _, part = key.rpartition(".")
        tensor = parameters[name]
        # Fused AdamW keeps its step counters on the device, the plain one on the host.
        on_host = part == "step" and not tensor.is_cuda
        optimizer.state[tensor][part] = value.clone() if on_host else value.to(tensor.device)
