"""Ends every command with a message and an exit code, without a traceback for a user's mistake."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

EXIT_USAGE, EXIT_FAILED = 2, 1
# EX_TEMPFAIL of sysexits.h: finished work is saved, and the same command continues it.
EXIT_RESUMABLE = 75
# Environment variable that a launcher sets; a run without a launcher sets it itself.
IN_RANKS = "WORLD_SIZE"
# Set by every command where the shell has not, before torch or scikit-learn loads OpenMP: threads
# that spin while they wait take the cores away from those they wait for, where something else
# computes too (docs/speed_log.md).
DEFAULT_VARIABLES = {"OMP_WAIT_POLICY": "PASSIVE"}


class SharedFailure(Exception):
    """Raised by all ranks of a run together with the same text, which only rank 0 prints."""


def run_app(app: typer.Typer) -> None:
    """Run a command line; a ValueError ends it with exit code 2, a numerical or file error with 1.

    This project raises ValueError for wrong input; its text says what is wrong, where, and what to
    do.
    """
    for name, value in DEFAULT_VARIABLES.items():
        os.environ.setdefault(name, value)
    try:
        app()
    except SystemExit as done:
        if IN_RANKS in os.environ and isinstance(done.code, int):
            # All results are on disk. Shutting down torch takes seconds that a queue may not give.
            _end_at_once(done.code)
        raise
    except ValueError as error:
        _fail(_with_notes(str(error), error), EXIT_USAGE, isinstance(error, SharedFailure))
    except (FloatingPointError, OSError) as error:
        text = _with_notes(said_of(error), error)
        _fail(text, EXIT_FAILED, isinstance(error, SharedFailure))
    except Exception as error:
        _tell_torchrun(f"{type(error).__name__}: {error}")
        raise


# Messages for errors of a file system, by error number.
_FILE_ERRORS = {
    errno.EISDIR: "is a folder, where a file is expected; move it away",
    errno.ENOTDIR: "is a file, where a folder is expected; move it away",
    errno.EROFS: "the file system is mounted for reading alone; mount it for writing, or give "
    "another folder",
    errno.EACCES: "may not be opened by this user; change its owner or mode",
    errno.ENOSPC: "the disk is full; make room",
    errno.EDQUOT: "the quota is used up; make room",
}


def said_of(error: Exception) -> str:
    """Return one line about an error; for a file error it gives the file's name and advice."""
    if isinstance(error, OSError) and error.filename and error.errno in _FILE_ERRORS:
        return f"{error.filename}: {_FILE_ERRORS[error.errno]}"
    return f"{type(error).__name__}: {error}"


def _with_notes(message: str, error: Exception) -> str:
    return "\n".join([message, *getattr(error, "__notes__", [])])


def _fail(message: str, code: int, is_shared: bool) -> None:
    _tell_torchrun(message)
    rank = os.environ.get("RANK", "0")
    prefix = "error" if rank == "0" else f"error on rank {rank}"
    if rank == "0" or not is_shared:
        print(f"{prefix}: {message}", file=sys.stderr, flush=True)
    # sys.exit is not used in ranks: a rank that fails must not wait in the clean-up of a process
    # group or of a worker.
    if IN_RANKS in os.environ:
        _end_at_once(code)
    sys.stdout.flush()
    sys.exit(code)


def _tell_torchrun(message: str) -> None:
    """Write the file in which torchrun looks for the error message of a failed rank."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        more = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": more}}))


def _end_at_once(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
            stream.flush()
    os._exit(code)
