"""Decides how long the ranks that are left may go on after a rank or a launcher has failed.

They are waited for because they know more: which rank they missed, or what went wrong before. The
wait ends at once when nobody is left who could say anything: each rank has ended, or its host does
not answer, or another rank has named it as the one that gave no sign of life. Otherwise it is long
where nothing is known yet, and shorter where a rank has said why it ended.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from data_prep.errors import EXIT_RESUMABLE
from launch.attempts.rank_logs import End, end_of, end_records

# Nobody has said anything, or ranks save a checkpoint because they were asked to stop.
UNKNOWN_S = 45.0
# A rank has said why it ended. The others hear it, or look for the reason, within 12 signs of life
# of a second each (`pretrain.ranks.watch`), and write the loss or cells that they stumbled over.
KNOWN_S = 20.0
# Hosts are asked again after so long, because one of them may be lost later than the first.
_ASK_AGAIN_S = 4.0
_NO_REASON = (0, EXIT_RESUMABLE, -signal.SIGTERM)


class Grace:
    """Knows of an attempt which ranks have ended and which hosts are lost.

    Parameters
    ----------
    hosts
        Host -> number of ranks, in the order of ranks.
    ask_lost
        Returns those of the hosts that do not answer; it may take seconds.
    """

    def __init__(
        self,
        attempt: Path,
        hosts: dict[str, int],
        ask_lost: Callable[[dict[str, int]], list[str]],
    ) -> None:
        self._attempt, self._hosts, self._ask_lost = attempt, hosts, ask_lost
        self._owners = [host for host, ranks in hosts.items() for _ in range(ranks)]
        self._ends: dict[int, End] = {}
        self._lost: list[str] | None = None
        self._failed_at = math.inf
        self._is_over = threading.Event()

    @property
    def has_begun(self) -> bool:
        return self._failed_at < math.inf

    def begin(self) -> None:
        """Record that something has failed now, and begin to ask which hosts still answer."""
        self._failed_at = time.monotonic()
        threading.Thread(target=self._look_for_lost, name="lost hosts", daemon=True).start()

    def is_over(self) -> bool:
        """Return whether the ranks that are left need not be waited for any more."""
        if not self.unaccounted():
            return True
        is_known = any(e.code not in _NO_REASON and (e.text or e.code < 0) for e in self._read())
        return time.monotonic() - self._failed_at > (KNOWN_S if is_known else UNKNOWN_S)

    def end(self) -> None:
        """Ask no host any more."""
        self._is_over.set()

    def lost(self) -> list[str]:
        """Return the hosts that do not answer; they are asked now if nobody has answered yet."""
        return self._ask_lost(self._hosts) if self._lost is None else self._lost

    def known_lost(self) -> set[str]:
        """Return the hosts that were found not to answer, without asking."""
        return set(self._lost or ())

    def unaccounted(self) -> set[int]:
        """Return the ranks that may still write why they end."""
        found = self._read()
        silent = {e.missed for e in found if e.missed is not None}
        lost = self.known_lost()
        return {
            rank
            for rank, host in enumerate(self._owners)
            if rank not in self._ends and rank not in silent and host not in lost
        }

    def _read(self) -> list[End]:
        for record in end_records(self._attempt):
            if record["rank"] not in self._ends:
                self._ends[record["rank"]] = end_of(self._attempt, record)
        return list(self._ends.values())

    def _look_for_lost(self) -> None:
        while not self._is_over.is_set():
            self._lost = self._ask_lost(self._hosts)
            self._is_over.wait(_ASK_AGAIN_S)
