"""One run in a folder: a file that says who works there, taken atomically and renewed.

``.owner.json`` is made by a hard link, which exactly one of several starts can do, on NFS too. A
process that ends in whatever way leaves it behind; the next start judges whether its owner lives:
on the same machine by the process itself, on another one by its signs of life. The owner touches
its file every few seconds; who has not for the time of a lease is dead, or stands still. If it goes
on later it finds another owner, and ends before it writes anything more.
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

# All attempts of one launcher have the same: it starts the next when the one before has ended.
SERIES, ATTEMPT = "GENELOOM_LAUNCH_SERIES", "GENELOOM_LAUNCH_ATTEMPT"
# In the environment of all that one attempt of a launcher has started.
LAUNCH_ID = "GENELOOM_LAUNCH_ID"
RENEW_S, LEASE_S = 5.0, 30.0
_LOOK_S, _ASK_S = 0.5, 20.0
_SOON_S, _WRITE_S = 0.05, 5.0
# States of a job of SLURM whose processes may be there.
_JOB_LIVES = {"RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "STAGE_OUT"}
logger = logging.getLogger(__name__)


class FolderInUse(SharedFailure, ValueError):
    """Another run works in the folder."""


class Owner:
    """This process as the owner of a folder, from `take` to the end of a ``with`` block.

    Parameters
    ----------
    kind
        What works there, for those who are refused: ``pretrain``, ``perturb``, ...
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
        """Have the folder for this process alone; it is made, and removed again if it stays empty.

        Where the owner is on another machine, and may have died, it is watched until it gives a
        sign of life or its lease has run out.

        Raises
        ------
        FolderInUse
            Its owner lives.
        ValueError
            It is no folder.
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
        """Return if the folder still is this process's; end the process if it is another's.

        To be called before anything is made visible. A process that stood still for longer than
        its lease finds out here, or in its thread.
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
            return True  # a file system that does not answer for a moment is no reason to end

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
    """Have a folder for this process alone, as `Owner.take` does, inside a ``with`` block."""
    with Owner(folder, kind) as owner:
        owner.take()
        yield owner


def owner_of(folder: Path) -> dict[str, Any]:
    """Return what the owner of a folder wrote about itself; empty if there is none."""
    return _read(folder / OWNER_NAME)


def is_known_to_live(owner: dict[str, Any]) -> bool:
    """Is an owner alive for certain? Looks at a process of this machine, asks SLURM of a job."""
    if owner.get("machine") == machine():
        return lives(owner)
    return bool(owner) and _says_slurm(owner) is True


def refuse_if_in_use(folder: Path) -> None:
    """Raise FolderInUse if the owner of a folder certainly lives; without writing or waiting.

    For those who are about to start what would be refused later.
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
    """Put this process's file in the place of a dead owner's, unless somebody else has done so.

    The right to do so is a file of its own, which one of many takes as a folder is taken: who has
    it may look whether the dead one's is there still, and nobody changes that in between. The
    place itself is never empty, or a third one could come in.
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
    """Give a file another name unless there is one of that name already."""
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
    """Is an empty or torn owner's file so young that its owner may still be writing it?"""
    with contextlib.suppress(OSError):
        return abs(_now_there(path) - path.stat().st_mtime) < _WRITE_S
    return True  # gone


def _lives_or_may(path: Path, owner: dict[str, Any], mine: dict[str, Any]) -> bool:
    if owner.get("machine") == mine["machine"]:
        return lives(owner)
    if mine["series"] and owner.get("series") == mine["series"]:
        # A job may start two runs at once: only where it was requeued has the one before ended.
        return owner.get("attempt") == mine["attempt"]
    # Another cluster may have a job of the same number: so nobody is dead by SLURM's word alone.
    is_gone = _says_slurm(owner) is False
    return _gives_a_sign(path, owner, 2 * RENEW_S + 2 * _LOOK_S if is_gone else LEASE_S)


def _gives_a_sign(path: Path, owner: dict[str, Any], patience_s: float) -> bool:
    """Watch an owner's file until it is touched, or was not for so long; return whether it was.

    Ages are by the clock of the machine that has the file: clocks of hosts differ.
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
    """Return when an owner's file was touched, None if it is another's or gone."""
    try:
        # Opened, for a file system of the network then asks its server and no cache.
        with path.open("rb") as file:
            is_same = json.loads(file.read()).get("id") == owner.get("id")
            return os.fstat(file.fileno()).st_mtime if is_same else None
    except (OSError, ValueError, AttributeError):
        return None


def lives(owner: dict[str, Any]) -> bool:
    """Is the process of this machine that a record names by `pid` and `started` there?"""
    try:
        process = psutil.Process(owner["pid"])
        is_same = abs(process.create_time() - owner["started"]) < 2
        return is_same and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, KeyError, TypeError):
        return False


def _says_slurm(owner: dict[str, Any]) -> bool | None:
    """Return whether the processes of an owner's job may be there; None if SLURM cannot tell."""
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
    """Return the time of the machine that has the file: clocks of hosts differ."""
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
    job = os.environ.get("SLURM_JOB_ID", "")
    return {
        "id": uuid.uuid4().hex,
        "kind": kind,
        **this_process(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "job": job,
        "launch": os.environ.get(LAUNCH_ID, ""),
        # A job that is requeued keeps its number.
        "series": os.environ.get(SERIES) or (job and f"slurm-{job}"),
        "attempt": os.environ.get(ATTEMPT) or os.environ.get("SLURM_RESTART_COUNT", "0"),
    }


def this_process() -> dict[str, Any]:
    """Return what names this process for others, on this machine and elsewhere."""
    return {
        "host": socket.gethostname(),
        "machine": machine(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
    }


def machine() -> str:
    """Return what two processes share if one can see the other: boot and process namespace."""
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
