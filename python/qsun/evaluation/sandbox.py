"""Running code that a model wrote: another process with limits on time, memory and files.

The limits stop accidents (endless loops, memory without end, large files), not an attacker: the process has
the rights of its user and may reach the network.  Run it where that is acceptable.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Runs before the program, in its process.  Limits on memory and processes do not exist everywhere.
# The program is not called __main__, so that what an answer does when it is run as a script is not done.
_START = """
import os, resource, runpy, sys
def limit(kind, value):
    try:
        resource.setrlimit(getattr(resource, kind), (value, value))
    except (AttributeError, ValueError, OSError):
        pass
limit("RLIMIT_CPU", int(sys.argv[2]))
limit("RLIMIT_AS", int(sys.argv[3]))
limit("RLIMIT_FSIZE", int(sys.argv[4]))
limit("RLIMIT_NOFILE", 32)
limit("RLIMIT_NPROC", 0)
limit("RLIMIT_CORE", 0)
program, token, report = sys.argv[1], sys.argv[5], int(sys.argv[6])
sys.argv[:] = [program]
write = os.write
runpy.run_path(program, run_name="program")
write(report, token.encode())
"""


@dataclass(frozen=True, slots=True)
class Limits:
    """seconds: of the clock and of the processor.  memory, file_bytes: in bytes."""

    seconds: float = 5.0
    memory: int = 1 << 30
    file_bytes: int = 1 << 20


@dataclass(frozen=True, slots=True)
class Outcome:
    """finished: the program ran to its last line.  detail: else why not."""

    finished: bool
    detail: str = ""


def run_program(source: str, limits: Limits | None = None) -> Outcome:
    """Run a Python program and tell whether it reached its end without an exception.

    Leaving early by sys.exit or os._exit is not reaching the end.
    """
    limits = Limits() if limits is None else limits
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="qsun-code-") as folder:
        program = Path(folder) / "program.py"
        program.write_text(source, encoding="utf-8", errors="replace")
        # Nothing here collects what the program prints, or it could fill this process's memory: its errors
        # go to a file, which has a limit, and only that it reached its end is told through a pipe.
        with tempfile.TemporaryFile() as errors, _pipe() as (reader, writer):
            command = [
                sys.executable, "-I", "-S", "-c", _START, str(program),
                str(max(1, round(limits.seconds))), str(limits.memory), str(limits.file_bytes),
                token, str(writer),
            ]  # fmt: skip
            process = subprocess.Popen(
                command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env={"PATH": os.defpath, "LANG": "C.UTF-8", "HOME": folder},
                start_new_session=True,
                pass_fds=(writer,),
            )
            try:
                process.wait(timeout=limits.seconds)
            except subprocess.TimeoutExpired:
                return Outcome(False, f"not done after {limits.seconds:g} s")
            finally:
                # With what it may have started.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            with contextlib.suppress(BlockingIOError):
                if token.encode() in os.read(reader, 4096):
                    return Outcome(True)
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
    if lines:
        return Outcome(False, lines[-1][:200])
    return Outcome(False, f"ended early with code {process.returncode}")


@contextlib.contextmanager
def _pipe() -> Iterator[tuple[int, int]]:
    """Both ends of a pipe; reading one that is empty does not wait."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    try:
        yield reader, writer
    finally:
        os.close(reader)
        os.close(writer)
