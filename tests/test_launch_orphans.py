"""Nothing outlives what started it: every way to launch, every way to be killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from data_prep.running.owner import this_process
from launch.attempts.rank import _LOOK_S, _LOOKS, ALIVE
from pretrain.config import RunConfig
from tests.ranks import commands
from tests.runs import last_step, tiny_config

_ROOT = Path(__file__).resolve().parent.parent
_LIMIT_S = 150
# What is promised: a launcher that is gone is noticed in so many seconds, and then its ranks save.
_NOTICED_S, _SAVED_S = 15, 15
_RESUMABLE = 75
_START = ("-m", "launch.attempts.rank")
# It looks ten times as often.
_START_QUICK = (
    "-c",
    "import sys; from launch.attempts import rank; rank._LOOK_S /= 10; sys.exit(rank.main())",
)


def wait_for(condition: Callable[[], bool], limit_s: float, what: Callable[[], str] = str) -> None:
    until = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < until, what()
        time.sleep(0.02)


# A rank that only waits, below the real `launch.attempts.rank`


@contextlib.contextmanager
def rank_below(
    folder: Path, supervisor: dict | None, *above: str, start: tuple[str, ...] = _START
) -> Iterator[subprocess.Popen]:
    """Start `launch.attempts.rank` with a rank that waits until it is asked to stop."""
    settings = {"device": "cpu", "nodes": 1, "environment": {}, "supervisor": supervisor}
    (folder / "settings.json").write_text(json.dumps(settings))
    words = [*above, sys.executable, *start, str(folder), "tests.waiting", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(_ROOT)}
    process = subprocess.Popen(words, cwd=folder, env=environment, start_new_session=True)
    try:
        wait_for((folder / "waits").exists, 30)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def require_asked(folder: Path, limit_s: float) -> None:
    wait_for((folder / "asked").exists, limit_s)
    assert (folder / "asked").read_text() == "SIGTERM"


def test_a_supervisor_of_this_machine_that_is_killed_is_noticed(tmp_path):
    supervisor = subprocess.Popen(["sleep", "600"])
    record = this_process() | {"pid": supervisor.pid}
    record["started"] = psutil.Process(supervisor.pid).create_time()
    with rank_below(tmp_path, record) as rank:
        supervisor.send_signal(signal.SIGSTOP)  # Ctrl-Z is no end
        time.sleep(2.5)
        assert not (tmp_path / "asked").exists()
        supervisor.kill()
        require_asked(tmp_path, 5)
        assert rank.wait(10) == _RESUMABLE
    supervisor.wait()
    end = json.loads((tmp_path / "rank_00000.json").read_text())
    assert end["code"] == _RESUMABLE
    assert "is gone: asked to save and stop" in (tmp_path / "rank_00000.log").read_text()


def test_a_supervisor_elsewhere_that_touches_nothing_any_more_is_noticed(tmp_path):
    assert (_LOOKS + 1) * _LOOK_S <= _NOTICED_S
    record = this_process() | {"machine": "elsewhere"}
    alive = tmp_path / ALIVE
    alive.touch()
    silence_s = _LOOKS * _LOOK_S / 10
    with rank_below(tmp_path, record, start=_START_QUICK) as rank:
        until = time.monotonic() + 2 * silence_s
        while time.monotonic() < until:
            alive.touch()
            time.sleep(_LOOK_S / 10)
        assert not (tmp_path / "asked").exists(), "it lived"
        started = time.monotonic()
        require_asked(tmp_path, _NOTICED_S)
        assert time.monotonic() - started > 0.8 * silence_s
        assert rank.wait(10) == _RESUMABLE


def test_a_rank_stops_with_its_parent_and_with_a_launcher_above(tmp_path):
    (tmp_path / "a").mkdir()
    with rank_below(tmp_path / "a", None) as rank:
        rank.kill()
        require_asked(tmp_path / "a", 5)
    (tmp_path / "b").mkdir()
    # A shell that waits for a launcher is one of those that pdsh leaves on a host.
    shell = ["bash", "-c", '"$@"; true  # -m launch.attempts.rank', "bash"]
    with rank_below(tmp_path / "b", None, *shell) as above:
        assert psutil.Process(above.pid).name() == "bash"
        above.kill()
        require_asked(tmp_path / "b", 5)


# Signals to ranks


def test_what_a_killed_command_started_here_ends_with_it(tmp_path):
    """`launch.attempts.keep`: a launcher, and what leaves its process group as pdsh's ssh does."""
    started = tmp_path / "started"
    tree = f"setsid sleep 600 & echo $! $$ > {started}.new; mv {started}.new {started}; wait"
    kept = [sys.executable, "-m", "launch.attempts.keep", "sh", "-c", tree]
    code = f"import subprocess; subprocess.run({kept}, start_new_session=True)"
    command = subprocess.Popen([sys.executable, "-c", code], cwd=_ROOT)
    try:
        wait_for(started.exists, _LIMIT_S)
        below = [psutil.Process(int(word)) for word in started.read_text().split()]
        # The shell writes before its child has become another program.
        wait_for(lambda: [p.name() for p in below] == ["sleep", "sh"], _LIMIT_S)
    finally:
        command.kill()
        command.wait()
    _, alive = psutil.wait_procs(below, timeout=20)
    assert alive == []
    for asked, found in (("exit 75", 75), ("kill -9 $$", 137)):
        assert subprocess.run([*kept[:-1], asked], cwd=_ROOT).returncode == found
    # pdsh itself is killed: its ssh processes would hold on to ranks that nobody watches.
    killed = f"setsid sleep 600 & echo $! > {started}; kill -9 $$"
    assert subprocess.run([*kept[:-1], killed], cwd=_ROOT).returncode == 137
    assert not psutil.pid_exists(int(started.read_text()))


def endless(shards: Path, out: Path, **changes) -> RunConfig:
    settings = {"run__epochs": 10**5, "run__max_steps": 10**6, "checkpoint__every_steps": 10**5}
    return tiny_config(shards, out, **(settings | {"run__heartbeat_s": 3} | changes))


def config_file(config: RunConfig) -> str:
    path = config.run.out.with_suffix(".yaml")
    path.write_text(config.to_yaml())
    return str(path)


def require_saved(config: RunConfig, state: str = "stopped", code: int = _RESUMABLE) -> None:
    """Assert that the last step is in a checkpoint, and that `ended.json` says so."""
    from pretrain.checkpoints import checkpoint

    last = checkpoint.newest(config.run.out)
    assert last is not None
    assert last.step == last_step(config.run.out)
    ended = json.loads((config.run.out / "ended.json").read_text())
    assert (ended["state"], ended["code"], ended["step"]) == (state, code, last.step)


def test_a_hangup_saves(shards, tmp_path):
    config = endless(shards, tmp_path / "run")
    words = ["--config", config_file(config)]
    with commands([words], tmp_path / "logs") as (rank,):
        wait_for(lambda: last_step(config.run.out) >= 2, _LIMIT_S, lambda: rank.said)
        rank.signal(signal.SIGHUP)
        assert rank.code(30) == _RESUMABLE, rank.said
        assert "signal SIGHUP: stopping after this step" in rank.said
    require_saved(config)


def test_a_second_interrupt_ends_at_once(shards, tmp_path):
    """Even in a collective that hangs, for the other rank stands still."""
    config = endless(shards, tmp_path / "run", run__heartbeat_s=60)
    with commands([["--config", config_file(config)]] * 2, tmp_path / "logs") as ranks:
        wait_for(lambda: last_step(config.run.out) >= 2, _LIMIT_S, lambda: ranks[0].said)
        ranks[1].signal(signal.SIGSTOP)
        time.sleep(0.3)
        ranks[0].signal(signal.SIGINT)
        time.sleep(1.2)
        assert ranks[0].process.is_alive()
        ranks[0].signal(signal.SIGINT)
        assert ranks[0].code(5) == 130, ranks[0].said
        assert "interrupted again: ended at once" in ranks[0].said
    assert not (config.run.out / "ended.json").exists()


# All ways, all kinds (long)


def geneloom(*words: str) -> list[str]:
    return [sys.executable, "-c", "from launch.cli import main; main()", *words]


def words_of(way: str, config: RunConfig, port: int) -> list[str]:
    own = ["pretrain", "--config", config_file(config)]
    launchers = {
        "pretrain": geneloom(),
        "deepspeed": [
            str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2",
            "--no_local_rank", "--master_port", str(port), "--module",
        ],
        "torchrun": [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
            "--master-port", str(port), "-m",
        ],
        "local": geneloom("launch", "local", "--ranks", "2", "--device", "cpu"),
        "mpi": geneloom("launch", "mpi", "--ranks", "2", "--device", "cpu"),
    }  # fmt: skip
    return [*launchers[way], *own]


class Launched:
    """A run of real ranks that was started in one of the ways, and all its processes."""

    def __init__(self, way: str, config: RunConfig) -> None:
        from tests.ranks import free_port

        self.config, self._mark = config, uuid.uuid4().hex
        self._log = config.run.out.with_suffix(".log")
        kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        settings = {
            "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(_ROOT),
            "GENELOOM_TEST": self._mark,
        }  # fmt: skip
        with self._log.open("w") as log:
            self.command = subprocess.Popen(
                words_of(way, config, free_port()), cwd=_ROOT, env=kept | settings, stdout=log,
                stderr=log, start_new_session=True,
            )  # fmt: skip
        wait_for(lambda: last_step(config.run.out) >= 3, _LIMIT_S, self.said)

    def said(self) -> str:
        return self._log.read_text()

    def processes(self, words: str = "") -> list[psutil.Process]:
        """Return those of its processes whose command line holds `words`; orphans too."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                ours = process.environ().get("GENELOOM_TEST") == self._mark
                is_there = process.status() != psutil.STATUS_ZOMBIE
                if ours and is_there and words in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def end(self) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.command.wait()


# What is above the ranks and started them, in the words of its command line.
ABOVE = {
    "deepspeed": "deepspeed.launcher.launch", "torchrun": "torch.distributed.run",
    "local": "deepspeed.launcher.launch", "mpi": "--oversubscribe",
}  # fmt: skip
_SLOW = pytest.mark.slow
KINDS = ["hangup", "terminate", "interrupt", "interrupt twice", "kill the command",
         "kill the launcher", "kill what is above a rank", "kill a rank"]  # fmt: skip


def cases() -> Iterator:
    for way in ("pretrain", "deepspeed", "torchrun", "local", "mpi"):
        for kind in KINDS:
            if way == "pretrain" and kind.startswith("kill"):
                continue  # it is the rank
            if kind == "kill what is above a rank" and way not in ("local", "mpi"):
                continue  # that is the launcher
            if (way, kind) == ("torchrun", "kill the launcher"):
                continue  # that is the command
            first = (way, kind) in {("local", "kill the command"), ("mpi", "kill the command"),
                                    ("deepspeed", "kill the command"), ("torchrun", "hangup"),
                                    ("local", "hangup"), ("local", "interrupt twice"),
                                    ("local", "kill the launcher")}  # fmt: skip
            yield pytest.param(way, kind, marks=pytest.mark.long if first else _SLOW)


def disturb(run: Launched, way: str, kind: str) -> None:
    """Do it; signals go to the command alone, or with a terminal to all (an interrupt)."""
    numbers = {"hangup": signal.SIGHUP, "terminate": signal.SIGTERM, "interrupt": signal.SIGINT}
    if kind in numbers:
        run.command.send_signal(numbers[kind])
    elif kind == "interrupt twice":
        os.killpg(run.command.pid, signal.SIGINT)
        time.sleep(1.2)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.command.pid, signal.SIGINT)
    elif kind == "kill the command":
        run.command.kill()
    elif kind == "kill the launcher":
        run.processes(ABOVE[way])[0].kill()
    elif kind == "kill what is above a rank":
        run.processes("-m launch.attempts.rank")[-1].kill()
    else:
        run.processes("-m pretrain")[-1].kill()


@pytest.mark.parametrize(("way", "kind"), cases())
def test_nothing_is_left(way, kind, shards, tmp_path):
    """No process after 30 s; all steps saved wherever all ranks live; the code that says so."""
    run = Launched(way, endless(shards, tmp_path / "run"))
    try:
        started = time.monotonic()
        disturb(run, way, kind)
        wait_for(
            lambda: not run.processes(),
            60 if kind == "kill a rank" else _NOTICED_S + _SAVED_S,
            lambda: f"{[p.cmdline() for p in run.processes()]}\n{run.said()}",
        )
        code = run.command.wait(1)
        print(f"{way}, {kind}: {time.monotonic() - started:.1f} s, code {code}")
        if kind == "kill a rank":
            assert code not in (0, _RESUMABLE)
        elif kind != "interrupt twice":
            require_saved(run.config)
            if way in ("pretrain", "local", "mpi") and kind != "kill the command":
                assert code == _RESUMABLE, run.said()
        elif way in ("local", "mpi"):
            # It may have been fast enough to save, or have been at its end, where nothing of ours
            # hears signals any more; a shell calls that 130 too.
            assert code in (130, -signal.SIGINT, _RESUMABLE), run.said()
    finally:
        run.end()
