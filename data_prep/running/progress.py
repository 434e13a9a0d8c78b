"""Shows the progress of long work: a bar on a terminal, and lines of text elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_EVERY_S = 15.0


@contextlib.contextmanager
def show_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yield a function (what, done, total) that shows the progress of the work on stderr."""
    if not sys.stderr.isatty():
        yield _Lines().show
        return
    columns = (
        TextColumn("{task.description:<15}"),
        BarColumn(),
        TextColumn("{task.completed:>12,.0f} / {task.total:,.0f}"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield _Bar(bar).show


class _Rate:
    """Amount of work per second since a step began, without work that was done before."""

    def __init__(self) -> None:
        self.what, self._began, self._at_start = "", 0.0, 0

    def update(self, what: str, done: int) -> tuple[bool, float]:
        """Return (whether a new step begins, amount of work per second)."""
        now = time.monotonic()
        is_new = what != self.what
        if is_new:
            self.what, self._began, self._at_start = what, now, done
        return is_new, (done - self._at_start) / max(1e-3, now - self._began)


class _Bar:
    def __init__(self, bar: Progress) -> None:
        self._bar, self._rate, self._task = bar, _Rate(), None

    def show(self, what: str, done: int, total: int) -> None:
        is_new, rate = self._rate.update(what, done)
        if is_new:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(what, rate="")
        assert self._task is not None
        text = f"{rate:,.0f}/s" if done else ""
        self._bar.update(self._task, completed=done, total=total, rate=text)


class _Lines:
    """Prints a line of progress every 15 s, for log files of batch systems."""

    def __init__(self) -> None:
        self._rate, self._last = _Rate(), time.monotonic()

    def show(self, what: str, done: int, total: int) -> None:
        _, rate = self._rate.update(what, done)
        now = time.monotonic()
        if now - self._last < _LINE_EVERY_S:
            return
        self._last = now
        left = f", {(total - done) / rate:,.0f} s left" if rate else ""
        print(f"{what}: {done:,} of {total:,}, {rate:,.0f}/s{left}", file=sys.stderr, flush=True)
