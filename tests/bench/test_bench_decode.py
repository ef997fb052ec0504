"""The decode step: its gate, its bytes, its random model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qsun.layers import mlp
from qsun.models.build import Placement
from qsun_bench import decode
from qsun_bench.decode import Request, decode_records, kv_bytes, step_weight_bytes
from qsun_bench.random_model import model_config, random_decode_module
from qsun_bench.random_weights import weight_bytes
from qsun_bench.shapes import ModelShape, shape
from qsun_kernels.backends.dispatch import requested_backend
from qsun_kernels.quant import QuantSpec

CPU = torch.device("cpu")
SPEC = QuantSpec(4, 64, True)
TINY = ModelShape("tiny", "qwen3", 4, 128, 256, 4, 2, 64, 512, False, 1e4)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Request:
    monkeypatch.setattr(decode, "shape", lambda name: TINY)
    return Request(CPU, shape="tiny", batches=(2,), contexts=(16,), tokens=3)


def test_bytes_of_a_step() -> None:
    """Facts of Llama-3.1-8B in W4 g128 with a 16-bit lm_head: 4.65 GB of weights, 128 KiB of KV a token."""
    sizes = shape("llama-3.1-8b")
    config = model_config(sizes, sizes.layers, 1024)
    assert step_weight_bytes(config, QuantSpec(4, 128, True), torch.bfloat16) == pytest.approx(
        4.65e9, rel=0.005
    )
    dense = step_weight_bytes(config, None, torch.bfloat16)
    assert dense == pytest.approx(15.0e9, rel=0.005)
    cut = model_config(sizes, 1, 64)
    module = random_decode_module(
        model_config(TINY, 2, 64), SPEC, Placement(torch.bfloat16, CPU), torch.bfloat16
    )
    assert kv_bytes(module, 10) == 10 * 2 * 2 * 2 * 64 * 2
    assert cut.num_layers == 1


def test_the_random_module_holds_what_the_bytes_count() -> None:
    module = random_decode_module(
        model_config(TINY, 2, 64), SPEC, Placement(torch.bfloat16, CPU, "torch"), torch.bfloat16
    )
    algorithmic = step_weight_bytes(module.config, SPEC, torch.bfloat16)
    # torch's int4 layout stores an unused offset beside each scale; norms of heads are not counted.
    extra = sum(weight_bytes(n, k, SPEC, torch.bfloat16) - n * k // 2 for n, k in TINY.linears.values())
    assert algorithmic <= module.bytes_per_step <= algorithmic + 2 * extra + 4 * 2 * 64 * 2


def test_the_same_function_in_two_precisions() -> None:
    """The gate's exact step must multiply by the same rounded weights."""
    config = model_config(TINY, 1, 64)
    low = random_decode_module(config, SPEC, Placement(torch.bfloat16, CPU), torch.bfloat16)
    high = random_decode_module(config, SPEC, Placement(torch.float32, CPU), torch.bfloat16)
    assert torch.equal(low.embed_tokens.float(), high.embed_tokens)
    assert torch.equal(low.lm_head.float(), high.lm_head)


def test_layers_of_both_kinds(tiny: Request) -> None:
    records = [record for record, _ in decode_records(tiny)]
    assert [record.backend for record in records if record] == ["torch", "dense"]
    assert all(record and record.ok and record.us and record.fields["model"] == "tiny" for record in records)


def spoil(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Wrong by five per cent, but only where no backend was named: as a broken kernel of ours would be."""

    def wrapped(x: Tensor) -> Tensor:
        return function(x) * (1.05 if requested_backend() is None else 1.0)

    return wrapped


def test_a_wrong_step_is_not_timed(tiny: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp, "silu_and_mul", spoil(mlp.silu_and_mul))
    monkeypatch.setattr(decode, "_time_per_token", lambda *_: pytest.fail("a wrong step was timed"))
    results = list(decode_records(tiny))
    assert results
    for record, note in results:
        assert record is not None and not record.ok and record.us is None
        assert note.startswith("a decode step: worst error")


def test_what_does_not_fit_is_told(tiny: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "_room", lambda device: 1000)
    assert [record for record, _ in decode_records(tiny)] == [None, None]
    assert all("1000 are free" in note for _, note in decode_records(tiny))


def test_a_checkpoint_is_timed_as_asked_for(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    request = Request(CPU, model=tmp_path / "model", batches=(1,), contexts=(16,), tokens=3, group_size=32)
    ((record, note),) = decode_records(request)
    assert record is not None and record.ok and note == ""
    assert record.case == "model.L2.b1.c16" and record.fields["group_size"] == 32
