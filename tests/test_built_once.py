"""Folders shared by tests are built once, and a write to one is noticed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.built_once import BuiltOnce


class _Factory:
    def __init__(self, base: Path) -> None:
        self._base = base

    def getbasetemp(self) -> Path:
        self._base.mkdir(exist_ok=True)
        return self._base


def test_built_once_for_all_workers_and_guarded(tmp_path):
    calls = []

    def build(folder: Path) -> None:
        calls.append(folder)
        (folder / "sub").mkdir()
        (folder / "sub" / "cells").write_text("1 2 3")

    one, other = (BuiltOnce(_Factory(tmp_path / f"popen-gw{n}")) for n in (0, 1))  # type: ignore
    folder = one.folder("cells", build)
    assert other.folder("cells", build) == folder == one.folder("cells", build)
    assert calls == [folder]
    one.require_untouched()
    for change, undo in (
        (lambda: (folder / "sub" / "cells").write_text("1 2 4"),
         lambda: (folder / "sub" / "cells").write_text("1 2 3")),
        (lambda: (folder / "new").mkdir(), lambda: (folder / "new").rmdir()),
    ):  # fmt: skip
        change()
        with pytest.raises(AssertionError, match="cells: a test wrote to what others read"):
            other.require_untouched()
        undo()
        other.require_untouched()


def test_a_build_that_fails_is_tried_again(tmp_path):
    def fail(folder: Path) -> None:
        raise ValueError("no")

    once = BuiltOnce(_Factory(tmp_path / "base"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no"):
        once.folder("x", fail)
    assert once.folder("x", lambda folder: (folder / "a").write_text("a")).is_dir()
