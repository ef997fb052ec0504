"""Whether a peer's package is there, and the library that vLLM brings its kernels in."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import torch

from qsun_bench.cases import Case
from qsun_bench.cases.wna16 import Wna16Operands
from qsun_kernels.backends.problems import Wna16Problem

_VLLM_LIBRARY = "_C_stable_libtorch.abi3.so"
_FA3_LIBRARY = "vllm_flash_attn/_vllm_fa3_C.abi3.so"


@cache
def missing(module: str) -> str | None:
    """Why a module cannot be imported; None when it was."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return f"{module.partition('.')[0]} is not installed"
    try:
        importlib.import_module(module)
    except Exception as error:  # a package for other versions of torch or CUDA raises anything
        return f"{module} does not import ({type(error).__name__}: {error})".splitlines()[0]
    return None


def load(module: str) -> Any:
    """A module of a peer's package, of which nothing is known here but what the peer's file says."""
    return importlib.import_module(module)


@cache
def missing_vllm(operator: str) -> str | None:
    """Why `torch.ops._C.OPERATOR` of vLLM's library cannot be called; None when it can.

    The library alone is enough: vLLM's Python is neither needed nor imported.
    """
    return _missing_operators(_VLLM_LIBRARY, torch.ops._C, (operator,))


@cache
def missing_fa3() -> str | None:
    """Why FlashAttention 3 as vLLM builds it, `torch.ops._vllm_fa3_C`, cannot be called; None when it can."""
    return _missing_operators(_FA3_LIBRARY, torch.ops._vllm_fa3_C, ("fwd", "get_scheduler_metadata"))


def _missing_operators(library: str, namespace: Any, operators: tuple[str, ...]) -> str | None:
    """Why not all operators can be called that vllm/LIBRARY registers in a namespace of torch.ops."""
    spec = importlib.util.find_spec("vllm")
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    libraries = [path for folder in folders if (path := Path(folder) / library).is_file()]
    if not libraries:
        return f"no vllm/{library} on the path"
    try:
        torch.ops.load_library(str(libraries[0]))
    except Exception as error:
        return f"{library} does not load ({type(error).__name__}: {error})".splitlines()[0]
    missed = [operator for operator in operators if not hasattr(namespace, operator)]
    return f"{library} has no operator {missed[0]}" if missed else None


def vllm_scalar_type(bits: int, bias: int) -> int:
    """The number by which vLLM's operators know an unsigned code of that width and zero point.

    Fields from the lowest bit: exponent 8, mantissa 8, signed 1, bias 32, finite only 1, kind of NaN 8; an
    integer has the kind 1.
    """
    return bits << 8 | bias << 17 | 1 << 50


def problem_of(case: Case, device: torch.device) -> Wna16Problem:
    """The problem of a case of `wna16_linear`."""
    problem = case.problem(device)
    assert isinstance(problem, Wna16Problem)
    return problem


def refusal(
    case: Case,
    device: torch.device,
    *,
    bits: tuple[int, ...],
    groups: tuple[int | str, ...],
    n_multiple: int,
    k_multiple: int,
    capability: tuple[int, int],
    act_order: bool = False,
) -> str | None:
    """Why a CUDA kernel with these limits cannot run a case; None when it can. Needs no package."""
    problem = problem_of(case, device)
    if device.type != "cuda":
        return f"a CUDA kernel, device is {device}"
    found = torch.cuda.get_device_capability(device)
    if found < capability:
        return f"needs compute capability {capability[0]}.{capability[1]}, {device} has {found[0]}.{found[1]}"
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return f"bfloat16 and float16 only, got {problem.dtype}"
    if problem.bits not in bits:
        return f"{' and '.join(map(str, bits))} bits only, got {problem.bits}"
    if problem.group_size not in groups:
        return f"group sizes {', '.join(map(str, groups))} only, got {problem.group_size}"
    if problem.has_g_idx and not act_order:
        return "no act-order"
    group = problem.K if problem.group_size == "channel" else problem.group_size
    if problem.K % k_multiple or problem.K % group:
        return f"K must be a multiple of the group size and of {k_multiple}, got {problem.K}"
    if problem.N % n_multiple:
        return f"N must be a multiple of {n_multiple}, got {problem.N}"
    return None


def sorted_columns(operands: Wna16Operands) -> tuple[torch.Tensor, torch.Tensor]:
    """(columns in the order of their groups, the group of each in that order), int32, for act-order."""
    groups, order = torch.sort(operands.weight.column_groups(), stable=True)
    return order.int(), groups.int()
