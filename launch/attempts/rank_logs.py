"""What the ranks of an attempt said and how they ended; who was first."""

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
# What a rank says when it ends because of another one.
_OF_OTHERS = (
    "gave no sign of life", "which all ranks talk through",
    "a collective failed", "Connection closed by peer",
)  # fmt: skip
_TOLD = re.compile(r"^rank \d+ failed: ")


@dataclass(frozen=True)
class End:
    """How a rank ended; `text` is its last error, empty if it said none."""

    rank: int
    host: str
    code: int
    at: float
    text: str
    log: Path

    @property
    def is_echo(self) -> bool:
        """Did it end because of another rank?"""
        return bool(_TOLD.match(self.text)) or any(mark in self.text for mark in _OF_OTHERS)

    def say(self) -> str:
        how = self.text or f"exit code {self.code}, without a word"
        if self.code < 0:
            how = f"ended by {_signal_name(-self.code)}" + (f": {self.text}" if self.text else "")
        if self.code == -signal.SIGKILL:
            how += " (by hand, or by the system for lack of memory: `dmesg` there tells)"
        return f"rank {self.rank} on {self.host}: {how}"


def end_records(attempt: Path) -> list[dict[str, Any]]:
    """Return what `launch.attempts.rank` has written of those ranks that have ended."""
    return [json.loads(path.read_text()) for path in attempt.glob("rank_*.json")]


def ends(attempt: Path) -> list[End]:
    """Return the ends of those ranks that have ended, the first one first."""
    found = []
    for record in end_records(attempt):
        log = attempt / log_name(record["rank"])
        text = last_error(log) if record["code"] else ""
        found.append(End(record["rank"], record["host"], record["code"], record["to"], text, log))
    return sorted(found, key=lambda e: e.at)


def root_cause(
    attempt: Path, hosts: dict[str, int], lost_hosts: list[str]
) -> tuple[str, Path | None]:
    """Return why an attempt ended, in one sentence, and the log to look at.

    The first rank that failed by itself; else a host that is gone; else a rank that never ended;
    else what the others complain about. `hosts`: host -> ranks, in the order of ranks.
    """
    ended = ends(attempt)
    failed = [e for e in ended if e.code != 0]
    # Ranks that saved and stopped did so because of another one, or were asked to.
    echoes = (-signal.SIGTERM, EXIT_RESUMABLE)
    own = [e for e in failed if not e.is_echo and e.code not in echoes]
    # Echoes come later: a machine whose clock is ahead must not make one the first.
    # What all ranks find together only rank 0 says.
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
    """Add a line to the events.jsonl of a run's folder of launches; where it cannot be, say so."""
    line = json.dumps({"time": time.time(), "event": event, **values}) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / EVENTS).open("a") as file:
            file.write(line)
    except OSError as error:
        print(f"launch: not recorded in {folder / EVENTS}: {error}", file=sys.stderr, flush=True)


def read_events(folder: Path) -> list[dict[str, Any]]:
    """Return the events of a run's folder of launches, oldest first."""
    return read_json_lines(folder / EVENTS)


def last_error(log: Path) -> str:
    """Return the last message of an error in a log, its first line and the notes below it."""
    lines = _last_lines(log)
    for place in range(len(lines) - 1, -1, -1):
        line = _TORCH_PREFIX.sub("", lines[place])
        found = _ERROR.match(line)
        if found:
            return found[1]
        if " ends: " in line:
            # Without whose words these are, and what to do: the caller knows.
            return line.partition(" ends: ")[2].partition(". The last complete checkpoint")[0]
        if _PYTHON_ERROR.match(line):
            return line
    return ""


def tail(path: Path, start: int) -> tuple[str, int]:
    """Return the whole lines of a file from a byte on, and the byte after them."""
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
    """Return the last lines of what the launchers themselves said."""
    said = [line for path in sorted(attempt.glob("launcher*.log")) for line in _words(path)]
    return "no rank started: " + (" | ".join(said[-3:]) or "the launcher said nothing")


def _words(path: Path) -> Iterator[str]:
    return (line.strip() for line in _last_lines(path) if line.strip(" -\n"))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
