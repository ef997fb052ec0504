"""Plans and calls of the CUDA library's paged attention with `PagedAttentionInputs`, told how to run.

The operators choose a configuration; these functions go to the launchers, which take one.
"""

from __future__ import annotations

from torch import Tensor

from qsun_kernels.backends.cuda import attention, library
from qsun_kernels.backends.problems import PagedAttentionDecodeProblem
from qsun_kernels.ops.cache_checks import kind_of
from qsun_kernels.testing import inputs
from qsun_kernels.testing.inputs import PagedAttentionInputs

__all__ = ["attend", "config", "plan_of", "problem_of"]


def config(
    parts: int,
    *,
    warps: int = 4,
    stages: int = 3,
    min_part_units: int = 1,
    whole_slack: int = -1,
    prefix_parts: int = 0,
    min_prefix_tiles: int = 1,
    min_saved_tiles: int = 0,
    overlaps_producer: bool = False,
) -> library.binding.PagedAttentionDecodeConfig:
    """One block an SM, the smallest parts and prefixes there are; no parts for prefixes: none are shared.

    whole_slack: by default requests are cut wherever equal parts end.
    """
    return library.binding.PagedAttentionDecodeConfig(
        warps=warps,
        stages=stages,
        blocks_per_sm=1,
        parts=parts,
        min_part_units=min_part_units,
        whole_slack=whole_slack,
        prefix_parts=prefix_parts,
        min_prefix_tiles=min_prefix_tiles,
        min_saved_tiles=min_saved_tiles,
        overlaps_producer=overlaps_producer,
    )


def problem_of(a: PagedAttentionInputs) -> PagedAttentionDecodeProblem:
    """What a backend is asked about calls with such inputs."""
    return PagedAttentionDecodeProblem(
        num_q_heads=a.q.shape[1],
        num_kv_heads=a.k_cache.shape[1],
        head_dim=a.q.shape[2],
        block_size=a.k_cache.shape[2],
        window=a.window,
        dtype=a.q.dtype,
        kv_dtype=a.k_cache.dtype,
        device=a.q.device,
        kv_scales=kind_of(a.k_scale),
    )


def plan_of(
    a: PagedAttentionInputs,
    told: library.binding.PagedAttentionDecodeConfig | None = None,
    *,
    shares: bool = False,
) -> tuple[Tensor, ...]:
    """The plan, in memory that held NaN. shares: with the prefixes that the block table has in common.

    told: the configuration to plan for; by default the library chooses.
    """
    table = a.block_table if shares else None
    with inputs.poisoned_outputs():
        return attention.plan_paged_attention(
            problem_of(a), a.seq_lens, a.q_len, a.window, table, config=told
        )


def attend(
    a: PagedAttentionInputs,
    plan: tuple[Tensor, ...] | None = None,
    told: library.binding.PagedAttentionDecodeConfig | None = None,
    *,
    out: Tensor | None = None,
    follows_write: bool = False,
) -> tuple[Tensor, Tensor]:
    """out and lse, with scratch and outputs in memory that held NaN; planned by the call without a plan.

    told: the configuration that the plan is for; by default the library chooses.
    """
    with inputs.poisoned_outputs():
        return attention.paged_attention_decode(
            *(a.q, a.k_cache, a.v_cache, a.block_table, a.seq_lens, a.softmax_scale, a.window),
            *(a.softcap, a.sinks, out, plan, a.k_scale, a.v_scale, follows_write),
            config=told,
        )
