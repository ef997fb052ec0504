"""torch's `scaled_dot_product_attention` over keys and values gathered into dense tensors beforehand.

The gather from the pages is not timed, which favours this peer; requests shorter than the longest are
padded and masked, which does not. A batch of equal lengths needs no mask and takes torch's fastest path.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qsun_bench.cases import Case
from qsun_bench.cases.attention import AttentionCase, AttentionOperands
from qsun_bench.peers import Prepared, _attention

NAME = "sdpa"
OPERATOR = "paged_attention_decode"


def available(case: Case, device: torch.device) -> str | None:
    """Any sizes of values, unless padding each request to the longest would not leave room for two copies."""
    assert isinstance(case, AttentionCase)
    reason = _attention.refused_cache(case)
    if reason is not None:
        return reason
    kept = max(case.seq_lens) if case.window is None else min(max(case.seq_lens), case.window)
    padded = 2 * len(case.seq_lens) * kept * case.kv_heads * case.head_dim * case.dtype.itemsize
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        if 2 * padded > 0.7 * total:
            return f"padded to the longest request, two copies take {2 * padded} bytes of {total}"
    return None


def prepare(operands: AttentionOperands) -> Prepared:
    gathered = [operands.gathered(row) for row in range(operands.seq_lens.shape[0])]
    lengths = [keys.shape[1] for keys, _ in gathered]
    heads, head_dim = operands.k_cache.shape[1], operands.k_cache.shape[3]
    # Random padding: it is masked, and zeros would be cheaper to read than real keys.
    shape = (len(lengths), heads, max(lengths), head_dim)
    keys = torch.empty(shape, dtype=operands.k_cache.dtype, device=operands.k_cache.device).normal_()
    values = torch.empty_like(keys).normal_()
    for row, (row_keys, row_values) in enumerate(gathered):
        keys[row, :, : lengths[row]] = row_keys
        values[row, :, : lengths[row]] = row_values
    mask = None
    if min(lengths) != max(lengths):
        positions = torch.arange(max(lengths), device=keys.device)
        mask = positions[None, :] < torch.tensor(lengths, device=keys.device)[:, None]
        mask = mask[:, None, None, :]

    def run(q: Tensor) -> Tensor:
        out = torch.nn.functional.scaled_dot_product_attention(
            q[:, :, None, :], keys, values, attn_mask=mask, scale=operands.softmax_scale, enable_gqa=True
        )
        return out[:, :, 0]

    return Prepared(run, (keys, values))
