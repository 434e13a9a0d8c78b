"""The folder of a run of ``prepare``: one run at a time, work that survives a kill, nothing half.

Inside the output folder, ``.partial`` holds the work until it is complete; then the results move
up, the manifest last. A folder without a manifest is no shard folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

PARTIAL, _LOCK = ".partial", ".lock"
_SPARE_BYTES = 64 << 20


def require_free(out: Path, manifest_name: str) -> None:
    """Raise ValueError unless `out` is absent, empty, or holds what an unfinished run left."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"{out}: exists and is no folder; give --out a new one")
    if (out / manifest_name).exists():
        raise ValueError(f"{out}: holds complete shards already; give --out a new folder")
    unfinished = (out / PARTIAL / manifest_name).exists()  # killed while the results moved up
    if not unfinished and {p.name for p in out.iterdir()} - {PARTIAL, _LOCK}:
        raise ValueError(f"{out}: exists and is not an empty folder; give --out a new one")


@contextlib.contextmanager
def locked_workspace(out: Path, manifest_name: str) -> Iterator[Path]:
    """Give the folder to work in, inside `out`, to one run at a time.

    After an error the work stays for the next run, unless there is none yet: then all folders that
    were made for it are removed.

    Raises
    ------
    ValueError
        `out` is in use by another run, or holds other things.
    """
    require_free(out, manifest_name)
    made = [p for p in (out, *out.parents) if not p.exists()]
    out.mkdir(parents=True, exist_ok=True)
    lock = os.open(out / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        # The system gives the lock back when its process ends, however it ends.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.pread(lock, 200, 0).decode(errors="replace") or "unknown"
        os.close(lock)
        raise ValueError(
            f"{out}: another run is preparing this folder ({owner}); wait for it, or give --out "
            "another folder"
        ) from error
    try:
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        (out / PARTIAL).mkdir(exist_ok=True)
        for path in out.iterdir():  # results that a killed run was moving up
            if path.name not in (PARTIAL, _LOCK):
                path.rename(out / PARTIAL / path.name)
        yield out / PARTIAL
    except BaseException as error:
        if any((out / PARTIAL).glob("chunk-*.json")):
            error.add_note(
                f"Finished work is kept in {out / PARTIAL}: the next run uses what still fits; "
                "remove the folder to give it up."
            )
        else:
            shutil.rmtree(out / PARTIAL, ignore_errors=True)
        if not (out / PARTIAL).exists():
            (out / _LOCK).unlink(missing_ok=True)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    finally:
        os.close(lock)
    (out / _LOCK).unlink(missing_ok=True)


def move_up(work: Path, names: list[str], manifest_name: str) -> None:
    """Move results out of the working folder, the manifest last, and remove the folder.

    May be repeated after a kill: what is up already is left there.
    """
    for name in [*names, manifest_name]:
        if (work / name).exists():
            (work / name).rename(work.parent / name)
    shutil.rmtree(work)


def force_to_disk(paths: list[Path]) -> None:
    """Return when the content of all files would survive a power failure.

    Called once at the end: most of it has been written in the background by then.
    """
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def check_disk(work: Path, needed_bytes: int) -> None:
    """Raise ValueError unless the file system of `work` has room."""
    free = shutil.disk_usage(work).free
    if free < needed_bytes + _SPARE_BYTES:
        raise ValueError(
            f"{work}: about {needed_bytes / 2**30:.1f} GiB are needed (the shards, and as much "
            f"again while working), {free / 2**30:.1f} GiB are free; make room or give --out a "
            "folder on another disk"
        )


def remove_stale(work: Path, keep: set[str]) -> None:
    """Remove what earlier runs left that this run has no use for."""
    for path in work.iterdir():
        if path.name not in keep and not path.name.startswith("rows-"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
