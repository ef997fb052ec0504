"""Input scales folded away: what absorbs 1/s when the columns of a linear layer are multiplied by s.

Multiplying column k of W by s[k] and dividing input channel k by s[k] leaves x @ W.T as it is. Dividing x
must cost nothing at run time, so 1/s goes into whatever makes x: `InputFold` says what. Which folds are
allowed is a question of SUN: the decode module reads keys and values that *other* modules wrote. K and V
must stay the same functions of the hidden state, or what the prefill modules write and what the decode
module expects drift apart, without any error. So

- the norm before q, k, v absorbs their scale: K = k_proj(norm(h)) is unchanged, as a whole;
- so does the norm before gate and up, and the rows of up_proj that of down_proj;
- o_proj is not scaled at all. Its input is a mix of values, so its scale could only go into the rows of
  v_proj, which would rescale V in the cache. (That is done for models served alone.)

An `InputFold` into a projection of keys or values is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class InputFold:
    """What absorbs the inverse of an input scale.

    kind: "norm" divides the weight of an RMSNorm, "rows" the rows (and the bias) of a linear layer whose
    output is the input, up to a factor that does not depend on it. module: its name within the layer.
    Raises ValueError for k_proj, v_proj or a matrix that has them: K and V must stay the same functions of
    the hidden state.
    """

    kind: Literal["norm", "rows"]
    module: str

    def __post_init__(self) -> None:
        if self.kind not in ("norm", "rows"):
            raise ValueError(f"kind is {self.kind!r}, expected 'norm' or 'rows'")
        if self.module.rsplit(".", 1)[-1] in ("k_proj", "v_proj", "kv_proj", "qkv_proj"):
            raise ValueError(
                f"module is {self.module!r}, expected no projection of keys or values: "
                "a scale folded into it would change what the shared KV cache means"
            )


@dataclass(frozen=True, slots=True)
class LinearGroup:
    """Linear layers of a decoder layer that read the same input.

    name: what the group's statistics are filed under. linears: names within the layer. fold: what absorbs the
    inverse of their scale, None when nothing may (then they are not scaled). clipped: those whose ranges are
    narrowed; not q and k, whose errors meet in a product and a softmax that the error of one matrix does
    not show.
    """

    name: str
    linears: tuple[str, ...]
    fold: InputFold | None
    clipped: tuple[str, ...]


DECODER_LAYER: tuple[LinearGroup, ...] = (
    LinearGroup(
        "attention_input",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        InputFold("norm", "input_layernorm"),
        ("self_attn.v_proj",),
    ),
    LinearGroup("attention_output", ("self_attn.o_proj",), None, ("self_attn.o_proj",)),
    LinearGroup(
        "mlp_input",
        ("mlp.gate_proj", "mlp.up_proj"),
        InputFold("norm", "post_attention_layernorm"),
        ("mlp.gate_proj", "mlp.up_proj"),
    ),
    LinearGroup("mlp_output", ("mlp.down_proj",), InputFold("rows", "mlp.up_proj"), ("mlp.down_proj",)),
)


def fold_into_norm(norm_weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Divide the weight of an RMSNorm by an input scale.

    norm_weight: float (K,); scale: float32 (K,), positive.
    Returns the new norm weight in its own dtype, and the scale that it really stands for, float32 (K,): the
    quotient is rounded to 16 bits, and the columns are multiplied by old / new instead of `scale`, so that
    the product of both is the same function again. A channel whose quotient would be zero or infinite in that
    dtype, or whose weight is zero, is left as it is.
    """
    exact = norm_weight.float()
    folded = (exact / scale).to(norm_weight.dtype)
    unusable = (folded == 0) | ~folded.isfinite()
    folded = torch.where(unusable, norm_weight, folded)
    return folded, torch.where(unusable, 1.0, exact / torch.where(unusable, 1.0, folded.float()))


@torch.no_grad()
def fold_scales(
    tensors: Mapping[str, Tensor],
    scales: Mapping[str, Tensor],
    groups: Sequence[LinearGroup] = DECODER_LAYER,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Apply input scales to the tensors of a decoder layer: the layer computes the same function as before.

    tensors: "self_attn.q_proj.weight", "input_layernorm.weight", ... of one layer; scales: float32 (K,) by
    group name, for groups with a fold.
    Returns (tensors that changed, the scales really applied, by group name). Weights of linear layers come
    back as float32, to be quantised; norm weights and biases in their own dtype.
    """
    changed: dict[str, Tensor] = {}
    applied: dict[str, Tensor] = {}

    def current(name: str) -> Tensor:
        return changed[name] if name in changed else require_tensor(tensors, name)

    for group in groups:
        if group.name not in scales:
            continue
        if group.fold is None:
            raise ValueError(f"scales has {group.name!r}, expected none: nothing may absorb its inverse")
        scale = scales[group.name].float()
        source = f"{group.fold.module}.weight"
        if group.fold.kind == "norm":
            changed[source], scale = fold_into_norm(current(source), scale)
        else:
            rows = current(source)
            if rows.shape[0] != scale.shape[0]:
                raise ValueError(
                    f"{source} has shape {tuple(rows.shape)}, expected {scale.shape[0]} rows: "
                    f"they are the inputs of {', '.join(group.linears)}"
                )
            changed[source] = rows.float() / scale.unsqueeze(1)
            bias = f"{group.fold.module}.bias"
            if bias in tensors:
                changed[bias] = (current(bias).float() / scale).to(tensors[bias].dtype)
        for linear in group.linears:
            changed[f"{linear}.weight"] = current(f"{linear}.weight").float() * scale
        applied[group.name] = scale
    return changed, applied


def require_tensor(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """tensors[name]; ValueError naming it when it is missing."""
    tensor = tensors.get(name)
    if tensor is None:
        raise ValueError(f"tensors has no {name!r}, expected it among the layer's {len(tensors)} tensors")
    return tensor
