"""Attempts at a run until it is done: start, watch, take down, find out why, go on.

Everything is kept in OUT/launch: command.sh, events.jsonl, and for each attempt a folder with what
its ranks said and how they ended (`launch.rank`). Success is what the ranks say of themselves, not
the exit code of mpirun, pdsh or DeepSpeed's launcher.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from data_prep.errors import EXIT_FAILED, EXIT_USAGE
from data_prep.files import LAUNCH_FOLDER
from launch.logs import ends, root_cause, tail
from launch.node import LAUNCH_ID
from launch.rank import log_name, write_whole
from launch.verbs import check_and_find_folder, module_of, saved_step, to_go_on

EXIT_RESUMABLE = 75
_POLL_S = 0.2
_RESEND_S = 2.0
_LOOK_S = 1.0
# When one rank has ended, the others find out by themselves and say why: time for that.
_GRACE_S = 45.0
_AFTERWARDS_S = 5.0
_STACKS_S = 2.0
_BACK_OFF_S = (1.0, 300.0)


@dataclass(frozen=True)
class Job:
    """What is to be run, and how often it may be started again."""

    verb: str
    arguments: list[str]
    device: str = "auto"
    restarts: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)


class Way(Protocol):
    """A way to start ranks."""

    def usable_hosts(self) -> dict[str, int]:
        """Return host -> ranks of the hosts that can be used now; ValueError if there are none."""
        ...

    def commands(
        self, hosts: dict[str, int], attempt: Path, words: list[str], environment: dict[str, str]
    ) -> dict[str, list[str]]:
        """Return what to start here: a name and a command line for each launcher process.

        `words`: module of a rank and its arguments; `environment`: what the ranks' processes have
        to have.
        """
        ...

    def lost(self, hosts: dict[str, int]) -> list[str]:
        """Return those of the hosts that do not answer any more."""
        ...

    def signal(self, hosts: dict[str, int], launch: str, number: int, ranks_only: bool) -> None:
        """Send a signal to the processes of a launch on all hosts; do not wait for long."""
        ...


def run(way: Way, job: Job, show: bool = False) -> int:
    """Run a job, starting it again where that helps, and return its exit code.

    Parameters
    ----------
    show
        Print what would be started, and start nothing.
    """
    out = check_and_find_folder(job.verb, job.arguments)
    folder = out / LAUNCH_FOLDER
    stop = _Stop()
    arguments, left, wait_s = job.arguments, job.restarts, _BACK_OFF_S[0]
    before: tuple | None = None
    for number in range(_next_number(folder), sys.maxsize):
        hosts = way.usable_hosts()
        attempt = _Attempt(way, job, arguments, hosts, folder / f"attempt_{number}", stop)
        if show:
            attempt.print_commands()
            return 0
        saved = saved_step(out)
        code = attempt.run()
        if code in (0, EXIT_RESUMABLE) or (code == EXIT_USAGE and attempt.failed_at_start()):
            attempt.remove_if_nothing_began(code)
            return code
        lost = way.lost(hosts)
        cause, log = root_cause(attempt.folder, hosts, lost)
        now = (cause, saved_step(out), tuple(hosts), tuple(lost))
        progress = now[1] > saved
        _say(f"attempt {number} ended: {cause}" + (f" ({log})" if log else ""))
        _record(folder, "ended", attempt=number, code=code, cause=cause, step=now[1], lost=lost)
        if stop.asked or code == EXIT_USAGE:
            return code
        if now == before:
            _say(
                f"the same end twice at step {max(now[1], 0)}: not started again. Both logs: "
                f"{folder}/attempt_{number - 1} and attempt_{number}"
            )
            return EXIT_FAILED
        left = job.restarts if progress else left - 1
        if left < 0:
            _say(f"not started again: --restarts {job.restarts}; the same command goes on")
            return EXIT_FAILED
        wait_s = _BACK_OFF_S[0] if progress else min(2 * wait_s, _BACK_OFF_S[1])
        _say(f"starting again in {wait_s:.0f} s from step {max(now[1], 0)}")
        if stop.wait(wait_s):
            return EXIT_RESUMABLE
        arguments, before = to_go_on(job.verb, job.arguments), now
    raise AssertionError("unreachable")


class _Stop:
    """Remembers that somebody asked this process to stop."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._remember)

    def _remember(self, _number: int, _frame: object) -> None:
        self.asked = True

    def wait(self, seconds: float) -> bool:
        """Return True as soon as it is asked for, False after so many seconds."""
        until = time.monotonic() + seconds
        while not self.asked and time.monotonic() < until:
            time.sleep(_POLL_S)
        return self.asked


class _Attempt:
    """One start of all ranks."""

    def __init__(
        self,
        way: Way,
        job: Job,
        arguments: list[str],
        hosts: dict[str, int],
        folder: Path,
        stop: _Stop,
    ) -> None:
        self.folder = folder
        self._way, self._job, self._hosts, self._stop = way, job, hosts, stop
        self._id = uuid.uuid4().hex
        self._environment = {**job.environment, LAUNCH_ID: self._id}
        words = ["launch.rank", str(folder), module_of(job.verb), *arguments]
        self._commands = way.commands(hosts, folder, words, self._environment)
        self._printed = 0
        self._running: dict[str, subprocess.Popen] = {}

    def print_commands(self) -> None:
        for command in self._commands.values():
            print(shlex.join(command), flush=True)

    def run(self) -> int:
        """Start, watch and take down; return the exit code that the ranks agree on."""
        self._write_record()
        self.print_commands()
        for name, command in self._commands.items():
            suffix = f"-{name}" if name else ""
            with (self.folder / f"launcher{suffix}.log").open("ab") as log:
                # A session of its own: Ctrl-C is for this process, which asks the ranks to save.
                self._running[name] = subprocess.Popen(
                    command, env=os.environ | self._environment, stdout=log, stderr=log,
                    stdin=subprocess.DEVNULL, start_new_session=True,
                )  # fmt: skip
        try:
            self._watch()
        finally:
            self._take_down()
        return self._code()

    def _watch(self) -> None:
        """Return when all launchers have ended, or some time after the first rank failed."""
        failed_at = sent_at = looked_at = -1e9
        while any(p.poll() is None for p in self._running.values()):
            time.sleep(_POLL_S)
            self._print_first_rank()
            now = time.monotonic()
            if self._stop.asked and now - sent_at > _RESEND_S:
                # Again and again: a rank that is still starting ignores it.
                sent_at = now
                self._way.signal(self._hosts, self._id, signal.SIGUSR1, True)
            if failed_at < 0 and now - looked_at > _LOOK_S:
                looked_at = now
                bad = any(p.poll() for p in self._running.values())
                if bad or any(e["code"] for e in self._ends()):
                    failed_at = now
            if failed_at > 0 and now - failed_at > _GRACE_S:
                return

    def _take_down(self) -> None:
        """End what is left on every host, and the launchers."""
        codes = [p.poll() for p in self._running.values()]
        if any(codes) or None in codes:
            if None in codes:
                # Those that stand still write where, into their logs.
                self._way.signal(self._hosts, self._id, signal.SIGUSR2, True)
                time.sleep(_STACKS_S)
            self._way.signal(self._hosts, self._id, signal.SIGKILL, False)
        for process in self._running.values():
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        until = time.monotonic() + _AFTERWARDS_S
        # On a network's file system the last words come late.
        while len(self._ends()) < sum(self._hosts.values()) and time.monotonic() < until:
            if any(codes) or None in codes:
                break
            time.sleep(_POLL_S)
        self._print_first_rank()

    def _code(self) -> int:
        codes = [e["code"] for e in self._ends()]
        if codes.count(0) == sum(self._hosts.values()):
            return 0
        for code in (EXIT_RESUMABLE, EXIT_USAGE):
            if code in codes:
                return code
        return EXIT_FAILED

    def _ends(self) -> list[dict[str, Any]]:
        return [json.loads(p.read_text()) for p in self.folder.glob("rank_*.json")]

    def failed_at_start(self) -> bool:
        """Did the ranks refuse what they were given? Then rank 0 has said so on the console."""
        return any(e.code == EXIT_USAGE and e.rank == 0 for e in ends(self.folder))

    def remove_if_nothing_began(self, code: int) -> None:
        """After wrong input: leave no folder that was made for it."""
        out = self.folder.parent.parent
        if code != EXIT_USAGE or {p.name for p in out.iterdir()} - {LAUNCH_FOLDER}:
            return
        for path in sorted((out / LAUNCH_FOLDER).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        for path in (out / LAUNCH_FOLDER, out):
            with contextlib.suppress(OSError):
                path.rmdir()

    def _print_first_rank(self) -> None:
        first = self._printed == 0
        text, self._printed = tail(self.folder / log_name(0), self._printed)
        if first and text:
            text = text.partition("\n")[2]  # whose log it is
        print(text, end="", flush=True)

    def _write_record(self) -> None:
        self.folder.mkdir(parents=True)
        launch = self.folder.parent
        settings = {
            "verb": self._job.verb,
            "device": self._job.device,
            "nodes": len(self._hosts),
            "environment": self._environment
            | {"GENELOOM_LAUNCH_COMMAND": shlex.join(["geneloom", *sys.argv[1:]])},
        }
        write_whole(self.folder / "settings.json", settings)
        lines = [shlex.join(["geneloom", *sys.argv[1:]])]
        lines += [f"# {shlex.join(c)}" for c in self._commands.values()]
        (launch / "command.sh").write_text("\n".join(lines) + "\n")
        _record(launch, "started", attempt=int(self.folder.name.split("_")[1]), hosts=self._hosts)


def _next_number(folder: Path) -> int:
    numbers = [int(p.name.split("_")[1]) for p in folder.glob("attempt_*")]
    return max(numbers, default=0) + 1


def _record(folder: Path, event: str, **values: Any) -> None:
    line = {"time": time.time(), "event": event, **values}
    with (folder / "events.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def _say(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)
