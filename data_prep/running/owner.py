"""Lets only one run at a time work in a folder, by a file that names the owner of the folder.

The file ``.owner.json`` is made by a hard link, so that exactly one of several processes succeeds,
on NFS too. Its owner touches it every few seconds as a heartbeat (`RENEW_S`). A process that is
killed leaves the file behind, and the next run decides whether the owner is alive: on the same
machine it looks for the process, on another machine it waits for a heartbeat. An owner without a
heartbeat for the time of a lease (`LEASE_S`) counts as dead. If it was only suspended and continues
later, `Owner.require` finds another owner and ends the process before it writes anything more.

`owned` is the usual entry; `refuse_if_in_use` checks a folder without taking it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from data_prep.errors import EXIT_FAILED, SharedFailure
from data_prep.files import OWNER_NAME, made_folder
from data_prep.running.queue_variables import job_of

# All attempts of one launcher have the same series; it starts an attempt after the last one ended.
SERIES, ATTEMPT = "GENELOOM_LAUNCH_SERIES", "GENELOOM_LAUNCH_ATTEMPT"
# Environment variable of all processes that one attempt of a launcher has started.
LAUNCH_ID = "GENELOOM_LAUNCH_ID"
RENEW_S, LEASE_S = 5.0, 30.0
_LOOK_S, _ASK_S = 0.5, 20.0
_SOON_S, _WRITE_S = 0.05, 5.0
# States of a SLURM job whose processes may be alive.
_JOB_LIVES = {"RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "STAGE_OUT"}
logger = logging.getLogger(__name__)


class FolderInUse(SharedFailure, ValueError):
    """Raised if another run works in the folder."""


class Owner:
    """Makes this process the owner of a folder, from `take` to the end of a ``with`` block.

    Parameters
    ----------
    kind
        Command that works in the folder, for messages to refused runs: ``pretrain``, ``perturb``,
        ...
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder
        self._path, self._mine = folder / OWNER_NAME, _mine(kind)
        self._held = contextlib.ExitStack()
        self._is_taken, self._stop = False, threading.Event()

    def __enter__(self) -> Owner:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self._held.close()

    def take(self) -> None:
        """Make this process the owner of the folder.

        A missing folder is created, and removed at the end if it is still empty. If there is an
        owner on another machine that may be dead, its file is watched until a heartbeat comes or
        the lease runs out.

        Raises
        ------
        FolderInUse
            The folder has an owner that is alive.
        ValueError
            The path is not a folder.
        """
        with contextlib.ExitStack() as until_taken:
            until_taken.enter_context(made_folder(self.folder))
            _take(self._path, self._mine)
            self._held = until_taken.pop_all()
        self._is_taken = True
        renewing = threading.Thread(target=self._renew, name="owner", daemon=True)
        renewing.start()
        self._held.callback(self._release, renewing)

    def require(self) -> None:
        """End the process with exit code 1 if it is not the owner of the folder any more.

        This must be called before results become visible. A process that was suspended for longer
        than its lease notices it here, or in the thread that renews the lease.
        """
        if not self._is_taken or self._is_mine():
            return
        by = _read(self._path)
        text = f"{_text(by)} has taken it over" if by else f"its {OWNER_NAME} is gone"
        print(
            f"error: {self.folder} is not this run's any more: {text}. Seen from another machine, "
            f"a run that stands still for {LEASE_S:.0f} s is dead. This one ends and writes no "
            f"more; `geneloom runs {self.folder}` shows how far the other one is",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_FAILED)

    def _is_mine(self) -> bool:
        try:
            return json.loads(self._path.read_text())["id"] == self._mine["id"]
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError):
            return True  # a short failure of the file system is no reason to end

    def _renew(self) -> None:
        while not self._stop.wait(RENEW_S):
            self.require()
            with contextlib.suppress(OSError):
                os.utime(self._path)

    def _release(self, renewing: threading.Thread) -> None:
        self._stop.set()
        renewing.join()
        self._is_taken = False
        if _read(self._path).get("id") == self._mine["id"]:
            self._path.unlink()


@contextlib.contextmanager
def owned(folder: Path, kind: str) -> Iterator[Owner]:
    """Make this process the owner of a folder inside a ``with`` block; see `Owner.take`."""
    with Owner(folder, kind) as owner:
        owner.take()
        yield owner


def owner_of(folder: Path) -> dict[str, Any]:
    """Return the record that the owner of a folder wrote; empty if there is no owner."""
    return _read(folder / OWNER_NAME)


def is_known_to_live(owner: dict[str, Any]) -> bool:
    """Return whether an owner is certainly alive.

    An owner on this machine is looked up as a process; for a SLURM job, SLURM is asked.
    """
    if owner.get("machine") == machine():
        return lives(owner)
    return bool(owner) and _says_slurm(owner) is True


def refuse_if_in_use(folder: Path) -> None:
    """Raise FolderInUse if the owner of a folder is certainly alive, without writing or waiting.

    A launcher calls this before it starts processes that would be refused later.
    """
    owner = owner_of(folder)
    if owner and is_known_to_live(owner):
        raise _refusal(folder, owner)


def _refusal(folder: Path, owner: dict[str, Any]) -> FolderInUse:
    return FolderInUse(
        f"{folder}: another run works in this folder: {_text(owner)}. `geneloom runs {folder}` "
        f"shows how far it is, `geneloom stop {folder}` ends it; or give another folder"
    )


def _take(path: Path, mine: dict[str, Any]) -> None:
    aside = path.with_name(f"{OWNER_NAME}.{uuid.uuid4().hex}.new")
    aside.write_text(json.dumps(mine))
    try:
        while not _linked(aside, path):
            found = _read(path)
            if not found and _is_being_written(path):
                time.sleep(_SOON_S)
            elif found and _lives_or_may(path, found, mine):
                raise _refusal(path.parent, found)
            elif _replaced(aside, path, found, mine):
                return
    finally:
        aside.unlink(missing_ok=True)


def _replaced(aside: Path, path: Path, dead: dict[str, Any], mine: dict[str, Any]) -> bool:
    """Replace a dead owner's file by this process's file; return whether that was done.

    It is not done if another process has replaced the file before. The right to replace it is a
    second file, which exactly one process takes, in the same way as a folder is taken. While that
    process checks that the dead owner's file is still there, no other process can change it. The
    owner's file is replaced without ever being absent, since otherwise a third process could take
    the folder.
    """
    right = path.with_name(f"{OWNER_NAME}.{dead.get('id', '')}.next")
    _take(right, mine)
    try:
        is_there = path.exists() and _read(path).get("id") == dead.get("id")
        if is_there:
            aside.replace(path)
            logger.warning("%s: its last run (%s) has ended: taken over", path.parent, _text(dead))
        return is_there
    finally:
        right.unlink(missing_ok=True)


def _linked(file: Path, path: Path) -> bool:
    """Link `file` to `path`; return False if `path` exists already."""
    try:
        os.link(file, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        try:
            with path.open("x") as copy:
                copy.write(file.read_text())
        except FileExistsError:
            return False
    return True


def _is_being_written(path: Path) -> bool:
    """Return whether an empty or incomplete owner's file is so new that it may still be written."""
    with contextlib.suppress(OSError):
        return abs(_now_there(path) - path.stat().st_mtime) < _WRITE_S
    return True  # the file is gone


def _lives_or_may(path: Path, owner: dict[str, Any], mine: dict[str, Any]) -> bool:
    if owner.get("machine") == mine["machine"]:
        return lives(owner)
    if mine["series"] and owner.get("series") == mine["series"]:
        # A job may start two runs at once. Only if it was requeued has the earlier run ended.
        return owner.get("attempt") == mine["attempt"]
    # Another cluster may have a job of the same number, so SLURM's answer alone does not prove that
    # an owner is dead: its heartbeat is watched too, for a shorter time.
    is_gone = _says_slurm(owner) is False
    return _gives_a_sign(path, owner, 2 * RENEW_S + 2 * _LOOK_S if is_gone else LEASE_S)


def _gives_a_sign(path: Path, owner: dict[str, Any], patience_s: float) -> bool:
    """Watch an owner's file for at most `patience_s`; return whether a heartbeat came.

    The age of the file is measured by the clock of the machine that stores it, because the clocks
    of hosts differ.
    """
    seen, until, is_said = _touched(path, owner), time.monotonic() + patience_s, False
    while seen is not None and time.monotonic() < until:
        age = _now_there(path) - seen
        if age >= patience_s:
            return False
        if not is_said:
            is_said = True
            logger.warning(
                "%s: %s may work in this folder; waiting for a sign of life, %.0f s at most",
                path.parent, _text(owner), patience_s,
            )  # fmt: skip
        time.sleep(_LOOK_S)
        now = _touched(path, owner)
        if now is not None and now != seen:
            return True
        seen = now
    return False


def _touched(path: Path, owner: dict[str, Any]) -> float | None:
    """Return the time of an owner's last heartbeat, None if its file is gone or was replaced."""
    try:
        # The file is opened, so that a network file system asks its server instead of a cache.
        with path.open("rb") as file:
            is_same = json.loads(file.read()).get("id") == owner.get("id")
            return os.fstat(file.fileno()).st_mtime if is_same else None
    except (OSError, ValueError, AttributeError):
        return None


def lives(owner: dict[str, Any]) -> bool:
    """Return whether the process that a record names by `pid` and `started` is alive here."""
    try:
        process = psutil.Process(owner["pid"])
        is_same = abs(process.create_time() - owner["started"]) < 2
        return is_same and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, KeyError, TypeError):
        return False


def _says_slurm(owner: dict[str, Any]) -> bool | None:
    """Return whether processes of an owner's SLURM job may be alive; None if SLURM cannot tell."""
    job = owner.get("job")
    if not job or shutil.which("squeue") is None:
        return None
    words = ["squeue", "--noheader", "--format=%T", f"--jobs={job}"]
    try:
        said = subprocess.run(words, capture_output=True, text=True, timeout=_ASK_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if said.returncode:
        return False if "Invalid job id" in said.stderr else None
    return bool(_JOB_LIVES & set(said.stdout.split()))


def _now_there(path: Path) -> float:
    """Return the present time by the clock of the machine that stores the file."""
    probe = path.with_name(f"{OWNER_NAME}.{uuid.uuid4().hex}.now")
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def _mine(kind: str) -> dict[str, Any]:
    job = job_of(os.environ)
    return {
        "id": uuid.uuid4().hex,
        "kind": kind,
        **this_process(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "job": job.number,
        "launch": os.environ.get(LAUNCH_ID, ""),
        # A requeued job keeps its number.
        "series": os.environ.get(SERIES) or (job.number and f"slurm-{job.number}"),
        "attempt": os.environ.get(ATTEMPT) or job.restarts,
    }


def this_process() -> dict[str, Any]:
    """Return the host, machine, process id and start time that identify this process."""
    return {
        "host": socket.gethostname(),
        "machine": machine(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
    }


def machine() -> str:
    """Return text that is equal for processes that can see each other.

    It consists of the boot id and the process namespace.
    """
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return socket.gethostname()


def _read(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text())
        if isinstance(found, dict):
            return found
    return {}


def _text(owner: dict[str, Any]) -> str:
    job = f", SLURM job {owner['job']}" if owner.get("job") else ""
    return (
        f"{owner.get('kind', 'a run')}, process {owner.get('pid')} on {owner.get('host')} since "
        f"{owner.get('since')}{job}"
    )
