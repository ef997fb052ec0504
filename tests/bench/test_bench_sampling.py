"""The sampling table: every way and backend in a line, none timed that is wrong."""

from __future__ import annotations

import pytest
import torch

from qsun_bench import sampling_time
from qsun_kernels.testing import timing


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two copies, and no clock: overflowing a cache takes gigabytes."""
    monkeypatch.setattr(timing, "read_bandwidth", lambda device: 1e12)
    monkeypatch.setattr(timing, "copies_to_overflow", lambda nbytes, device: 2)
    measured = timing.Timing(12.5, 0.0, 7, 1, 2, "wall")
    monkeypatch.setattr(timing, "time_calls", lambda *arguments, **options: measured)


def test_the_table(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    sampling_time.main(["--device", "cpu", "--vocabulary", "500", "--batch", "1", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * len(sampling_time.WAYS) * 3
    timed = [line for line in lines if line[20:].startswith("torch")]
    assert len(timed) == 2 * len(sampling_time.WAYS) and all("12.5 us" in line for line in timed)
    if not torch.cuda.is_available():
        refused = [line for line in lines if line[20:].startswith("cuda")]
        assert len(refused) == len(timed) and all(" us " not in line for line in refused)


def test_a_wrong_result_is_not_timed(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(logits: torch.Tensor, *settings: torch.Tensor, backend: str) -> tuple[torch.Tensor, ...]:
        return torch.full((logits.shape[0],), 499), torch.ones(logits.shape[0], dtype=torch.bool)

    monkeypatch.setattr(sampling_time, "sample_tokens", wrong)
    with pytest.raises(AssertionError, match="sample_tokens tokens: "):
        sampling_time.main(["--device", "cpu", "--vocabulary", "500", "--batch", "3"])
