"""Watch for ranks that die or stop making progress, and end the other ranks with a message.

A collective operation notices a dead peer when its connection closes (gloo), or after a timeout of
minutes (nccl, a lost machine, a stopped process). Therefore every rank runs a thread that
increments a count in the key-value store of the launch and looks at the next rank's count. If a
count stays unchanged for too long, the thread reports this to all ranks through the store, and all
ranks end. The load on a rank does not grow with the number of ranks.

A rank may also be alive without making progress, because a file system hangs or because one rank
never enters a collective operation. The rank's own thread notices this, and the message names the
rank that stopped. All ranks pass the same points in the same order; each thread writes the last
point that its rank has passed, and the time. The others wait for the rank that has passed the
fewest points. This also holds under NCCL, where ranks wait for the device and not in a collective
operation, and where an aborted communicator makes all ranks look late. Only if all ranks have
passed equally many points, the one outside any collective operation is named.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import math
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType

from data_prep.errors import EXIT_FAILED, SharedFailure
from data_prep.running.launchers import launcher_is_gone
from pretrain.ranks import dist
from pretrain.ranks.dist import Ranks
from pretrain.ranks.signed_messages import Signer

logger = logging.getLogger(__name__)

# Signs of life are counted in rounds, not in seconds, because a job that was suspended as a whole
# must not report any rank. A round lasts a second, and a tenth of the limit if that is shorter.
_ROUND_S = 1.0
_LEAST_ROUNDS = 10
# This many rounds are enough after a collective operation has failed.
_HURRIED_ROUNDS = 6
# One round for the news that a collective operation failed, one to find the rank that caused it,
# one to receive its name, and some spare rounds.
_ROUNDS_TO_FIND_OUT = _HURRIED_ROUNDS + 6
# After so many rounds every rank has read the reason why the run ends.
_ROUNDS_TO_HEAR = 3
_NAMED = 4
_IN_COLLECTIVE = "in a collective"
_ROOT = Path(__file__).parents[2]
_OWN_FOLDERS = ("data_prep", "pretrain", "eval")
_STORE_IS_GONE = "rank 0 (which all ranks talk through), or what started it, "


class Watch:
    """Watches the other ranks inside a ``with`` block, and tells them how the block ended.

    All ranks leave the block together, unless one of them failed.

    Parameters
    ----------
    limit_s
        How long a rank may give no sign of life; 0: ranks are not watched.
    stall_s
        How long a rank may stay in one step; 0: without limit.
    """

    def __init__(self, ranks: Ranks, limit_s: float, stall_s: float = 0) -> None:
        self._rank, self._others = ranks.rank, ranks.world_size - 1
        self._next = (ranks.rank + 1) % ranks.world_size
        self._interval_s = min(_ROUND_S, limit_s / _LEAST_ROUNDS)
        self._rounds_per_limit = math.ceil(limit_s / self._interval_s) if limit_s > 0 else 0
        self._limit_s, self._stall_s = limit_s, stall_s
        self._step: int | None = None
        self._rounds_in_step = 0
        # The number of points passed, the last point, and its time.
        self._passed: tuple[int, str, float] = (0, "the start", time.time())
        self._has_said_where = self._has_warned = False
        self._rounds = 0
        self._is_hurried = False
        self._stopped = threading.Event()
        self._ending = threading.Lock()
        self._threads: list[threading.Thread] = []
        if limit_s > 0 and self._others:
            # The names are unique to this run, because torchrun's store outlives the processes that
            # it restarts.
            self._signer = Signer(dist.run_secret())
            self._store = dist.open_store(self._signer.name)
            # The first sign of life comes before ranks meet: one that is frozen before its threads
            # have said anything is missed too.
            self._store.add(f"beats/{self._rank}", 1)
            # With a slow name server a connection takes seconds, in which the store answers no
            # other rank.
            dist.wait_for_all()
            for work in (self._talk, self._look_at_talk):
                self._threads.append(threading.Thread(target=work, name="watch", daemon=True))
        elif limit_s > 0 and stall_s > 0:
            work = self._look_at_itself
            self._threads.append(threading.Thread(target=work, name="watch", daemon=True))

    def __enter__(self) -> Watch:
        # `kill -USR2` prints what every thread does; a supervisor sends it before it ends a rank.
        faulthandler.register(signal.SIGUSR2, file=sys.stderr, all_threads=True)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        if error is None or isinstance(error, SharedFailure):
            try:
                self._leave_together()
            except RuntimeError as lost:
                if error is None:
                    self._find_reason(lost)
        elif dist.is_from_a_collective(error):
            self._find_reason(error)
        elif isinstance(error, Exception):
            self._report_own(error)
        self._stopped.set()
        if not self._others:  # then nothing is asked of a store that may be gone
            for thread in self._threads:
                thread.join()

    def progress(self, step: int | None = None) -> None:
        """Record that the main thread makes progress; from the first step on stalls are noticed."""
        self._step, self._rounds_in_step = self._step if step is None else step, 0
        self.passed("the last batch" if step is None else "the step's cells")

    def passed(self, point: str) -> None:
        """Record that the main thread passed a point; all ranks pass the same ones in order."""
        self._passed = self._passed[0] + 1, point, time.time()

    def _leave_together(self) -> None:
        """Return when all ranks have left the block and none of them watches any more.

        No rank stops watching before all have finished, and rank 0, which holds the store, does not
        leave while another rank uses it.
        """
        if not self._others:
            return
        dist.wait_for_all()
        self._stopped.set()
        for thread in self._threads:
            thread.join()
        dist.wait_for_all()

    def _find_reason(self, error: BaseException) -> None:
        """End this process with the name of the rank that made a collective operation fail."""
        if self._threads and self._others:
            logger.warning("rank %d: a collective failed; looking for the reason", self._rank)
            self._is_hurried = True
            with contextlib.suppress(*dist.STORE_ERRORS):
                self._tell("suspicions")
            self._threads[0].join(_ROUNDS_TO_FIND_OUT * self._interval_s)
        behind = ""
        if self._threads and self._others:
            with contextlib.suppress(*dist.STORE_ERRORS):
                behind = "; ".join(self._who_is_behind().values())
        failure = ConnectionError(
            f"a collective failed, another rank is gone or stands still ({behind or error}). The "
            "last complete checkpoint is as it was; start again with --resume"
        )
        self._report_own(failure)
        raise failure from error

    def _report_own(self, error: Exception) -> None:
        # This process ends by its own error, not by the watch.
        self._stopped.set()
        if self._threads and self._others:
            text = f"rank {self._rank} failed: {type(error).__name__}: {error}"
            self._report(text, self._others + 1)

    def _talk(self) -> None:
        """Give signs of life, look for those of the next rank, and read reports of failures."""
        beats = unchanged = 0
        while not self._stopped.wait(self._interval_s):
            try:
                self._store.add(f"beats/{self._rank}", 1)
                self._store.set(f"passed/{self._rank}", json.dumps([self._step, *self._passed]))
                now = self._store.add(f"beats/{self._next}", 0)
                if self._store.add("news", 0):
                    self._read_news()
            except dist.STORE_ERRORS:
                if dist.store_is_the_launchers() and launcher_is_gone(within_s=1):
                    # The launcher asks the ranks to stop; they save a checkpoint without being
                    # watched.
                    self._stopped.set()
                    return
                self._end(_STORE_IS_GONE + "is gone")
                return
            self._rounds += 1
            self._look_at_main_thread()
            unchanged = unchanged + 1 if now == beats else 0
            beats = now
            if unchanged > self._patience():
                text = self._silence(f"rank {self._next}")
                self._report(text, self._others)
                self._end(text)

    def _tell(self, news: str) -> int:
        """Count one more of "suspicions", "failures" or "stalls"; return how many there were.

        There may be a thousand ranks that ask rank 0's store every second. So they ask a single
        question, and read what it is about only if there is anything.
        """
        count = self._store.add(news, 1)
        self._store.add("news", 1)
        return count

    def _read_news(self) -> None:
        """Hurry where a collective has failed, say where this rank is, or end with a failure."""
        self._is_hurried |= self._store.add("suspicions", 0) > 0
        if self._store.add("stalls", 0) and not self._has_said_where:
            self._say_where()
        if self._store.add("failures", 0) and (failure := self._told_failure()):
            # Rank 0 holds the store, so it stays until the others have read the failure too.
            self._report(failure, self._others + 1)
            self._end(failure)

    def _look_at_main_thread(self) -> None:
        """End the run if this rank is stalled."""
        if self._is_stalled() and self._tell("stalls") == 1:
            self._say_where()
            # The other ranks write where they are in their next rounds.
            self._stopped.wait(_ROUNDS_TO_HEAR * self._interval_s)
            text = self._who_stands_still()
            # All ranks read the report, also a stalled one, because another thread of it does so.
            self._report(text, self._others + 1)
            self._end(text)

    def _is_stalled(self) -> bool:
        self._rounds_in_step += self._step is not None
        return 0 < self._stall_s < self._rounds_in_step * self._interval_s

    def _say_where(self) -> str:
        self._has_said_where = True
        where = f"in step {(self._step or 0) + 1}: {whereabouts()}"
        print(f"rank {self._rank} {where}; its threads:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        if self._others:
            self._store.set(f"where/{self._rank}", where)
        return where

    def _look_at_itself(self) -> None:
        """Do the same as `_look_at_main_thread` for a run with one rank."""
        while not self._stopped.wait(self._interval_s):
            if self._is_stalled():
                where = self._say_where()
                self._end(f"no step was finished for {self._stall_s:.0f} s: {where}")

    def _who_stands_still(self) -> str:
        """Return the ranks that the others wait for: those behind, or outside a collective."""
        said = {}
        for rank in range(self._others + 1):
            if self._store.check([f"where/{rank}"]):
                said[rank] = self._store.get(f"where/{rank}").decode()
        behind = self._who_is_behind()
        elsewhere = [f"rank {r} {said[r]} ({text})" for r, text in behind.items() if r in said] or [
            f"rank {r} {text}" for r, text in said.items() if _IN_COLLECTIVE not in text
        ]
        silent = [f"rank {r} does not answer" for r in range(self._others + 1) if r not in said]
        who = "; ".join([*silent, *elsewhere][:_NAMED]) or (
            f"all ranks wait in a collective, {said[self._rank]}: look at the network between them"
        )
        return f"no step was finished for {self._stall_s:.0f} s: {who}"

    def _who_is_behind(self) -> dict[int, str]:
        """Return, for the ranks that have passed the fewest points, their last point and its time.

        The result is empty if all ranks have passed equally many.
        """
        found = {}
        for rank in range(self._others + 1):
            if self._store.check([f"passed/{rank}"]):
                found[rank] = json.loads(self._store.get(f"passed/{rank}"))
        fewest = min((row[1] for row in found.values()), default=0)
        behind = {rank: row for rank, row in found.items() if row[1] == fewest}
        if len(behind) == len(found):
            return {}
        return {
            rank: f"rank {rank} has come to {point} of step {(step or 0) + 1} at "
            f"{time.strftime('%H:%M:%S', time.localtime(when))}, and no further"
            for rank, (step, _, point, when) in behind.items()
        }

    def _look_at_talk(self) -> None:
        """End the process if the store does not answer, for its thread then waits forever."""
        rounds = unchanged = 0
        while not self._stopped.wait(self._interval_s):
            now = self._rounds
            unchanged = unchanged + 1 if now == rounds else 0
            rounds = now
            if unchanged > self._patience():
                self._end(self._silence(_STORE_IS_GONE.rstrip(", ")))

    def _patience(self) -> int:
        return _HURRIED_ROUNDS if self._is_hurried else self._rounds_per_limit

    def _silence(self, who: str) -> str:
        return f"{who} gave no sign of life for {self._patience() * self._interval_s:.1f} s"

    def _told_failure(self) -> str | None:
        """Return the failure that a rank of this run reported; other messages are ignored."""
        if not self._store.check(["failure"]):
            return None
        text = self._signer.opened(self._store.get("failure"))
        if text is None and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "rank %d: somebody who is no rank of this run has written a failure into its "
                "store at %s; it is ignored", self._rank, os.environ["MASTER_ADDR"],
            )  # fmt: skip
        return text

    def _report(self, text: str, listeners: int) -> None:
        """Tell all ranks of a failure; the first report counts.

        `listeners` is the number of ranks that can read it, including this one.
        """
        try:
            if self._store.add("reports", 1) == 1 or self._told_failure() is None:
                self._store.set("failure", self._signer.sign(text))
                self._tell("failures")
            heard = self._store.add("heard", 1)
            for _ in range(4 * _ROUNDS_TO_HEAR):
                # The store ends with rank 0, so only rank 0 has to wait.
                if self._rank > 0 or heard >= listeners:
                    break
                time.sleep(self._interval_s / 4)
                heard = self._store.add("heard", 0)
        except dist.STORE_ERRORS:
            logger.warning("rank %d: nobody could be told: %s", self._rank, text)

    def _end(self, text: str) -> None:
        """End this process at once: its main thread may wait forever in a collective."""
        if self._stopped.is_set() or not self._ending.acquire(blocking=False):
            return
        print(
            f"rank {self._rank} ends: {text}. The last complete checkpoint is as it was; start "
            "again with --resume",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_FAILED)


def whereabouts() -> str:
    """Return the line of this project that the main thread is in, and whether in a collective."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    stack = list(traceback.walk_stack(frame))
    waits = any(
        f.f_globals.get("__name__", "").startswith(("torch.distributed", "deepspeed.comm"))
        for f, _ in stack
    )
    for inner, line in stack:
        path = Path(inner.f_code.co_filename)
        if path.is_relative_to(_ROOT) and path.relative_to(_ROOT).parts[0] in _OWN_FOLDERS:
            place = f"{path.relative_to(_ROOT).as_posix()}:{line} ({inner.f_code.co_name})"
            return f"{_IN_COLLECTIVE}, called from {place}" if waits else place
    return _IN_COLLECTIVE if waits else "outside of this project's code"
