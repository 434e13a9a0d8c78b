"""Requests to stop: a signal is remembered, and the current step is finished first."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time

logger = logging.getLogger(__name__)

# SIGHUP means that the terminal, or the connection to it, was closed.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# A launcher and its terminal may both pass on one Ctrl-C within this time.
_SECOND_S = 1.0
_INTERRUPTED = 128 + signal.SIGINT
_AT_ONCE = (
    b"interrupted again: ended at once. The last complete checkpoint is as it was; start again "
    b"with --resume\n"
)


class StopRequest:
    """Remembers signals inside a ``with`` block; the ranks agree on them in the next step.

    A second Ctrl-C ends the process at once. SIGHUP stays ignored if it was ignored before, as
    under nohup. After a block without an error all signals are ignored, because another one during
    the exit would kill the process.
    """

    def __init__(self) -> None:
        self._name = ""

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._ask)
        # The handlers above wait until the main thread returns from a collective operation, which
        # may hang. The number of each signal is written to this pipe at once.
        self._numbers, self._writes = os.pipe()
        os.set_blocking(self._writes, False)
        self._before = signal.set_wakeup_fd(self._writes, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._count, name="stop", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        signal.set_wakeup_fd(self._before)
        os.close(self._writes)
        self._thread.join()
        os.close(self._numbers)
        if kind is None:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)

    def _ask(self, number: int, _frame: object) -> None:
        # Nothing is logged here, because a signal can interrupt the writing of a log line, and two
        # writes must not nest.
        self._name = self._name or signal.Signals(number).name

    def _count(self) -> None:
        first = 0.0
        while numbers := os.read(self._numbers, 64):
            if signal.SIGINT not in numbers:
                continue
            now = time.monotonic()
            if first and now - first > _SECOND_S:
                with contextlib.suppress(OSError):
                    os.write(sys.stderr.fileno(), _AT_ONCE)
                os._exit(_INTERRUPTED)
            first = first or now

    def was_asked(self) -> bool:
        """Return whether a signal has arrived, and log it; called once per step."""
        if self._name:
            again = " (Ctrl-C again: end at once)" if self._name == "SIGINT" else ""
            logger.warning("signal %s: stopping after this step%s", self._name, again)
        return bool(self._name)
