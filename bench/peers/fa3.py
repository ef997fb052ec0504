"""FlashAttention 3 out of vLLM's library, over pages, with its own number of splits.

Its cache has tokens before heads. The scheduler's metadata are made by a kernel of its own once a step, as
vLLM does, and are timed as its plan.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qsun_bench.cases import Case
from qsun_bench.cases.attention import AttentionOperands
from qsun_bench.peers import Prepared, _attention, _packages

NAME = "fa3"
OPERATOR = "paged_attention_decode"

_SPLITS_BY_HEURISTIC = 0


def available(case: Case, device: torch.device) -> str | None:
    refused = _attention.refusal(case, device, head_dims=(64, 96, 128, 192, 256), capability=(9, 0))
    if refused is None and torch.cuda.get_device_capability(device) != (9, 0):
        refused = "a kernel for compute capability 9.0 alone"
    return refused or _packages.missing_fa3()


def prepare(operands: AttentionOperands) -> Prepared:
    # (num_blocks, heads, block_size, head_dim) -> (num_blocks, block_size, heads, head_dim)
    keys, values = (t.transpose(1, 2).contiguous() for t in (operands.k_cache, operands.v_cache))
    # It prefetches ids of pages past a length, which must then be pages.
    table = operands.block_table.clamp(max=keys.shape[0] - 1)
    lengths = operands.seq_lens.clone()
    batch, longest = len(lengths), int(lengths.max())
    _, block_size, heads, head_dim = keys.shape
    starts = torch.arange(batch + 1, dtype=torch.int32, device=keys.device)
    last = -1 if operands.window is None else operands.window - 1
    ahead = -1 if operands.window is None else 0

    def plan() -> Tensor:
        made: Tensor = torch.ops._vllm_fa3_C.get_scheduler_metadata(
            batch,
            1,  # query tokens a request
            longest,
            operands.q_heads,
            heads,
            head_dim,
            head_dim,
            keys.dtype,
            lengths,
            starts,  # of queries
            None,  # starts of keys
            None,  # starts of new keys
            None,  # query tokens used
            None,  # padding on the left
            block_size,
            0,  # new keys
            True,  # causal
            last,
            ahead,
            False,  # no softcap
            _SPLITS_BY_HEURISTIC,
            None,  # packing of a group's heads: its choice
            0,  # multiprocessors left free
        )
        return made

    metadata = plan()

    def run(q: Tensor) -> Tensor:
        out = torch.empty_like(q)
        torch.ops._vllm_fa3_C.fwd(
            q,
            keys,
            values,
            *(None, None, None),  # new keys, new values, q_v
            out,
            starts,
            *(None, None, None),  # starts of keys, starts of new keys, query tokens used
            lengths,
            1,
            longest,
            table,
            *(None, None),  # rows of the batch, padding on the left
            *(None, None, None),  # rotation
            *(None, None, None),  # scales of 8-bit operands
            operands.softmax_scale,
            True,  # causal
            last,
            ahead,
            0.0,  # no softcap
            True,  # rotation interleaved
            metadata,
            _SPLITS_BY_HEURISTIC,
            None,  # packing of a group's heads: its choice
            0,  # multiprocessors left free
            None,  # sinks
            1,  # ranks
            0,  # rank
            None,  # tokens of all ranks
        )
        return out

    return Prepared(run, (keys, values), plan=plan)
