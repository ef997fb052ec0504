"""How long `sample_tokens` takes: python -m qsun_bench.sampling_time [--device D] [--vocabulary V] ...

One line a batch size, way of drawing and backend: microseconds of one call in a replayed graph, logits read
from memory (rotated over copies), beside the time that reading them takes at the bandwidth of this machine.
Every result is compared with the reference before it is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from qsun_kernels import BackendUnavailable, sample_tokens
from qsun_kernels.backends.problems import BACKENDS
from qsun_kernels.testing import inputs, timing
from qsun_kernels.testing.judge import judge_sample_tokens

__all__ = ["WAYS", "main"]

WAYS = {
    "greedy": (0.0, 0, 1.0, 0.0),
    "temperature": (0.8, 0, 1.0, 0.0),
    "min-p": (0.8, 0, 1.0, 0.05),
    "top-k": (0.8, 50, 1.0, 0.0),
    "top-p": (0.8, 0, 0.95, 0.0),
    "top-k, top-p": (0.8, 50, 0.95, 0.0),
}
"""Temperature, top_k, top_p and min_p of all rows."""


def arguments_of(way: str, logits: Tensor) -> tuple[Tensor, ...]:
    """What an operator call takes."""
    batch, device = logits.shape[0], logits.device
    dtypes = (torch.float32, torch.int32, torch.float32, torch.float32)
    columns = [
        torch.full((batch,), value, dtype=dtype, device=device)
        for value, dtype in zip(WAYS[way], dtypes, strict=True)
    ]
    return (logits, *columns, torch.arange(batch, device=device) * 0x5DEECE66D)


def measured(
    device: torch.device, vocabulary: int, batches: Sequence[int], dtype: torch.dtype, seconds: float
) -> Iterator[str]:
    """The lines of the table."""
    bandwidth = timing.read_bandwidth(device)
    for batch in batches:
        nbytes = batch * vocabulary * dtype.itemsize
        copies = [
            inputs.normal(inputs.generator(seed), (batch, vocabulary), dtype, device, std=3.0)
            for seed in range(timing.copies_to_overflow(nbytes, device))
        ]
        floor = nbytes / bandwidth * 1e6
        for way in WAYS:
            for backend in BACKENDS:
                calls = [partial(sample_tokens, *arguments_of(way, one), backend=backend) for one in copies]
                try:
                    judge_sample_tokens(calls[0](), *arguments_of(way, copies[0])).require()
                except BackendUnavailable as refused:
                    yield f"{batch:>5} {way:<13} {backend:<6} {refused.reason}"
                    continue
                us = timing.time_calls(calls, [(one,) for one in copies], device=device, seconds=seconds).us
                yield f"{batch:>5} {way:<13} {backend:<6} {us:9.1f} us   floor {floor:.1f} us"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m qsun_bench.sampling_time", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--seconds", type=float, default=0.4, help="of timing each")
    chosen = parser.parse_args(arguments)
    device = torch.device(chosen.device)
    dtype = getattr(torch, chosen.dtype)
    for line in measured(device, chosen.vocabulary, chosen.batch, dtype, chosen.seconds):
        print(line, flush=True)


if __name__ == "__main__":
    main()
