"""Files that are complete or absent."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

# In a folder that a command fills: what started it, what its ranks said. No part of the result.
LAUNCH_FOLDER = "launch"
# In a folder that a run works in (`data_prep.owner`).
OWNER_NAME = ".owner.json"


def names_in(folder: Path) -> set[str]:
    """Return what a folder holds beside that which starts a run in it, or owns it."""
    if not folder.is_dir():
        return set()
    # Also of an owner's file that was being made when its process was killed.
    names = (p.name for p in folder.iterdir())
    return {n for n in names if n != LAUNCH_FOLDER and not n.startswith(OWNER_NAME)}


def require_new_file(out: Path) -> None:
    """Raise ValueError if a file exists, or its folder does not."""
    if out.exists():
        raise ValueError(f"{out}: exists; give --out another file")
    if not out.parent.is_dir():
        raise ValueError(f"{out}: the folder {out.parent} does not exist")


@contextlib.contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make a folder; at the end, those that were made for it and hold nothing are removed again.

    Raises
    ------
    ValueError
        There is something else in its place.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: exists and is no folder; give another one")
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for empty in made:
            with contextlib.suppress(OSError):
                empty.rmdir()


@contextlib.contextmanager
def complete_file(out: Path) -> Iterator[Path]:
    """Give a path whose file or folder becomes `out` at the end, and is removed after an error."""
    aside = out.with_name(f".{out.name}.partial")
    try:
        yield aside
        aside.replace(out)
    finally:
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        aside.unlink(missing_ok=True)
