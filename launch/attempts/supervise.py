"""Attempts at a run until it is done: start, watch, take down, find out why, go on.

Everything is kept in OUT/launch: command.sh, events.jsonl, and for each attempt a folder with what
its ranks said and how they ended (`launch.attempts.rank`). Success is what the ranks say of
themselves, not the exit code of mpirun, pdsh or DeepSpeed's launcher.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from data_prep.errors import EXIT_FAILED, EXIT_RESUMABLE, EXIT_USAGE
from data_prep.files import LAUNCH_FOLDER, names_in
from data_prep.running.network import TOKEN
from data_prep.running.owner import (
    ATTEMPT,
    LAUNCH_ID,
    SERIES,
    refuse_if_in_use,
    this_process,
)
from data_prep.running.redact import is_public, redacted_command
from launch.attempts.rank import ALIVE, TOUCH_S, log_name, make_private, write_private
from launch.attempts.rank_logs import end_records, record_event, root_cause, tail
from launch.verbs import check_and_find_folder, module_of, saved_step, to_go_on

# In the folder of an attempt: lines as `node1 slots=8`, and as `NAME=VALUE`.
HOSTFILE, ENVIRONMENT = "hostfile", "environment"
_POLL_S = 0.2
# One Ctrl-C may come twice.
_SECOND_S = 0.5
_RESEND_S = 2.0
_LOOK_S = 1.0
# When one rank has ended, the others find out by themselves and say why: time for that.
_GRACE_S = 45.0
_SOON_S = 8.0
_AFTERWARDS_S = 5.0
_STACKS_S = 2.0
_BACK_OFF_S = (1.0, 300.0)
_LEAST_FREE = 1 << 20
_ASKED = b"launch: the ranks finish their step and save; Ctrl-C again: end at once\n"
_INTERRUPTED = 128 + signal.SIGINT


@dataclass(frozen=True)
class Job:
    """What is to be run, and how often it may be started again."""

    verb: str
    arguments: list[str]
    device: str = "auto"
    restarts: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)
    # Of the shell or the user, for ranks alone; may hold secrets.
    variables: Mapping[str, str] = field(default_factory=dict)


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
    if not show:
        refuse_if_in_use(out)
    folder = out / LAUNCH_FOLDER
    was_there, series = folder.exists(), uuid.uuid4().hex
    stop, patience = Stop(), _Patience(job.restarts)
    arguments = job.arguments
    for number in range(_next_number(folder), sys.maxsize):
        hosts = way.usable_hosts()
        attempt = Attempt(
            way, module_of(job.verb), arguments, hosts, folder / f"attempt_{number}", job.device,
            {**job.environment, SERIES: series, ATTEMPT: str(number)}, stop,
            variables=job.variables,
        )  # fmt: skip
        print("\n".join(attempt.show()), flush=True)
        if show:
            return 0
        commands = attempt.show(redacted_command)
        record_event(folder, "started", attempt=number, hosts=hosts, commands=commands)
        command = folder / "command.sh"
        before = command.read_text() if command.exists() else None
        with contextlib.suppress(OSError):
            command.write_text(_own_command() + "\n")
        saved = saved_step(out)
        code = attempt.run()
        if attempt.was_refused():
            if before is not None:
                command.write_text(before)
            attempt.remove_if_nothing_began(was_there)
            if was_there:
                record_event(folder, "refused", attempt=number, code=code)
            return code
        if stop.at_once:
            record_event(folder, "ended", attempt=number, code=_INTERRUPTED, cause="Ctrl-C, twice")
            return _INTERRUPTED
        if code in (0, EXIT_RESUMABLE):
            record_event(folder, "done" if code == 0 else "stopped", attempt=number)
            return code
        lost = way.lost(hosts)
        cause, log = root_cause(attempt.folder, hosts, lost)
        cause = _full_disk(out) or cause
        end = _End(cause, saved_step(out), tuple(hosts), tuple(lost))
        _say(f"attempt {number} ended: {cause}" + (f" ({log})" if log else ""))
        record_event(
            folder, "ended", attempt=number, code=code, cause=cause, step=end.step, lost=lost
        )
        if stop.asked or code == EXIT_USAGE:
            return code
        wait_s = patience.after(end, end.step > saved, folder, number)
        if wait_s is None:
            return EXIT_FAILED
        _say(f"starting again in {wait_s:.0f} s from step {max(end.step, 0)}")
        if stop.wait(wait_s):
            return EXIT_RESUMABLE
        arguments = to_go_on(job.verb, job.arguments)
    raise AssertionError("unreachable")


@dataclass(frozen=True)
class _End:
    """How an attempt ended; `step`: of the newest checkpoint then."""

    cause: str
    step: int
    hosts: tuple[str, ...]
    lost: tuple[str, ...]


class _Patience:
    """Decides whether another start can help, and how long to wait before it."""

    def __init__(self, restarts: int) -> None:
        self._restarts = self._left = restarts
        self._wait_s = _BACK_OFF_S[0]
        self._before: _End | None = None

    def after(self, end: _End, progress: bool, folder: Path, number: int) -> float | None:
        """Return the seconds to wait, None to give up. `progress`: there is a newer checkpoint."""
        if end == self._before:
            _say(
                f"the same end twice at step {max(end.step, 0)}: not started again. Both logs: "
                f"{folder}/attempt_{number - 1} and attempt_{number}"
            )
            return None
        self._before = end
        self._left = self._restarts if progress else self._left
        self._wait_s = _BACK_OFF_S[0] if progress else min(2 * self._wait_s, _BACK_OFF_S[1])
        self._left -= 1
        if self._left < 0:
            _say(f"not started again (--restarts {self._restarts}); the same command goes on")
            return None
        return self._wait_s


class Stop:
    """Remembers that somebody asked this process to stop; at a second Ctrl-C to end at once."""

    def __init__(self) -> None:
        self.asked = self.at_once = False
        self._interrupted = math.inf
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self._remember)
        # Ranks on other hosts would take a command that stands still for one that is gone.
        signal.signal(signal.SIGTSTP, signal.SIG_IGN)

    def _remember(self, number: int, _frame: object) -> None:
        self.asked = True
        if number == signal.SIGINT:
            os.write(sys.stderr.fileno(), _ASKED)
            now = time.monotonic()
            self.at_once |= now - self._interrupted > _SECOND_S
            self._interrupted = min(now, self._interrupted)

    def wait(self, seconds: float) -> bool:
        """Return True as soon as it is asked for, False after so many seconds."""
        until = time.monotonic() + seconds
        while not self.asked and time.monotonic() < until:
            time.sleep(_POLL_S)
        return self.asked


class Attempt:
    """One start of all ranks."""

    def __init__(
        self,
        way: Way,
        module: str,
        arguments: list[str],
        hosts: dict[str, int],
        folder: Path,
        device: str,
        environment: Mapping[str, str],
        stop: Stop | None = None,
        limit_s: float = math.inf,
        is_quiet: bool = False,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self._limit_s, self._is_quiet = limit_s, is_quiet
        self._way, self._hosts, self._device, self._stop = way, hosts, device, stop
        self._id = uuid.uuid4().hex
        self._environment = {**environment, LAUNCH_ID: self._id}
        self._variables = variables or {}
        words = ["launch.attempts.rank", str(folder), module, *arguments]
        self._commands = way.commands(hosts, folder, words, self._environment)
        self._printed = 0
        self._running: dict[str, subprocess.Popen] = {}

    def show(self, line_of: Callable[[list[str]], str] = shlex.join) -> list[str]:
        """Return the command lines of the launchers; `line_of` makes one line of its words."""
        return [line_of(command) for command in self._commands.values()]

    def run(self) -> int:
        """Start, watch and take down; return the exit code that the ranks agree on."""
        try:
            self._write_settings()
        except OSError as error:
            _say(f"{self.folder} cannot be written: {error}")
            return EXIT_FAILED
        for name, command in self._commands.items():
            suffix = f"-{name}" if name else ""
            with (self.folder / f"launcher{suffix}.log").open("ab") as log:
                # A session of its own: Ctrl-C is for this process, which asks the ranks to save.
                self._running[name] = subprocess.Popen(
                    command, env=os.environ | self._environment, stdout=log, stderr=log,
                    stdin=subprocess.DEVNULL, start_new_session=True,
                )  # fmt: skip
        ended = threading.Event()
        threading.Thread(target=self._touch, args=(ended,), daemon=True).start()
        try:
            self._watch()
        finally:
            self._take_down()
            ended.set()
            self._write_rank_settings({n: v for n, v in self._variables.items() if is_public(n)})
        return self._code()

    def _touch(self, ended: threading.Event) -> None:
        """Show those on other machines that this process is there."""
        while not ended.wait(TOUCH_S):
            with contextlib.suppress(OSError):
                (self.folder / ALIVE).touch(mode=0o600)

    def _watch(self) -> None:
        """Return when all launchers have ended, or some time after the first rank failed."""
        started = time.monotonic()
        failed_at = sent_at = looked_at = -math.inf
        waiting_for = -1
        while any(p.poll() is None for p in self._running.values()):
            time.sleep(_POLL_S)
            self._print_first_rank()
            now = time.monotonic()
            if self._stop and self._stop.asked and now - sent_at > _RESEND_S:
                # Again and again: a rank that is still starting ignores it.
                sent_at = now
                self._way.signal(self._hosts, self._id, signal.SIGUSR1, True)
            if self._stop and self._stop.at_once:
                return
            if self._stop and self._stop.asked and self._all_ended():
                return
            if failed_at < 0 and now - looked_at > _LOOK_S:
                looked_at = now
                if self._all_ended():
                    return
                bad = [code for p in self._running.values() if (code := p.poll())]
                if bad and min(bad) < 0:
                    # A launcher was killed: its ranks may be as they were.
                    self._way.signal(self._hosts, self._id, signal.SIGUSR1, True)
                if bad or any(e["code"] for e in self._ends()):
                    failed_at = now
            if 0 < failed_at < now - _SOON_S and waiting_for < 0:
                # mpirun waits for a host that is gone; its ranks will not say anything either.
                lost = self._way.lost(self._hosts)
                waiting_for = sum(n for host, n in self._hosts.items() if host not in lost)
            if 0 <= waiting_for <= len(self._ends()):
                return
            if 0 < failed_at < now - _GRACE_S or now - started > self._limit_s:
                return
        if not any((p.returncode or 0) > 0 for p in self._running.values()):
            self._wait_for_ends()

    def _wait_for_ends(self) -> None:
        """Wait for what ranks say of their ends, when no launcher has said that something failed.

        On a network's file system it comes late. Or the ranks are still there, and can save: their
        launcher was killed. (DeepSpeed's runner ends with 0 if its pdsh is.)
        """
        for limit_s in (_AFTERWARDS_S, _GRACE_S):
            until = time.monotonic() + limit_s
            while time.monotonic() < until:
                if self._all_ended():
                    return
                time.sleep(_POLL_S)
            self._way.signal(self._hosts, self._id, signal.SIGUSR1, True)

    def _take_down(self) -> None:
        """End what is left on every host, and the launchers."""
        codes = [p.poll() for p in self._running.values()]
        if any(codes) or not self._all_ended():
            is_hurried = self._all_ended() or (self._stop is not None and self._stop.at_once)
            if None in codes and not is_hurried:
                # Those that stand still write where, into their logs.
                self._way.signal(self._hosts, self._id, signal.SIGUSR2, True)
                time.sleep(_STACKS_S)
            self._way.signal(self._hosts, self._id, signal.SIGKILL, False)
        for process in self._running.values():
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._print_first_rank()

    def _code(self) -> int:
        codes = [e["code"] for e in self._ends()]
        if codes.count(0) == sum(self._hosts.values()):
            return 0
        if EXIT_RESUMABLE in codes:
            # A rank without an end was killed: the others saved because of that, nobody asked.
            was_asked = self._all_ended() or (self._stop is not None and self._stop.asked)
            return EXIT_RESUMABLE if was_asked else EXIT_FAILED
        return EXIT_USAGE if EXIT_USAGE in codes else EXIT_FAILED

    def _ends(self) -> list[dict[str, Any]]:
        return end_records(self.folder)

    def _all_ended(self) -> bool:
        """Have all ranks ended? Their launchers take seconds more, for nothing."""
        return len(self._ends()) == sum(self._hosts.values())

    def was_refused(self) -> bool:
        """Was it wrong input? Then rank 0 has said so on the console."""
        return any(e["code"] == EXIT_USAGE and e["rank"] == 0 for e in self._ends())

    def remove_if_nothing_began(self, was_there: bool) -> None:
        """Leave no folder that was made for a run that was refused; nothing else is touched.

        `was_there`: OUT/launch was there before, and may be that of a run, or of a job that waits.
        """
        out = self.folder.parent.parent
        if was_there or names_in(out):
            shutil.rmtree(self.folder)
            return
        shutil.rmtree(out / LAUNCH_FOLDER)
        with contextlib.suppress(OSError):
            out.rmdir()

    def _print_first_rank(self) -> None:
        if self._is_quiet:
            return
        first = self._printed == 0
        text, self._printed = tail(self.folder / log_name(0), self._printed)
        if first and text:
            text = text.partition("\n")[2]  # whose log it is
        print(text, end="", flush=True)

    def _write_settings(self) -> None:
        """Write what `launch.attempts.rank` reads, and what a launcher may."""
        make_private(self.folder)
        self._write_rank_settings({TOKEN: secrets.token_hex(32), **self._variables})
        (self.folder / ALIVE).touch(mode=0o600)
        hosts, variables = self._hosts.items(), sorted(self._environment.items())
        (self.folder / HOSTFILE).write_text("".join(f"{h} slots={n}\n" for h, n in hosts))
        (self.folder / ENVIRONMENT).write_text("".join(f"{k}={v}\n" for k, v in variables))

    def _write_rank_settings(self, variables: Mapping[str, str]) -> None:
        """Write what `launch.attempts.rank` reads; at the end again, without what may be secret."""
        command = {"GENELOOM_LAUNCH_COMMAND": _own_command()}
        settings = {
            "device": self._device,
            "nodes": len(self._hosts),
            "supervisor": this_process(),
            "environment": {**variables, **self._environment, **command},
        }
        write_private(self.folder / "settings.json", json.dumps(settings))


def _full_disk(out: Path) -> str:
    """Return what is said if nothing more can be written: ranks could not say so themselves."""
    free = shutil.disk_usage(out).free
    if free >= _LEAST_FREE:
        return ""
    return f"the disk of {out} is full ({free / 2**20:.1f} MiB free); make room there"


def _own_command() -> str:
    return redacted_command(["geneloom", *sys.argv[1:]])


def _next_number(folder: Path) -> int:
    numbers = [int(p.name.split("_")[1]) for p in folder.glob("attempt_*")]
    return max(numbers, default=0) + 1


def _say(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)
