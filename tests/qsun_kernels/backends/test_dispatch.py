"""Which backend is taken: order, call over context over environment, and no silent fallback."""

from __future__ import annotations

import asyncio
import copy
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from qsun_kernels import BackendUnavailable, KernelLaunchError, rms_norm, use_backend
from qsun_kernels.backends import dispatch
from qsun_kernels.backends.problems import (
    BACKENDS,
    AttentionImplementation,
    BackendName,
    Implementation,
    Problem,
    RmsNormProblem,
    SiluAndMulProblem,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@dataclass
class FakeBackend:
    """A backend that refuses what the test says, and counts how often it is asked."""

    name: str
    whole: str | None = None
    refuses: str | None = None
    asked: list[Problem] = field(default_factory=list)

    def unavailable(self) -> str | None:
        return self.whole

    @property
    def IMPLEMENTATIONS(self) -> Mapping[str, Implementation]:
        def supports(problem: Any) -> str | None:
            self.asked.append(problem)
            return self.refuses

        def run(*arguments: Any) -> tuple[str, Any]:
            return self.name, arguments

        return {"rms_norm": Implementation(supports, run, lambda problem: f"{self.name} kernel")}


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[BackendName, FakeBackend]]:
    """Three backends that support everything, until a test says otherwise."""
    fakes: dict[BackendName, FakeBackend] = {name: FakeBackend(name) for name in ("cuda", "triton", "torch")}
    monkeypatch.setattr(dispatch, "load_backend", fakes.__getitem__)
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    dispatch.forget_choices()
    yield fakes
    dispatch.forget_choices()


def norm(device: torch.device) -> RmsNormProblem:
    return RmsNormProblem(8, False, torch.float32, device)


def test_cuda_then_triton_then_torch(backends: dict[BackendName, FakeBackend]) -> None:
    assert dispatch.select(norm(CUDA)).backend == "cuda"
    backends["cuda"].refuses = "hidden_size=8 is odd"
    dispatch.forget_choices()
    assert dispatch.select(norm(CUDA)).backend == "triton"
    backends["triton"].whole = "triton cannot be imported"
    dispatch.forget_choices()
    assert dispatch.select(norm(CUDA)).backend == "torch"


def test_the_cpu_considers_torch_only(backends: dict[BackendName, FakeBackend]) -> None:
    assert dispatch.select(norm(CPU)).backend == "torch"
    assert not backends["cuda"].asked
    assert not backends["triton"].asked


def test_a_named_backend_is_taken_literally_on_the_cpu_too(backends: dict[BackendName, FakeBackend]) -> None:
    assert dispatch.select(norm(CPU), "triton").backend == "triton"


@pytest.mark.parametrize(
    ("whole", "refuses", "reason"),
    [("not built: no nvcc", None, "not built: no nvcc"), (None, "hidden_size=8, it takes 64", "it takes 64")],
)
def test_a_named_backend_never_falls_back(
    whole: str | None, refuses: str | None, reason: str, backends: dict[BackendName, FakeBackend]
) -> None:
    backends["cuda"].whole, backends["cuda"].refuses = whole, refuses
    with pytest.raises(BackendUnavailable, match=f"backend 'cuda' cannot run rms_norm: .*{reason}") as caught:
        dispatch.select(norm(CUDA), "cuda")
    assert (caught.value.operator, caught.value.backend) == ("rms_norm", "cuda")


def test_an_operator_that_a_backend_lacks_is_a_reason(backends: dict[BackendName, FakeBackend]) -> None:
    with pytest.raises(
        BackendUnavailable, match="backend 'triton' cannot run silu_and_mul: it has no silu_and_mul"
    ):
        dispatch.select(SiluAndMulProblem(8, torch.float32, CUDA), "triton")


def test_when_all_refuse_every_reason_is_told(backends: dict[BackendName, FakeBackend]) -> None:
    for name, backend in backends.items():
        backend.refuses = f"{name} is out"
    with pytest.raises(
        BackendUnavailable,
        match="no backend can run rms_norm: cuda: cuda is out; triton: triton is out; torch: torch",
    ):
        dispatch.select(norm(CUDA))


def test_call_beats_context_beats_environment(
    monkeypatch: pytest.MonkeyPatch, backends: dict[BackendName, FakeBackend]
) -> None:
    requested = dispatch.requested_backend
    assert requested() is None
    monkeypatch.setenv("QSUN_BACKEND", "cuda")
    assert requested() == "cuda"
    with use_backend("triton"):
        assert requested() == "triton"
        assert requested("torch") == "torch"
        with use_backend("torch"):
            assert requested() == "torch"
        assert requested() == "triton"
    assert requested() == "cuda"
    monkeypatch.setenv("QSUN_BACKEND", "")
    assert requested() is None


def test_operators_obey_all_three(
    monkeypatch: pytest.MonkeyPatch, backends: dict[BackendName, FakeBackend]
) -> None:
    def taken(**kwargs: Any) -> Any:
        return rms_norm(torch.ones(2, 8), torch.ones(8), eps=1e-6, **kwargs)[0]

    assert taken() == "torch"
    assert taken(backend="triton") == "triton"
    with use_backend("triton"):
        assert taken() == "triton"
        assert taken(backend="torch") == "torch"
    monkeypatch.setenv("QSUN_BACKEND", "cuda")
    assert taken() == "cuda"
    monkeypatch.delenv("QSUN_BACKEND")
    assert taken() == "torch"


def test_the_context_is_restored_after_an_error(backends: dict[BackendName, FakeBackend]) -> None:
    with pytest.raises(KeyError), use_backend("triton"):
        raise KeyError("inside")
    assert dispatch.requested_backend() is None


def test_the_context_belongs_to_its_thread_and_task(backends: dict[BackendName, FakeBackend]) -> None:
    seen: list[BackendName | None] = []
    with use_backend("triton"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.requested_backend()))
        thread.start()
        thread.join()
    assert seen == [None]

    async def task(name: BackendName) -> BackendName | None:
        with use_backend(name):
            await asyncio.sleep(0)
            return dispatch.requested_backend()

    async def both() -> list[BackendName | None]:
        return await asyncio.gather(task("cuda"), task("triton"))

    assert asyncio.run(both()) == ["cuda", "triton"]


def test_a_backend_is_asked_once_a_problem(backends: dict[BackendName, FakeBackend]) -> None:
    x, weight = torch.ones(2, 8), torch.ones(8)
    for rows in (1, 2, 2, 1):
        rms_norm(x[:rows], weight, eps=1e-6)
    assert backends["torch"].asked == [norm(CPU)]
    rms_norm(x, weight, eps=1e-6, residual=x)
    assert len(backends["torch"].asked) == 2


def test_a_refusal_is_remembered_and_raised_again(backends: dict[BackendName, FakeBackend]) -> None:
    backends["triton"].refuses = "no"
    for _ in range(2):
        with pytest.raises(BackendUnavailable):
            rms_norm(torch.ones(2, 8), torch.ones(8), eps=1e-6, backend="triton")
    assert len(backends["triton"].asked) == 1


def test_launcher_of_a_prepared_weight_says_why_its_backend_is_gone(
    backends: dict[BackendName, FakeBackend],
) -> None:
    backends["cuda"].whole = "no CUDA device"
    with pytest.raises(BackendUnavailable, match="backend 'cuda' cannot run rms_norm: no CUDA device"):
        dispatch.launcher_of("cuda", "rms_norm")


@pytest.mark.damaged
@pytest.mark.parametrize("name", ["", "CUDA", "cudnn", "torch "])
def test_an_unknown_name_is_an_error_that_says_where_it_came_from(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = "expected one of 'cuda', 'triton', 'torch'"
    with pytest.raises(ValueError, match=f"^backend is {name!r}; {expected}"):
        dispatch.requested_backend(name)
    with pytest.raises(ValueError, match=f"^name is {name!r}; {expected}"), use_backend(name):  # type: ignore[arg-type]
        pass
    if name:
        monkeypatch.setenv("QSUN_BACKEND", name)
        with pytest.raises(ValueError, match=f"^environment variable QSUN_BACKEND is {name!r}; {expected}"):
            rms_norm(torch.ones(2, 8), torch.ones(8), eps=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_plans_its_attention(name: BackendName) -> None:
    """`plan_paged_attention` asks whichever is chosen."""
    entry = dispatch.load_backend(name).IMPLEMENTATIONS.get("paged_attention_decode")
    if entry is None:
        assert dispatch.load_backend(name).unavailable() is not None
    else:
        assert isinstance(entry, AttentionImplementation)


def test_without_a_gpu_the_real_cuda_backend_says_why() -> None:
    with pytest.raises(BackendUnavailable, match=r"backend 'cuda' cannot run rms_norm: \w"):
        rms_norm(torch.ones(2, 8), torch.ones(8), eps=1e-6, backend="cuda")


def test_errors_can_be_rebuilt_from_their_parts() -> None:
    """As happens when one crosses from a worker process to its parent."""
    errors: list[Exception] = [
        BackendUnavailable("rms_norm", "cuda", "not built"),
        KernelLaunchError("rms_norm", "rows=3 H=8", "invalid argument"),
    ]
    for error in errors:
        again = copy.copy(error)
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert vars(again) == vars(error)
    assert str(errors[1]) == "rms_norm failed to launch with rows=3 H=8: invalid argument"


def test_importing_the_package_leaves_the_heavy_things_alone() -> None:
    """Neither triton nor transformers: each takes longer to import than everything here."""
    program = (
        "import sys, qsun_kernels; "
        "print([m for m in ('triton', 'transformers', 'gguf', 'qsun_kernels.testing') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
