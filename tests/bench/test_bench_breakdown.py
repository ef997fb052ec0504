"""Traces become operators, and host time is what the device does not fill."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qsun.models.build import Placement
from qsun_bench import host_time as host
from qsun_bench.breakdown import BETWEEN, breakdown_of, of_frames, of_kernels, operator_of_kernel
from qsun_bench.decode_steps import given_engine, settle, submit_given
from qsun_bench.random_model import model_config, random_decode_module
from qsun_bench.shapes import ModelShape
from qsun_kernels.quant import QuantSpec

CPU = torch.device("cpu")
TINY = ModelShape("tiny", "llama", 2, 128, 256, 4, 2, 64, 512, False, 1e4)


def event(name: str, ts: float, dur: float, cat: str = "kernel", tid: int = 1) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid}


@pytest.mark.parametrize(
    ("kernel", "operator"),
    [
        ("void qsun::wna16_stream_kernel<4, 1, 2>(StreamArguments)", "wna16_linear"),
        ("void qsun::wna16_gemm_sm90_kernel<4>(GemmArguments)", "wna16_linear"),
        ("qsun::paged_attention_plan_kernel(PlanArguments)", "plan_paged_attention"),
        ("qsun::paged_attention_compare_kernel(PrefixArguments)", "plan_paged_attention"),
        ("paged_attention_tiles_kernel<__nv_bfloat16, 128>", "paged_attention_decode"),
        ("write_kv_cache_kernel", "write_kv_cache"),
        ("rms_norm_kernel(RmsNormParams)", "rms_norm"),
        ("apply_rope_kernel", "apply_rope"),
        ("silu_and_mul_kernel", "silu_and_mul"),
        ("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", "cublas"),
        ("void cublasLt::splitKreduce_kernel<32, 16>", "cublas"),
        ("void at::native::reduce_kernel<512, 1, ReduceOp<float>>", "sampling"),
        ("void at::native::(anonymous namespace)::vectorized_gather_kernel", "embedding"),
        ("Memcpy HtoD (Pageable -> Device)", "copies"),
        ("somebody_elses_kernel", "other: somebody_elses_kernel"),
    ],
)
def test_kernel_names_tell_operators(kernel: str, operator: str) -> None:
    assert operator_of_kernel(kernel) == operator


def test_kernels_gaps_and_overlap() -> None:
    """Two steps: 10 us of a matmul that the norm overlaps by 2, a gap of 3, then a copy of 5."""
    events = []
    for start in (100.0, 120.0):
        events += [
            event("wna16_stream_kernel", start, 10),
            event("rms_norm_kernel", start + 8, 4),
            event("Memcpy DtoH", start + 15, 5, cat="gpu_memcpy"),
        ]
    events += [event("aten::mm", 90, 500, cat="cpu_op"), {"ph": "i", "cat": "kernel", "name": "mark"}]
    found = of_kernels(events, 2)
    assert (found.step_us, found.busy_us, found.between_us) == (20.0, 17.0, 3.0)
    assert [(s.operator, s.us, s.launches) for s in found.shares] == [
        ("wna16_linear", 10.0, 1.0),
        ("copies", 5.0, 1.0),
        ("rms_norm", 2.0, 1.0),
    ]
    told = found.to_json()
    assert told[BETWEEN] == {"us": 3.0} and told["operators"]["rms_norm"] == {"us": 2.0, "launches": 1.0}
    with pytest.raises(RuntimeError, match="saw no kernel"):
        of_kernels([event("aten::mm", 0, 1, cat="cpu_op")], 1)


def test_frames_count_once() -> None:
    """A linear layer of 10 us holds its operator of 8, which calls a helper of 2; the step takes 30."""

    def frame(name: str, ts: float, dur: float, tid: int = 1) -> dict[str, Any]:
        return event(name, ts, dur, "python_function", tid)

    events = [
        frame("/x/qsun/engine/engine.py(301): step", 0, 30),
        frame("qsun/layers/linear.py(74): __call__", 1, 10),
        frame("qsun_kernels/ops/wna16_linear.py(40): wna16_linear", 2, 8),
        frame("qsun_kernels/ops/checks.py(11): floating", 3, 2),
        frame("qsun/engine/sampler.py(56): sample", 20, 5),
        frame("qsun/engine/sampler.py(83): modify_logits", 21, 1),
        # Another thread's, which is no part of the step.
        frame("qsun_kernels/ops/rms_norm.py(31): rms_norm", 5, 9, tid=2),
    ]
    found = of_frames(events, 1)
    assert {s.operator: (s.us, s.launches) for s in found.shares} == {
        "wna16_linear": (8.0, 1.0),
        "sampling": (5.0, 1.0),
        "linear": (2.0, 1.0),
    }
    assert (found.step_us, found.busy_us, found.between_us) == (30.0, 15.0, 15.0)
    with pytest.raises(RuntimeError, match=r"no Python frame of DecodeEngine\.step"):
        of_frames(events[1:], 1)


def running_engine(device: torch.device) -> Any:
    config = model_config(TINY, 2, 128)
    placement = Placement(torch.bfloat16, device)
    module = random_decode_module(config, QuantSpec(4, 64, True), placement, torch.bfloat16)
    engine = given_engine(module, "auto", batch=2, longest=100, backend=None)
    submit_given(engine, ["a", "b"], 16, 80)
    settle(engine, 2)
    return engine


def test_a_real_step_on_this_cpu() -> None:
    found = breakdown_of(running_engine(CPU).step, CPU, 2)
    calls = {share.operator: share.launches for share in found.shares}
    # Two layers, each half of which ends with the norm of what follows; the first norm stands alone.
    assert calls["rms_norm"] == 1 and calls["wna16_linear_rms_norm"] == 4 and calls["lm_head"] == 1
    assert {"paged_attention_decode", "wna16_linear", "sampling"} <= calls.keys()
    assert 0 < found.busy_us < found.step_us
    assert sum(share.us for share in found.shares) == pytest.approx(found.busy_us)


class FakeEvent:
    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = FakeEvent.now

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at - self.at


def test_host_time_is_the_clock_less_the_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    replayed = []

    def replay(graph: object) -> None:
        replayed.append(graph)
        FakeEvent.now += 2.0  # milliseconds

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", replay)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(host, "_walls", lambda step, steps: [step() or 0.003 for _ in range(steps)])
    found = host.host_time(lambda: torch.cuda.CUDAGraph.replay("graph"), CPU, 4)  # type: ignore[arg-type]
    assert len(replayed) == 4, "when Python is timed alone nothing is replayed"
    assert found.device_us == pytest.approx(2000) and found.wall_us == pytest.approx(3000)
    assert found.exposed_us == pytest.approx(1000)
    assert torch.cuda.CUDAGraph.replay is replay, "what was watched is put back"
    with pytest.raises(RuntimeError, match="replays no CUDA graph"):
        host.host_time(lambda: None, CPU, 2)


@pytest.mark.gpu
def test_a_gpu_step_is_broken_down_and_its_host_time_told(device: torch.device) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    engine = running_engine(device)
    found = breakdown_of(engine.step, device, 4)
    launches = {share.operator: share.launches for share in found.shares}
    assert launches["paged_attention_decode"] >= 2 and launches["wna16_linear"] >= 8
    assert 0 < found.busy_us <= found.step_us
    told = host.host_time(engine.step, device, 8)
    assert 0 < told.device_us < told.wall_us and told.python_us > 0
