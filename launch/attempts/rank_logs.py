"""Reads the logs and exit codes of an attempt's ranks, and finds the cause of a failure.

`root_cause` explains in one sentence why an attempt ended. `record_event` and `read_events` keep
the list of a run's events.
"""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import EXIT_RESUMABLE
from data_prep.files import read_json_lines
from launch.attempts.rank import log_name

EVENTS = "events.jsonl"
_TAIL_BYTES = 64_000
_ERROR = re.compile(r"^error(?: on rank \d+)?: (.*)")
_TORCH_PREFIX = re.compile(r"^\[rank\d+\]: ")
_PYTHON_ERROR = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit)\b.*")
# Phrases in the error message of a rank that ends because another rank failed.
_OF_OTHERS = (
    "gave no sign of life", "which all ranks talk through",
    "a collective failed", "Connection closed by peer",
)  # fmt: skip
_TOLD = re.compile(r"^rank \d+ failed: ")
_MISSED = re.compile(r"^rank (\d+)\b.* gave no sign of life")


@dataclass(frozen=True)
class End:
    """The end of a rank; `text` is its last error message, '' if there is none."""

    rank: int
    host: str
    code: int
    at: float
    text: str
    log: Path

    @property
    def is_echo(self) -> bool:
        """Whether the rank ended because another rank failed."""
        return bool(_TOLD.match(self.text)) or any(mark in self.text for mark in _OF_OTHERS)

    @property
    def missed(self) -> int | None:
        """The rank that this rank has found to give no sign of life."""
        found = _MISSED.match(self.text)
        return int(found[1]) if found else None

    def say(self) -> str:
        how = self.text or f"exit code {self.code}, without a word"
        if self.code < 0:
            how = f"ended by {_signal_name(-self.code)}" + (f": {self.text}" if self.text else "")
        if self.code == -signal.SIGKILL:
            how += " (by hand, or by the system for lack of memory: `dmesg` there tells)"
        return f"rank {self.rank} on {self.host}: {how}"


def end_records(attempt: Path) -> list[dict[str, Any]]:
    """Return the records that `launch.attempts.rank` has written for the ranks that have ended."""
    return [json.loads(path.read_text()) for path in attempt.glob("rank_*.json")]


def ends(attempt: Path) -> list[End]:
    """Return the ends of the ranks that have ended, in the order of time."""
    return sorted((end_of(attempt, r) for r in end_records(attempt)), key=lambda e: e.at)


def end_of(attempt: Path, record: dict[str, Any]) -> End:
    """Return the end of the rank that a record is of, with what its log says."""
    log = attempt / log_name(record["rank"])
    text = last_error(log) if record["code"] else ""
    return End(record["rank"], record["host"], record["code"], record["to"], text, log)


def root_cause(
    attempt: Path, hosts: dict[str, int], lost_hosts: list[str]
) -> tuple[str, Path | None]:
    """Return the cause of an attempt's end in one sentence, and the path of the log to read.

    The cause is the first of these that exists: a rank that failed by itself; a host that cannot be
    reached; a rank without a record of its end; the error message of another rank; the last output
    of the launchers. `hosts` maps each host to its number of ranks, in the order of ranks.
    """
    ended = ends(attempt)
    failed = [e for e in ended if e.code != 0]
    # Ranks that saved and stopped did so because another rank failed, or because they were asked.
    echoes = (-signal.SIGTERM, EXIT_RESUMABLE)
    own = [e for e in failed if not e.is_echo and e.code not in echoes]
    # Ranks that failed because of another rank are left out above, because clocks that differ could
    # make one of them the first. An error that all ranks find together is printed by rank 0 only,
    # so exit codes without a message are sorted last.
    own.sort(key=lambda e: (e.code > 0 and not e.text, e.at))
    if own:
        return own[0].say(), own[0].log
    echo = f"; {failed[0].say()}" if failed else ""
    if lost_hosts:
        return f"{', '.join(lost_hosts)} cannot be reached{echo}", failed[0].log if failed else None
    owners = [host for host, ranks in hosts.items() for _ in range(ranks)]
    silent = sorted(set(range(len(owners))) - {e.rank for e in ended})
    if silent and not any(attempt.glob("rank_*.log")):
        return _launchers_word(attempt), None
    if silent:
        names = ", ".join(f"rank {r} on {owners[r]}" for r in silent[:4])
        more = ", ..." if len(silent) > 4 else ""
        log = attempt / log_name(silent[0])
        return f"{names}{more}: ended from outside, or stood still{echo}", log
    if failed:
        return failed[0].say(), failed[0].log
    return _launchers_word(attempt), None


def record_event(folder: Path, event: str, **values: Any) -> None:
    """Append an event to events.jsonl in a run's launch folder; print a message if that fails."""
    line = json.dumps({"time": time.time(), "event": event, **values}) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / EVENTS).open("a") as file:
            file.write(line)
    except OSError as error:
        print(f"launch: not recorded in {folder / EVENTS}: {error}", file=sys.stderr, flush=True)


def read_events(folder: Path) -> list[dict[str, Any]]:
    """Return the events in a run's launch folder, oldest first."""
    return read_json_lines(folder / EVENTS)


def last_error(log: Path) -> str:
    """Return the first line of the last error message in a log; '' if there is none."""
    lines = _last_lines(log)
    for place in range(len(lines) - 1, -1, -1):
        line = _TORCH_PREFIX.sub("", lines[place])
        found = _ERROR.match(line)
        if found:
            return found[1]
        if " ends: " in line:
            # The name of the rank before the message and the advice after it are cut off.
            return line.partition(" ends: ")[2].partition(". The last complete checkpoint")[0]
        if _PYTHON_ERROR.match(line):
            return line
    return ""


def tail(path: Path, start: int) -> tuple[str, int]:
    """Return the complete lines of a file from byte `start` on, and the byte after them."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            content = file.read()
    except OSError:
        return "", start
    whole = content[: content.rfind(b"\n") + 1]
    return whole.decode(errors="replace"), start + len(whole)


def _last_lines(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []


def _launchers_word(attempt: Path) -> str:
    """Return a message with the last three lines that the launchers themselves printed."""
    said = [line for path in sorted(attempt.glob("launcher*.log")) for line in _words(path)]
    return "no rank started: " + (" | ".join(said[-3:]) or "the launcher said nothing")


def _words(path: Path) -> Iterator[str]:
    return (line.strip() for line in _last_lines(path) if line.strip(" -\n"))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
