"""Requests to stop: a signal is remembered, and the step in flight is finished."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time

logger = logging.getLogger(__name__)

# SIGHUP: the terminal was closed, or the connection to it.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# A launcher and its terminal may both pass on one Ctrl-C.
_SECOND_S = 1.0
_INTERRUPTED = 128 + signal.SIGINT


class StopRequest:
    """Remembers signals that ask for a stop; the ranks agree on it in the next step.

    A second Ctrl-C ends the process at once. SIGHUP stays ignored where it is, as under nohup.
    """

    def __init__(self) -> None:
        self._name = ""
        self._interrupted = 0.0
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._ask)

    def _ask(self, number: int, _frame: object) -> None:
        # Not logged here: a signal can interrupt the writing of a log line, which must not nest.
        self._name = self._name or signal.Signals(number).name
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted and now - self._interrupted > _SECOND_S:
                os.write(
                    sys.stderr.fileno(),
                    b"interrupted again: ended at once. The last complete checkpoint is as it "
                    b"was; start again with --resume\n",
                )
                os._exit(_INTERRUPTED)
            self._interrupted = self._interrupted or now

    def was_asked(self) -> bool:
        """Return whether a signal has come, and say so: it is asked once a step."""
        if self._name:
            again = " (Ctrl-C again: end at once)" if self._name == "SIGINT" else ""
            logger.warning("signal %s: stopping after this step%s", self._name, again)
        return bool(self._name)

    def close(self) -> None:
        """Ignore them from now on: asked again while it exits, a process would die of it."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
