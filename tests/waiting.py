"""A rank that only waits: ``python -m tests.waiting FOLDER``. Started by `launch.attempts.rank` in
tests."""

import signal
import sys
import time
from pathlib import Path

from data_prep.running.launchers import stop_with_launcher

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1)

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    asked: list[int] = []
    for number in SIGNALS:
        signal.signal(number, lambda got, _frame: asked.append(got))
    stop_with_launcher()
    (folder / "waits").touch()
    while not asked:
        time.sleep(0.02)
    (folder / "asked").write_text(signal.Signals(asked[0]).name)
    # Its launcher asks it too, and Python takes handlers away before it ends: it would die of that.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(75)
