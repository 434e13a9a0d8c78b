"""The command ``geneloom stop``: ends a run in a folder and its left-over processes on all hosts.

`find_traces` reads from the folder where processes may be. `Traces` counts them and sends them
signals.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from data_prep.errors import EXIT_FAILED
from data_prep.files import LAUNCH_FOLDER
from data_prep.running.owner import LAUNCH_ID, machine, owner_of
from launch.attempts.rank import remove_secrets
from launch.hosts.ask_hosts import SSH_ARGUMENTS, ask_all, read_hostfile
from launch.hosts.node import signal_process, signal_processes
from launch.verbs import saved_step
from launch.ways.local import HERE
from launch.ways.slurm import JOB_NAME, jobs_of, state_of

_POLL_S = 1.0
_END_S = 20.0


def stop_command(
    folder: Annotated[Path, typer.Argument(help="that a run works in")],
    now: Annotated[bool, typer.Option("--now", help="at once, without saving")] = False,
    wait: Annotated[int, typer.Option(min=1, help="seconds in which it may save")] = 300,
) -> None:
    """End the run in a folder: its ranks save, then whatever is left of it is killed.

    Works from any machine that sees the folder, and reaches the run's hosts by ssh, or asks SLURM.
    What a killed launcher left behind is found too, on all hosts of its attempts.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    cancelled = _cancel(folder, now, wait)
    traces = find_traces(folder)
    found = traces.count()
    if not found and not cancelled:
        remove_secrets(folder / LAUNCH_FOLDER)
        print(f"{folder}: nothing runs here{_unreachable(traces)}")
        raise SystemExit(EXIT_FAILED if traces.silent else 0)
    if found and not now:
        traces.signal(signal.SIGTERM)
        print(f"{folder}: asked to save and stop", flush=True)
        until = time.monotonic() + wait
        while traces.count() and time.monotonic() < until:
            time.sleep(_POLL_S)
    until = time.monotonic() + _END_S
    while (left := traces.count()) and time.monotonic() < until:
        traces.signal(signal.SIGKILL)
        time.sleep(_POLL_S)
    if not left:
        remove_secrets(folder / LAUNCH_FOLDER)
    step = saved_step(folder)
    saved = f"; saved is step {step}" if step >= 0 else ""
    print(f"{folder}: " + (f"{left} processes are left" if left else f"ended{saved}"), end="")
    print(_unreachable(traces))
    if left or traces.silent:
        raise SystemExit(EXIT_FAILED)


@dataclass
class Traces:
    """Places where processes of a run may be.

    Attributes
    ----------
    launches
        Ids that all processes started by the attempts of a launcher have in their environment.
    hosts
        Hosts on which these processes are searched for; `HERE` is this machine.
    processes
        Records of single processes: rank 0, and the launcher's supervisor.
    silent
        Hosts that did not answer, with the reason.
    """

    launches: list[str] = field(default_factory=list)
    hosts: list[str] = field(default_factory=list)
    processes: list[dict[str, Any]] = field(default_factory=list)
    silent: dict[str, str] = field(default_factory=dict)

    def count(self) -> int:
        """Return the number of processes that are alive."""
        return self.signal(0)

    def signal(self, number: int) -> int:
        """Send a signal to all processes, and return their number."""
        found = 0
        for process in self.processes:
            if process["machine"] == machine():
                found += signal_process(process["pid"], process["started"], number)
            else:
                words = ("process", str(process["pid"]), str(process["started"]), str(number))
                found += self._ask([process["host"]], *words)
        if not self.launches:
            return found
        if HERE in self.hosts:
            found += signal_processes(self.launches, number, ranks_only=False)
        others = [h for h in self.hosts if h != HERE]
        return found + self._ask(others, "signal", ",".join(self.launches), str(number), "all")

    def _ask(self, hosts: list[str], *question: str) -> int:
        answers = ask_all(hosts, *question, limit_s=_END_S)
        for host, answer in answers.items():
            self.silent.pop(host, None)
            if answer.problem:
                self.silent[host] = answer.problem
        return sum(a.content for a in answers.values() if not a.problem)


def find_traces(folder: Path) -> Traces:
    """Return where processes of a folder's runs may be, according to the files of these runs."""
    traces, owner = Traces(), owner_of(folder)
    if owner:
        traces.processes.append(owner)
    for path in sorted((folder / LAUNCH_FOLDER).glob("attempt_*/settings.json")):
        settings = json.loads(path.read_text())
        supervisor = settings.get("supervisor")
        if supervisor is None:  # the attempt of a SLURM job; SLURM knows its processes
            continue
        traces.launches.append(settings["environment"][LAUNCH_ID])
        if arguments := settings.get("ssh_arguments"):
            os.environ.setdefault(SSH_ARGUMENTS, arguments)
        if supervisor not in traces.processes:
            traces.processes.append(supervisor)
        for host in read_hostfile(path.with_name("hostfile")):
            is_elsewhere = host == HERE and supervisor["machine"] != machine()
            place = supervisor["host"] if is_elsewhere else host
            if place not in traces.hosts:
                traces.hosts.append(place)
    return traces


def _cancel(folder: Path, now: bool, wait_s: float) -> int:
    """Cancel the SLURM jobs that were submitted for a folder; return their number."""
    owners = owner_of(folder).get("job") or ""
    jobs = [job for job in jobs_of(folder) if state_of(job)]
    # The job file may have been submitted by hand. A job with another name is not cancelled, since
    # it may do other work too.
    if owners and owners not in jobs and state_of(owners, "%j").startswith(JOB_NAME):
        jobs.append(owners)
    for job in jobs:
        words = ["scancel", *(["--signal=KILL"] if now else []), job]
        done = subprocess.run(words, capture_output=True, text=True)
        print(f"scancel {job}: {done.stderr.strip() or 'asked to save and stop'}", flush=True)
    until = time.monotonic() + wait_s
    while any(map(state_of, jobs)) and time.monotonic() < until:
        time.sleep(_POLL_S)
    return len(jobs)


def _unreachable(traces: Traces) -> str:
    return "".join(f"\n  {host}: {problem}" for host, problem in traces.silent.items())
