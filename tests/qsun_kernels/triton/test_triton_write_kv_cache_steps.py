"""write_kv_cache with its steps and codes through Triton."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
from qsun_kernels.testing import inputs
from qsun_kernels.testing.kv_codes import KV_KINDS, KvKind
from qsun_kernels.testing.kv_writes import judge_kv_write, kv_write

pytestmark = pytest.mark.triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KINDS = (*KV_KINDS, torch.bfloat16)


@pytest.mark.parametrize("kv", KINDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_pair_of_dtypes(device: torch.device, dtype: torch.dtype, kv: KvKind | torch.dtype) -> None:
    call = kv_write(inputs.generator(0), 3, dtype=dtype, kv=kv, heads=(2, 1), head_dim=64, device=device)
    judge_kv_write(call.run(backend="triton"), call).require()


@pytest.mark.parametrize("kv", ["fp8", "int4", torch.float16], ids=str)
@pytest.mark.parametrize("steps", [(), ("rope",), ("norm",), ("rotate",), ("norm", "rope")], ids=" ".join)
def test_every_step_alone(device: torch.device, steps: tuple[str, ...], kv: KvKind | torch.dtype) -> None:
    call = kv_write(
        inputs.generator(1), 3, dtype=torch.bfloat16, kv=kv, heads=(2, 1), steps=steps, device=device
    )
    judge_kv_write(call.run(backend="triton"), call).require()


@pytest.mark.parametrize(
    ("head_dim", "heads", "block_size", "kv"),
    [
        (2, (1, 1), 1, "int8"),
        (7, (2, 1), 3, "int8"),
        (20, (9, 3), 5, "int4"),
        (96, (2, 2), 16, "int4"),
        (128, (3, 1), 16, "int8"),
        (256, (2, 1), 32, "int4"),
    ],
)
def test_shapes(
    device: torch.device, head_dim: int, heads: tuple[int, int], block_size: int, kv: KvKind
) -> None:
    steps = ["norm", "rope"] if head_dim % 2 == 0 else ["norm"]
    if head_dim & (head_dim - 1) == 0:
        steps.append("rotate")
    call = kv_write(
        inputs.generator(head_dim),
        4,
        dtype=torch.bfloat16,
        kv=kv,
        heads=heads,
        head_dim=head_dim,
        block_size=block_size,
        steps=steps,
        device=device,
    )
    judge_kv_write(call.run(backend="triton"), call).require()


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("kind", KV_KINDS)
def test_codes_of_keys_as_they_come_are_those_of_torch(device: torch.device, kind: KvKind) -> None:
    """Bit for bit, whatever the values are."""
    call = kv_write(
        inputs.generator(2), 8, dtype=torch.float32, kv=kind, heads=(1, 1), skip=0.0, steps=(), device=device
    )
    call.k[1, 0, 5], call.k[2, 0, 60], call.k[3, 0, 0] = torch.nan, torch.inf, 1e30
    call.k[4], call.k[5] = 0.0, -0.0
    call.k[6] *= 1e-40
    call.k[7] = (torch.arange(64, device=device) % 15 - 7.0) * 0.5
    got, expected = call.run(backend="triton"), call.run(backend="torch")
    assert torch.equal(got.k_cache.view(torch.uint8), expected.k_cache.view(torch.uint8))
    assert got.k_scale is not None and expected.k_scale is not None
    assert torch.equal(got.k_scale.isnan(), expected.k_scale.isnan())
    assert torch.equal(got.k_scale.nan_to_num(-1.0), expected.k_scale.nan_to_num(-1.0))


def test_rotation_and_rounding_are_those_of_torch(device: torch.device) -> None:
    """The same sums in the same order: without a norm, codes and queries are equal bit for bit."""
    for kv in ("int8", "int4"):
        call = kv_write(
            inputs.generator(3),
            3,
            dtype=torch.bfloat16,
            kv=kv,
            heads=(2, 1),
            steps=("rotate",),
            device=device,
        )
        got, expected = call.run(backend="triton"), call.run(backend="torch")
        assert got.q is not None and expected.q is not None and torch.equal(got.q, expected.q)
        assert torch.equal(got.k_cache, expected.k_cache)


def test_no_tokens_and_no_slots(device: torch.device) -> None:
    for tokens, skip in ((0, 0.0), (3, 1.0)):
        call = kv_write(
            inputs.generator(4),
            tokens,
            dtype=torch.bfloat16,
            kv="int8",
            heads=(2, 1),
            skip=skip,
            device=device,
        )
        judge_kv_write(call.run(backend="triton"), call).require()


def test_keys_without_queries(device: torch.device) -> None:
    call = kv_write(
        inputs.generator(5),
        3,
        dtype=torch.bfloat16,
        kv="fp8",
        heads=(2, 1),
        steps=("norm", "rope"),
        device=device,
    )
    call = replace(call, q=None, q_norm=None)
    judge_kv_write(call.run(backend="triton"), call).require()
