"""Loading and exporting hold the weights of one layer at a time."""

from __future__ import annotations

import weakref

import pytest
import torch

from qsun.checkpoint.safetensors_file import SafetensorsFile
from qsun.modules.decode import load_decode_module
from qsun.modules.export import export_quantized
from qsun.modules.prefill import load_prefill_module

LAYERS = 6
CALIBRATION = [list(range(3, 40))]


@pytest.fixture
def model(tiny):
    return tiny("llama", num_hidden_layers=LAYERS)


@pytest.fixture
def live(monkeypatch) -> list[int]:
    """Bytes of layers' tensors as stored that were alive after each read, while the test runs."""
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    history: list[int] = []
    original = SafetensorsFile.get

    def get(self, name):
        tensor = original(self, name)
        if ".layers." in name:
            alive.add(tensor)
            history.append(sum(item.nbytes for item in alive))
        return tensor

    monkeypatch.setattr(SafetensorsFile, "get", get)
    return history


def layer_bytes(hf) -> int:
    return sum(parameter.nbytes for parameter in hf.model.layers[0].parameters())


@pytest.mark.parametrize("quantizer", ["rtn", "awq", "gptq"])
@pytest.mark.parametrize("how", ["load", "export"])
def test_quantising_holds_one_layer(model, live, tmp_path, quantizer, how):
    calibration = CALIBRATION if quantizer != "rtn" else None
    # bfloat16, so that no tensor of the module itself is one that was read.
    arguments = {
        "bits": 4,
        "dtype": torch.bfloat16,
        "device": "cpu",
        "quantizer": quantizer,
        "calibration": calibration,
    }
    if how == "load":
        load_decode_module(model.path, **arguments)
    else:
        export_quantized(model.path, tmp_path / "q", **arguments)
    assert len(live) == LAYERS * 9
    assert max(live) == layer_bytes(model.hf)


def test_dense_layers_are_read_one_tensor_at_a_time(model, live):
    """In another dtype than the stored one, no two tensors as stored are held at once."""
    decode = load_decode_module(model.path, dtype=torch.bfloat16, device="cpu")
    largest = max(parameter.nbytes for parameter in model.hf.model.layers[0].parameters())
    assert max(live) <= 2 * largest
    live.clear()
    load_prefill_module("x", None, base_path=model.path, decode=decode)
    assert max(live) <= 2 * largest
