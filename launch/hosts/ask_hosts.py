"""Reads the hostfile of a cluster without a queue, and asks its hosts questions over ssh."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.hosts.node import ROOT

_CONNECT_S = 10
# ssh ends if a host does not answer three times in a row, at intervals of 5 s.
_ALIVE_S, _ALIVE_TIMES = 5, 3
# A host is a name, an alias of ~/.ssh/config or an address, with or without `user@`. A name that
# begins with a hyphen would be an option of ssh, which could run a command here.
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:%@-]*")
# Environment variable with further arguments of every ssh, such as `-p 2222 -i KEY`; pdsh and
# DeepSpeed read it too.
SSH_ARGUMENTS = "PDSH_SSH_ARGS_APPEND"


def read_hostfile(path: Path) -> dict[str, int]:
    """Return the number of slots of each host in a hostfile of DeepSpeed or Open MPI.

    Raises
    ------
    ValueError
        The file cannot be read, a line is not ``host slots=N``, a host could be an option of ssh,
        or a host is given twice.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--hostfile {path}: cannot be read ({error})") from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        slots = words[1].removeprefix("slots=") if len(words) == 2 else ""
        if not slots.isdigit() or int(slots) < 1:
            raise ValueError(f"{path}, line {number}: '{line}' is not `host slots=N`")
        if not _HOST.fullmatch(words[0]):
            raise ValueError(
                f"{path}, line {number}: '{words[0]}' is no host: a name, an alias of "
                "~/.ssh/config or an address, with `user@` before it where that is needed"
            )
        if words[0] in hosts:
            raise ValueError(f"{path}, line {number}: {words[0]} stands twice")
        hosts[words[0]] = int(slots)
    if not hosts:
        raise ValueError(f"{path}: names no host")
    return hosts


def names_on_network(hosts: Sequence[str]) -> dict[str, str]:
    """Return the name or address behind each host, without ``user@``, and for aliases of ssh too.

    Only ssh on this machine knows the aliases of its ``~/.ssh/config``; it connects to nobody here.
    """
    names = {}
    for host in hosts:
        words = ["ssh", *shlex.split(os.environ.get(SSH_ARGUMENTS, "")), "-G", "--", host]
        said = subprocess.run(words, capture_output=True, text=True).stdout
        found = re.search(r"^hostname (.+)$", said, re.MULTILINE)
        names[host] = found[1] if found else host.rpartition("@")[2]
    return names


def ssh(
    host: str,
    words: Sequence[str],
    environment: Mapping[str, str] | None = None,
    connect_s: int = _CONNECT_S,
) -> list[str]:
    """Return the ssh command line that runs `words` on a host, in the current folder."""
    given = {**package_first(), **(environment or {})}
    settings = [f"{name}={value}" for name, value in sorted(given.items())]
    remote = f"cd {shlex.quote(str(Path.cwd()))} && exec env {shlex.join([*settings, *words])}"
    return [
        "ssh", "-n", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={connect_s}",
        "-o", f"ServerAliveInterval={_ALIVE_S}", "-o", f"ServerAliveCountMax={_ALIVE_TIMES}",
        *shlex.split(os.environ.get(SSH_ARGUMENTS, "")), "--", host, remote,
    ]  # fmt: skip


def package_first() -> dict[str, str]:
    """Return environment variables with which another Python imports this same package.

    Without them, ``python -m`` would look in the working folder first, where a user may have a
    ``pretrain.py`` of his own.
    """
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    return {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


@dataclass(frozen=True)
class Answer:
    """The answer of a host; `problem` says why there is none, and is None if there is one."""

    content: Any
    problem: str | None


def ask_all(
    hosts: Sequence[str], *question: str, limit_s: float = 60, connect_s: int = _CONNECT_S
) -> dict[str, Answer]:
    """Return each host's answer to a question, asked of all hosts at once over ssh.

    The hosts run ``launch.hosts.node`` with the words of the question.
    """
    words = [sys.executable, "-m", "launch.hosts.node", *question]
    started = time.time()
    running = {
        host: subprocess.Popen(
            ssh(host, words, connect_s=connect_s),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in hosts
    }
    answers = {}
    for host, process in running.items():
        try:
            said, complaint = process.communicate(timeout=max(0.1, started + limit_s - time.time()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            answers[host] = Answer(None, f"gave no answer within {limit_s:.0f} s")
            continue
        answers[host] = _read(host, process.returncode, said, complaint)
    return answers


def _read(host: str, code: int, said: str, complaint: str) -> Answer:
    lines = complaint.strip().splitlines()
    if code == 255:
        return Answer(None, _why_no_login(host, lines[-1] if lines else "ssh failed"))
    try:
        return Answer(json.loads(said.strip().splitlines()[-1]), None)
    except (ValueError, IndexError):
        reason = lines[-1] if lines else f"exit code {code}"
        hint = f"is {sys.executable} there, with the same packages?"
        return Answer(None, f"this Python or package does not run there ({reason}); {hint}")


def _why_no_login(host: str, reason: str) -> str:
    """Return a message with ssh's reason for a failed login, and advice."""
    known = {
        "Could not resolve": "unknown host; correct the hostfile or /etc/hosts",
        "Permission denied": f"no login without a password; `ssh-copy-id {host}`",
        "Host key verification failed": f"its key changed or is unknown; `ssh {host}` once by hand",
        "timed out": "no answer; is it on, and its port 22 open?",
        "refused": "nobody listens on its ssh port; start sshd",
        "No route": "no route; is its network up?",
    }
    hint = next((text for mark, text in known.items() if mark in reason), "try `ssh` by hand")
    return f"not reachable: {hint} ({reason})"
