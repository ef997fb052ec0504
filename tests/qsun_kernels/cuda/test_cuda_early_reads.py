"""What launches read, or let others read, before those in front of them have ended: what they were told.

The emulator hides what the launch in front writes until the kernel waits for it (emulator/producers.cpp).
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from qsun_kernels.errors import KernelLaunchError
from qsun_kernels.testing import inputs

pytestmark = pytest.mark.slow
DTYPE = torch.bfloat16


class Written(NamedTuple):
    """A write of five tokens: arguments up to the queries, those of the steps, and the caches."""

    heads: tuple[Tensor, Tensor, Tensor]  # q, k, v
    caches: tuple[Tensor, Tensor]
    slots: Tensor
    positions: Tensor
    cos_sin: Tensor
    norms: tuple[Tensor, Tensor]

    def run(self, kernels, *, settled: bool) -> list[Tensor]:
        q, k, v = self.heads
        for cache in self.caches:
            cache.zero_()
        steps = (q, self.positions, self.cos_sin, *self.norms, 1e-5, False, None, None)
        out = kernels.run("write_kv_cache", k, v, *self.caches, self.slots, *steps, settled)
        return [out, *(cache.clone() for cache in self.caches)]


@pytest.fixture
def written() -> Written:
    source, cpu = inputs.generator(0), torch.device("cpu")
    heads = tuple(inputs.normal(source, (5, heads, 64), DTYPE, cpu) for heads in (4, 2, 2))
    caches = tuple(torch.zeros(3, 2, 16, 64, dtype=DTYPE) for _ in range(2))
    norms = tuple(inputs.normal(source, (64,), DTYPE, cpu) for _ in range(2))
    slots = torch.tensor([3, 40, -1, 17, 0])
    cos_sin = inputs.normal(source, (9, 64), torch.float32, cpu)
    return Written(heads, caches, slots, torch.tensor([8, 0, 3, 1, 5]), cos_sin, norms)


def triggers_early(extension) -> bool:
    """Whether the last launch let the next one start before it had itself waited."""
    return bool(ctypes.CDLL(extension.__file__).triggered_before_wait())


def test_a_write_lets_the_next_launch_start_after_its_own_wait(
    emulated_kernels, emulated_extension, written
) -> None:
    """Then all in front of the write has ended when attention starts; unless that is older still."""
    q, k, v = written.heads
    emulated_kernels.run("write_kv_cache", k, v, *written.caches, written.slots)
    assert not triggers_early(emulated_extension)
    no_steps = (None, None, None, None, None, 0.0, False, None, None)
    emulated_kernels.run("write_kv_cache", k, v, *written.caches, written.slots, *no_steps, True)
    assert triggers_early(emulated_extension)
    written.run(emulated_kernels, settled=False)
    assert not triggers_early(emulated_extension)
    written.run(emulated_kernels, settled=True)
    assert triggers_early(emulated_extension)
    emulated_kernels.run("rms_norm", q.reshape(5, -1), torch.ones(256, dtype=DTYPE), 1e-5, None)
    assert triggers_early(emulated_extension)


@pytest.mark.parametrize("order", ["forward", "reverse", "3"])
def test_a_settled_write_waits_for_its_heads(emulated_kernels, guard, monkeypatch, written, order) -> None:
    """q, k and v are the launch's in front, and the caches nobody's to write before it has ended."""
    monkeypatch.setenv("QSUN_EMULATOR_ORDER", order)
    expected = written.run(emulated_kernels, settled=False)
    for tensor in (*written.heads, *written.caches):
        guard(tensor)
    got = written.run(emulated_kernels, settled=True)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("what", ["slots", "positions", "cos_sin", "norm"])
def test_only_a_settled_write_reads_early(emulated_kernels, guard, written, what) -> None:
    """Without the promise nothing is read early; with it, what the launch in front writes is missed."""
    expected = written.run(emulated_kernels, settled=False)
    guard(written.norms[0] if what == "norm" else getattr(written, what))
    for one, other in zip(written.run(emulated_kernels, settled=False), expected, strict=True):
        assert torch.equal(one, other)
    if what == "positions":
        with pytest.raises(KernelLaunchError, match="trap"):
            written.run(emulated_kernels, settled=True)
        return
    got = written.run(emulated_kernels, settled=True)
    assert any(not torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("has_residual", [False, True])
def test_a_norm_reads_its_weight_early_where_it_may(emulated_kernels, guard, rows, has_residual) -> None:
    source, cpu = inputs.generator(rows), torch.device("cpu")
    x, residual = (inputs.normal(source, (rows, 576), DTYPE, cpu) for _ in range(2))
    weight = inputs.normal(source, (576,), DTYPE, cpu)
    added = residual if has_residual else None

    def normed(prefetch_weight: bool) -> Tensor:
        out = emulated_kernels.run("rms_norm", x, weight, 1e-5, added, prefetch_weight)
        return out[0] if has_residual else out

    expected = normed(False)
    guard(x)
    guard(residual)
    assert torch.equal(normed(True), expected)
    guard(weight)
    assert torch.equal(normed(False), expected)
    assert normed(True).isnan().all()
