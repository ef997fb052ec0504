"""The bytes and floors in docs/decode_step.md are those of the shapes."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from qsun_bench.random_weights import weight_bytes
from qsun_bench.shapes import shape
from qsun_kernels.quant import QuantSpec

PAGE = Path(__file__).resolve().parents[2] / "docs" / "decode_step.md"


def rows() -> dict[str, tuple[float, float]]:
    table = re.search(r"<!-- decode-step -->\n(.*?)<!-- /decode-step -->", PAGE.read_text(), re.DOTALL)
    assert table is not None
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1].splitlines()[2:]]
    return {name: (float(size), float(floor)) for name, size, floor in cells}


def test_the_table_follows_from_the_shapes() -> None:
    model, dtype = shape("llama-3.1-8b"), torch.bfloat16
    rate = float(re.search(r"at ([\d.]+) TB/s", PAGE.read_text())[1]) * 1e12

    def low_bit(N: int, K: int, bits: int = 4) -> int:
        return weight_bytes(N, K, QuantSpec(bits, 128, True), dtype)

    q, kv = model.q_heads * model.head_dim, model.kv_heads * model.head_dim
    expected = {
        "qkv": low_bit(q + 2 * kv, model.hidden),
        "attention": 2 * kv * dtype.itemsize * 1024,
        "o": low_bit(model.hidden, q),
        "gate_up": low_bit(2 * model.intermediate, model.hidden),
        "down": low_bit(model.hidden, model.intermediate),
    }
    expected["a layer"] = sum(expected.values())
    expected["32 layers"] = model.layers * expected["a layer"]
    expected["lm_head, 16 bits"] = weight_bytes(model.vocabulary, model.hidden, None, dtype)
    for bits in (8, 4):
        expected[f"lm_head, {bits} bits"] = low_bit(model.vocabulary, model.hidden, bits)
    assert rows() == {
        name: (round(size / 1e6, 2), round(size / rate * 1e6, 1)) for name, size in expected.items()
    }
