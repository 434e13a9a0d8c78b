"""Files that are complete or absent."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

# In a folder that a command fills: what started it, what its ranks said. No part of the result.
LAUNCH_FOLDER = "launch"
# In a folder that a run works in (`data_prep.running.owner`).
OWNER_NAME = ".owner.json"
# What is being written: the folder inside of a result, the end of a file's name.
PARTIAL = ".partial"


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
def complete_file(out: Path, to_disk: bool = False) -> Iterator[Path]:
    """Give a path whose file or folder becomes `out` at the end, and is removed after an error.

    `to_disk`: a file is forced to disk before it gets its name, so that no power failure leaves a
    name without its content.
    """
    aside = out.with_name(f".{out.name}{PARTIAL}")
    if aside.is_dir():  # of a process that was killed
        shutil.rmtree(aside)
    try:
        yield aside
        if to_disk:
            force_to_disk(aside)
        aside.replace(out)
    finally:
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        aside.unlink(missing_ok=True)


def write_to_disk(out: Path, text: str) -> None:
    """Write a small file that is complete or absent, also after a power failure."""
    with complete_file(out, to_disk=True) as aside:
        aside.write_text(text)


def force_to_disk(path: Path) -> None:
    """Return when a file's content, or a folder's names, would survive a power failure."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def require_new(out: Path) -> None:
    """Raise ValueError unless a folder to be written is absent, or empty but for what runs left."""
    if out.exists() and (not out.is_dir() or names_in(out) - {PARTIAL}):
        raise ValueError(f"{out}: exists and is not an empty folder; give --out a new one")


@contextlib.contextmanager
def complete_folder(out: Path, record: str) -> Iterator[Path]:
    """Give a folder to write into, whose files become those of `out` at the end; or nothing at all.

    `record` names the file without which nobody reads the folder.

    The folder lies inside `out` (the same file system, also behind links and mount points). After
    an error it is removed, with the folders that were made for it.
    """
    partial = out / PARTIAL
    with made_folder(out):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            # The record comes last: a folder with a record is complete.
            for path in sorted(partial.iterdir(), key=lambda p: (p.name == record, p.name)):
                path.rename(out / path.name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file to which lines are added; none if it is not there.

    A line that is no JSON, which a killed process left half written, is skipped with a warning.
    """
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            logger.warning("%s: a torn line is skipped", path)
    return records


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
