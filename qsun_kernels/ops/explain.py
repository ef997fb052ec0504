"""Which backend runs what, and why not the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch

from qsun_kernels.backends.dispatch import (
    load_backend,
    passed_over,
    refusal,
    requested_backend,
)
from qsun_kernels.backends.problems import (
    BACKENDS,
    ApplyRopeProblem,
    BackendName,
    DequantizeProblem,
    PagedAttentionDecodeProblem,
    Problem,
    RmsNormProblem,
    SampleTokensProblem,
    SiluAndMulProblem,
    Wna16GateUpSiluProblem,
    Wna16LinearRmsNormProblem,
    Wna16Problem,
    WriteKvCacheProblem,
)

__all__ = ["ExplainRow", "Status", "explain", "explain_rows", "representative_problems"]

Status = Literal["chosen", "available", "refused"]


@dataclass(frozen=True, slots=True)
class ExplainRow:
    """One backend's answer to one problem.

    problem: its values, as "N=4096 K=4096 ...". status: ``chosen`` for the backend that an operator call
    would use, ``available`` for one that could run it, ``refused`` for one that could not. detail: the
    kernel, or the reason.
    """

    operator: str
    problem: str
    backend: BackendName
    status: Status
    detail: str


def representative_problems(
    device: torch.device | str | None = None, dtype: torch.dtype = torch.bfloat16
) -> tuple[Problem, ...]:
    """One problem an operator, with the widths of an 8-billion-parameter Llama and 4-bit weights in groups of
    128.

    device: by default the current CUDA device if there is one, else the CPU.
    """
    if device is None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    weight = (4096, 4096, 4, 128, True, False, dtype, device)
    return (
        Wna16Problem(*weight),
        Wna16LinearRmsNormProblem(*weight),
        Wna16GateUpSiluProblem(28672, *weight[1:]),
        PagedAttentionDecodeProblem(32, 8, 128, 16, None, dtype, dtype, device),
        WriteKvCacheProblem(8, 128, 16, dtype, dtype, device),
        RmsNormProblem(4096, True, dtype, device),
        ApplyRopeProblem(32, 8, 128, dtype, device),
        SiluAndMulProblem(14336, dtype, device),
        DequantizeProblem(*weight),
        SampleTokensProblem(128256, torch.float32, device),
    )


def explain_rows(
    problems: Problem | Sequence[Problem] | None = None, *, backend: BackendName | None = None
) -> tuple[ExplainRow, ...]:
    """What every backend answers to each problem, in the order of preference; without problems, to
    representative ones.

    backend: as in an operator call; the context and the environment are asked as there. When a backend that
    was asked for refuses a problem, no row of that problem is "chosen", and the operator would raise
    BackendUnavailable.
    """
    if problems is None:
        problems = representative_problems()
    elif not isinstance(problems, Sequence):
        problems = (problems,)
    requested = requested_backend(backend)
    return tuple(row for problem in problems for row in _rows_of(problem, requested))


def _rows_of(problem: Problem, requested: BackendName | None) -> list[ExplainRow]:
    rows: list[ExplainRow] = []
    is_chosen = False
    for backend in BACKENDS:
        named = backend == requested
        # What the automatic choice never considers is not even loaded: importing triton takes most of a
        # second.
        reason = refusal(backend, problem) if named else passed_over(backend, problem)
        status: Status = "refused"
        if reason is None:
            status = "chosen" if named or (requested is None and not is_chosen) else "available"
            is_chosen = is_chosen or status == "chosen"
            reason = load_backend(backend).IMPLEMENTATIONS[problem.operator].describe(problem)
        rows.append(ExplainRow(problem.operator, _values(problem), backend, status, reason))
    return rows


def _values(problem: Problem) -> str:
    """The fields of a problem in one line."""
    return " ".join(
        f"{field.name}={str(getattr(problem, field.name)).removeprefix('torch.')}"
        for field in fields(problem)
    )


def explain(
    problems: Problem | Sequence[Problem] | None = None, *, backend: BackendName | None = None
) -> str:
    """The table operator x backend: what was chosen, what could run, why the others cannot. See
    `explain_rows`.

    Without problems it asks for representative ones: bfloat16, 4-bit weights, on the GPU if there is one.
    """
    lines: list[str] = []
    previous: tuple[str, str] | None = None
    for row in explain_rows(problems, backend=backend):
        if (row.operator, row.problem) != previous:
            previous = (row.operator, row.problem)
            lines.append(f"{row.operator}  ({row.problem})")
        lines.append(f"  {row.backend:<6}  {row.status:<9}  {row.detail}")
    return "\n".join(lines)
