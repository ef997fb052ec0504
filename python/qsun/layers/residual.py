"""The end of a residual block: its last product, the addition to the stream, and the norm of what follows."""

from __future__ import annotations

from torch import Tensor

from qsun.layers.linear import Linear, Normed, QuantLinear
from qsun.layers.mlp import GateUpSilu
from qsun.layers.norm import RMSNorm
from qsun_kernels import norm_may_pend


def end_block(
    last: Linear, x: Tensor, stream: Tensor, norm: RMSNorm, reader: Linear | GateUpSilu | None
) -> tuple[Normed, Tensor]:
    """Add last(x) to the residual stream (T, H), and normalise the sum for `reader`.

    Returns (normalised, new residual stream). reader: all that reads the first of the two, None where it is
    more than one layer. Where both layers are low-bit products whose kernels can, the norm is left to the
    reader, which spares the launch of the norm between them.
    """
    if (
        isinstance(last, QuantLinear)
        and isinstance(reader, QuantLinear | GateUpSilu)
        and norm_may_pend(x.shape[0], last.weight, reader.weight)
    ):
        return last.leave_norm(x, stream, norm)
    return last.end_block(x, stream, norm)
