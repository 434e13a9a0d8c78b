"""Signs of life: a rank that dies or stands still ends the others, with a message.

A collective notices a dead peer when its connection closes (gloo), or after a time-out of minutes
(nccl, a machine that is gone, a process that is stopped). So every rank counts up in the key-value
store of the launch, from a thread, and looks at the next rank's count. Who finds it unchanged for
too long says so to all, through the store; everybody ends. The load does not grow with the ranks.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from datetime import timedelta
from types import TracebackType

from data_prep.errors import EXIT_FAILED
from pretrain import dist
from pretrain.dist import Ranks

logger = logging.getLogger(__name__)

_BEATS_PER_LIMIT = 10
# Missed beats that are enough when a collective has failed already.
_HURRIED_BEATS = 4
# A store that does not answer while everybody leaves is no failure.
_LEAVING_S = 3.0


class Watch:
    """Watches the other ranks inside a ``with`` block, and tells them how the block ended.

    Parameters
    ----------
    limit_s
        How long a rank may give no sign of life; 0: nobody watches.
    """

    def __init__(self, ranks: Ranks, limit_s: float) -> None:
        self._rank, self._next = ranks.rank, (ranks.rank + 1) % ranks.world_size
        self._limit_s = limit_s
        self._interval_s = limit_s / _BEATS_PER_LIMIT
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        if limit_s > 0 and ranks.world_size > 1:
            # A connection of its own: the training's may be waiting in it.
            self._store = dist.open_store(timedelta(seconds=limit_s))
            self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        if self._thread:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        if self._thread is None:
            return
        if error is None:
            # Nobody stops watching before everybody is through.
            dist.wait_for_all()
        elif dist.may_be_a_lost_peer(error):
            # Who it was is known in a moment; the watching thread then ends this process.
            logger.warning("rank %d: a collective failed; looking for the reason", self._rank)
            self._limit_s = _HURRIED_BEATS * self._interval_s
            self._thread.join(2 * self._limit_s)
        elif isinstance(error, Exception):
            self._report(f"rank {self._rank} failed: {type(error).__name__}: {error}")
        self._stopped.set()

    def _run(self) -> None:
        count, changed = -1, time.monotonic()
        while not self._stopped.wait(self._interval_s):
            try:
                self._store.add(f"beats/{self._rank}", 1)
                beats = self._store.add(f"beats/{self._next}", 0)
                if self._store.add("failures", 0):
                    self._end(self._store.get("failure").decode())
            except dist.STORE_ERRORS:
                if not self._stopped.wait(_LEAVING_S):
                    self._end("rank 0, or the process that started the ranks, does not answer")
                return
            if beats != count:
                count, changed = beats, time.monotonic()
            elif time.monotonic() - changed > self._limit_s:
                text = f"rank {self._next} gave no sign of life for {self._limit_s:.0f} s"
                self._report(text)
                self._end(text)

    def _report(self, text: str) -> None:
        """Tell all ranks; the first report counts."""
        try:
            if self._store.add("reports", 1) == 1:
                self._store.set("failure", text)
                self._store.add("failures", 1)
        except dist.STORE_ERRORS:
            logger.warning("rank %d: nobody could be told: %s", self._rank, text)

    def _end(self, text: str) -> None:
        """End this process: its main thread may wait for ever in a collective."""
        if self._stopped.is_set():
            return
        print(
            f"rank {self._rank} ends: {text}. The last complete checkpoint is as it was; start "
            "again with --resume",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_FAILED)
