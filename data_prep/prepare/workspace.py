"""Manages the output folder of ``prepare``: one run at a time, and work that survives a kill.

`locked_workspace` gives one run the folder ``.partial`` inside the output folder for its work. When
the work is complete, `move_up` moves the results to the output folder, the manifest last; a folder
without a manifest does not count as shards. The file ``.request`` holds a hash of the run's
arguments until the run has cleaned up. `check_disk` and `full_disk_named` look after free space.
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
    """Raise ValueError unless `out` is absent, empty, or the folder of an unfinished run."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"{out}: exists and is no folder; give --out a new one")
    if (out / manifest_name).exists():
        raise ValueError(f"{out}: holds complete shards already; give --out a new folder")
    if not _moving(out, manifest_name) and names_in(out) - _NOT_RESULTS:
        raise ValueError(f"{out}: exists and is not an empty folder; give --out a new one")


def _moving(out: Path, manifest_name: str) -> Path | None:
    """Return the folder whose results a killed run was moving to `out`, None if there is none."""
    return next((p.parent for p in (out / PARTIAL).glob(f"*/{manifest_name}")), None)


def complete_already(out: Path, manifest_name: str, request: str) -> bool:
    """Return whether a run with this request is complete except for its clean-up, and clean up.

    A run that is killed after its manifest is in place leaves its request file, and possibly all or
    a part of ``.partial``.
    """
    asked = out / _REQUEST
    if not (out / manifest_name).exists() or not asked.exists() or request not in asked.read_text():
        return False
    try:
        with owned(out, "prepare"):
            shutil.rmtree(out / PARTIAL, ignore_errors=True)
            asked.unlink(missing_ok=True)
    except FolderInUse:
        return False  # that run is still alive; `locked_workspace` raises the error for it
    return True


@contextlib.contextmanager
def full_disk_named(work: Path, needed_bytes: int) -> Iterator[None]:
    """Add a note about the needed disk space to errors that a full disk causes."""
    try:
        yield
    except OSError as error:
        free = shutil.disk_usage(work).free
        # numpy and Arrow do not always pass on the error number.
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
    """Yield the working folder inside `out`, which only one run at a time can have.

    After an error the finished work is kept for the next run. If no work is finished, the working
    folder is removed.

    Raises
    ------
    ValueError
        `out` is in use by another run, or holds other files.
    """
    require_free(out, manifest_name)
    with owned(out, "prepare"):
        work = out / PARTIAL
        try:
            require_free(out, manifest_name)  # another run may have finished in the meantime
            (out / _REQUEST).write_text(request)
            work.mkdir(exist_ok=True)
            moving = _moving(out, manifest_name)
            if moving is not None:
                for name in names_in(out) - _NOT_RESULTS:
                    (out / name).rename(moving / name)
            # Row-wise copies that a killed run did not finish, or that are damaged, are removed.
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
    """Move results from `folder`, inside `work`, to the output folder; then remove `work`.

    The manifest is moved last. After a kill the call can be repeated, since it skips files that
    have been moved already.
    """
    for name in [*names, manifest_name]:
        if (folder / name).exists():
            (folder / name).rename(work.parent / name)
    shutil.rmtree(work)


def check_disk(work: Path, needed_bytes: int) -> None:
    """Raise ValueError unless the file system of `work` has enough free space."""
    free = shutil.disk_usage(work).free
    if free < needed_bytes + _SPARE_BYTES:
        raise ValueError(
            f"{work}: about {needed_bytes / 2**30:.1f} GiB are needed (the shards, and as much "
            f"again while working), {free / 2**30:.1f} GiB are free; make room or give --out a "
            "folder on another disk"
        )


def used_bytes(work: Path) -> int:
    """Return the number of bytes in chunks and tars of earlier runs, which need no new space."""
    found = [*work.glob("chunk-*"), *work.glob("tars-*/*")]
    return sum(p.stat().st_size for p in found)


def remove_stale(work: Path, keep: set[str]) -> list[str]:
    """Remove files and folders of earlier runs that this run cannot use; return their names."""
    stale = [p for p in work.iterdir() if p.name not in keep]
    for path in stale:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return [p.name for p in stale]
