"""The check of the suite's processor time counts everything, and fails."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_BURN = "import time\nwhile time.process_time() < 0.4: pass"
# A grandchild that outlives its parent.
_ORPHAN = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {_BURN!r}])"


# The command, but for the work that tells how fast a machine is: importing torch takes seconds.
_MAIN = (
    "import sys; from tests import cpu_budget as budget; budget._REFERENCE = 'pass';"
    "budget._REFERENCE_S = {reference_s}; sys.exit(budget.main(float(sys.argv[1]), sys.argv[2:]))"
)


def budget(seconds: float, *command: str, reference_s: float = 1e3) -> subprocess.CompletedProcess:
    words = [sys.executable, "-c", _MAIN.format(reference_s=reference_s), str(seconds), *command]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True)


def test_orphans_are_counted_and_too_much_fails():
    within = budget(60, sys.executable, "-c", _ORPHAN)
    assert within.returncode == 0, within.stderr
    assert "slower" not in within.stdout, "nobody asks how fast the machine is"
    beyond = budget(0.1, sys.executable, "-c", _ORPHAN)
    assert beyond.returncode == 1
    assert "of 0 s allowed (this machine is 1.00 times slower)" in beyond.stdout
    assert "have become too expensive" in beyond.stderr


def test_a_slower_machine_is_allowed_more():
    slow = budget(0.1, sys.executable, "-c", _BURN, reference_s=1e-3)
    assert slow.returncode == 0, slow
    assert re.search(r"this machine is \d+\.\d\d times slower", slow.stdout)


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
