"""What the demo tells at the end: which backend ran what, how fast, and how far from the floor."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qsun.cli.answers import Pace
from qsun.engine.options import kv_format_of
from qsun.engine.report import operator_problems
from qsun.layers.linear import QuantLinear
from qsun.layers.mlp import GateUpSilu
from qsun_kernels.ops.explain import explain_rows
from qsun_kernels.testing.timing import read_bandwidth

if TYPE_CHECKING:
    from qsun.engine.engine import DecodeEngine


@dataclass(frozen=True, slots=True)
class Summary:
    """The numbers of one run; the field names are those of its JSON.

    backends: for each operator of a decode step, the backend and its kernel.
    prefill_s: until every answer had begun; decode_s: from there to the end, in decode_steps steps that gave
        decode_tokens tokens. tokens: of all answers together.
    weight_bytes: what a decode step reads of the weights, whatever its batch. bytes_per_token: weights and KV
        that decode steps read, over the tokens they gave (mean_batch of them a step).
    read_gb_s: read-only bandwidth measured now. floor_ms: what reading a step's bytes at that rate takes;
        step_ms: what a step took.
    module_bytes: of the decode module and of each prefill module; kv_cache_bytes: allocated.
    peak_bytes: of the process on a CPU, of the device's allocator on a GPU.
    """

    device: str
    threads: int
    backends: Mapping[str, str]
    tokens: int
    prefill_s: float
    decode_s: float
    decode_steps: int
    decode_tokens: int
    mean_batch: float
    weight_bytes: int
    bytes_per_token: float
    read_gb_s: float
    floor_ms: float
    step_ms: float
    module_bytes: Mapping[str, int]
    kv_cache_bytes: int
    peak_bytes: int

    @property
    def tokens_per_s(self) -> float:
        """Of the decode part."""
        return self.decode_tokens / self.decode_s if self.decode_s else 0.0

    def lines(self) -> list[str]:
        """For a reader."""
        width = max(map(len, self.backends))
        place = f"{self.device}, {self.threads} threads" if self.device == "cpu" else self.device
        modules = ", ".join(f"{name} {_megabytes(size)}" for name, size in self.module_bytes.items())
        weights = _megabytes(self.weight_bytes)
        kv = _megabytes(self.bytes_per_token - self.weight_bytes / self.mean_batch)
        return [
            f"backends on {place}",
            *(f"  {operator:<{width}}  {text}" for operator, text in self.backends.items()),
            f"speed    {self.tokens} tokens: {self.prefill_s:.1f} s until every answer had begun, then "
            f"{self.tokens_per_s:.1f} tokens/s",
            f"         {self.decode_steps} decode steps of {self.step_ms:.1f} ms, "
            f"{self.mean_batch:.1f} requests a step",
            f"memory   {modules}; KV cache {_megabytes(self.kv_cache_bytes)}; "
            f"peak {_megabytes(self.peak_bytes)}",
            f"reads    {_megabytes(self.bytes_per_token)} a token: {weights} of weights for "
            f"{self.mean_batch:.1f} requests, {kv} of KV",
            f"floor    {self.floor_ms:.1f} ms a step, reading that at the {self.read_gb_s:.1f} GB/s measured "
            f"here: a step took {self.step_ms / self.floor_ms:.0f} times as long",
        ]


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB" if count < 1e8 else f"{count / 1e6:.0f} MB"


def summarise(engine: DecodeEngine, pace: Pace, prefill_bytes: Mapping[str, int]) -> Summary:
    """Read the numbers from an engine that has answered everything."""
    decode, stats = engine.decode_module, engine.stats()
    peak = _peak_bytes(decode.device)  # before the probe of the bandwidth takes memory of its own
    bandwidth = read_bandwidth(decode.device)
    return Summary(
        device=str(decode.device),
        threads=torch.get_num_threads(),
        backends=_backends(engine),
        tokens=pace.tokens,
        prefill_s=pace.prefill_s,
        decode_s=pace.decode_s,
        decode_steps=pace.decode_steps,
        decode_tokens=pace.decode_tokens,
        mean_batch=stats.mean_batch,
        weight_bytes=stats.weight_bytes_per_step,
        bytes_per_token=stats.bytes_read_per_token,
        read_gb_s=bandwidth * 1e-9,
        floor_ms=stats.bytes_read_per_token * stats.mean_batch / bandwidth * 1e3,
        step_ms=pace.decode_s / pace.decode_steps * 1e3 if pace.decode_steps else 0.0,
        module_bytes={"decode module": decode.nbytes, **prefill_bytes},
        kv_cache_bytes=stats.kv_bytes,
        peak_bytes=peak,
    )


def _backends(engine: DecodeEngine) -> dict[str, str]:
    """What runs each operator of the decode step, the linear layers as they were prepared."""
    decode = engine.decode_module
    found: dict[str, str] = {}
    attention, mlp = decode.stack.layers[0].attention, decode.stack.layers[0].mlp
    for linear in (attention.qkv, attention.o, mlp.gate_up, mlp.down):
        if isinstance(linear, QuantLinear):
            weight = linear.weight
            found["wna16_linear"] = f"{weight.backend} ({weight.spec}, layout {weight.layout})"
    if isinstance(mlp.gate_up, GateUpSilu):
        weight = mlp.gate_up.weight
        found["wna16_gate_up_silu"] = f"{weight.backend} ({weight.spec}, layout {weight.layout})"
    options = engine.options
    kv_format = kv_format_of(options.kv_cache_dtype, decode.dtype, decode.config.head_dim)
    for row in explain_rows(
        operator_problems(decode, options.block_size, kv_format), backend=options.backend
    ):
        if row.status == "chosen":
            found[row.operator] = f"{row.backend} ({row.detail})"
    return found


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # Kilobytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
