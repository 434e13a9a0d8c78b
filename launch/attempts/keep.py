"""Runs a launcher, and ends it with all that it has started here when the command above is gone.

The command is ``python -m launch.attempts.keep LAUNCHER ARGUMENTS``. DeepSpeed's runner, pdsh and
the ssh processes below it outlive each other. If the command that watches them is killed, this
process kills them; then the ranks miss the connection over which they were started within a second
or two, and save.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys

import psutil

_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Run the launcher and return its exit code (128 + N if signal N ended it)."""
    above = os.getppid()
    signal.signal(signal.SIGTERM, _end_all)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != above:  # it has ended in the meantime
        return 128 + signal.SIGTERM
    code = subprocess.Popen(sys.argv[1:]).wait()
    return code if code >= 0 else 128 - code


def _end_all(_number: int, _frame: object) -> None:
    # pdsh's ssh processes have process groups of their own. Who starts others is killed first.
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            process.kill()
    os._exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
