"""A decode module whose lm_head is kept in few bits."""

from __future__ import annotations

import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from qsun import DecodeEngine
from qsun.errors import SharedPartsWarning
from qsun.layers.linear import QuantLinear
from qsun.modules.decode import load_decode_module
from qsun.modules.prefill import load_prefill_module
from qsun_kernels import QuantSpec, dequantize
from qsun_kernels.quant import quantize_rtn


def load(path, **options):
    return load_decode_module(path, dtype=torch.float32, device="cpu", **options)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", ["llama", "qwen2"], ids=["untied", "tied"])
def test_logits_are_those_of_the_rounded_head(tiny, kind, bits) -> None:
    model = tiny(kind)
    decode, whole = load(model.path, lm_head_bits=bits), load(model.path)
    assert (decode.lm_head_bits, whole.lm_head_bits) == (bits, 16)
    rounded = dequantize(quantize_rtn(whole.lm_head, QuantSpec(bits, 64, True)), torch.float32)
    hidden = torch.randn(5, decode.config.hidden_size, generator=torch.Generator().manual_seed(0))
    got = decode.logits(hidden)
    torch.testing.assert_close(got, hidden @ rounded.T, rtol=1e-4, atol=1e-4)
    assert (got - whole.logits(hidden)).abs().max() > 1e-2
    # The embedding is read as it was.
    assert torch.equal(decode.embed(torch.arange(9)), whole.embed(torch.arange(9)))
    assert (decode.lm_head is None) == (kind == "llama")


def test_bytes_are_those_that_a_step_reads(tiny) -> None:
    whole, untied = load(tiny("llama").path), load(tiny("llama").path, lm_head_bits=8)
    tied = load(tiny("qwen2").path, lm_head_bits=8)
    assert isinstance(untied.head, QuantLinear) and isinstance(tied.head, QuantLinear)
    assert untied.bytes_per_step == whole.bytes_per_step - whole.lm_head.nbytes + untied.head.nbytes
    assert untied.nbytes == untied.bytes_per_step + untied.embed_tokens.nbytes
    # Beside the quantised head a tied embedding stays.
    assert tied.nbytes == tied.bytes_per_step + tied.embed_tokens.nbytes


def test_what_must_fit_does_not_change(tiny) -> None:
    """A prefill module's KV does not depend on the lm_head, so it serves either decoder."""
    whole, few = load(tiny("llama").path), load(tiny("llama").path, lm_head_bits=4)
    assert few.fingerprint == whole.fingerprint
    fingerprints = {
        load_prefill_module("own", base_path=tiny("llama").path, decode=d).fingerprint for d in (whole, few)
    }
    assert len(fingerprints) == 1


def test_an_lm_head_of_its_own_is_told_as_before(tiny, tmp_path) -> None:
    path = tiny("llama").path
    decode = load(path, lm_head_bits=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = load_prefill_module("same", path, base_path=path, decode=decode)
    assert same.notices == ()
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"][3] += 1
    for file in path.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(
        SharedPartsWarning, match="its lm_head differs from the one that .* was quantised from"
    ):
        other = load_prefill_module("other", tmp_path, base_path=path, decode=decode)
    assert len(other.notices) == 1


def test_the_engine_says_so_and_answers(tiny) -> None:
    path = tiny("llama").path
    engine = DecodeEngine.from_pretrained(
        path, bits=4, group_size=32, lm_head_bits=8, dtype=torch.float32, device="cpu", memory="1MiB"
    )
    engine.add_model("own")
    (completion,) = engine.generate([5, 6, 7], model="own")
    assert completion.error is None and completion.token_ids
    assert "lm_head, 8 bits  (N=96 K=64)  torch, layout torch." in engine.explain()
    assert "lm_head  (N=96 K=64)" in DecodeEngine.from_pretrained(path, bits=4, device="cpu").explain()


@pytest.mark.damaged
@pytest.mark.parametrize("bits", [0, 2, 3, 32, "8", 8.0, True])
def test_other_numbers_of_bits_are_refused(bits) -> None:
    with pytest.raises(ValueError, match=r"lm_head_bits is .*, expected 16, 8 or 4"):
        load("/nowhere", lm_head_bits=bits)


@pytest.mark.damaged
def test_an_lm_head_that_is_not_finite_is_refused(tiny, tmp_path) -> None:
    from qsun.errors import CheckpointError

    path = tiny("llama").path
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"][3, 5] = float("inf")
    for file in path.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lm_head"):
        load(tmp_path, lm_head_bits=4)
