"""QSUN_CHECK=1: indices outside their tensors are refused by name, by every backend, before a kernel runs."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from qsun_kernels import CacheIndexError, CapturedCallError, paged_attention_decode, write_kv_cache
from qsun_kernels.backends.problems import BackendName
from qsun_kernels.ops import checked_mode
from qsun_kernels.testing import inputs

BACKENDS = (
    "torch",
    pytest.param("triton", marks=pytest.mark.triton),
    pytest.param("cuda", marks=pytest.mark.gpu),
)
BLOCK_SIZE, SPARE = 4, 2


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the variable had been set when the package was imported."""
    monkeypatch.setattr(checked_mode, "ENABLED", True)


class Attention:
    """Three requests of 0, 9 and 6 tokens in blocks of 4; num_blocks is 7."""

    def __init__(self, device: torch.device) -> None:
        self.case = inputs.paged_attention_inputs(
            inputs.generator(1),
            (0, 9, 6),
            num_q_heads=2,
            num_kv_heads=1,
            head_dim=16,
            block_size=BLOCK_SIZE,
            dtype=torch.float32,
            device=device,
            spare_blocks=SPARE,
        )

    def run(self, backend: BackendName, **changes: Any) -> Tensor:
        case = self.case
        return paged_attention_decode(
            *(case.q, case.k_cache, case.v_cache, case.block_table, case.seq_lens),
            **({"softmax_scale": case.softmax_scale, "backend": backend} | changes),
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_inside_passes_and_is_the_same(
    backend: BackendName, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = Attention(device)
    # Nobody follows these.
    attention.case.block_table[0] = -5
    attention.case.block_table[1, 3:] = 1000
    plain = attention.run(backend)
    monkeypatch.setattr(checked_mode, "ENABLED", True)
    assert torch.equal(attention.run(backend), plain)


@pytest.mark.damaged
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block", [-1, 1000])
def test_a_block_outside_the_cache_is_named(
    block: int, backend: BackendName, device: torch.device, checked: None
) -> None:
    attention = Attention(device)
    num_blocks = len(attention.case.k_cache)
    attention.case.block_table[1, 2] = block
    attention.case.block_table[2, 1] = block  # behind the first
    with pytest.raises(CacheIndexError) as caught:
        attention.run(backend)
    assert str(caught.value) == (
        f"paged_attention_decode: block_table[1, 2] is {block}, expected 0 to {num_blocks - 1} "
        f"(num_blocks is {num_blocks}): the block of position 8 of request 1, which has 9 tokens"
    )
    error = caught.value
    assert isinstance(error, ValueError)
    assert (error.argument, error.place, error.value) == ("block_table", (1, 2), block)


@pytest.mark.damaged
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [-1, "too long"])
def test_a_length_that_the_table_cannot_hold_is_named(
    length: int | str, backend: BackendName, device: torch.device, checked: None
) -> None:
    attention = Attention(device)
    limit = attention.case.block_table.shape[1] * BLOCK_SIZE
    wrong = limit + 1 if isinstance(length, str) else length
    attention.case.seq_lens[2] = wrong
    with pytest.raises(CacheIndexError, match=rf"seq_lens\[2\] is {wrong}, expected 0 to {limit} ") as caught:
        attention.run(backend)
    assert caught.value.place == (2,)


def test_a_full_table_is_inside(device: torch.device, checked: None) -> None:
    attention = Attention(device)
    limit = attention.case.block_table.shape[1] * BLOCK_SIZE
    attention.case.block_table.copy_(torch.arange(attention.case.block_table.numel()).view(3, -1) % 5)
    attention.case.seq_lens.fill_(limit)
    attention.run("torch")


@pytest.mark.damaged
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_slot_past_the_cache_is_named_and_nothing_is_written(
    backend: BackendName, device: torch.device, checked: None
) -> None:
    k = torch.ones(4, 2, 16, device=device)
    cache = torch.zeros(3, 2, BLOCK_SIZE, 16, device=device)
    slots = torch.tensor([11, -7, 12, 13], device=device)
    with pytest.raises(CacheIndexError) as caught:
        write_kv_cache(k, k, cache, cache.clone(), slots, backend=backend)
    assert str(caught.value) == (
        "write_kv_cache: slot_mapping[2] is 12, expected at most 11 (num_blocks * block_size is 12), "
        "or negative to skip the token"
    )
    assert not cache.any()
    slots[2:] = -1
    write_kv_cache(k, k, cache, cache.clone(), slots, backend=backend)
    assert int(cache.count_nonzero()) == 2 * 16


@pytest.mark.damaged
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("position", [-1, 40])
def test_a_position_without_angles_is_named(
    position: int, backend: BackendName, device: torch.device, checked: None
) -> None:
    k = torch.ones(2, 2, 16, device=device)
    caches = [torch.zeros(3, 2, BLOCK_SIZE, 16, device=device) for _ in range(2)]
    slots, positions = torch.tensor([0, 1], device=device), torch.tensor([39, position], device=device)
    with pytest.raises(CacheIndexError, match=rf"positions\[1\] is {position}, expected 0 to 39, a row of"):
        write_kv_cache(
            *(k, k, *caches, slots),
            q=k,
            positions=positions,
            cos_sin=torch.ones(40, 16, device=device),
            backend=backend,
        )


@pytest.mark.damaged
def test_compiled_calls_are_checked(device: torch.device, checked: None) -> None:
    """The registered operator runs when the traced code does."""
    attention = Attention(device)
    attention.case.block_table[1, 0] = 1000
    case = attention.case
    with pytest.raises(CacheIndexError, match=r"block_table\[1, 0\] is 1000"):
        torch.ops.qsun.paged_attention_decode(
            *(case.q, case.k_cache, case.v_cache, case.block_table, case.seq_lens, 1.0, None), backend="torch"
        )


@pytest.mark.damaged
def test_capture_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that is captured would replay unchecked."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    checked_mode._refuse_capture("write_kv_cache", torch.device("cpu"))
    with pytest.raises(CapturedCallError, match="write_kv_cache was called while a CUDA graph is captured"):
        checked_mode._refuse_capture("write_kv_cache", torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.damaged
def test_a_capture_meets_the_refusal(checked: None) -> None:
    attention = Attention(torch.device("cuda"))
    attention.run("cuda")
    with (
        pytest.raises(CapturedCallError, match="run without CUDA graphs"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        attention.run("cuda")


def test_errors_survive_their_pickles() -> None:
    for error in (CacheIndexError("a", "b", (1, 2), 3, "4"), CapturedCallError("a", "B")):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error) and str(again) == str(error)


@pytest.mark.parametrize(("text", "asked"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_what_the_variable_may_hold(text: str | None, asked: bool) -> None:
    assert checked_mode.is_asked_for(text) is asked


def test_another_value_is_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("environment variable QSUN_CHECK is 'yes', expected '1'")):
        checked_mode.is_asked_for("yes")


CALL = """
import torch, qsun_kernels
k, cache = torch.ones(1, 1, 4), torch.zeros(2, 1, 2, 4)
try:
    qsun_kernels.write_kv_cache(k, k, cache, cache.clone(), torch.tensor([4]))
except Exception as error:
    print(type(error).__name__)
"""


@pytest.mark.parametrize(("value", "raised"), [("1", "CacheIndexError"), (None, "IndexError")])
def test_the_environment_decides(value: str | None, raised: str) -> None:
    """In a process of its own: the variable is read when the package is imported."""
    environment = {name: text for name, text in os.environ.items() if name != "QSUN_CHECK"}
    environment |= {} if value is None else {"QSUN_CHECK": value}
    done = subprocess.run(
        [sys.executable, "-c", CALL], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == raised
