"""The automatic choice of a GPU backend is what the recorded runs say."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from qsun_kernels.backends.problems import BACKENDS

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results" / "h100"
SUITES = {"wna16": "wna16_linear", "attention": "paged_attention_decode"}


def geometric_means(suite: str) -> dict[str, float]:
    """Microseconds of our GPU backends over the cases that both ran, rightly."""
    records = json.loads((RESULTS / f"{suite}.json").read_text())["records"]
    times = {
        backend: {r["case"]: r["us"] for r in records if r["backend"] == backend and r["ok"]}
        for backend in ("cuda", "triton")
    }
    cases = times["cuda"].keys() & times["triton"].keys()
    assert cases
    return {b: math.exp(sum(math.log(t[c]) for c in cases) / len(cases)) for b, t in times.items()}


@pytest.mark.parametrize("suite", SUITES)
def test_the_faster_backend_is_asked_first(suite: str) -> None:
    means = geometric_means(suite)
    assert BACKENDS[0] == min(means, key=means.__getitem__), means
