"""Runs a launcher, and ends it with all that it has started here when the command above is gone.

The command is ``python -m launch.attempts.keep LAUNCHER ARGUMENTS``. DeepSpeed's runner, pdsh and
the ssh processes below it outlive each other. If the command that watches them is killed, or one of
them, this process kills the rest; then the ranks miss the connection over which they were started
within a second or two, and save.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys

import psutil

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_END_S = 1.0


def main() -> int:
    """Run the launcher and return its exit code (128 + N if signal N ended it)."""
    above = os.getppid()
    signal.signal(signal.SIGTERM, _end_all)
    system = ctypes.CDLL(None)
    system.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    # What a process that was killed has started becomes a child of this one.
    system.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    if os.getppid() != above:  # it has ended in the meantime
        return 128 + signal.SIGTERM
    code = subprocess.Popen(sys.argv[1:]).wait()
    _kill_all()
    return code if code >= 0 else 128 - code


def _end_all(_number: int, _frame: object) -> None:
    _kill_all()
    os._exit(128 + signal.SIGTERM)


def _kill_all() -> None:
    # pdsh's ssh processes have process groups of their own. Who starts others is killed first.
    left = psutil.Process().children(recursive=True)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, _END_S)


if __name__ == "__main__":
    sys.exit(main())
