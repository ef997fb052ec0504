"""The operators in an engine of your own: quantise a layer, multiply, attend over a paged cache.

python examples/kernel_user.py
"""

from __future__ import annotations

import torch

from qsun_kernels import (
    QuantSpec,
    dequantize,
    explain,
    paged_attention_decode,
    prepare_weight,
    quantize_rtn,
    wna16_linear,
    write_kv_cache,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16


def low_bit_layer() -> None:
    """A layer of 4-bit weights, against the same layer dequantised."""
    weight = 0.02 * torch.randn(1024, 2048, device=DEVICE)  # (N, K)
    packed = quantize_rtn(weight, QuantSpec(bits=4, group_size=128, symmetric=True))
    prepared = prepare_weight(packed, dtype=DTYPE)  # the backend is chosen here, once

    x = torch.randn(4, 2048, dtype=DTYPE, device=DEVICE)
    y = wna16_linear(x, prepared)
    dense = x.float() @ dequantize(packed, torch.float32).T
    worst = ((y.float() - dense).abs().max() / dense.abs().max()).item()
    print(
        f"wna16_linear by {prepared.backend} ({prepared.layout}): "
        f"{packed.nbytes} bytes instead of {weight.numel() * 2}"
    )
    print(f"  worst difference to the dequantised layer: {worst:.2%} of the largest output")


def paged_attention() -> None:
    """Two requests of different lengths whose keys and values lie in scattered blocks."""
    num_blocks, kv_heads, block_size, head_dim = 16, 2, 16, 64
    k_cache = torch.zeros(num_blocks, kv_heads, block_size, head_dim, dtype=DTYPE, device=DEVICE)
    v_cache = torch.zeros_like(k_cache)
    # Request 0 has 20 tokens in blocks 7 and 3, request 1 has 5 in block 11.
    block_table = torch.tensor([[7, 3], [11, 0]], dtype=torch.int32, device=DEVICE)
    seq_lens = torch.tensor([20, 5], dtype=torch.int32, device=DEVICE)
    for request, length in enumerate(seq_lens.tolist()):
        positions = torch.arange(length, device=DEVICE)
        slots = block_table[request, positions // block_size].long() * block_size + positions % block_size
        k = torch.randn(length, kv_heads, head_dim, dtype=DTYPE, device=DEVICE)
        v = torch.randn(length, kv_heads, head_dim, dtype=DTYPE, device=DEVICE)
        write_kv_cache(k, v, k_cache, v_cache, slots)

    q = torch.randn(2, 8, head_dim, dtype=DTYPE, device=DEVICE)  # one new token a request, 8 query heads
    out, lse = paged_attention_decode(
        q, k_cache, v_cache, block_table, seq_lens, softmax_scale=head_dim**-0.5, lse=True
    )
    print(f"paged_attention_decode: out {tuple(out.shape)}, log-sum-exp {tuple(lse.shape)}")


if __name__ == "__main__":
    torch.manual_seed(0)
    low_bit_layer()
    paged_attention()
    print(explain())
