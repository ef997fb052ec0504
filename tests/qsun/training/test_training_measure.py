"""The count of operations, and that the program measures."""

from __future__ import annotations

import json

import pytest
import torch

from qsun.training.batch import Example
from qsun.training.kernels import compiled_kernels, eager_kernels
from qsun.training.measure import Shape, main, needed_flops, random_config


def test_operations_counted_by_hand() -> None:
    config = random_config(Shape(8, 2, 1, 4, 16, 32), 3)
    weights = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16  # q, k and v, o, three of the MLP
    example = Example((1, 2, 3), (4, 5))  # four positions, of which two are the prefill module's
    rest = 3 * 3 * 2 * 8 * 16 + 4 * 32 * 8 * 2
    assert needed_flops(config, [example], "full", pairs=False) == 3 * weights * 6 * 4 + rest
    unread = 8 * 8 + 3 * 8 * 16  # of the last layer, for a position of the prompt: o and the MLP
    sun = 3 * weights * (6 * 2 + 4 * 2) - unread * 6 * 2 + rest
    assert needed_flops(config, [example], "sun", pairs=False) == sun
    sun_pairs = 3 * weights * 4 * 4 - unread * 4 * 2 + rest
    assert needed_flops(config, [example], "sun", pairs=True) == sun_pairs


@pytest.mark.parametrize("more", [[], ["--rank", "2", "--checkpointing"]])
def test_the_program(more, capsys) -> None:
    command = ["--shape", "smollm2-135m", "--layers", "1", "--examples", "1", "--length", "24"]
    assert main([*command, "--steps", "1", "--device", "cpu", "--json", *more]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["method"].split(",")[0] for row in rows] == ["full", "sun"]
    assert all(row["step_ms"] > 0 and row["tflops_per_s"] > 0 for row in rows)


@pytest.mark.slow
def test_compiled_parts_are_the_eager_ones() -> None:
    eager, compiled = eager_kernels(), compiled_kernels()
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(5, 16, generator=generator), torch.rand(16, generator=generator)
    heads, angles = torch.randn(5, 2, 8, generator=generator), torch.rand(5, 1, 4, generator=generator)
    torch.testing.assert_close(compiled.normalise(x, weight, 1e-5), eager.normalise(x, weight, 1e-5))
    torch.testing.assert_close(
        compiled.rotate(heads, angles.cos(), angles.sin()), eager.rotate(heads, angles.cos(), angles.sin())
    )
    torch.testing.assert_close(compiled.gate(x), eager.gate(x))
