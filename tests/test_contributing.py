"""The changes that CONTRIBUTING.md shows are real: applied to a copy, their tests pass there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

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


def test_the_shown_changes_work(tmp_path):
    """All in one copy, which costs one start of Python; each names other tests."""
    for folder in FOLDERS:
        # With what is compiled already; times of files are kept, so that it is used.
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("golden"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    names, files = [], []
    for diff, (file, *rest) in shown_changes():
        done = subprocess.run(
            ["git", "apply", "--whitespace=error-all", "-"], cwd=tmp_path, input=diff, text=True,
            capture_output=True, env=os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        added = re.findall(r"^\+def (test_\w+)", diff, re.M)
        assert added and (not rest or all(rest[-1] in name for name in added)), (file, rest)
        files.append(file)
        names += added
    words = ["-n0", "-v", "-p", "no:cacheprovider", "-k", " or ".join(names), *files]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words], cwd=tmp_path, capture_output=True, text=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for name in names:
        assert re.search(rf"::{name}\b.* PASSED", done.stdout), done.stdout
