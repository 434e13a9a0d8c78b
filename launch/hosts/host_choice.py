"""Which hosts of a hostfile are used, and how ssh reaches them: options of several commands."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from launch.hosts.ask_hosts import SSH_ARGUMENTS, read_hostfile


@dataclass(frozen=True)
class HostChoice:
    """Options with the names that they have for DeepSpeed's launcher."""

    include: Annotated[
        str, typer.Option("--include", "-i", help="hosts of the hostfile to use: node1@node2")
    ] = ""
    exclude: Annotated[
        str, typer.Option("--exclude", "-e", help="hosts of the hostfile to leave out")
    ] = ""
    ssh_port: Annotated[
        int, typer.Option(min=0, max=65535, help=f"of all hosts; more of ssh: {SSH_ARGUMENTS}")
    ] = 0

    def read(self, hostfile: Path) -> dict[str, int]:
        """Return the slots of the chosen hosts; every ssh from now on takes the port.

        Raises
        ------
        ValueError
            The hostfile is wrong, or the choice leaves no host of it.
        """
        if self.ssh_port:
            more = os.environ.get(SSH_ARGUMENTS, "")
            os.environ[SSH_ARGUMENTS] = f"{more} -p {self.ssh_port}".strip()
        return chosen_hosts(read_hostfile(hostfile), self.include, self.exclude)


def chosen_hosts(hosts: dict[str, int], include: str, exclude: str) -> dict[str, int]:
    """Return the hosts that ``--include`` or ``--exclude`` leave, in the order of the hostfile.

    Raises
    ------
    ValueError
        Both are given, a host is not in the hostfile, none is left, or slots are named.
    """
    if include and exclude:
        raise ValueError("--include and --exclude: give one of them")
    option, text = ("--include", include) if include else ("--exclude", exclude)
    if not text:
        return hosts
    named, at = [], text
    while at:  # a host may hold an @ itself: the longest that the hostfile has is meant
        found = max((h for h in hosts if at == h or at.startswith(f"{h}@")), key=len, default=None)
        if found is None:
            raise ValueError(
                f"{option} {text}: '{at}' is not in the hostfile, which has {', '.join(hosts)}; "
                "slots (`node1:0,1`) cannot be named: write fewer of them into the hostfile"
            )
        named.append(found)
        at = at[len(found) + 1 :]
    left = {h: n for h, n in hosts.items() if (h in named) == bool(include)}
    if not left:
        raise ValueError(f"{option} {text}: leaves no host")
    return left
