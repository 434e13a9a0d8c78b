"""Starts and watches a run on several ranks, and starts it again after a failure until it is done.

`run` is the loop over attempts. Each `Attempt` starts the launcher processes of a `Way`, watches
them and the records of the ranks (`launch.attempts.rank`), and kills what is left at the end. After
a failure, `launch.attempts.rank_logs.root_cause` finds the cause, and `_Patience` decides whether
to start again. All records are in OUT/launch: command.sh, events.jsonl, and for each attempt a
folder with the logs and exit codes of its ranks. The result of an attempt follows from the exit
codes of the ranks, not from that of mpirun, pdsh or DeepSpeed's launcher.
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
from launch.attempts.grace import UNKNOWN_S, Grace
from launch.attempts.rank import (
    ALIVE,
    TOUCH_S,
    log_name,
    make_private,
    remove_secrets,
    write_private,
    write_secrets,
)
from launch.attempts.rank_logs import end_records, record_event, root_cause, tail
from launch.hosts.ask_hosts import SSH_ARGUMENTS
from launch.verbs import check_and_find_folder, module_of, saved_step, to_go_on

# Files in the folder of an attempt, with lines like `node1 slots=8` and like `NAME=VALUE`.
HOSTFILE, ENVIRONMENT = "hostfile", "environment"
_POLL_S = 0.2
# A second SIGINT within this time is the same Ctrl-C, which may arrive twice.
_SECOND_S = 0.5
_RESEND_S = 2.0
_LOOK_S = 0.5
_SOON_S = 1.0
_AFTERWARDS_S = 5.0
_STACKS_S = 2.0
_BACK_OFF_S = (1.0, 300.0)
_LEAST_FREE = 1 << 20
_ASKED = b"launch: the ranks finish their step and save; Ctrl-C again: end at once\n"
_INTERRUPTED = 128 + signal.SIGINT


@dataclass(frozen=True)
class Job:
    """A command to run on several ranks, and how often it may be started again."""

    verb: str
    arguments: list[str]
    device: str = "auto"
    restarts: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)
    # Environment variables from the shell or the user, for the ranks only; they may hold secrets.
    variables: Mapping[str, str] = field(default_factory=dict)


class Way(Protocol):
    """A way to start ranks, such as mpirun or ssh: the interface of the classes of `launch.ways`.

    Hosts are given as a mapping from host to number of ranks.
    """

    def usable_hosts(self) -> dict[str, int]:
        """Return the number of ranks for each usable host; ValueError if no host is usable."""
        ...

    def commands(
        self, hosts: dict[str, int], attempt: Path, words: list[str], environment: dict[str, str]
    ) -> dict[str, list[str]]:
        """Return the command lines of the launcher processes to start here, by name.

        `words` are the module of a rank and its arguments; `environment` holds the variables that
        the processes of the ranks must have.
        """
        ...

    def lost(self, hosts: dict[str, int]) -> list[str]:
        """Return the hosts that do not answer any more."""
        ...

    def signal(self, hosts: dict[str, int], launch: str, number: int, ranks_only: bool) -> None:
        """Send a signal to the processes of a launch on all hosts, without waiting for long."""
        ...


def run(way: Way, job: Job, show: bool = False) -> int:
    """Run a job, start it again where that can help, and return its exit code.

    Parameters
    ----------
    show
        Only print the command lines of the first attempt, and start nothing.
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
        commands = attempt.show(redacted_command)
        print("\n".join(attempt.show() if show else commands), flush=True)
        if show:
            return 0
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
        remove_secrets(folder)  # also those of a launcher that was killed before its ranks began
        if stop.at_once:
            record_event(folder, "ended", attempt=number, code=_INTERRUPTED, cause="Ctrl-C, twice")
            return _INTERRUPTED
        if code in (0, EXIT_RESUMABLE):
            record_event(folder, "done" if code == 0 else "stopped", attempt=number)
            return code
        lost = attempt.lost()
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
    """The end of an attempt; `step` is the step of the newest checkpoint at that time."""

    cause: str
    step: int
    hosts: tuple[str, ...]
    lost: tuple[str, ...]


class _Patience:
    """Decides whether another attempt can help, and how long to wait before it."""

    def __init__(self, restarts: int) -> None:
        self._restarts = self._left = restarts
        self._wait_s = _BACK_OFF_S[0]
        self._before: _End | None = None

    def after(self, end: _End, progress: bool, folder: Path, number: int) -> float | None:
        """Return the seconds to wait before the next attempt, None to give up.

        `progress` tells whether the attempt has saved a newer checkpoint.
        """
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
    """Remembers whether this process was asked to stop, or, by a second Ctrl-C, to end at once."""

    def __init__(self) -> None:
        self.asked = self.at_once = False
        self._interrupted = math.inf
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # not nohup
                signal.signal(number, self._remember)
        # Ctrl-Z is ignored, because for ranks on other hosts a suspended command looks dead.
        signal.signal(signal.SIGTSTP, signal.SIG_IGN)

    def _remember(self, number: int, _frame: object) -> None:
        self.asked = True
        if number == signal.SIGINT:
            os.write(sys.stderr.fileno(), _ASKED)
            now = time.monotonic()
            self.at_once |= now - self._interrupted > _SECOND_S
            self._interrupted = min(now, self._interrupted)

    def wait(self, seconds: float) -> bool:
        """Return True as soon as this process is asked to stop, False after `seconds`."""
        until = time.monotonic() + seconds
        while not self.asked and time.monotonic() < until:
            time.sleep(_POLL_S)
        return self.asked


class Attempt:
    """One attempt at a run: starts all ranks, watches them, and ends them."""

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
        self._grace = Grace(folder, hosts, way.lost)

    def show(self, line_of: Callable[[list[str]], str] = shlex.join) -> list[str]:
        """Return the command lines of the launchers; `line_of` joins the words of a command."""
        return [line_of(command) for command in self._commands.values()]

    def run(self) -> int:
        """Start all ranks, watch them, kill remaining processes; return the attempt's exit code."""
        try:
            self._write_settings()
        except OSError as error:
            _say(f"{self.folder} cannot be written: {error}")
            return EXIT_FAILED
        for name, command in self._commands.items():
            suffix = f"-{name}" if name else ""
            with (self.folder / f"launcher{suffix}.log").open("ab") as log:
                # The launcher gets its own session, so that Ctrl-C reaches only this process, which
                # asks the ranks to save.
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
            remove_secrets(self.folder)
            self._write_rank_settings({})
        return self._code()

    def _touch(self, ended: threading.Event) -> None:
        """Touch the heartbeat file, which ranks on other machines watch, until the attempt ends."""
        while not ended.wait(TOUCH_S):
            with contextlib.suppress(OSError):
                (self.folder / ALIVE).touch(mode=0o600)

    def _watch(self) -> None:
        """Wait until all ranks or all launchers have ended, or for some time after a failure."""
        started = time.monotonic()
        sent_at = looked_at = -math.inf
        while any(p.poll() is None for p in self._running.values()):
            time.sleep(_POLL_S)
            self._print_first_rank()
            now = time.monotonic()
            if self._stop and self._stop.asked and now - sent_at > _RESEND_S:
                # The signal is repeated, because a rank that is still starting ignores it.
                sent_at = now
                self._way.signal(self._hosts, self._id, signal.SIGUSR1, True)
            if self._stop and self._stop.at_once:
                return
            if now - looked_at > _LOOK_S:
                looked_at = now
                if self._all_ended():
                    return
                self._look_for_failure()
                if self._grace.has_begun and self._grace.is_over():
                    return
            if now - started > self._limit_s:
                return
        if not any((p.returncode or 0) > 0 for p in self._running.values()):
            self._wait_for_ends()

    def _look_for_failure(self) -> None:
        """Let the grace of the other ranks begin when a launcher or a rank has failed."""
        if self._grace.has_begun:
            return
        bad = [code for p in self._running.values() if (code := p.poll())]
        if bad and min(bad) < 0:
            # A launcher was killed, and its ranks may still be running.
            self._way.signal(self._hosts, self._id, signal.SIGUSR1, True)
        if bad or any(e["code"] for e in self._ends()):
            self._grace.begin()

    def _wait_for_ends(self) -> None:
        """Wait for the end records of the ranks after the launchers ended without an error.

        On a network file system the records may appear late. Or the ranks are still running,
        because their launcher was killed; then they are asked to save. (DeepSpeed's runner ends
        with exit code 0 if its pdsh is killed.) Asking ranks that have ended does no harm.
        """
        for limit_s in (_SOON_S, _AFTERWARDS_S, UNKNOWN_S):
            until = time.monotonic() + limit_s
            while time.monotonic() < until:
                if self._all_ended():
                    return
                time.sleep(_POLL_S)
            self._way.signal(self._hosts, self._id, signal.SIGUSR1, True)

    def _take_down(self) -> None:
        """Kill the processes that are left on every host, and the launchers."""
        self._grace.end()
        codes = [p.poll() for p in self._running.values()]
        if any(codes) or not self._all_ended():
            lost = self._grace.known_lost()
            answering = {h: n for h, n in self._hosts.items() if h not in lost}
            at_once = self._stop is not None and self._stop.at_once
            if None in codes and not at_once and self._grace.unaccounted():
                # On SIGUSR2, ranks that hang write their stack traces to their logs.
                self._way.signal(answering, self._id, signal.SIGUSR2, True)
                time.sleep(_STACKS_S)
            if lost:
                # They may come back, and are told too; nobody waits for them.
                later = (dict.fromkeys(lost, 0), self._id, signal.SIGKILL, False)
                threading.Thread(target=self._way.signal, args=later, daemon=True).start()
            self._way.signal(answering, self._id, signal.SIGKILL, False)
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
            # If a rank has no end record and nobody asked to stop, that rank was killed, and the
            # others saved because of it.
            was_asked = self._all_ended() or (self._stop is not None and self._stop.asked)
            return EXIT_RESUMABLE if was_asked else EXIT_FAILED
        return EXIT_USAGE if EXIT_USAGE in codes else EXIT_FAILED

    def _ends(self) -> list[dict[str, Any]]:
        return end_records(self.folder)

    def _all_ended(self) -> bool:
        """Return whether all ranks have ended; their launchers need some seconds more."""
        return len(self._ends()) == sum(self._hosts.values())

    def lost(self) -> list[str]:
        """Return the hosts that do not answer any more."""
        return self._grace.lost()

    def was_refused(self) -> bool:
        """Return whether rank 0 ended because of wrong input; it has printed the message."""
        return any(e["code"] == EXIT_USAGE and e["rank"] == 0 for e in self._ends())

    def remove_if_nothing_began(self, was_there: bool) -> None:
        """Remove the folders that were made for a refused run.

        `was_there` tells whether OUT/launch existed before. It may belong to an earlier run or to a
        waiting job, and then only the folder of this attempt is removed.
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
            text = text.partition("\n")[2]  # the first line names the rank
        print(text, end="", flush=True)

    def _write_settings(self) -> None:
        """Write the files that `launch.attempts.rank` and launchers read."""
        make_private(self.folder)
        self._write_rank_settings({TOKEN: secrets.token_hex(32)})
        hidden = {n: v for n, v in self._variables.items() if not is_public(n)}
        write_secrets(self.folder, sum(self._hosts.values()), hidden)
        (self.folder / ALIVE).touch(mode=0o600)
        hosts, variables = self._hosts.items(), sorted(self._environment.items())
        (self.folder / HOSTFILE).write_text("".join(f"{h} slots={n}\n" for h, n in hosts))
        (self.folder / ENVIRONMENT).write_text("".join(f"{k}={v}\n" for k, v in variables))

    def _write_rank_settings(self, token: Mapping[str, str]) -> None:
        """Write settings.json for `launch.attempts.rank`.

        It is written again at the end of the attempt, without the token.
        """
        command = {"GENELOOM_LAUNCH_COMMAND": _own_command()}
        public = {n: v for n, v in self._variables.items() if is_public(n)}
        settings = {
            "device": self._device,
            "nodes": len(self._hosts),
            "supervisor": this_process(),
            "ssh_arguments": os.environ.get(SSH_ARGUMENTS, ""),
            "environment": {**token, **public, **self._environment, **command},
            "secrets": sorted(self._variables.keys() - public.keys()),
        }
        write_private(self.folder / "settings.json", json.dumps(settings))


def _full_disk(out: Path) -> str:
    """Return a message if the disk is full, else ''; ranks could not write it themselves."""
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
