"""Finds the launchers that started this process, and stops the process when one of them ends.

A launcher that is killed leaves its ranks running, and nothing else would end them. The operating
system signals the death of the direct parent; a thread watches the launchers above it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil

from data_prep.errors import EXIT_FAILED

# Time in which a rank that was asked to stop finishes its step and saves; then it is killed.
SAVE_LIMIT_S = 300.0
_LOOK_S = 1.0
_PR_SET_PDEATHSIG = 1
# Names of programs, Python scripts and modules that start ranks and wait for them.
_PROGRAMS = {
    "mpirun", "mpiexec", "orterun", "orted", "prterun", "prted", "mpiexec.hydra", "hydra_pmi_proxy",
    "torchrun", "deepspeed", "ds", "geneloom",
}  # fmt: skip
_MODULES = {
    "deepspeed.launcher.runner", "deepspeed.launcher.launch", "torch.distributed.run",
    "torch.distributed.launch", "launch.attempts.node_ranks", "launch.attempts.rank",
}  # fmt: skip
_known: list[psutil.Process] = []
_SOON_S = 0.05
_SHELLS = {"sh", "bash", "dash", "zsh"}


def stop_with_launcher() -> None:
    """Make this process receive SIGTERM when one of the launchers above it ends in any way.

    Only launchers, which wait for their ranks, are watched, and the SSH connection over which a
    launcher was started on this host. A shell that started a launcher in the background may end.
    """
    launchers = launchers_above(psutil.Process())
    if not launchers:
        return
    _known.extend(launchers)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != launchers[0].pid:  # it has ended in the meantime
        os.kill(os.getpid(), signal.SIGTERM)
    threading.Thread(target=_watch, args=(launchers,), name="launchers", daemon=True).start()


def launcher_is_gone(within_s: float = 0) -> bool:
    """Return whether a launcher of `stop_with_launcher` has ended, or ends within `within_s`."""
    until = time.monotonic() + within_s
    while all(map(_lives, _known)):
        if time.monotonic() >= until:
            return False
        time.sleep(_SOON_S)
    return True


def launchers_above(process: psutil.Process) -> list[psutil.Process]:
    """Return the launchers among the parents of a process, the nearest first."""
    found: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        for above in process.parents():
            is_connection = bool(found) and above.name().startswith("sshd") and above.pid > 1
            if not is_connection and not _is_launcher(above.cmdline()):
                break
            found.append(above)
            if is_connection:
                break
    return found


def _is_launcher(words: list[str]) -> bool:
    name = Path(words[0]).name if words else ""
    if name in _PROGRAMS:
        return True
    if name in _SHELLS:  # the shell that pdsh runs on a host
        text = words[words.index("-c") + 1] if "-c" in words[:-1] else ""
        return any(f"-m {module}" in text for module in _MODULES)
    if not name.startswith("python"):
        return False
    rest = words[1:]
    while rest and rest[0].startswith("-") and rest[0] not in ("-m", "-c"):
        rest = rest[1:]
    if len(rest) > 1 and rest[0] == "-m":
        return rest[1] in _MODULES
    if len(rest) > 1 and rest[0] == "-c":
        return "from launch.cli import main" in rest[1]
    return bool(rest) and Path(rest[0]).name in _PROGRAMS


def _watch(launchers: list[psutil.Process]) -> None:
    while all(_lives(launcher) for launcher in launchers):
        time.sleep(_LOOK_S)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SAVE_LIMIT_S)
    with contextlib.suppress(OSError):
        print(
            f"what started process {os.getpid()} is gone, and it did not stop in "
            f"{SAVE_LIMIT_S:.0f} s: ended. The last complete checkpoint is as it was",
            file=sys.stderr,
            flush=True,
        )
    os._exit(EXIT_FAILED)


def _lives(process: psutil.Process) -> bool:
    """Return whether a process is alive; psutil compares start times, so ids may be reused."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
