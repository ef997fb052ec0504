"""Indices in device memory that point outside their tensors: the kernel ends in an error."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

PRELUDE = """
import torch
from qsun_kernels.backends import cuda
from qsun_kernels.testing import inputs

def run(operator, *arguments):
    cuda.IMPLEMENTATIONS[operator].run(*arguments)
    torch.cuda.synchronize()

def attend(change, dtype=torch.float16):
    a = inputs.paged_attention_inputs(
        inputs.generator(0), (20,), num_q_heads=1, num_kv_heads=1, head_dim=64, block_size=16,
        dtype=dtype, device="cuda", spare_blocks=1)
    change(a)
    run("paged_attention_decode", a.q, a.k_cache, a.v_cache, a.block_table, a.seq_lens, 1.0, None)

def fused(slot=0, position=0):
    k, table = torch.ones(1, 2, 64, device="cuda").half(), torch.ones(40, 64, device="cuda")
    codes = [torch.zeros(3, 2, 4, 64, dtype=torch.int8, device="cuda") for _ in range(2)]
    scales = [torch.zeros(3, 2, 4, device="cuda") for _ in range(2)]
    at = [torch.tensor([number], device="cuda") for number in (slot, position)]
    run("write_kv_cache", k, k, *codes, at[0], k, at[1], table, None, None, 1e-6, False, *scales)

ones = torch.ones(1, 2, 8, device="cuda")
cache = torch.zeros(3, 2, 4, 8, device="cuda")
"""

CASES = {
    "nothing wrong": "attend(lambda a: None); fused()",
    "position past the table": """
        run("apply_rope", ones, ones, torch.tensor([40], device="cuda"), torch.ones(40, 8, device="cuda"))
    """,
    "negative position": """
        run("apply_rope", ones, ones, torch.tensor([-1], device="cuda"), torch.ones(40, 8, device="cuda"))
    """,
    "slot past the cache": """
        run("write_kv_cache", ones, ones, cache, cache.clone(), torch.tensor([12], device="cuda"))
    """,
    "slot past a cache of codes": "fused(slot=12)",
    "position of a fused write": "fused(position=40)",
    "negative position of a fused write": "fused(position=-1)",
    "length past the block table": "attend(lambda a: a.seq_lens.fill_(49))",
    "block past the cache": "attend(lambda a: a.block_table.fill_(1000))",
    "negative block": "attend(lambda a: a.block_table.fill_(-1))",
    "length past the block table, float32": "attend(lambda a: a.seq_lens.fill_(49), torch.float32)",
    "block past the cache, float32": "attend(lambda a: a.block_table.fill_(1000), torch.float32)",
    "negative block, float32": "attend(lambda a: a.block_table.fill_(-1), torch.float32)",
}


@pytest.mark.gpu
@pytest.mark.damaged
@pytest.mark.parametrize("case", CASES)
def test_an_index_outside_its_tensor_ends_in_an_error(case) -> None:
    """In a process of its own: after a trap no kernel of the process runs again."""
    script = PRELUDE + textwrap.dedent(CASES[case]) + "\nprint('no error')\n"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False
    )
    if case == "nothing wrong":
        assert done.returncode == 0 and "no error" in done.stdout, done.stderr
    else:
        assert done.returncode != 0 and "no error" not in done.stdout, done.stdout
        assert "CUDA error" in done.stderr, done.stderr
