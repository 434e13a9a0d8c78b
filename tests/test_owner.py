"""One run in a folder: who is there is told, who has died is noticed, exactly one gets in."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from data_prep.files import OWNER_NAME
from data_prep.running import owner as owner_module
from data_prep.running.owner import (
    ATTEMPT,
    LEASE_S,
    SERIES,
    FolderInUse,
    owned,
    refuse_if_in_use,
)
from tests.ranks import commands, kill, run_ranks
from tests.runs import last_step, metrics, tiny_config
from tests.test_pretrain_faults import wait_until

_USABLE = 75


def write_owner(folder: Path, age_s: float = 0, **changes) -> Path:
    """Write the file of an owner of another machine, as old as `age_s`."""
    folder.mkdir(exist_ok=True)
    path = folder / OWNER_NAME
    owner = {
        "id": "other", "host": "node7", "machine": "elsewhere", "pid": 12, "started": 0.0,
        "since": "2026-01-02 03:04:05 UTC", "job": "", "series": "",
    }  # fmt: skip
    path.write_text(json.dumps(owner | changes))
    then = time.time() - age_s
    os.utime(path, (then, then))
    return path


def test_the_owner_is_named_and_leaves_nothing(tmp_path):
    folder = tmp_path / "a" / "b"
    with owned(folder, "pretrain"):
        with (
            pytest.raises(FolderInUse, match=f"pretrain, process {os.getpid()} on .* since 20"),
            owned(folder, "pretrain"),
        ):
            pass
        assert json.loads((folder / OWNER_NAME).read_text())["pid"] == os.getpid()
        assert [p.name for p in folder.iterdir()] == [OWNER_NAME]
    assert not (tmp_path / "a").exists()


def test_what_stands_in_a_folder_stays(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(RuntimeError), owned(tmp_path, "pretrain"):
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


@pytest.fixture
def short_lease(monkeypatch):
    """Times of a lease that a test can wait for."""
    monkeypatch.setattr(owner_module, "LEASE_S", 1.5)
    monkeypatch.setattr(owner_module, "RENEW_S", 0.2)
    monkeypatch.setattr(owner_module, "_LOOK_S", 0.05)


def test_an_owner_elsewhere_that_gives_signs_is_waited_for_no_longer(short_lease, tmp_path):
    path = write_owner(tmp_path, job="77")
    stop = threading.Event()

    def renew() -> None:
        while not stop.wait(0.2):
            os.utime(path)

    renewing = threading.Thread(target=renew)
    renewing.start()
    try:
        started = time.monotonic()
        with pytest.raises(FolderInUse, match=r"process 12 on node7 since .*, SLURM job 77"):
            owned(tmp_path, "pretrain").__enter__()
        assert time.monotonic() - started < 1
    finally:
        stop.set()
        renewing.join()
    assert [p.name for p in tmp_path.iterdir()] == [OWNER_NAME], "a refused start leaves nothing"


@pytest.mark.parametrize(("age_s", "at_least_s"), [(0.0, 1.0), (2.0, 0.0), (-3600.0, 1.0)])
def test_an_owner_elsewhere_that_gives_no_sign_is_dead(age_s, at_least_s, short_lease, tmp_path):
    """By the clock of the file system; one that was set back makes nobody immortal."""
    write_owner(tmp_path, age_s)
    started = time.monotonic()
    with owned(tmp_path, "pretrain"):
        assert at_least_s <= time.monotonic() - started < 3
        assert json.loads((tmp_path / OWNER_NAME).read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_the_next_attempt_of_a_launcher_takes_over(tmp_path, monkeypatch):
    write_owner(tmp_path, series="launch-1", attempt="1")
    monkeypatch.setenv(SERIES, "launch-1")
    monkeypatch.setenv(ATTEMPT, "2")
    with owned(tmp_path, "pretrain"):
        pass
    monkeypatch.delenv(SERIES)
    monkeypatch.delenv(ATTEMPT)
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    write_owner(tmp_path, series="slurm-5", attempt="0")
    with pytest.raises(FolderInUse):  # two at once in one job
        owned(tmp_path, "pretrain").__enter__()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with owned(tmp_path, "pretrain"):
        pass


def test_a_run_beside_another_of_its_job_is_refused(tmp_path, monkeypatch):
    """In an allocation both have its number; that the other lives can be seen here."""
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    with owned(tmp_path, "pretrain"):
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        with pytest.raises(FolderInUse):
            owned(tmp_path, "pretrain").__enter__()


def test_what_is_about_to_start_looks_without_waiting_or_writing(tmp_path):
    refuse_if_in_use(tmp_path / "nothing")
    with owned(tmp_path, "perturb"), pytest.raises(FolderInUse, match="perturb, process"):
        refuse_if_in_use(tmp_path)
    path = write_owner(tmp_path, job="77")  # may have died: a rank will find out
    refuse_if_in_use(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_in_its_place_is_named(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ValueError, match="run: exists and is no folder"):
        owned(tmp_path / "run", "pretrain").__enter__()
    assert (tmp_path / "run").read_text() == "mine"


def test_an_owner_that_was_killed_is_noticed_at_once(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from data_prep.running.owner import owned\n"
        "with owned(Path(sys.argv[1]), 'pretrain'): print('in', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "in\n"
    with pytest.raises(FolderInUse, match=f"process {process.pid} on"):
        owned(tmp_path, "pretrain").__enter__()
    process.kill()
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    with owned(tmp_path, "pretrain"):  # though nobody has waited for it yet
        pass
    process.wait()


def enter(folders: list[Path], together, entered) -> None:
    """Try every folder at the same moment as the others, and hold it until all have tried."""
    random.seed()  # each its own moments, not those of the process that it was forked from
    for folder in folders:
        together.wait(60)
        try:
            with owned(folder, "pretrain"):
                entered.put((folder, True))
                together.wait(60)
        except FolderInUse:
            entered.put((folder, False))
            together.wait(60)


@pytest.fixture
def slow_moments(monkeypatch):
    """Let time pass between what a start reads and what it does, as on a loaded machine."""
    for name in ("_linked", "_read"):
        now = getattr(owner_module, name)

        def later(*given, now=now):
            time.sleep(random.random() * 0.02)
            done = now(*given)
            time.sleep(random.random() * 0.02)
            return done

        monkeypatch.setattr(owner_module, name, later)


@pytest.mark.parametrize("what", ["nobody", "a dead owner", "a dead owner and a dead heir"])
def test_of_many_that_start_at_once_one_gets_in(what, slow_moments, tmp_path):
    folders = [tmp_path / f"run_{number}" for number in range(6)]
    for folder in folders:
        if what != "nobody":
            path = write_owner(folder, age_s=LEASE_S + 1)
        if what == "a dead owner and a dead heir":  # killed while it took over
            heir = path.with_name(f"{OWNER_NAME}.other.next")
            heir.write_text(path.read_text().replace("other", "heir"))
            os.utime(heir, (path.stat().st_mtime,) * 2)
    context = multiprocessing.get_context("fork")
    together, entered = context.Barrier(6), context.Queue()
    # For all folders: to fork this process, which has imported much, takes long.
    racers = [context.Process(target=enter, args=(folders, together, entered)) for _ in range(6)]
    for racer in racers:
        racer.start()
    got = [entered.get(timeout=60) for _ in racers for _ in folders]
    for racer in racers:
        racer.join(30)
        assert racer.exitcode == 0
    assert {folder: got.count((folder, True)) for folder in folders} == dict.fromkeys(folders, 1)
    assert len(got) == 36
    assert not [p for p in tmp_path.rglob("*") if not p.is_dir()]


def test_an_owner_whose_file_was_torn_is_dead_after_a_while(tmp_path):
    path = tmp_path / OWNER_NAME
    path.write_text('{"id": "oth')
    then = time.time() - 60
    os.utime(path, (then, then))
    with owned(tmp_path, "pretrain"):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_a_second_start_of_a_run_is_refused_and_changes_nothing(shards, tmp_path):
    config = tiny_config(
        shards, tmp_path / "run", run__max_steps=10**6, run__epochs=10**5, checkpoint__every_steps=5
    )
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml())
    words = ["--config", str(path)]
    with commands([words], tmp_path / "logs") as (first,):
        wait_until(lambda: last_step(config.run.out) >= 6, [first])
        for more in ([], ["--resume"], ["--restart"]):
            with commands([[*words, *more]], tmp_path / "logs") as (second,):
                assert second.code() == 2
            named = f"another run works in this folder: pretrain, process {first.pid} on"
            assert re.search(f"error: .*{named}", second.said), second.said
        before = last_step(config.run.out)
        wait_until(lambda: last_step(config.run.out) > before, [first])
        kill(first.process)
    steps = [m["step"] for m in metrics(config.run.out, "train")]
    assert steps == list(range(1, len(steps) + 1))
    with commands([[*words, "--resume"]], tmp_path / "logs") as (third,):
        wait_until(lambda: last_step(config.run.out) > steps[-1], [third])
        third.signal(signal.SIGTERM)
        assert third.code() == _USABLE
    assert not (config.run.out / OWNER_NAME).exists()


def test_a_run_that_was_taken_over_while_it_stood_still_writes_nothing_more(shards, tmp_path):
    """Its owner's file is replaced as a start on another machine does; two ranks, frozen."""
    config = tiny_config(
        shards, tmp_path / "run", run__max_steps=10**6, run__epochs=10**5, run__heartbeat_s=3,
        checkpoint__every_steps=2,
    )  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml())
    out = config.run.out
    with commands([["--config", str(path)]] * 2, tmp_path / "logs") as ranks:
        wait_until(lambda: last_step(out) >= 4, ranks)
        for rank in ranks:
            rank.signal(signal.SIGSTOP)
        (out / OWNER_NAME).unlink()
        write_owner(out, kind="pretrain")
        before = (out / "metrics.jsonl").read_bytes(), checkpoints_of(out)
        for rank in ranks:
            rank.signal(signal.SIGCONT)
        assert ranks[0].code() == 1
        assert ranks[1].code() == 1
        assert ((out / "metrics.jsonl").read_bytes(), checkpoints_of(out)) == before
        said = ranks[0].said
        assert re.search(
            rf"error: {out} is not this run's any more: pretrain, process 12 on node7", said
        )
        assert "Traceback" not in said + ranks[1].said
    assert json.loads((out / OWNER_NAME).read_text())["id"] == "other"


def checkpoints_of(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").glob("step-*"))


def test_all_ranks_are_refused(shards, tmp_path):
    """One message, exit code 2 of both ranks, nobody waits for the other."""
    config = tiny_config(shards, tmp_path / "run")
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml())
    with (
        owned(config.run.out, "pretrain"),
        commands([["--config", str(path)]] * 2, tmp_path / "logs") as ranks,
    ):
        assert [rank.code() for rank in ranks] == [2, 2]
        assert ranks[0].said.count("another run works in this folder") == 1, ranks[0].said
        assert ranks[1].said.strip() == "", ranks[1].said
        assert [p.name for p in config.run.out.iterdir()] == [OWNER_NAME]


def own_twice(folder: Path) -> str:
    """Enter a folder of an evaluation with two ranks, from inside such a one."""
    from eval.owning import owned_by_ranks
    from pretrain.ranks import dist

    ranks = dist.start(60, threads=1)
    text = ""
    with owned_by_ranks(folder, "finetune", ranks):
        try:
            with owned_by_ranks(folder, "finetune", ranks):
                pass
        except FolderInUse as error:
            text = str(error)
        dist.wait_for_all()
    dist.leave()
    return text


def test_ranks_of_an_evaluation_are_refused_together(tmp_path):
    first, second = run_ranks(2, own_twice, tmp_path)
    assert first == second
    assert "another run works in this folder: finetune, process" in first
