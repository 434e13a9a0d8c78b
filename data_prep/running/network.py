"""Finds the network interface and the address with which ranks reach ranks on other machines."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

import psutil

from data_prep.running.queue_variables import ranks_here

INTERFACE = "GLOO_SOCKET_IFNAME"
# Environment variable with the secret of a launch, which only its ranks know: it comes from a file
# that only its owner can read.
TOKEN = "GENELOOM_TOKEN"


def address_of(host: str) -> str | None:
    """Return the address of a host, one of IPv4 if it has any, None if it is unknown here."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return None
    return str(min(found, key=lambda entry: entry[0] != socket.AF_INET)[4][0])


def family_of(address: str) -> socket.AddressFamily:
    """Return the family of an address, IPv6 if it has colons."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def interface_to(address: str) -> str | None:
    """Return the name of the network interface that leads to an address, None if none is known.

    For an address of this machine it is the interface that has the address, not loopback.
    """
    found = address_of(address)
    if found is None:
        return None
    try:
        with socket.socket(family_of(found), socket.SOCK_DGRAM) as probe:
            probe.connect((found, 9))  # for UDP this sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address == own for a in addresses) and not _is_loopback(own):
            return name
    return None


def interface_of_job(environment: Mapping[str, str]) -> str | None:
    """Return the interface that a rank of a job on several machines should use.

    None leaves the choice to Gloo, which takes the interface of the address that belongs to this
    machine's name. Where /etc/hosts gives 127.0.1.1 for it (Debian's default), this is loopback,
    which does not reach other machines. The function returns the interface that leads to
    ``MASTER_ADDR``. If that is a name of this machine that means loopback, it returns the only
    other interface that is up.
    """
    here = ranks_here(environment)
    if INTERFACE in environment or here == environment["WORLD_SIZE"]:
        return None
    found = interface_to(environment["MASTER_ADDR"])
    if found is not None or here is None:  # if their number is unknown, all ranks may be here
        return found
    others = outer_interfaces()
    return others[0] if len(others) == 1 else None


def address_to_listen_at(environment: Mapping[str, str]) -> str:
    """Return the address at which rank 0 listens for the other ranks.

    It is the address of ``MASTER_ADDR`` if this machine has that address. An empty string, which
    means all addresses, is returned if the address belongs to something else (a service, a
    translated address), or if the name means loopback here and another address on other machines.
    """
    master = environment["MASTER_ADDR"]
    here = ranks_here(environment)
    found = address_of(master)
    if found is None:
        return ""
    if _is_loopback(found):
        alone = environment["WORLD_SIZE"] in ("1", here)
        return found if alone or found == master else ""
    own = {a.address for addresses in psutil.net_if_addrs().values() for a in addresses}
    return found if found in own else ""


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def outer_interfaces() -> list[str]:
    """Return the names of interfaces that are up and have an IPv4 address other than loopback."""
    states = psutil.net_if_stats()
    return sorted(
        name
        for name, addresses in psutil.net_if_addrs().items()
        if name in states and states[name].isup
        and any(a.family == socket.AF_INET and not a.address.startswith("127.") for a in addresses)
    )  # fmt: skip


def describe_network() -> str:
    """Return text with this machine's name, its address and its interfaces, for a message."""
    name = socket.gethostname()
    address = address_of(name) or "no address"
    chosen = os.environ.get(INTERFACE, "the one of that address")
    return f"{name} ({address}) uses {chosen} of {', '.join(outer_interfaces()) or 'none'}"
