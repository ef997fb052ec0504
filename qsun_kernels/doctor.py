"""The doctor: what was built, what is there, which backend each operator would use and why not the others.

`python -m qsun_kernels` prints it as text, with `--json` as data. Its output is what a bug report needs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import qsun_kernels
from qsun_kernels.backends import cuda, dispatch
from qsun_kernels.backends.problems import BACKENDS
from qsun_kernels.ops.explain import explain_rows

DESCRIPTION = "Tell what was built, what is there, and which backend each operator would use."
BUILD_RECORD = Path(__file__).with_name("_build_info.json")


def installed_version(distribution: str) -> str:
    """The version of an installed distribution, or `not installed`."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def build_facts() -> dict[str, str]:
    """How this copy of the package was built: from the record that the build left, and from the library."""
    facts = {"package": str(Path(qsun_kernels.__file__).parent)}
    if not BUILD_RECORD.exists():
        return facts | {"CUDA library": f"no build record ({BUILD_RECORD.name}): run `pip install -e .`"}
    record: dict[str, Any] = json.loads(BUILD_RECORD.read_text())
    facts["revision"] = record["revision"]
    if not record["build"]:
        return facts | {"CUDA library": f"not built: {record['reason']}"}
    facts["CUDA library"] = (
        f"built for {', '.join('sm_' + arch for arch in record['archs'])} ({record['reason']})"
    )
    told = {name: value for name, value in cuda.build_info().items() if name not in ("archs", "revision")}
    return facts | {name.replace("_", " "): str(value) for name, value in told.items()}


def nvidia_driver() -> str:
    """The driver's version as nvidia-smi tells it, or why it is unknown."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown ({type(error).__name__}: nvidia-smi)"
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else "none"


def machine_facts() -> dict[str, str]:
    """The software and devices that a kernel meets here."""
    facts = {
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'not in this build'})",
        "triton": installed_version("triton"),
        "nvidia driver": nvidia_driver(),
    }
    if not torch.cuda.is_available():
        return facts | {"GPU": "none visible to torch"}
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        memory = f"{p.total_memory / 2**30:.1f} GiB"
        facts[f"GPU {index}"] = f"{p.name}, sm_{p.major}{p.minor}, {p.multi_processor_count} SMs, {memory}"
    return facts


def backend_facts() -> dict[str, str]:
    """Whether each backend can run anything here, and why not."""
    return {name: dispatch.load_backend(name).unavailable() or "ready" for name in BACKENDS}


def environment_facts() -> dict[str, str]:
    """Environment variables that change what runs."""
    ours = ("QSUN_BACKEND", "QSUN_CHECK", "QSUN_CUDA", "QSUN_CUDA_ARCHS")
    names = (*ours, "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")
    return {name: os.environ[name] for name in names if name in os.environ}


def section(title: str, facts: Mapping[str, str]) -> list[str]:
    """A titled, aligned block of lines; an empty one says so."""
    width = max(map(len, facts), default=0)
    return [
        title,
        *(f"  {name:<{width}}  {value}" for name, value in facts.items()),
        *([] if facts else ["  none set"]),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; exit status 0."""
    parser = argparse.ArgumentParser(prog="python -m qsun_kernels", description=DESCRIPTION)
    parser.add_argument("--json", action="store_true", help="one JSON document instead of text")
    options = parser.parse_args(arguments)
    version = installed_version("qsun")
    facts = {
        "build": build_facts(),
        "machine": machine_facts(),
        "environment": environment_facts(),
        "backends": backend_facts(),
    }
    if options.json:
        rows = [asdict(row) for row in explain_rows()]
        print(json.dumps({"qsun": version, **facts, "operators": rows}, indent=2))
        return 0
    print(f"qsun {version}")
    for title, part in facts.items():
        print("\n".join(["", *section(title, part)]))
    print("\noperators" + (f" (backend {b!r} is asked for)" if (b := dispatch.requested_backend()) else ""))
    print(qsun_kernels.explain())
    return 0
