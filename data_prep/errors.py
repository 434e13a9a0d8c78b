"""How every command ends: a user's mistake is one message and exit code 2, never a traceback."""

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
# Of sysexits.h, EX_TEMPFAIL: what was done is saved, and the same command goes on.
EXIT_RESUMABLE = 75
# A launcher sets it, or a run that is alone for itself.
IN_RANKS = "WORLD_SIZE"


class SharedFailure(Exception):
    """Raised by all ranks of a run together, with one text: rank 0 says it for all."""


def run_app(app: typer.Typer) -> None:
    """Run a command line; ValueError exits with 2, a numerical or file error with 1.

    ValueError is what this project raises for wrong input; its text says what, where, what to do.
    """
    try:
        app()
    except SystemExit as done:
        if IN_RANKS in os.environ and isinstance(done.code, int):
            # All is on disk. To take down torch takes seconds, which a queue may not give.
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


# What a file system says of a name in a place where something else was expected.
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
    """Return one line about an error; of a file its name first, and what to do."""
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
    # Not sys.exit: ranks that fail must not wait in a process group's or a worker's clean-up.
    if IN_RANKS in os.environ:
        _end_at_once(code)
    sys.stdout.flush()
    sys.exit(code)


def _tell_torchrun(message: str) -> None:
    """Write the file in which torchrun looks for the reason of a rank that failed."""
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
