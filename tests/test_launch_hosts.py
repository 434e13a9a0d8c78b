"""Ranks on several real hosts (network, process and mount namespaces): start, loss, bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.verbs import saved_step
from pretrain.config import RunConfig
from tests.hosts import Host, hosts, skip_without_hosts, why_no_hosts
from tests.ranks import run_ranks
from tests.runs import metrics, run_training, tiny_config
from tests.synthetic import write_cells

_ROOT = Path(__file__).resolve().parent.parent
_WHY_NOT = why_no_hosts()
pytestmark = pytest.mark.skipif(_WHY_NOT is not None, reason=f"several hosts: {_WHY_NOT}")
_LIMIT_S = 240
_STEPS = 80


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Iterator[list[Host]]:
    with hosts(3, tmp_path_factory.mktemp("hosts")) as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory) -> RunConfig:
    """A run of one process."""
    config = small(shards, tmp_path_factory.mktemp("undisturbed") / "run")
    run_ranks(1, run_training, config)
    return config


def small(shards: Path, out: Path, **changes) -> RunConfig:
    settings = {"run__max_steps": _STEPS, "run__heartbeat_s": 3, "checkpoint__every_steps": 5}
    return tiny_config(shards, out, **(settings | changes))


def write_hostfile(folder: Path, *names: str, slots: int = 1) -> Path:
    path = folder / "hosts"
    path.write_text("".join(f"{name} slots={slots}\n" for name in names))
    return path


def command(config: RunConfig, *launch: str) -> list[str]:
    """Return ``geneloom launch ... pretrain --config FILE``."""
    path = config.run.out.with_suffix(".yaml")
    path.write_text(config.to_yaml())
    code = "import sys; from launch.cli import main; sys.argv[0] = 'geneloom'; main()"
    return [sys.executable, "-c", code, "launch", *launch, "pretrain", "--config", str(path)]


def environment() -> dict[str, str]:
    gone = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if k not in gone}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)}


def launch(host: Host, config: RunConfig, *words: str) -> subprocess.CompletedProcess:
    return host.run(command(config, *words), timeout=_LIMIT_S, env=environment())


def losses(run: Path) -> list[float]:
    return [m["loss"] for m in metrics(run, "train")]


def require_same_run(config: RunConfig, expected: RunConfig) -> None:
    """Assert that every cell was seen as in an undisturbed run, and the losses are its."""
    own, other = metrics(config.run.out, "train"), metrics(expected.run.out, "train")
    assert [m["step"] for m in own] == [m["step"] for m in other]
    assert own[-1]["cells_digest"] == other[-1]["cells_digest"]
    assert own[-1]["cells_seen"] == other[-1]["cells_seen"]
    assert losses(config.run.out) == pytest.approx(losses(expected.run.out), rel=1e-5)


def events(config: RunConfig, kind: str) -> list[dict]:
    lines = (config.run.out / "launch" / "events.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["event"] == kind]


def test_what_every_way_starts_on_two_hosts(tmp_path):
    """Hosts are asked over ssh, by user and by an alias of ssh, and answer; nothing is started."""
    skip_without_hosts()
    code = (
        "import json, os, signal, sys\n"
        "from pathlib import Path\n"
        "from launch.ways.hostfile import Pdsh, Ssh\n"
        "from launch.ways.mpi import MpiCluster\n"
        "slots, out = {'root@ds1': 2, 'b': 2}, Path(sys.argv[1])\n"
        "first = Ssh(slots, out, 'cpu', ranks=3)\n"
        "found = {'usable': first.usable_hosts()}\n"
        "for way in (first, Pdsh(slots, out, 'cpu'), MpiCluster(slots, out, 'cpu')):\n"
        "    way.know(first._facts)\n"
        "    words = way.commands(found['usable'], out / 'attempt', ['m', 'x y'], {'A': 'b c'})\n"
        "    found[type(way).__name__] = words\n"
        "first.signal(found['usable'], 'nobody', signal.SIGKILL, True)\n"
        "found['lost'] = first.lost({'b': 1, 'ds9': 1})\n"
        "print(json.dumps(found))\n"
    )
    with hosts(2, tmp_path / "hosts") as (first, second):
        with (tmp_path / "hosts/ds1/ssh/config").open("a") as config:
            config.write(f"Host b\n  HostName {second.address}\n")
        words = [sys.executable, "-c", code, str(tmp_path)]
        done = first.run(words, timeout=_LIMIT_S, env=environment())
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["usable"] == {"root@ds1": 2, "b": 1}, "three ranks, host by host"
    assert found["lost"] == ["ds9"]
    address = first.address
    for number, (name, command) in enumerate(found["Ssh"].items()):
        assert command[0] == "ssh" and command[-2] == name
        assert f" -m launch.attempts.node_ranks {number} 2,1 {address} " in command[-1]
        assert "exec env 'A=b c' " in command[-1] and command[-1].endswith(" m 'x y'")
    (pdsh,) = found["Pdsh"].values()
    assert f"DS_ENV_FILE={tmp_path}/attempt/environment" in pdsh and address in pdsh
    (mpirun,) = found["MpiCluster"].values()
    assert mpirun[mpirun.index("--host") + 1] == "root@ds1:2,b:1"
    assert mpirun[mpirun.index("-n") + 1] == "3"
    assert mpirun[mpirun.index("btl_tcp_if_include") + 1] == "eth0"
    assert f"MASTER_ADDR={address}" in mpirun and mpirun[-2:] == ["m", "x y"]


@pytest.mark.long
@pytest.mark.parametrize(
    "words",
    [
        ("hostfile", "--launcher", "ssh", "--hostfile"),
        ("hostfile", "--launcher", "pdsh", "--hostfile"),
        ("mpi", "--hostfile"),
    ],
    ids=["ssh", "pdsh", "mpi"],
)
def test_two_hosts_are_one_run(words, three, undisturbed, shards, tmp_path):
    config = small(shards, tmp_path / "run", run__max_steps=_STEPS)
    hostfile = write_hostfile(tmp_path, "ds2", "ds3")
    shown = launch(three[0], config, *words, str(hostfile), "--show")
    assert shown.returncode == 0 and "launch.attempts.rank" in shown.stdout, shown.stderr
    assert not config.run.out.exists()
    done = launch(three[0], config, *words, str(hostfile))
    assert done.returncode == 0, done.stdout + done.stderr
    require_same_run(config, undisturbed)
    ends = sorted((config.run.out / "launch" / "attempt_1").glob("rank_*.json"))
    assert {json.loads(p.read_text())["host"] for p in ends} == {"ds2", "ds3"}
    for host in three:
        assert not host.processes("launch.attempts.rank")


def unplug(host: Host) -> None:
    host.unplug()


def kill_rank(host: Host) -> None:
    pid = host.processes("-m pretrain ")[0]
    host.run(["kill", "-KILL", str(pid)])


def kill_all(host: Host) -> None:
    for pid in host.processes("launch"):
        host.run(["kill", "-KILL", str(pid)])


@pytest.mark.long
@pytest.mark.parametrize(
    ("words", "disturb", "left"),
    [
        (("hostfile", "--hostfile"), unplug, {"ds2": 1}),
        (("hostfile", "--hostfile"), kill_all, {"ds2": 1, "ds3": 1}),
        (("mpi", "--restarts", "3", "--hostfile"), unplug, {"ds2": 1}),
        pytest.param(
            ("hostfile", "--launcher", "pdsh", "--hostfile"), unplug, {"ds2": 1},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("mpi", "--restarts", "3", "--hostfile"), kill_rank, {"ds2": 1, "ds3": 1},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["ssh-cable", "ssh-killed", "mpi-cable", "pdsh-cable", "mpi-killed"],
)  # fmt: skip
def test_a_lost_host_costs_no_cell(words, disturb, left, three, undisturbed, shards, tmp_path):
    config = small(shards, tmp_path / "run")
    hostfile = write_hostfile(tmp_path, "ds2", "ds3")
    log = tmp_path / "console"
    process = three[0].start(command(config, *words, str(hostfile)), log, env=environment())
    try:
        wait_for(lambda: saved_step(config.run.out) >= 5, process, log)
        disturb(three[2])
        assert process.wait(_LIMIT_S) == 0, log.read_text()
    finally:
        process.kill()
        three[2].plug_in(three[0])
    require_same_run(config, undisturbed)
    started = events(config, "started")
    assert [e["hosts"] for e in started] == [{"ds2": 1, "ds3": 1}, left], log.read_text()
    (ended,) = events(config, "ended")
    assert "ds3" in ended["cause"], ended
    assert ended["step"] >= 5


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, log: Path) -> None:
    until = time.monotonic() + _LIMIT_S
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.02)


@pytest.mark.long
def test_preparing_on_two_hosts_gives_the_same_bytes(three, tmp_path):
    cells = tmp_path / "cells.h5ad"
    write_cells(cells, num_cells=120)
    code = "import sys; from launch.cli import main; sys.argv[0] = 'geneloom'; main()"
    words = ["prepare", str(cells), "--vocab", "build", "--min-genes", "1", "--out"]
    hostfile = write_hostfile(tmp_path, "ds2", "ds3")
    over = ["launch", "mpi", "--hostfile", str(hostfile)]
    for start, out in (([], "one"), (over, "two")):
        done = three[0].run(
            [sys.executable, "-c", code, *start, *words, str(tmp_path / out)],
            timeout=_LIMIT_S, env=environment(),
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    tars = sorted((tmp_path / "one").rglob("*.tar"))
    assert tars
    for tar in tars:
        assert (
            tar.read_bytes() == (tmp_path / "two" / tar.relative_to(tmp_path / "one")).read_bytes()
        )
    ends = sorted((tmp_path / "two" / "launch" / "attempt_1").glob("rank_*.json"))
    assert {json.loads(p.read_text())["host"] for p in ends} == {"ds2", "ds3"}
