"""The Walsh-Hadamard transform in torch, float32."""

from __future__ import annotations

import torch
from torch import Tensor


def hadamard(x: Tensor) -> Tensor:
    """Each row of x (..., D) times H / sqrt(D), H the Hadamard matrix of D = 2**n rows in Sylvester's order.

    H[i, j] = (-1)**(number of ones in i & j) is symmetric and, divided by sqrt(D), its own inverse. Float32:
    n rounds, the first of neighbours, the last of halves, in which a pair (a, b) becomes (a + b, a - b); then
    one multiplication by D**-0.5. Backends that keep this order give the same bits.
    """
    shape = x.shape
    width = shape[-1]
    x = x.float()
    distance = 1
    while distance < width:
        a, b = x.reshape(*shape[:-1], width // (2 * distance), 2, distance).unbind(-2)
        x = torch.stack((a + b, a - b), dim=-2)
        distance *= 2
    return x.reshape(shape).mul(width**-0.5)
