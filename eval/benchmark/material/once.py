"""What several contenders or folds need is made once, and forgotten when no fold needs it."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Any


class Once:
    """Values by key, made when they are first asked for, and the seconds that each took.

    A value of a seed (a twin's states, features of drawn cells) is kept until a value of another
    seed is asked for: folds of one seed follow each other. Values without a seed stay.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        """Take what tells the seconds."""
        self._now = now
        self._known: dict[tuple[Hashable, int | None], Any] = {}
        self._seconds: dict[tuple[Hashable, int | None], float] = {}
        self._used: set[tuple[Hashable, int | None]] = set()
        self._depth, self._spent = 0, 0.0

    def get(self, key: Hashable, seed: int | None, make: Callable[[], Any]) -> Any:
        """Return what `make` gives, or gave when this key and seed were asked for first."""
        whole = (key, seed)
        if self._depth == 0:  # what is made on the way to another value is a part of that one
            self._used.add(whole)
        if whole not in self._known:
            self._known = {k: v for k, v in self._known.items() if k[1] in (None, seed)}
            started, self._depth = self._now(), self._depth + 1
            try:
                self._known[whole] = make()
            finally:
                self._depth -= 1
            self._seconds[whole] = self._now() - started
            self._spent += self._seconds[whole] if self._depth == 0 else 0.0
        return self._known[whole]

    def watch(self) -> Callable[[int, int], float]:
        """Return a function that says how far the seconds since now are off a fair share.

        It takes the folds that share a value of a seed, and those that share one without, and
        returns the shares of everything that was used, minus the seconds spent on making it now:
        whoever comes first does not pay for all.
        """
        self._used, before = set(), self._spent

        def correction(folds_of_seed: int, folds: int) -> float:
            shares = (
                self._seconds[k] / (folds if k[1] is None else folds_of_seed) for k in self._used
            )
            return sum(shares) - (self._spent - before)

        return correction
