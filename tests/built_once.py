"""What many tests read is built once for all test workers, and nobody writes to it."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

COUNTED = "counted"


class BuiltOnce:
    """Folders that the first worker who asks builds, for all workers of a test session.

    Each has a hash of all that is in it. `require_untouched` compares: a test that writes into a
    folder that others read must work on a copy.
    """

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        base = factory.getbasetemp()
        # Workers of pytest-xdist have folders of their own in one that they share.
        is_worker = base.name.startswith("popen-")
        self._root = (base.parent if is_worker else base) / "built_once"
        self._root.mkdir(exist_ok=True)
        self._used: set[str] = set()

    def folder(self, name: str, build: Callable[[Path], object]) -> Path:
        """Return the folder of a name; `build` fills it, once, and gets its path."""
        folder, digest = self._root / name, self._root / f"{name}.sha256"
        with FileLock(self._root / f"{name}.lock"):
            if not digest.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a build that failed
                folder.mkdir()
                build(folder)
                digest.write_text(content_hash(folder))
        self._used.add(name)
        return folder

    def require_untouched(self) -> None:
        """Raise if a folder that this worker used is not as it was built."""
        for name in sorted(self._used):
            folder = self._root / name
            built = (self._root / f"{name}.sha256").read_text()
            assert content_hash(folder) == built, f"{folder}: a test wrote to what others read"


def content_hash(folder: Path) -> str:
    """Return a hash of the names and bytes of all files below a folder.

    Without ``counted/``: the first run that needs a table counted from shards adds it there.
    """
    sha256 = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if COUNTED in path.relative_to(folder).parts:
            continue
        sha256.update(f"{path.relative_to(folder)}\0{path.is_dir()}\0".encode())
        if path.is_file():
            sha256.update(hashlib.sha256(path.read_bytes()).digest())
    return sha256.hexdigest()
