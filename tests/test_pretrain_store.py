"""The store in which ranks meet: where it listens, and what strangers can do who reach it."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.ranks import run_ranks, start_functions

_FORGED = "rank 1 failed: OSError: forged"


def connect() -> Any:
    """Return a connection to the store such as anybody has who reaches its port."""
    import torch

    return torch.distributed.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]))


def attacked() -> tuple[list[str], list[str]]:
    """Run two watched ranks; rank 1 also is a stranger who writes all he can. Return addresses at
    which the port listens, and what rank 0 warns of."""
    import logging

    from pretrain.ranks import dist, watch

    class Said(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warnings.append(record.getMessage())

    warnings: list[str] = []
    handler, ranks = Said(), dist.start(60, 1)
    watch.logger.addHandler(handler)
    port = int(os.environ["MASTER_PORT"])
    listening = {
        c.laddr.ip
        for c in psutil.net_connections("tcp")
        if c.status == psutil.CONN_LISTEN and c.laddr.port == port
    }
    with watch.Watch(ranks, 2.0):
        if ranks.rank == 1:
            time.sleep(0.5)
            store = connect()
            prefixes = {k.rpartition("beats")[0] for k in store.list_keys() if "beats" in k}
            assert len(prefixes) == 1, store.list_keys()
            for prefix in prefixes:
                store.set(f"{prefix}failure", _FORGED)
                store.add(f"{prefix}reports", 1)
                store.add(f"{prefix}failures", 1)
                store.add(f"{prefix}news", 1)
        time.sleep(2.5)
    watch.logger.removeHandler(handler)
    dist.leave()
    return sorted(listening), warnings


def test_a_forged_failure_ends_nobody():
    listening, warnings = run_ranks(2, attacked)[0]
    assert listening == ["127.0.0.1"]
    assert len(warnings) == 1 and "is no rank of this run has written a failure" in warnings[0]


def fails_after_a_forgery(out: Path) -> None:
    """Rank 1 fails after a stranger has said so; what it says itself has to arrive."""
    from data_prep.errors import run_app
    from pretrain.ranks import dist
    from pretrain.ranks.watch import Watch

    def run() -> None:
        ranks = dist.start(60, 1)
        with Watch(ranks, 2.0):
            if ranks.rank == 1:
                time.sleep(0.5)
                store = connect()
                prefix = next(k for k in store.list_keys() if "beats" in k).rpartition("beats")[0]
                store.set(f"{prefix}failure", _FORGED)
                store.add(f"{prefix}reports", 1)
                store.add(f"{prefix}failures", 1)
                store.add(f"{prefix}news", 1)
                time.sleep(0.5)
                raise OSError("the true reason")
            time.sleep(20)

    run_app(run)  # type: ignore[arg-type]


def test_a_true_failure_is_heard_after_a_forged_one(tmp_path):
    ranks = start_functions(fails_after_a_forgery, [[tmp_path]] * 2, tmp_path / "logs")
    try:
        assert [r.code(60) for r in ranks] == [1, 1]
    finally:
        for rank in ranks:
            rank.process.kill()
    assert "rank 0 ends: rank 1 failed: OSError: the true reason" in ranks[0].said, ranks[0].said


def meets(name: str) -> str:
    """Return what this rank hears; the token of a launch is its own."""
    from pretrain.ranks import dist

    os.environ["GENELOOM_TOKEN"] = "one" if name == "all" or os.environ["RANK"] == "0" else "two"
    try:
        dist.start(5, 1)
        said = dist.first_rank_says("hello")
        dist.leave()
    except (ConnectionError, RuntimeError) as error:
        said = type(error).__name__
    finally:
        del os.environ["GENELOOM_TOKEN"]
    return said


def meets_at(address: str) -> str:
    before, os.environ["MASTER_ADDR"] = os.environ["MASTER_ADDR"], address
    try:
        return meets("all")
    finally:
        os.environ["MASTER_ADDR"] = before


def test_ranks_of_one_launch_meet():
    assert run_ranks(2, meets, "all") == ["hello", "hello"]


def test_ranks_meet_at_an_address_of_ipv6():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    assert run_ranks(2, meets_at, "::1") == ["hello", "hello"]


def test_where_rank_0_listens():
    from data_prep.running.network import address_to_listen_at, outer_interfaces

    own = [
        a.address
        for name in outer_interfaces()
        for a in psutil.net_if_addrs()[name]
        if a.family == socket.AF_INET
    ]
    job = {"WORLD_SIZE": "2"}
    assert address_to_listen_at(job | {"MASTER_ADDR": "127.0.0.1"}) == "127.0.0.1"
    assert address_to_listen_at(job | {"MASTER_ADDR": "localhost"}) == ""
    assert address_to_listen_at(job | {"MASTER_ADDR": "::1"}) == "::1"
    here = {"MASTER_ADDR": "localhost", "LOCAL_WORLD_SIZE": "2"}
    assert address_to_listen_at(job | here) == "127.0.0.1"
    for address in own:
        assert address_to_listen_at(job | {"MASTER_ADDR": address}) == address
    # Another machine's, as of a service that leads to this one; and no name at all.
    for address in ("192.0.2.1", "no such host"):
        assert address_to_listen_at(job | {"MASTER_ADDR": address}) == ""


def test_signatures():
    from pretrain.ranks.signed_messages import Signer

    one, two = Signer("a"), Signer("b")
    message = one.sign("rank 1 failed: Ü").encode()
    assert one.opened(message) == "rank 1 failed: Ü"
    assert two.opened(message) is None and one.opened(message[:-1]) is None
    assert one.opened(b"") is None and one.opened(b"\xff" * 80) is None
    assert one.name != two.name == Signer("b").name
