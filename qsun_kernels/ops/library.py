"""The operators as `torch.ops.qsun.*`, and when a call has to go through them.

Eager calls skip the dispatcher of torch, which costs more than some of the kernels. The registered operators
serve whoever has to see the call: torch.compile, fake tensors, functionalisation and tracing modes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["LIBRARY", "is_traced", "refuse_gradient", "register"]

LIBRARY = torch.library.Library("qsun", "DEF")

_PLAIN = (torch.Tensor, torch.nn.Parameter, type(None))


def is_traced(*tensors: Tensor | None) -> bool:
    """Whether a call must go through the registered operator: something watches it or the tensors hold no
    data.

    A fake tensor has a null data pointer and says so with no more than a warning, so kernels must never see
    one.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    return any(type(tensor) not in _PLAIN or _is_functional(tensor) for tensor in tensors)


def _is_functional(tensor: Tensor | None) -> bool:
    """Whether functionalisation wraps the tensor; its type does not tell."""
    return tensor is not None and torch._is_functional_tensor(tensor)


def refuse_gradient(operator: str, **tensors: Tensor | None) -> None:
    """RuntimeError when a gradient would have to flow through one of the named tensors: no operator has a
    backward.
    """
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(
                f"{operator} has no gradient and {name} requires one; call it under torch.no_grad() or "
                f"torch.inference_mode(), or pass {name}.detach()"
            )


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define an operator of the library: its schema, what it does on every device, and the shapes it returns.

    Direct calls of the operator refuse gradients as the public functions do.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qsun::{name}", fake, lib=LIBRARY)
    overload = getattr(torch.ops.qsun, name).default
    arguments = [argument.name for argument in overload._schema.arguments]

    def refuse_then_run(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(arguments, args, strict=False)) | kwargs
        tensors: dict[str, Tensor | None] = {}
        for key, value in given.items():
            if isinstance(value, Tensor):
                tensors[key] = value
            elif isinstance(value, list | tuple):
                tensors |= {f"{key}[{i}]": item for i, item in enumerate(value) if isinstance(item, Tensor)}
        refuse_gradient(name, **tensors)
        return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)

    LIBRARY.impl(name, refuse_then_run, "Autograd", with_keyset=True)
