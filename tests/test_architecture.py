"""The rules of the house, as a test: who may import whom, what stays out of csrc, what is never called.

Each rule is a function from the sources to a list of breaches, so that the last tests can feed it a breach
and see it caught. docs/architecture.md tells why the rules are what they are.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {
    "qsun_kernels": ROOT / "qsun_kernels",
    "qsun": ROOT / "python" / "qsun",
    "qsun_bench": ROOT / "bench",
}


@dataclass(frozen=True)
class Import:
    """One import: the module that does it, what it names, and where."""

    importer: str
    target: str
    line: int
    at_run_time: bool  # False under `if TYPE_CHECKING:`

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.target}"


def module_name(package: str, root: Path, path: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join((package, *(part for part in parts if part != "__init__")))


def imports_of(module: str, is_package: bool, source: str) -> Iterator[Import]:
    """Every import statement of a module, anywhere in it, relative ones resolved."""

    def walk(node: ast.AST, at_run_time: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for statement in child.body:
                    yield from walk_statement(statement, False)
                for statement in child.orelse:
                    yield from walk_statement(statement, at_run_time)
                continue
            yield from walk_statement(child, at_run_time)

    def walk_statement(node: ast.AST, at_run_time: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, alias.name, node.lineno, at_run_time)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                keep = len(parents) - node.level + (1 if is_package else 0)
                base = ".".join((*parents[:keep], *([base] if base else [])))
            for alias in node.names:
                yield Import(module, f"{base}.{alias.name}", node.lineno, at_run_time)
        yield from walk(node, at_run_time)

    yield from walk(ast.parse(source), True)


def python_files() -> Iterator[tuple[str, Path]]:
    for package, root in SOURCES.items():
        for path in sorted(root.rglob("*.py")):
            yield module_name(package, root, path), path


def all_imports() -> list[Import]:
    return [
        found
        for module, path in python_files()
        for found in imports_of(module, path.name == "__init__.py", path.read_text())
    ]


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def breaches_of_direction(imports: list[Import]) -> list[str]:
    """bench -> qsun -> qsun_kernels, never back."""
    forbidden = {"qsun_kernels": ("qsun", "qsun_bench"), "qsun": ("qsun_bench",)}
    return [
        str(i)
        for i in imports
        for lower, uppers in forbidden.items()
        if within(i.importer, lower) and any(within(i.target, upper) for upper in uppers)
    ]


BACKEND_MAY_IMPORT = ("qsun_kernels.backends.problems", "qsun_kernels.quant", "qsun_kernels.errors")

# What each room inside qsun_kernels may import of its own package; the front door is not listed.
ROOMS: dict[str, tuple[str, ...]] = {
    "qsun_kernels.errors": (),
    "qsun_kernels.quant": ("qsun_kernels.errors",),
    "qsun_kernels.backends.problems": ("qsun_kernels.quant", "qsun_kernels.errors"),
    "qsun_kernels.backends.cuda": (
        "qsun_kernels.backends.problems",
        "qsun_kernels.backends.panels",
        "qsun_kernels.quant",
        "qsun_kernels.errors",
    ),
    "qsun_kernels.backends.panels": ("qsun_kernels.quant",),
    "qsun_kernels.backends.triton": (
        "qsun_kernels.backends.problems",
        "qsun_kernels.quant",
        "qsun_kernels.errors",
    ),
    "qsun_kernels.backends.reference": (
        "qsun_kernels.backends.problems",
        "qsun_kernels.quant",
        "qsun_kernels.errors",
    ),
    "qsun_kernels.backends.dispatch": (
        "qsun_kernels.backends.problems",
        "qsun_kernels.backends.cuda",
        "qsun_kernels.backends.triton",
        "qsun_kernels.backends.reference",
        "qsun_kernels.quant",
        "qsun_kernels.errors",
    ),
    "qsun_kernels.ops": (
        "qsun_kernels.backends.dispatch",
        "qsun_kernels.backends.problems",
        "qsun_kernels.quant",
        "qsun_kernels.errors",
    ),
}


def breaches_of_rooms(imports: list[Import]) -> list[str]:
    """ops -> backends.dispatch -> {cuda, triton, reference}; quant knows torch only."""
    found = []
    for i in imports:
        room = next((r for r in ROOMS if within(i.importer, r)), None)
        if room is None or not within(i.target, "qsun_kernels") or within(i.target, room):
            continue
        extension = room == "qsun_kernels.backends.cuda" and within(i.target, "qsun_kernels._C")
        if not extension and not any(within(i.target, allowed) for allowed in ROOMS[room]):
            found.append(str(i))
    return found


def breaches_of_ownership(imports: list[Import]) -> list[str]:
    """The extension is imported by one file, triton by one folder, the testing tools by tests and bench."""
    owners = {
        "qsun_kernels._C": ("qsun_kernels.backends.cuda",),
        "triton": ("qsun_kernels.backends.triton",),
        "qsun_kernels.testing": ("qsun_kernels.testing", "qsun_bench", "qsun.demo"),
    }
    return [
        str(i)
        for i in imports
        for owned, allowed in owners.items()
        if within(i.target, owned) and i.at_run_time and not any(within(i.importer, a) for a in allowed)
    ]


def breaches_of_torch_free(imports: list[Import]) -> list[str]:
    """The nouns, the block pool and what decides over them run without torch."""
    torch_free = (
        "qsun.core",
        "qsun.kv_cache.block_pool",
        "qsun.kv_cache.prefix_index",
        "qsun.engine.scheduler",
    )
    banned = ("torch", "qsun_kernels", "numpy")
    return [
        str(i)
        for i in imports
        if i.importer in torch_free and i.at_run_time and any(within(i.target, b) for b in banned)
    ]


def breaches_of_training(imports: list[Import]) -> list[str]:
    """Training has a forward pass of its own; only the study, which also serves, knows the engine."""
    return [
        str(i)
        for i in imports
        if within(i.importer, "qsun.training")
        and not within(i.importer, "qsun.training.study")
        and any(within(i.target, room) for room in ("qsun.engine", "qsun.evaluation"))
    ]


def breaches_of_unpickling(imports: list[Import]) -> list[str]:
    """Nothing in the packages can unpickle: a checkpoint is data."""
    banned = ("pickle", "dill", "cloudpickle", "marshal", "shelve", "torch.load", "joblib")
    return [str(i) for i in imports if any(within(i.target, b) for b in banned)]


def breaches_of_custom_op(module: str, source: str) -> list[str]:
    """torch.library.custom_op costs tens of microseconds a call; torch.load unpickles."""
    return [
        f"{module}:{node.lineno} uses {ast.unparse(node)}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and ast.unparse(node) in ("torch.library.custom_op", "library.custom_op", "torch.load")
    ]


def breaches_in_csrc(path: str, source: str) -> list[str]:
    """csrc knows no torch; the public face knows no device header; inline PTX lives in device/ alone."""
    found = []
    for number, line in enumerate(source.splitlines(), 1):
        include = re.match(r'\s*#\s*include\s*[<"]([^>"]+)', line)
        header = include.group(1) if include else ""
        if re.match(r"(torch|ATen|c10)\b", header):
            found.append(f"{path}:{number} includes {header}")
        if header.startswith("pybind11") and not path.startswith("csrc/bindings/"):
            found.append(f"{path}:{number} includes {header}")
        if path.startswith("csrc/include/") and (header.endswith(".cuh") or "device/" in header):
            found.append(f"{path}:{number} includes {header}")
        if path.startswith("csrc/device/") and re.search(r"(wna16|attention|fused|sampling)/", header):
            found.append(f"{path}:{number} includes {header}")
        if re.search(r"\basm\b\s*(volatile)?\s*\(", line) and not path.startswith("csrc/device/"):
            found.append(f"{path}:{number} has inline assembly")
        if "__ldg(" in line and path != "csrc/device/vector.cuh":
            # load_element tells why: for 16-bit floats it may be moved before its bounds check.
            found.append(f"{path}:{number} calls __ldg, expected load_element")
        if re.search(r"\batomicAdd\b.*\bfloat\b|\bredux?\b.*\.f(16|32)", line):
            found.append(f"{path}:{number} adds floating-point values atomically")
    return found


IMPORTS = all_imports()
RULES = (
    breaches_of_direction,
    breaches_of_rooms,
    breaches_of_ownership,
    breaches_of_torch_free,
    breaches_of_training,
    breaches_of_unpickling,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_imports_keep_the_rule(rule) -> None:
    assert IMPORTS, "found no import at all: the sources are not where this test looks"
    assert rule(IMPORTS) == []


def test_python_calls_nothing_banned() -> None:
    assert [
        b for module, path in python_files() for b in breaches_of_custom_op(module, path.read_text())
    ] == []


def test_csrc_keeps_the_rules() -> None:
    files = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cuh", ".cu", ".cpp")]
    assert files
    assert [b for p in files for b in breaches_in_csrc(p.relative_to(ROOT).as_posix(), p.read_text())] == []


def test_test_names_are_unique() -> None:
    """Two test files of one name shadow each other in reports and in xdist groups."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_no_binary_or_build_output_is_tracked() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    assert [
        f for f in listed.stdout.splitlines() if f.endswith((".so", ".o", ".pyc", ".pt", ".bin", ".pkl"))
    ] == []


@pytest.mark.parametrize(
    ("rule", "module", "source"),
    [
        (breaches_of_direction, "qsun_kernels.ops.x", "import qsun.engine"),
        (breaches_of_direction, "qsun.engine.x", "def f():\n    from qsun_bench import cases"),
        (breaches_of_rooms, "qsun_kernels.ops.x", "from ..backends import cuda"),
        (breaches_of_rooms, "qsun_kernels.quant.x", "from qsun_kernels.ops import rms_norm"),
        (breaches_of_rooms, "qsun_kernels.backends.triton.x", "from ..reference import norm"),
        (breaches_of_ownership, "qsun_kernels.ops.x", "from .. import _C"),
        (breaches_of_ownership, "qsun_kernels.ops.x", "import triton.language as tl"),
        (breaches_of_ownership, "qsun.engine.x", "from qsun_kernels.testing import inputs"),
        (breaches_of_torch_free, "qsun.core", "import torch"),
        (breaches_of_torch_free, "qsun.kv_cache.block_pool", "from qsun_kernels import rms_norm"),
        (breaches_of_training, "qsun.training.x", "from qsun.engine import DecodeEngine"),
        (breaches_of_unpickling, "qsun.checkpoint.x", "import pickle"),
    ],
)
def test_a_breach_is_caught(rule, module: str, source: str) -> None:
    assert rule(list(imports_of(module, False, source)))


def test_type_checking_imports_are_not_run_time_imports() -> None:
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n"
    assert breaches_of_torch_free(list(imports_of("qsun.core", False, source))) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("csrc/wna16/x.cu", "#include <torch/extension.h>"),
        ("csrc/wna16/x.cu", "#include <pybind11/pybind11.h>"),
        ("csrc/include/qsun/x.h", '#include "device/loads.cuh"'),
        ("csrc/device/x.cuh", '#include "wna16/gemv.cuh"'),
        ("csrc/fused/x.cu", '  asm volatile("membar.gl;");'),
        ("csrc/wna16/x.cuh", "  return __ldg(scales + n);"),
    ],
)
def test_a_csrc_breach_is_caught(path: str, source: str) -> None:
    assert breaches_in_csrc(path, source)


def test_banned_calls_are_caught() -> None:
    assert breaches_of_custom_op("qsun.x", "import torch\ntorch.load('x')")
    assert breaches_of_custom_op(
        "qsun_kernels.x", "import torch\n@torch.library.custom_op('a::b')\ndef f(): ..."
    )
