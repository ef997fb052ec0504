"""`qsun doctor`: the report of `python -m qsun_kernels`, and the versions of what the engine needs."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from importlib import metadata

from qsun.cli import exits
from qsun_kernels import doctor as kernels

# Of the extra `engine`; the kernels need none of them.
_ENGINE = ("safetensors", "transformers", "tokenizers", "jinja2", "rich", "gguf")


def engine_packages() -> dict[str, str | None]:
    """Each package that the engine uses and its version, None where it is not installed."""
    found: dict[str, str | None] = {}
    for name in _ENGINE:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def doctor(arguments: argparse.Namespace) -> int:
    """Print the report; one JSON document with --json."""
    packages = engine_packages()
    if arguments.json:
        captured = io.StringIO()
        with contextlib.redirect_stdout(captured):
            kernels.main(["--json"])
        print(json.dumps(json.loads(captured.getvalue()) | {"engine packages": packages}, indent=2))
        return exits.OK
    kernels.main([])
    shown = {
        name: version or "not installed: pip install 'qsun[engine]'" for name, version in packages.items()
    }
    print("\n".join(["", *kernels.section("engine packages", shown)]))
    return exits.OK
