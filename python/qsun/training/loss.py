"""The loss on the tokens of the answer, without ever holding the logits of all of them.

For each predicted token, with student distribution p, teacher distribution q and temperature t:

    loss = (1 - w) * -log p(target) + w * t^2 * KL(q_t || p_t)

where p_t, q_t are the softmax of logits / t (Hinton et al. 2015, arXiv 1503.02531, section 2).  Logits are
the product of hidden states with the frozen lm_head, so the gradient with respect to the hidden states is all
that is needed, and is computed with the loss, some rows at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

LOGIT_BYTES = 256 * 1024**2
"""float32 logits that are in memory at one time."""


@dataclass(frozen=True, slots=True)
class Distillation:
    """weight: share of the teacher's term, in [0, 1].  temperature: above 0."""

    weight: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name, value, sound in (
            ("weight", self.weight, lambda x: 0 <= x <= 1),
            ("temperature", self.temperature, lambda x: x > 0),
        ):
            if type(value) not in (int, float) or not math.isfinite(value) or not sound(value):
                expected = "a number in [0, 1]" if name == "weight" else "a finite number above 0"
                raise ValueError(f"{name} is {value!r}, expected {expected}")


@dataclass(frozen=True, slots=True)
class Teacher:
    """hidden: (M, H), the teacher's states of the same rows.  lm_head: (V, H), its own."""

    hidden: Tensor
    lm_head: Tensor
    distillation: Distillation


def response_loss(
    hidden: Tensor, lm_head: Tensor, targets: Tensor, *, teacher: Teacher | None = None
) -> Tensor:
    """The sum of the loss over the predicted tokens, a scalar in float32 (float64 for float64).

    hidden (M, H), lm_head (V, H), targets int64 (M,).
    """
    total: Tensor = _SummedLoss.apply(hidden, lm_head, targets, teacher)
    return total


def token_losses(hidden: Tensor, lm_head: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) of each row, float32 (M,), without gradient."""
    rows = _chunk_rows(lm_head)
    with torch.no_grad():
        parts = [
            functional.cross_entropy(_logits(h, lm_head), t, reduction="none")
            for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)
        ]
    return torch.cat(parts)


def _chunk_rows(lm_head: Tensor) -> int:
    return max(1, LOGIT_BYTES // (4 * lm_head.shape[0]))


def _logits(hidden: Tensor, lm_head: Tensor) -> Tensor:
    """As `DecodeModule.logits`, but for float64, which stays what it is."""
    logits = functional.linear(hidden, lm_head)
    return logits if logits.dtype == torch.float64 else logits.float()


def _chunk_loss(hidden: Tensor, lm_head: Tensor, targets: Tensor, teacher: Teacher | None) -> Tensor:
    logits = _logits(hidden, lm_head)
    if teacher is None:
        return functional.cross_entropy(logits, targets, reduction="sum")
    weight, t = teacher.distillation.weight, teacher.distillation.temperature
    with torch.no_grad():
        wanted = functional.log_softmax(_logits(teacher.hidden, teacher.lm_head) / t, dim=-1)
    student = functional.log_softmax(logits / t, dim=-1)
    divergence = functional.kl_div(student, wanted, reduction="sum", log_target=True) * (t * t)
    if weight == 1:
        return divergence
    return (1 - weight) * functional.cross_entropy(logits, targets, reduction="sum") + weight * divergence


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, hidden: Tensor, lm_head: Tensor, targets: Tensor, teacher: Teacher | None
    ) -> Tensor:
        rows = _chunk_rows(lm_head)
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        total = torch.zeros((), dtype=wide, device=hidden.device)
        grads = []
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            guide = None
            if teacher is not None:
                guide = Teacher(teacher.hidden[part], teacher.lm_head, teacher.distillation)
            with torch.enable_grad():
                leaf = hidden[part].detach().requires_grad_(True)
                loss = _chunk_loss(leaf, lm_head, targets[part], guide)
            grads.append(torch.autograd.grad(loss, leaf)[0])
            total += loss.detach()
        ctx.save_for_backward(torch.cat(grads))
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        (stored,) = ctx.saved_tensors
        # On a GPU the scalar, one over the tokens, would first be rounded to the dtype of `stored`.
        return (stored.to(grad.dtype) * grad).to(stored.dtype), None, None, None
