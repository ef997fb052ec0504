"""One forward pass of SUN training (arXiv 2603.02599).

Layer by layer, rows of the prompt go through the prefill module and rows of the answer through the decode
module.  In attention they meet: in each sequence a row sees the keys and values of all rows before it,
whichever module made them.  This is what serving does with its cache, so nothing has to be stored or
replayed, and the gradient of the answer reaches the prefill module through keys and values alone.

    h_p = embed(prompt)                        h_d = embed(answer)
    q, k, v = [ W_p norm(h_p) | W_d norm(h_d) ]            per layer, W_d frozen
    a = causal_attention(q, k, v)                          within each sequence
    h_p += O_p a_p;  h_p += MLP_p(norm(h_p))   h_d += O_d a_d;  h_d += MLP_d(norm(h_d))

Full fine-tuning is the same pass with no rows of the decode module.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from qsun.training.attention import packed_attention
from qsun.training.batch import Pack
from qsun.training.kernels import Kernels
from qsun.training.stack import TrainingStack


@dataclass(frozen=True, slots=True)
class Frame:
    """What all modules share and none trains.

    embed_tokens, lm_head: (V, H) in the dtype of computation.  cos_sin: (max_positions, head_dim).
    """

    embed_tokens: Tensor
    lm_head: Tensor
    cos_sin: Tensor


@dataclass(frozen=True, slots=True)
class _Side:
    """Rows of one module in one layer; `output` False where nothing reads what the layer gives for them."""

    stack: TrainingStack
    layer: int
    output: bool


def forward(
    pack: Pack,
    frame: Frame,
    prefill: TrainingStack,
    decode: TrainingStack | None,
    kernels: Kernels,
    *,
    checkpointing: bool = False,
) -> Tensor:
    """Hidden states (M, H) of the rows that predict, after the final norm of the module that computed them.

    decode: the frozen decoder; None is allowed for a pack without rows of it.
    checkpointing: keep only the input of each layer and compute the rest again in the backward pass.
    """
    split, total = pack.split, pack.num_tokens
    if decode is None and split != total:
        raise ValueError(f"decode is None, expected a decoder for the {total - split} rows that are its own")
    config = prefill.config
    hidden = functional.embedding(pack.tokens, frame.embed_tokens)
    cos, sin = frame.cos_sin.index_select(0, pack.positions).unsqueeze(1).chunk(2, dim=-1)
    sides = [(prefill, split)] if decode is None else [(prefill, split), (decode, total - split)]
    parts: list[Tensor] = list(hidden.split([rows for _, rows in sides]))
    for layer in range(config.num_layers):
        last = layer == config.num_layers - 1
        # Past the keys and values of the last layer nothing of the prompt is read, unless it predicts.
        wanted = [not (last and index == 0 and not pack.needs_prefill_output) for index in range(len(sides))]
        step = [_Side(stack, layer, output) for (stack, _), output in zip(sides, wanted, strict=True)]
        if checkpointing:
            parts = checkpoint(
                _layer, step, parts, pack, cos, sin, kernels,
                use_reentrant=False, preserve_rng_state=False,
            )  # fmt: skip
        else:
            parts = _layer(step, parts, pack, cos, sin, kernels)
    normed = [
        kernels.normalise(part, stack.vector(stack.norm), config.rms_norm_eps)
        if output
        else torch.zeros_like(part)
        for part, (stack, _), output in zip(parts, sides, wanted, strict=True)
    ]
    return torch.cat(normed).index_select(0, pack.predicting)


def _layer(
    sides: list[_Side], parts: list[Tensor], pack: Pack, cos: Tensor, sin: Tensor, kernels: Kernels
) -> list[Tensor]:
    config = sides[0].stack.config
    heads = (config.num_q_heads, config.num_kv_heads, config.num_kv_heads)
    queries, keys, values = [], [], []
    for side, x in zip(sides, parts, strict=True):
        stack, tensors = side.stack, side.stack.layers[side.layer]
        normed = kernels.normalise(x, stack.vector(tensors.attention_norm), config.rms_norm_eps)
        joint = stack.linear(side.layer, "qkv", normed).view(-1, sum(heads), config.head_dim)
        q, k, v = joint.split(heads, dim=1)
        if tensors.q_norm is not None and tensors.k_norm is not None:
            q = kernels.normalise(q, stack.vector(tensors.q_norm), config.rms_norm_eps)
            k = kernels.normalise(k, stack.vector(tensors.k_norm), config.rms_norm_eps)
        queries.append(q)
        keys.append(k)
        values.append(v)
    attended = packed_attention(
        kernels.rotate(torch.cat(queries), cos, sin),
        kernels.rotate(torch.cat(keys), cos, sin),
        torch.cat(values),
        pack.plan,
        scale=config.head_dim**-0.5,
        window=config.windows[sides[0].layer],
    ).flatten(1)
    outputs = []
    for side, x, rows in zip(sides, parts, attended.split([len(part) for part in parts]), strict=True):
        if not side.output:
            outputs.append(x)
            continue
        stack, tensors = side.stack, side.stack.layers[side.layer]
        x = x + stack.linear(side.layer, "o", rows)
        normed = kernels.normalise(x, stack.vector(tensors.mlp_norm), config.rms_norm_eps)
        x = x + stack.linear(side.layer, "down", kernels.gate(stack.linear(side.layer, "gate_up", normed)))
        outputs.append(x)
    return outputs
