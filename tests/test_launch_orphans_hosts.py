"""Nothing outlives its launcher on several real hosts; the command stands on one of its own."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts import Host, hosts, skip_without_hosts
from tests.runs import last_step, metrics
from tests.test_launch_orphans import config_file, endless, require_saved, wait_for

_ROOT = Path(__file__).resolve().parent.parent
_GENELOOM = [sys.executable, "-c", "from launch.cli import main; main()"]
_LIMIT_S = 240
_WAYS = {
    "ssh": ["hostfile", "--hostfile"],
    "pdsh": ["hostfile", "--launcher", "pdsh", "--hostfile"],
    "mpi": ["mpi", "--hostfile"],
}
# What waits for the ranks, in the words of its command line, and on which host.
_ABOVE = {"ssh": (1, "launch.attempts.node_ranks"), "pdsh": (0, "pdsh -S "), "mpi": (0, "prterun")}

_LEFT = ("-m pretrain", "launch.attempts", "deepspeed.launcher", "mpirun", "prte")


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Iterator[list[Host]]:
    skip_without_hosts()
    with hosts(3, tmp_path_factory.mktemp("hosts")) as made:
        yield made


def slow(way: str, kind: str):
    return pytest.param(way, kind, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("way", "kind"),
    [
        pytest.param("ssh", "kill the command", marks=pytest.mark.long),
        pytest.param("mpi", "kill the command", marks=pytest.mark.long),
        slow("ssh", "hangup"), slow("mpi", "hangup"), slow("pdsh", "hangup"),
        slow("pdsh", "kill the command"), slow("ssh", "kill the launcher"),
        slow("mpi", "kill the launcher"), slow("pdsh", "kill the launcher"),
    ],
)  # fmt: skip
def test_nothing_is_left_on_any_host(way, kind, three, shards, tmp_path):
    config = endless(shards, tmp_path / "run", run__heartbeat_s=5)
    (tmp_path / "hosts").write_text("ds2 slots=1\nds3 slots=1\n")
    log = tmp_path / "log"
    command = [*_GENELOOM, "launch", *_WAYS[way], str(tmp_path / "hosts"), "pretrain", "--config"]
    environment = os.environ | {
        "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1", "NCCL_DEBUG": "VERSION",
    }  # fmt: skip
    process = three[0].start([*command, config_file(config)], log, env=environment)
    try:
        wait_for(lambda: last_step(config.run.out) >= 3, _LIMIT_S, log.read_text)
        (rank,) = three[2].processes("-m pretrain")
        has = three[2].run(["cat", f"/proc/{rank}/environ"]).stdout.split("\0")
        assert {"OMP_NUM_THREADS=1", "NCCL_DEBUG=VERSION"} <= set(has), "of the launching shell"
        (supervisor,) = three[0].processes("launch.cli import")
        started = time.monotonic()
        if kind == "kill the launcher":
            place, words = _ABOVE[way]
            pid = three[place].processes(words)[0]
            three[place].run(["kill", "-KILL", str(pid)])
        else:
            name = "-HUP" if kind == "hangup" else "-KILL"
            three[0].run(["kill", name, str(supervisor)])
        wait_for(lambda: not any(h.processes(w) for h in three for w in _LEFT), 60, log.read_text)
        print(f"{way}, {kind}: {time.monotonic() - started:.1f} s, code {process.wait(10)}")
        if (way, kind) != ("mpi", "kill the launcher"):
            require_saved(config)
        steps = [m["step"] for m in metrics(config.run.out, "train")]
        assert steps == list(range(1, len(steps) + 1))
        if kind == "hangup":
            assert process.wait(1) == 75
    finally:
        process.send_signal(signal.SIGKILL)
        for host in three:
            for pid in host.processes("launch"):
                host.run(["kill", "-KILL", str(pid)])
