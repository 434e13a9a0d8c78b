"""Run a command and fail if it, with all that it starts, needs more processor time than allowed.

``python -m tests.cpu_budget SECONDS COMMAND...``. Processor time, not wall time: it hardly depends
on what else the machine does. Processes that outlive their parents (servers that are forked from,
daemons) are counted too: this process adopts them, and waits for them.

The seconds are those of the machine where the budget was measured. Another one, or the same one at
another hour, is up to 1.6 times slower. So what seems too much is compared with a work that does
not grow with the tests: importing libraries.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import resource
import subprocess
import sys
import time

import psutil

_PR_SET_CHILD_SUBREAPER = 36
# Imported once more (with bytecode), and the processor seconds that this took where the budget was
# measured: an AMD Zen 5 on 2026-12-01, between 2.26 and 2.40 in five runs.
_REFERENCE = "import torch, pandas, sklearn.linear_model, scipy.stats"
_REFERENCE_S = 2.3
# Whoever is left after the command gets so long to end by itself.
_GRACE_S = 10.0


def run(command: list[str]) -> tuple[int, float]:
    """Return (exit code, processor seconds of the command and all its descendants)."""
    # Without it (no Linux) orphans are not counted.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    before = _used_s()
    child = subprocess.Popen(command)
    code = None
    deadline = math.inf
    while code is None or psutil.Process().children(recursive=True):
        if time.monotonic() > deadline:
            for orphan in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    orphan.kill()
        # Every orphan is waited for at once, as init would: the tests ask whether it has ended.
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == child.pid:
                    code = child.returncode = os.waitstatus_to_exitcode(ended[1])
                    deadline = time.monotonic() + _GRACE_S
        time.sleep(0.05)
    return code, _used_s() - before


def _used_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def slowness() -> float:
    """Return how much slower this machine is than where the budget was measured; 1 or more."""
    words = [sys.executable, "-c", _REFERENCE]
    return max(1.0, min(run(words)[1] for _ in range(2)) / _REFERENCE_S)


def main(allowed_s: float, command: list[str]) -> int:
    """Run, say what it took, and return the exit code: the command's, or 1 above the budget."""
    started = time.monotonic()
    code, used_s = run(command)
    wall_s = time.monotonic() - started
    machine = ""
    if used_s > allowed_s:
        slower = slowness()
        allowed_s, machine = allowed_s * slower, f" (this machine is {slower:.2f} times slower)"
    print(
        f"processor time {used_s:.0f} s of {allowed_s:.0f} s allowed{machine}, "
        f"wall time {wall_s:.0f} s"
    )
    if not code and used_s > allowed_s:
        print(
            "error: the tests have become too expensive; docs/testing.md says what costs how much, "
            "and what to do about it",
            file=sys.stderr,
        )
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
