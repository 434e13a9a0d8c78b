"""The changes that CONTRIBUTING.md shows are real: applied to a copy, their tests pass there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages import section

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("data_prep", "pretrain", "eval", "launch", "deepspeed_configs", "tests")


def shown_changes() -> list[tuple[str, list[str]]]:
    """Return each change as (unified diff, words of the command that tries it)."""
    page = section((ROOT / "CONTRIBUTING.md").read_text(), "changes-of-ten-minutes")
    diffs = re.findall(r"^```diff\n(.*?)^```", page, re.M | re.S)
    tried = re.findall(r"^Try it: `python -m pytest -n0 -q (.*)`$", page, re.M)
    assert len(diffs) == len(tried) == 4
    return [(d, t.split()) for d, t in zip(diffs, tried, strict=True)]


def apply_change(diff: str, folder: Path) -> list[str]:
    """Apply a diff in `folder`, and return the names of the tests that it adds."""
    done = subprocess.run(
        ["git", "apply", "--whitespace=error-all", "-"], cwd=folder, input=diff, text=True,
        capture_output=True, env=os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    added = re.findall(r"^\+def (test_\w+)", diff, re.M)
    assert added
    return added


def copy_of_the_project(folder: Path) -> None:
    for name in FOLDERS:
        # With what is compiled already; times of files are kept, so that it is used.
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("golden"))
    shutil.copy(ROOT / "pyproject.toml", folder)


def test_the_shown_changes_fit_this_tree(tmp_path):
    """The long form, `test_the_shown_changes_work`, runs what they add."""
    copy_of_the_project(tmp_path)
    for diff, (file, *rest) in shown_changes():
        added = apply_change(diff, tmp_path)
        assert not rest or all(rest[-1] in name for name in added), (file, rest)
        here = (tmp_path / file).read_text()
        assert all(f"def {name}(" in here for name in added), file
        for changed in re.findall(r"^\+\+\+ b/(\S+\.py)$", diff, re.M):
            compile((tmp_path / changed).read_text(), changed, "exec")


@pytest.mark.long
def test_the_shown_changes_work(tmp_path):
    """All in one copy, which costs one start of Python; each names other tests."""
    copy_of_the_project(tmp_path)
    names, files = [], []
    for diff, (file, *_) in shown_changes():
        names += apply_change(diff, tmp_path)
        files.append(file)
    words = ["-n0", "-v", "-p", "no:cacheprovider", "-k", " or ".join(names), *files]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words], cwd=tmp_path, capture_output=True, text=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for name in names:
        assert re.search(rf"::{name}\b.* PASSED", done.stdout), done.stdout
