"""Where the demo keeps its quantised checkpoint, and how it knows that the copy is whole.

A folder under $XDG_CACHE_HOME/qsun (default ~/.cache/qsun), named by the digest of everything that decides
its content: the source file, the quantisation and the package version. Its manifest lists every file with
its size and SHA-256; what does not agree with the manifest is thrown away and made again. A folder is
filled under another name and then renamed, so an interrupted run leaves nothing that looks complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

MANIFEST = "qsun_manifest.json"

_PACKAGES = ("qsun", "qsun_kernels")


@dataclass(frozen=True, slots=True)
class Cached:
    """path: the folder. origin: found whole, made now, or made again because of `damage`."""

    path: Path
    origin: Literal["found", "made", "rebuilt"]
    damage: str = ""


def cache_root() -> Path:
    """$XDG_CACHE_HOME/qsun, or ~/.cache/qsun. A relative XDG_CACHE_HOME counts as none, as specified."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "qsun"


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def package_version() -> str:
    """The version of this package, with a digest of its sources: they change between two releases too."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        # Found, not imported: this runs before torch is needed.
        found = find_spec(package)
        assert found is not None and found.submodule_search_locations
        for root in map(Path, found.submodule_search_locations):
            for path in sorted(root.rglob("*.py")):
                digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    try:
        own = version("qsun")
    except PackageNotFoundError:
        own = "not installed"
    return f"{own} {digest.hexdigest()}"


def cache_key(source: Path, *parts: str) -> str:
    """A folder name that changes with the content of `source` and with each of `parts`."""
    text = json.dumps([file_digest(source), *parts])
    return f"{source.stem}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def cached_folder(root: Path, key: str, make: Callable[[Path], None]) -> Cached:
    """The folder of `key` under `root`, made by `make(empty folder)` when it is missing or damaged."""
    target = root / key
    damage = ""
    if target.exists():
        damage = damage_of(target)
        if not damage:
            return Cached(target, "found")
    root.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=root))
    try:
        make(work)
        _write_manifest(work)
        if target.exists():
            shutil.rmtree(target)
        work.rename(target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return Cached(target, "rebuilt" if damage else "made", damage)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def _write_manifest(folder: Path) -> None:
    entries = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        for path in _files(folder)
    }
    (folder / MANIFEST).write_text(json.dumps({"format": 1, "files": entries}, indent=1) + "\n")


def damage_of(folder: Path) -> str:
    """What in `folder` disagrees with its manifest, in one line; empty when it is whole."""
    try:
        listed = json.loads((folder / MANIFEST).read_text())["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in listed.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    found = {str(path.relative_to(folder)) for path in _files(folder)}
    if found != set(expected):
        return f"files {sorted(found ^ set(expected))} are not as listed in {MANIFEST}"
    for name, (size, digest) in expected.items():
        path = folder / name
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, expected {size}"
        if file_digest(path) != digest:
            return f"{name} has another SHA-256 than {MANIFEST} lists"
    return ""
