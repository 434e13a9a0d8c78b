"""One run in a folder on real hosts and a real SLURM: refused, taken over, and nothing lost."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_prep.files import OWNER_NAME
from pretrain.config import RunConfig
from tests.hosts import Host, hosts, skip_without_hosts
from tests.runs import last_step, metrics, tiny_config
from tests.slurm_hosts import slurm, why_no_slurm

_ROOT = Path(__file__).resolve().parent.parent
_GENELOOM = [sys.executable, "-c", "from launch.cli import main; main()"]
_LIMIT_S = 180


def endless(shards: Path, out: Path) -> RunConfig:
    return tiny_config(
        shards, out, run__max_steps=10**6, run__epochs=10**5, checkpoint__every_steps=20
    )


def words(config: RunConfig, *more: str) -> list[str]:
    path = config.run.out.with_suffix(".yaml")
    path.write_text(config.to_yaml())
    return [*_GENELOOM, "pretrain", "--config", str(path), *more]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"}


def wait_for(condition: Callable[[], bool], log: Path) -> None:
    until = time.monotonic() + _LIMIT_S
    while not condition():
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.05)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Iterator[list[Host]]:
    skip_without_hosts()
    with hosts(2, tmp_path_factory.mktemp("hosts")) as made:
        yield made


@pytest.mark.long
def test_a_frozen_host_loses_its_run_and_writes_nothing_more(two, shards, tmp_path):
    """Alive: refused. Frozen for a lease: taken over. Thawed: it finds out and ends, silent."""
    config, log = endless(shards, tmp_path / "run"), tmp_path / "log"
    first = two[0].start(words(config), log, env=environment())
    wait_for(lambda: last_step(config.run.out) >= 30, log)
    refused = two[1].run(words(config, "--resume"), timeout=_LIMIT_S, env=environment())
    assert refused.returncode == 2, refused.stderr
    assert "another run works in this folder: pretrain, process" in refused.stderr
    assert " on ds1 since " in refused.stderr

    (pid,) = two[0].processes("launch.cli import")
    assert two[0].run(["kill", "-STOP", str(pid)]).returncode == 0
    started, other = time.monotonic(), tmp_path / "other"
    second = two[1].start(words(config, "--resume"), other, env=environment())
    wait_for(lambda: other.exists() and "has ended: taken over" in other.read_text(), other)
    assert 20 < time.monotonic() - started < 60
    before = last_step(config.run.out)
    wait_for(lambda: last_step(config.run.out) > before + 5, other)
    owner = json.loads((config.run.out / OWNER_NAME).read_text())
    assert owner["host"] == "ds2"

    two[0].run(["kill", "-CONT", str(pid)])
    first.send_signal(signal.SIGCONT)  # nsenter stops with what it has started
    assert first.wait(30) == 1
    assert "is not this run's any more: pretrain, process" in log.read_text()
    before = last_step(config.run.out)
    wait_for(lambda: last_step(config.run.out) > before + 5, other)
    (pid,) = two[1].processes("launch.cli import")
    two[1].run(["kill", "-TERM", str(pid)])
    assert second.wait(60) == 75
    steps = [m["step"] for m in metrics(config.run.out, "train")]
    assert steps == list(range(1, len(steps) + 1))
    assert not (config.run.out / OWNER_NAME).exists()


@pytest.mark.long
def test_a_second_job_for_a_folder_is_refused(shards, tmp_path):
    """While one waits, while it runs; by hand with sbatch; then the folder is free again."""
    reason = why_no_slurm()
    if reason:
        pytest.skip(reason)
    config = endless(shards, tmp_path / "run")
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml())
    submit = [*_GENELOOM, "launch", "slurm", "--time", "10", "pretrain", "--config", str(path)]
    held = [*submit[:5], "--sbatch=--hold", *submit[5:]]
    launched = config.run.out / "launch"
    with slurm(2, tmp_path / "slurm") as cluster:

        def refused(command: list[str]) -> str:
            done = cluster.login.run(command, env=cluster.environment | environment())
            assert done.returncode == 2, done.stdout + done.stderr
            return done.stderr

        cluster.environment |= {k: environment()[k] for k in ("PYTHONPATH", "OMP_NUM_THREADS")}
        job = cluster.run(*held).split("submitted job ")[1].split()[0]
        files = {p.name: p.read_bytes() for p in launched.iterdir()}
        assert f"job {job} is for this folder, and PENDING" in refused(submit)
        assert {p.name: p.read_bytes() for p in launched.iterdir()} == files
        cluster.run("scontrol", "release", job)
        log = launched / f"job-{job}.log"
        wait_for(lambda: last_step(config.run.out) >= 5, log)
        assert f"SLURM job {job}" in refused(submit)

        again = cluster.run("sbatch", "--parsable", str(launched / "job.sbatch")).strip()
        cluster.run("scontrol", "release", again)
        assert cluster.wait_for(again, {"FAILED", "COMPLETED"}, _LIMIT_S) == "FAILED"
        said = (launched / f"job-{again}.log").read_text()
        assert f"SLURM job {job}" in said and "another run works in this folder" in said
        before = last_step(config.run.out)
        wait_for(lambda: last_step(config.run.out) > before, log)

        cluster.run("scancel", job)
        cluster.wait_for(job, {"CANCELLED"}, _LIMIT_S)
        wait_for(lambda: not (config.run.out / OWNER_NAME).exists(), log)
        steps = [m["step"] for m in metrics(config.run.out, "train")]
        assert steps == list(range(1, len(steps) + 1))
