"""The folder of a run of ``prepare``: one run at a time, work that survives a kill, nothing half.

Inside the output folder, ``.partial`` holds the work until it is complete; then the results move
up, the manifest last. A folder without a manifest is no shard folder. ``.request`` says what was
asked for, until the run has tidied up.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from data_prep.files import PARTIAL, names_in
from data_prep.matrices.row_copy import ROWS_DONE, is_whole
from data_prep.running.owner import FolderInUse, owned

logger = logging.getLogger(__name__)

_REQUEST = ".request"
_NOT_RESULTS = {PARTIAL, _REQUEST}
_SPARE_BYTES = 64 << 20


def require_free(out: Path, manifest_name: str) -> None:
    """Raise ValueError unless `out` is absent, empty, or holds what an unfinished run left."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"{out}: exists and is no folder; give --out a new one")
    if (out / manifest_name).exists():
        raise ValueError(f"{out}: holds complete shards already; give --out a new folder")
    if not _moving(out, manifest_name) and names_in(out) - _NOT_RESULTS:
        raise ValueError(f"{out}: exists and is not an empty folder; give --out a new one")


def _moving(out: Path, manifest_name: str) -> Path | None:
    """Return the folder out of which a killed run was moving its results, if there is one."""
    return next((p.parent for p in (out / PARTIAL).glob(f"*/{manifest_name}")), None)


def complete_already(out: Path, manifest_name: str, request: str) -> bool:
    """Return whether a run with this request ended here but for its last clean-up, and do that.

    A run that is killed after its manifest is in place leaves its request; `.partial` may be there
    too, or half of it.
    """
    asked = out / _REQUEST
    if not (out / manifest_name).exists() or not asked.exists() or request not in asked.read_text():
        return False
    try:
        with owned(out, "prepare"):
            shutil.rmtree(out / PARTIAL, ignore_errors=True)
            asked.unlink(missing_ok=True)
    except FolderInUse:
        return False  # it lives: the way that is taken next says so
    return True


@contextlib.contextmanager
def full_disk_named(work: Path, needed_bytes: int) -> Iterator[None]:
    """Say how much room is needed where writing fails for want of it."""
    try:
        yield
    except OSError as error:
        free = shutil.disk_usage(work).free
        # numpy and Arrow do not always hand on the number of the error.
        if error.errno in (errno.ENOSPC, errno.EDQUOT) or free < _SPARE_BYTES:
            missing = max(0, needed_bytes - used_bytes(work))
            error.add_note(
                f"The disk of {work} is full: about {needed_bytes / 2**30:.2f} GiB are needed in "
                f"all, {missing / 2**30:.2f} GiB more than is there now, and "
                f"{free / 2**30:.2f} GiB are free. Make room and start the same command again."
            )
        raise


@contextlib.contextmanager
def locked_workspace(out: Path, manifest_name: str, request: str = "") -> Iterator[Path]:
    """Give the folder to work in, inside `out`, to one run at a time.

    After an error the work stays for the next run, unless there is none yet: then all folders that
    were made for it are removed.

    Raises
    ------
    ValueError
        `out` is in use by another run, or holds other things.
    """
    require_free(out, manifest_name)
    with owned(out, "prepare"):
        work = out / PARTIAL
        try:
            require_free(out, manifest_name)  # the run that had it may just have finished
            (out / _REQUEST).write_text(request)
            work.mkdir(exist_ok=True)
            moving = _moving(out, manifest_name)
            if moving is not None:
                for name in names_in(out) - _NOT_RESULTS:
                    (out / name).rename(moving / name)
            # Copies that a killed run did not finish, or damaged ones.
            for path in work.glob("rows-*"):
                if not is_whole(path):
                    shutil.rmtree(path)
            yield work
        except BaseException as error:
            kept = ("chunk-*.json", "medians-*.json", f"rows-*/{ROWS_DONE}")
            if any(next(work.glob(pattern), None) for pattern in kept):
                error.add_note(
                    f"Finished work is kept in {work}: the next run uses what still fits; remove "
                    "the folder to give it up."
                )
            else:
                shutil.rmtree(work, ignore_errors=True)
            if not work.exists():
                (out / _REQUEST).unlink(missing_ok=True)
            raise
        (out / _REQUEST).unlink(missing_ok=True)


def move_up(work: Path, folder: Path, names: list[str], manifest_name: str) -> None:
    """Move results out of `folder` in the working folder `work`, the manifest last; remove `work`.

    May be repeated after a kill: what is up already is left there.
    """
    for name in [*names, manifest_name]:
        if (folder / name).exists():
            (folder / name).rename(work.parent / name)
    shutil.rmtree(work)


def check_disk(work: Path, needed_bytes: int) -> None:
    """Raise ValueError unless the file system of `work` has room."""
    free = shutil.disk_usage(work).free
    if free < needed_bytes + _SPARE_BYTES:
        raise ValueError(
            f"{work}: about {needed_bytes / 2**30:.1f} GiB are needed (the shards, and as much "
            f"again while working), {free / 2**30:.1f} GiB are free; make room or give --out a "
            "folder on another disk"
        )


def used_bytes(work: Path) -> int:
    """Return what chunks and tars of earlier runs take: room that is used again."""
    found = [*work.glob("chunk-*"), *work.glob("tars-*/*")]
    return sum(p.stat().st_size for p in found)


def remove_stale(work: Path, keep: set[str]) -> list[str]:
    """Remove what earlier runs left that this run has no use for; return the names."""
    stale = [p for p in work.iterdir() if p.name not in keep]
    for path in stale:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return [p.name for p in stale]
