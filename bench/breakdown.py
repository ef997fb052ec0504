"""Where the time of a step goes, by operator, from torch's profiler.

On a GPU every kernel of a replayed graph is in the trace, and its name tells the operator. A kernel may start
while the one before it still runs, and wait for it: its time is what it adds, from the end of those that
started before it to its own. So times add up to that in which the device was busy; what no kernel fills lies
between launches.

On a CPU there are no launches to see. There the profiler's Python frames are taken instead: the time in a
frame of `qsun_kernels/ops/NAME.py` is the operator's, less what another named frame inside it takes. Tracing
slows Python down, so on a CPU shares mean more than times.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

BETWEEN = "between"
"""What no operator fills: between launches on a GPU, Python around the operators on a CPU."""

# The first pattern that is found in a kernel's name tells its operator.
_KERNELS: Sequence[tuple[str, str]] = (
    (r"paged_attention_(plan|order|compare|group)", "plan_paged_attention"),
    (r"paged_attention", "paged_attention_decode"),
    (r"write_kv|hadamard", "write_kv_cache"),
    (r"wna16|dequantize_kernel", "wna16_linear"),
    (r"rms_norm", "rms_norm"),
    (r"rope", "apply_rope"),
    (r"silu_and_mul", "silu_and_mul"),
    (r"nvjet|gemm|gemv|cutlass|cublas|splitK|sm90_xmma|ampere_", "cublas"),
    (r"sampl|gumbel|argmax|topk|sort|Sort|reduce_kernel|softmax", "sampling"),
    (r"embedding|indexSelect|index_select|gather", "embedding"),
    (r"[Mm]emcpy|[Mm]emset", "copies"),
    (r"elementwise|copy_kernel|CatArray|FillFunctor", "elementwise"),
)

_LM_HEAD = "lm_head"
# The same for Python's frames, by file and function: an operator is called as its file is.
_FRAMES: Sequence[tuple[str, str]] = (
    (r"(?:^|/)qsun_kernels/ops/(\w+)\.py\(\d+\): \1$", r"\1"),
    (r"(?:^|/)qsun/engine/\w*sampl\w*\.py\(\d+\): ", "sampling"),
    (r"(?:^|/)qsun/layers/linear\.py\(\d+\): __call__$", "linear"),
    (r"(?:^|/)qsun/modules/decode\.py\(\d+\): (?:raw_)?logits$", _LM_HEAD),
    (r"(?:^|/)qsun/modules/decode\.py\(\d+\): embed$", "embedding"),
)


@dataclass(frozen=True, slots=True)
class Share:
    """An operator's part of a step: microseconds that it adds, and launches (calls on a CPU)."""

    operator: str
    us: float
    launches: float


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Of one step, averaged over those that were traced.

    step_us: from the start of the first to the end of the last, over their number. busy_us: the time in which
    at least one operator ran. shares: the largest first, what is between them not included.
    """

    step_us: float
    busy_us: float
    shares: tuple[Share, ...]

    @property
    def between_us(self) -> float:
        """What no operator fills."""
        return self.step_us - self.busy_us

    def to_json(self) -> dict[str, Any]:
        """As a record keeps it."""
        parts = {
            share.operator: {"us": round(share.us, 2), "launches": round(share.launches, 2)}
            for share in self.shares
        }
        return {
            "step_us": round(self.step_us, 2),
            "busy_us": round(self.busy_us, 2),
            BETWEEN: {"us": round(self.between_us, 2)},
            "operators": parts,
        }


def breakdown_of(step: Callable[[], object], device: torch.device, steps: int) -> Breakdown:
    """Trace `steps` steps of something that is running already.

    Raises RuntimeError when the trace holds nothing: a driver may forbid profiling.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, with_stack=not on_gpu) as traced:
        for _ in range(steps):
            step()
        if on_gpu:
            torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        traced.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return of_kernels(events, steps) if on_gpu else of_frames(events, steps)


def operator_of_kernel(name: str) -> str:
    """The operator that a kernel belongs to; the kernel's own name, cut short, when none is known."""
    for pattern, operator in _KERNELS:
        if re.search(pattern, name):
            return operator
    return f"other: {name[:60]}"


def of_kernels(events: Iterable[Mapping[str, Any]], steps: int) -> Breakdown:
    """From a trace of the device, over all of which gaps count, those between two steps too."""
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    launches = sorted(
        (float(event["ts"]), float(event["dur"]), str(event["name"]))
        for event in events
        if event.get("ph") == "X" and event.get("cat") in kinds
    )
    if not launches:
        raise RuntimeError("the profiler saw no kernel: is profiling allowed on this machine?")
    parts: dict[str, list[float]] = {}
    busy, end = 0.0, launches[0][0]
    for start, duration, name in launches:
        added = max(0.0, start + duration - max(start, end))
        parts.setdefault(operator_of_kernel(name), []).append(added)
        busy += added
        end = max(end, start + duration)
    return Breakdown((end - launches[0][0]) / steps, busy / steps, _shares(parts, steps))


def of_frames(events: Iterable[Mapping[str, Any]], steps: int) -> Breakdown:
    """From the Python frames of a trace of the CPU: the frames of `DecodeEngine.step` are the steps."""
    frames = [event for event in events if event.get("ph") == "X" and event.get("cat") == "python_function"]
    whole = [event for event in frames if re.search(r"qsun/engine/engine\.py\(\d+\): step$", event["name"])]
    if not whole:
        raise RuntimeError("the profiler saw no Python frame of DecodeEngine.step")
    parts: dict[str, list[float]] = {}
    busy = 0.0
    for thread in {event.get("tid") for event in whole}:
        busy += _add_frames([event for event in frames if event.get("tid") == thread], parts)
    total = sum(float(event["dur"]) for event in whole)
    return Breakdown(total / steps, busy / steps, _shares(parts, steps))


def _add_frames(frames: Iterable[Mapping[str, Any]], parts: dict[str, list[float]]) -> float:
    """Add what each named frame of one thread takes by itself; returns the time under any of them."""
    named = sorted(
        (float(event["ts"]), -float(event["dur"]), operator)
        for event in frames
        if (operator := _operator_of_frame(event["name"])) is not None
    )
    busy = 0.0
    # Frames that lie around the current one: when each ends, its operator, its place in `parts`.
    around: list[tuple[float, str, int]] = []
    for start, negative, operator in named:
        duration = -negative
        while around and around[-1][0] <= start:
            around.pop()
        if around and around[-1][1] in (operator, _LM_HEAD):
            continue  # a helper of the same operator, or the matmul of the lm_head: the outer frame tells it
        if around:
            _, outer, place = around[-1]
            parts[outer][place] -= duration
        else:
            busy += duration
        own = parts.setdefault(operator, [])
        around.append((start + duration, operator, len(own)))
        own.append(duration)
    return busy


def _operator_of_frame(name: str) -> str | None:
    for pattern, operator in _FRAMES:
        found = re.search(pattern, name)
        if found is not None:
            return found.expand(operator)
    return None


def _shares(parts: Mapping[str, Sequence[float]], steps: int) -> tuple[Share, ...]:
    shares = [Share(operator, sum(times) / steps, len(times) / steps) for operator, times in parts.items()]
    return tuple(sorted(shares, key=lambda share: -share.us))
