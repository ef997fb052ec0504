"""What the exit codes of the command line mean, and which error leads to which."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable

from qsun.errors import QsunError, RequestError

OK = 0
INTERNAL = 1
USAGE = 2
BAD_INPUT = 3
UNAVAILABLE = 4
REQUEST_FAILED = 5
INTERRUPTED = 130

EPILOG = f"""\
exit codes:
  {OK}    done
  {INTERNAL}    an error inside qsun (please report it, with --debug and `qsun doctor`)
  {USAGE}    the command line is wrong
  {BAD_INPUT}    a file or checkpoint is missing, damaged or does not fit
  {UNAVAILABLE}    a backend or device that was asked for cannot run here
  {REQUEST_FAILED}    a request failed; the others were answered
  {INTERRUPTED}  interrupted
"""


class UsageError(Exception):
    """Arguments that are right one by one and make no sense together."""


def code_of(error: Exception) -> int:
    """The exit code of an error that ended a command."""
    # Imported here: an error of the command line alone should not wait for torch.
    from qsun_kernels.errors import BackendUnavailable

    if isinstance(error, UsageError):
        return USAGE
    if isinstance(error, BackendUnavailable):
        return UNAVAILABLE
    if isinstance(error, RequestError):
        return REQUEST_FAILED
    if isinstance(error, (QsunError, OSError, UnicodeDecodeError, json.JSONDecodeError)):
        return BAD_INPUT
    return INTERNAL


def message_of(error: Exception) -> str:
    """One line for the user; an error of ours speaks for itself, a foreign one is named."""
    text = " ".join(str(error).split())
    if code_of(error) == INTERNAL:
        return f"internal error: {type(error).__name__}: {text} (--debug shows where)"
    return text or type(error).__name__


def guarded(command: Callable[[], int], *, debug: bool) -> int:
    """Run a command and return its exit code; an error becomes one line on stderr and its code.

    debug: let errors through, with their traceback.

    Called before torch is imported: OpenMP reads its wait policy once. Its default lets waiting threads
    spin, which on a busy machine costs the working ones their processor: a decode step of the demo on two
    threads took 3 s instead of 0.23 s, with two other processes running.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        with warnings.catch_warnings():
            # A warning is one line for the user, not a quotation of our source.
            warnings.showwarning = _show_warning
            return command()
    except KeyboardInterrupt:
        print("qsun: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of stdout went away (`qsun ... | head`). Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except Exception as error:
        if debug:
            raise
        print(f"qsun: {message_of(error)}", file=sys.stderr)
        return code_of(error)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"qsun: warning: {' '.join(str(message).split())}", file=sys.stderr)
