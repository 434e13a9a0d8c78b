"""The check of the suite's processor time counts everything, and fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_BURN = "import time\nwhile time.process_time() < 0.4: pass"
# A grandchild that outlives its parent.
_ORPHAN = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {_BURN!r}])"


def budget(seconds: float, *command: str) -> subprocess.CompletedProcess:
    words = [sys.executable, "-m", "tests.cpu_budget", str(seconds), *command]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True)


def test_orphans_are_counted_and_too_much_fails():
    within = budget(60, sys.executable, "-c", _ORPHAN)
    assert within.returncode == 0, within.stderr
    beyond = budget(0.3, sys.executable, "-c", _ORPHAN)
    assert beyond.returncode == 1
    assert "of 0 s allowed" in beyond.stdout
    assert "have become too expensive" in beyond.stderr


def test_a_failed_command_keeps_its_code():
    assert budget(60, sys.executable, "-c", "raise SystemExit(5)").returncode == 5


def test_an_orphan_that_has_ended_is_gone_before_the_command_ends():
    # Who waits for a process that nobody reaps finds it as a zombie, and takes it for alive.
    waits = (
        "import psutil, subprocess, sys;"
        'starts = \'import subprocess; print(subprocess.Popen(["sleep", "0.2"]).pid)\';'
        "orphan = int(subprocess.check_output([sys.executable, '-c', starts], stderr=-3));"
        "sys.exit(len(psutil.wait_procs([psutil.Process(orphan)], timeout=5)[1]))"
    )
    assert budget(60, sys.executable, "-c", waits).returncode == 0
