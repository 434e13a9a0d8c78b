"""``geneloom stop``: ends what runs in a folder and what was left behind; nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from data_prep.running.owner import LAUNCH_ID, owned, this_process
from launch.stop import stop_command
from tests.hosts import hosts, skip_without_hosts
from tests.runs import last_step, metrics, tiny_config

_ROOT = Path(__file__).resolve().parent.parent
_GENELOOM = [sys.executable, "-c", "from launch.cli import main; main()"]
_LIMIT_S = 150


def record_of(process: subprocess.Popen) -> dict:
    started = psutil.Process(process.pid).create_time()
    return this_process() | {"pid": process.pid, "started": started}


@contextlib.contextmanager
def left_behind(out: Path, number: int, launch: str) -> Iterator[tuple[subprocess.Popen, Path]]:
    """Give a rank of an attempt, below a supervisor that never asks it anything."""
    attempt = out / "launch" / f"attempt_{number}"
    attempt.mkdir(parents=True)
    supervisor = subprocess.Popen(["sleep", "600"])
    settings = {
        "device": "cpu", "nodes": 1, "environment": {LAUNCH_ID: launch},
        "supervisor": record_of(supervisor),
    }  # fmt: skip
    (attempt / "settings.json").write_text(json.dumps(settings))
    (attempt / "hostfile").write_text("localhost slots=1\n")
    words = [
        sys.executable,
        "-m",
        "launch.attempts.rank",
        str(attempt),
        "tests.waiting",
        str(attempt),
    ]
    environment = os.environ | {"PYTHONPATH": str(_ROOT), LAUNCH_ID: launch}
    rank = subprocess.Popen(words, cwd=out, env=environment, start_new_session=True)
    try:
        until = time.monotonic() + 30
        while not (attempt / "waits").exists():
            assert time.monotonic() < until
            time.sleep(0.02)
        yield rank, attempt
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(rank.pid, signal.SIGKILL)
        for process in (rank, supervisor):
            process.kill()
            process.wait()


def test_what_attempts_left_is_asked_to_save_and_others_stay(tmp_path, capsys):
    mine, other = tmp_path / "mine", tmp_path / "other"
    with (
        left_behind(mine, 1, "launch-a") as (first, one),
        left_behind(mine, 2, "launch-b") as (second, two),
        left_behind(other, 1, "launch-c") as (third, _),
    ):
        stop_command(mine, now=False, wait=30)
        assert [first.wait(5), second.wait(5)] == [75, 75]
        assert (one / "asked").read_text() == (two / "asked").read_text() == "SIGTERM"
        assert third.poll() is None
        said = capsys.readouterr().out
        assert said == f"{mine}: asked to save and stop\n{mine}: ended\n"
        with pytest.raises(SystemExit) as none:
            stop_command(mine, now=False, wait=30)
        assert none.value.code == 0
        assert capsys.readouterr().out == f"{mine}: nothing runs here\n"
        stop_command(other, now=True, wait=30)
        assert third.wait(5) == -signal.SIGKILL
    with pytest.raises(ValueError, match="no such folder"):
        stop_command(tmp_path / "absent", now=False, wait=1)


def test_an_owner_without_a_launcher_is_asked(tmp_path, capsys):
    code = (
        "import sys, time; from pathlib import Path; from data_prep.running.owner import owned\n"
        "with owned(Path(sys.argv[1]), 'perturb'): print('in', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(_ROOT)},
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "in\n"
    stop_command(tmp_path, now=False, wait=30)
    assert process.wait(5) == -signal.SIGTERM
    with owned(tmp_path, "perturb"):
        pass


@pytest.mark.long
def test_a_run_on_two_hosts_is_stopped_from_a_third(shards, tmp_path):
    """First with its supervisor alive, which ends with 75; then at once, without saving."""
    skip_without_hosts()
    config = tiny_config(
        shards, tmp_path / "run", run__max_steps=10**6, run__epochs=10**5, run__heartbeat_s=5,
        checkpoint__every_steps=10,
    )  # fmt: skip
    path, log, out = tmp_path / "run.yaml", tmp_path / "log", config.run.out
    path.write_text(config.to_yaml())
    (tmp_path / "hostfile").write_text("ds2 slots=1\nds3 slots=1\n")
    words = ["launch", "hostfile", "--hostfile", str(tmp_path / "hostfile"), "--restarts", "3",
             "pretrain", "--config", str(path)]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"}
    with hosts(3, tmp_path / "hosts") as three:
        for number, (more, code) in enumerate([(["--restart"], 75), (["--restart"], None)]):
            process = three[0].start([*_GENELOOM, *words, *more], log, env=environment)
            before = last_step(out)
            until = time.monotonic() + _LIMIT_S
            while last_step(out) < before + 15:
                assert process.poll() is None and time.monotonic() < until, log.read_text()
                time.sleep(0.1)
            now = [] if code == 75 else ["--now"]
            done = three[2].run(
                [*_GENELOOM, "stop", str(out), *now], timeout=_LIMIT_S, env=environment
            )
            assert done.returncode == 0, done.stdout + done.stderr
            assert process.wait(30) == code or code is None
            assert "ended; saved is step" in done.stdout
            for host in three:
                assert not host.processes("pretrain"), (number, host.name)
        steps = [m["step"] for m in metrics(out, "train")]
        assert steps == list(range(1, len(steps) + 1))
