"""The diffs in CONTRIBUTING.md: each is applied to a copy of the packages, and works there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.pages import section

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("data_prep", "pretrain", "eval", "launch", "deepspeed_configs", "tests", "pyproject.toml")
PYTEST = (sys.executable, "-m", "pytest", "-n0", "-q", "-p", "no:cacheprovider")


def changed_copy(folder: Path, anchor: str) -> Path:
    """Return a copy of the packages to which the diffs of a section of CONTRIBUTING.md are applied.

    Parameters
    ----------
    folder
        The copy is made in it.
    anchor
        Of the heading, as in a link to it.
    """
    copy = folder / "copy"
    copy.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            # With what is compiled already; times of files are kept, so that it is used.
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("golden"))
        else:
            shutil.copy2(ROOT / name, copy / name)
    page = section((ROOT / "CONTRIBUTING.md").read_text(), anchor)
    diffs = re.findall(r"(?ms)^```diff\n(.*?)^```", page)
    assert diffs, f"no diff below {anchor}"
    for diff in diffs:
        done = subprocess.run(
            ["git", "apply", "--whitespace=error-all", "-"], input=diff, cwd=copy,
            env=os.environ | {"GIT_CEILING_DIRECTORIES": str(folder)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{anchor}: the diff fits no more\n{done.stderr}"
    return copy


def run_there(copy: Path, *command: str) -> str:
    """Run a command in a copy and return what it printed; the copy's packages are imported."""
    env = os.environ | {"PYTHONPATH": str(copy)}
    done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_new_kind_of_evaluation(tmp_path):
    copy = changed_copy(tmp_path, "a-new-kind-of-evaluation")
    assert "1 passed" in run_there(copy, *PYTEST, "tests/test_eval_cell_order.py")
    ruff = Path(sys.executable).with_name("ruff")
    run_there(copy, str(ruff), "check", "eval/benchmark/kinds", "tests/test_eval_cell_order.py")
