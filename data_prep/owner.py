"""One run in a folder: a file that says who works there, taken atomically and renewed.

``.owner.json`` is made by a hard link, which exactly one of several starts can do, on NFS too. A
process that ends in whatever way leaves it behind; the next start judges whether its owner lives:
on the same machine by the process itself, on another one by the age of the lease.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import psutil

from data_prep.files import OWNER_NAME, made_folder

# All attempts of one launcher have the same: it starts the next when the one before has ended.
SERIES, ATTEMPT = "GENELOOM_LAUNCH_SERIES", "GENELOOM_LAUNCH_ATTEMPT"
RENEW_S, LEASE_S = 5.0, 30.0
_P = ParamSpec("_P")
_R = TypeVar("_R")
logger = logging.getLogger(__name__)


class FolderInUse(ValueError):
    """Another run works in the folder."""


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Have a folder for this process alone; it is made, and removed again if it stays empty.

    Raises
    ------
    FolderInUse
        Its owner lives, or may live.
    ValueError
        It is no folder.
    """
    path, mine, stop = folder / OWNER_NAME, _mine(), threading.Event()
    with made_folder(folder):
        _take(path, mine)
        renewing = threading.Thread(target=_renew, args=(path, mine, stop), daemon=True)
        renewing.start()
        try:
            yield
        finally:
            stop.set()
            renewing.join()
            if _read(path).get("id") == mine["id"]:
                path.unlink()


def owning(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let a function have the folder of its argument `out` for itself; of `ranks` the first."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        given = signature.bind(*args, **kwargs).arguments
        ranks = given.get("ranks")
        if ranks is not None and not ranks.is_first:
            return function(*args, **kwargs)
        with owned(Path(given["out"])):
            return function(*args, **kwargs)

    return call


def _take(path: Path, mine: dict[str, Any]) -> None:
    aside = path.with_name(f"{OWNER_NAME}.{mine['id']}")
    aside.write_text(json.dumps(mine))
    try:
        while True:
            if _linked(aside, path):
                return
            found = _read(path)
            if found and _may_live(path, found, mine):
                raise FolderInUse(
                    f"{path.parent}: another run works in this folder: {_text(found)}. Wait for it "
                    "or end it, or give another folder; `geneloom runs` shows how far it is"
                )
            _put_away(path, found)
    finally:
        aside.unlink()


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


def _put_away(path: Path, dead: dict[str, Any]) -> None:
    """Remove the file of an owner that is dead, unless somebody else has taken its place since."""
    old = path.with_name(f"{OWNER_NAME}.{uuid.uuid4().hex}.old")
    with contextlib.suppress(FileNotFoundError):
        path.rename(old)  # of several, one succeeds
        taken = _read(old)
        if taken.get("id") != dead.get("id"):
            _linked(old, path)
        else:
            logger.warning("%s: its last run (%s) has ended: taken over", path.parent, _text(dead))
        old.unlink()


def _renew(path: Path, mine: dict[str, Any], stop: threading.Event) -> None:
    while not stop.wait(RENEW_S):
        # A file system that does not answer for a moment is no reason to end.
        if _read(path).get("id", mine["id"]) == mine["id"]:
            with contextlib.suppress(OSError):
                os.utime(path)
        else:
            # It stood still for longer than the lease, and another run has begun.
            logger.error("%s is another run's by now: this one ends, unsaved", path.parent)
            os._exit(1)


def _may_live(path: Path, owner: dict[str, Any], mine: dict[str, Any]) -> bool:
    if owner.get("machine") == mine["machine"]:
        return _lives(owner)
    if mine["series"] and owner.get("series") == mine["series"]:
        # A job may start two runs at once: only where it was requeued has the one before ended.
        return owner.get("attempt") == mine["attempt"]
    try:
        return _now_there(path) - path.stat().st_mtime < LEASE_S
    except FileNotFoundError:
        return False


def _lives(owner: dict[str, Any]) -> bool:
    try:
        process = psutil.Process(owner["pid"])
        is_same = abs(process.create_time() - owner["started"]) < 2
        return is_same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _now_there(path: Path) -> float:
    """Return the time of the machine that has the file: clocks of hosts differ."""
    probe = path.with_name(f"{OWNER_NAME}.{uuid.uuid4().hex}.now")
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        probe.unlink(missing_ok=True)


def _mine() -> dict[str, Any]:
    job = os.environ.get("SLURM_JOB_ID", "")
    return {
        "id": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "job": job,
        # A job that is requeued keeps its number.
        "series": os.environ.get(SERIES) or (job and f"slurm-{job}"),
        "attempt": os.environ.get(ATTEMPT) or os.environ.get("SLURM_RESTART_COUNT", "0"),
    }


def _machine() -> str:
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
    return f"process {owner.get('pid')} on {owner.get('host')} since {owner.get('since')}{job}"
