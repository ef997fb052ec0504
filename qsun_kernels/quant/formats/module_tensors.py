"""The tensors of one linear layer of a checkpoint, checked by name as they are taken."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qsun_kernels.quant.packed import PackedWeight


class ModuleTensors:
    """Hands out the tensors of one module and says by name what is missing, of another type or another shape.

    tensors: name within the module ("qweight", "scales", ...) to tensor; module: the module's name, for
    messages; format_name: the checkpoint format, for messages; known: every name the format has. "bias" is
    no part of the quantised weight: it may be present and is left alone.
    Raises TypeError for a value that is no tensor, ValueError for a name the format does not have.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], module: str, format_name: str, known: tuple[str, ...]
    ) -> None:
        self.module = module
        self.format_name = format_name
        self.tensors = tensors
        for name, tensor in tensors.items():
            if name != "bias" and name not in known:
                raise ValueError(
                    f"{module}.{name} is no tensor of {format_name} checkpoints, expected {', '.join(known)}"
                )
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{module}.{name} is {type(tensor).__name__}, expected a torch.Tensor")

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def take(
        self, name: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int | None, ...], why: str = ""
    ) -> Tensor:
        """The tensor `name`, checked. None in `shape` is any size of at least 1; `why` explains the shape.

        Raises ValueError when it is missing or has another shape, TypeError for another dtype.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            present = ", ".join(sorted(self.tensors)) or "none"
            raise ValueError(
                f"{self.module} has the tensors {present}, "
                f"expected {name} too ({self.format_name} checkpoint)"
            )
        if tensor.dtype not in dtypes:
            expected = " or ".join(str(dtype) for dtype in dtypes)
            raise TypeError(f"{self.module}.{name} has dtype {tensor.dtype}, expected {expected}")
        fits = tensor.dim() == len(shape) and all(
            got >= 1 and expected in (None, got) for got, expected in zip(tensor.shape, shape, strict=True)
        )
        if not fits:
            expected = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(
                f"{self.module}.{name} has shape {tuple(tensor.shape)}, "
                f"expected ({expected}){why and ' '}{why}"
            )
        return tensor

    def validated(self, packed: PackedWeight) -> PackedWeight:
        """`packed` after its values were checked; a ValueError names the module."""
        try:
            return packed.validate()
        except ValueError as error:
            raise ValueError(f"{self.module}: {error} ({self.format_name} checkpoint)") from error


def implied_groups(g_idx: Tensor, columns_per_group: int) -> bool:
    """Whether g_idx (K,) only says what is implied without it: column k is in k // columns_per_group."""
    columns = torch.arange(g_idx.shape[0], device=g_idx.device)
    return torch.equal(g_idx.long(), columns // columns_per_group)
