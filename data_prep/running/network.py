"""Which network interface of this machine leads to another one."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

import psutil

# How many ranks a launcher started on this machine, by the names that launchers give it.
RANKS_HERE = ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
INTERFACE = "GLOO_SOCKET_IFNAME"
# Of a launch: what its ranks know and nobody else, from a file that only its owner can read.
TOKEN = "GENELOOM_TOKEN"


def interface_to(address: str) -> str | None:
    """Return the name of the network interface that leads to an address, None if none is known.

    The one of an address of this node itself is that address's, not loopback.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address == own for a in addresses) and not own.startswith("127."):
            return name
    return None


def interface_of_job(environment: Mapping[str, str]) -> str | None:
    """Return the interface that a rank should use among several machines, None to leave it.

    Gloo takes the interface of the address that this machine's own name has; where /etc/hosts says
    127.0.1.1 (Debian's default), that is loopback, on which no other machine is. Here it is the
    one that leads to ``MASTER_ADDR``; where that is a name of this machine itself and loopback,
    the only other one that is up.
    """
    here = next((environment[n] for n in RANKS_HERE if environment.get(n)), None)
    if INTERFACE in environment or here == environment["WORLD_SIZE"]:
        return None
    found = interface_to(environment["MASTER_ADDR"])
    if found is not None or here is None:  # without a word of how many are here: all may be
        return found
    others = outer_interfaces()
    return others[0] if len(others) == 1 else None


def address_to_listen_at(environment: Mapping[str, str]) -> str:
    """Return the address at which rank 0 waits for the others: one of this machine, where known.

    That of ``MASTER_ADDR`` if it is this machine's own; an empty text, which means all addresses,
    where it is another's (a service, a translated address), or a name that means loopback here and
    something else on other machines.
    """
    master = environment["MASTER_ADDR"]
    here = next((environment[n] for n in RANKS_HERE if environment.get(n)), None)
    try:
        found = socket.gethostbyname(master)
    except OSError:  # IPv6 alone, or unknown here
        return ""
    if found.startswith("127."):
        alone = environment["WORLD_SIZE"] in ("1", here)
        return found if alone or found == master else ""
    own = {a.address for addresses in psutil.net_if_addrs().values() for a in addresses}
    return found if found in own else ""


def outer_interfaces() -> list[str]:
    """Return the interfaces that are up and have an IPv4 address which is not loopback."""
    states = psutil.net_if_stats()
    return sorted(
        name
        for name, addresses in psutil.net_if_addrs().items()
        if name in states and states[name].isup
        and any(a.family == socket.AF_INET and not a.address.startswith("127.") for a in addresses)
    )  # fmt: skip


def describe_network() -> str:
    """Return this machine's name, the address of that name and its interfaces, for a message."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        address = "no address"
    chosen = os.environ.get(INTERFACE, "the one of that address")
    return f"{name} ({address}) uses {chosen} of {', '.join(outer_interfaces()) or 'none'}"
