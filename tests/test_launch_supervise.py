"""A run that ends with an error: started again where that can help, and the evidence kept."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.attempts.rank_logs import ends, last_error, root_cause
from launch.verbs import check_and_find_folder, saved_step, to_go_on
from tests.ranks import end_commands, run_ranks, start_geneloom
from tests.runs import metrics, rank_processes, run_training, tiny_config

_ROOT = Path(__file__).resolve().parent.parent
_LIMIT_S = 240


def start(config, log: Path, *launch: str) -> subprocess.Popen:
    path = config.run.out.with_suffix(".yaml")
    path.write_text(config.to_yaml())
    code = "import sys; from launch.cli import main; sys.argv[0] = 'geneloom'; main()"
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    with log.open("a") as file:
        return subprocess.Popen(
            [sys.executable, "-c", code, "launch", "local", "--ranks", "2", "--device", "cpu",
             *launch, "pretrain", "--config", str(path)],
            cwd=_ROOT, env=kept | {"OMP_NUM_THREADS": "1"}, stdout=file, stderr=file,
        )  # fmt: skip


def test_a_killed_rank_of_prepare_is_started_again(shards, tmp_path):
    """MPI ranks that prepare data: they start in a quarter of the time that training needs."""
    cells, vocabulary = shards.parent / "cells.h5ad", shards / "vocabulary.json"
    arguments = ["prepare", cells, "--vocab", vocabulary, "--heldout", "0.2", "--out"]
    out, log = tmp_path / "out", tmp_path / "log"
    process = start_geneloom(
        ["launch", "mpi", "--ranks", "2", "--device", "cpu", "--restarts", "1", *arguments, out],
        log,
    )
    try:
        until = time.monotonic() + _LIMIT_S
        while len(ranks := rank_processes(process.pid, "data_prep")) < 2:
            assert process.process.is_alive(), process.said
            assert time.monotonic() < until
            time.sleep(0.02)
        ranks[1].kill()
        assert process.code(_LIMIT_S) == 0, process.said
    finally:
        end_commands([process])
    assert re.search(r"launch: attempt 1 ended: .*ended by SIGKILL", process.said), process.said
    assert re.search(r"launch: starting again in \d s from step 0\n", process.said), process.said
    folder = out / "launch"
    command = (folder / "command.sh").read_text()
    assert command.startswith("geneloom launch mpi --ranks 2")
    found = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [e["event"] for e in found] == ["started", "ended", "started", "done"]
    assert all((folder / f"attempt_{n}" / "rank_00001.log").exists() for n in (1, 2))

    alone = start_geneloom([*arguments, tmp_path / "alone"], log)
    assert alone.code() == 0, alone.said
    written = {p.name: p.read_bytes() for p in (tmp_path / "alone").iterdir()}
    assert {p.name: p.read_bytes() for p in out.iterdir() if p != folder} == written


def test_a_refused_start_leaves_what_another_launch_wrote(tmp_path):
    folder, log = tmp_path / "out" / "launch", tmp_path / "log"
    (folder / "attempt_1").mkdir(parents=True)
    (folder / "command.sh").write_text("geneloom launch slurm ...\n")
    words = ["launch", "mpi", "--ranks", "1", "--device", "cpu", "prepare", tmp_path / "no.h5ad",
             "--vocab", "build", "--out", tmp_path / "out", "--token", "canary"]  # fmt: skip
    assert start_geneloom(words, log).code() == 2, log.read_text()
    assert sorted(p.name for p in folder.iterdir()) == ["attempt_1", "command.sh", "events.jsonl"]
    assert (folder / "command.sh").read_text() == "geneloom launch slurm ...\n"
    said = (folder / "events.jsonl").read_text()
    found = [json.loads(line)["event"] for line in said.splitlines()]
    assert found == ["started", "refused"]
    assert "canary" not in said


@pytest.mark.long
def test_a_killed_rank_costs_no_cell(shards, tmp_path):
    alone = tiny_config(shards, tmp_path / "alone", run__max_steps=60)
    run_ranks(1, run_training, alone)
    config = tiny_config(
        shards, tmp_path / "run", run__max_steps=60, run__heartbeat_s=3, checkpoint__every_steps=4
    )
    log = tmp_path / "log"
    process = start(config, log, "--restarts", "2")
    until = time.monotonic() + _LIMIT_S
    while saved_step(config.run.out) < 4:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until
        time.sleep(0.02)
    rank_processes(process.pid, "pretrain")[1].kill()
    assert process.wait(_LIMIT_S) == 0, log.read_text()
    own, other = metrics(config.run.out, "train"), metrics(alone.run.out, "train")
    assert own[-1]["cells_digest"] == other[-1]["cells_digest"]
    assert [m["loss"] for m in own] == pytest.approx([m["loss"] for m in other], rel=1e-5)
    said = log.read_text()
    assert re.search(r"launch: attempt 1 ended: rank [01] on .*: ended by SIGKILL", said), said
    assert re.search(r"launch: starting again in 1 s from step \d+\n", said), said
    folder = config.run.out / "launch"
    assert "geneloom launch local --ranks 2" in (folder / "command.sh").read_text()
    found = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [e["event"] for e in found] == ["started", "ended", "started", "done"]
    assert all((folder / f"attempt_{n}" / "rank_00001.log").exists() for n in (1, 2))


@pytest.mark.long
def test_a_crash_that_repeats_is_not_started_again(shards, tmp_path):
    """A learning rate that makes every step after the first infinite."""
    config = tiny_config(
        shards, tmp_path / "run", run__max_steps=20, optim__learning_rate=1e30,
        optim__warmup_steps=1, optim__max_grad_norm=1e30,
    )  # fmt: skip
    log = tmp_path / "log"
    process = start(config, log, "--restarts", "5")
    assert process.wait(_LIMIT_S) == 1, log.read_text()
    said = log.read_text()
    assert "the same end twice at step 0: not started again" in said
    assert re.findall(r"launch: attempt (\d) ended: (.*) in step", said) == [
        ("1", "rank 0 on " + socket.gethostname() + ": NotFinite: loss is nan"),
        ("2", "rank 0 on " + socket.gethostname() + ": NotFinite: loss is nan"),
    ]


def test_wrong_input_is_said_once_and_leaves_nothing(shards, tmp_path):
    log = tmp_path / "log"
    config = tiny_config(tmp_path / "nothing", tmp_path / "run")
    process = start(config, log, "--restarts", "3")
    assert process.wait(_LIMIT_S) == 2, log.read_text()
    assert log.read_text().count("no manifest.json") == 1
    assert not (tmp_path / "run").exists()


def write_end(folder: Path, rank: int, host: str, code: int, at: float, said: str) -> None:
    (folder / f"rank_{rank:05d}.log").write_text(f"# rank {rank} on {host}\n{said}\n")
    record = {"rank": rank, "host": host, "code": code, "from": 0.0, "to": at}
    (folder / f"rank_{rank:05d}.json").write_text(json.dumps(record))


ECHO = "rank {} ends: rank 2 failed: OSError: disk. The last complete checkpoint is as it was"


def test_the_first_error_is_the_root_cause(tmp_path):
    """Texts as ranks write them; a clock that is ahead does not make an echo the first."""
    hosts = {"a": 2, "b": 2}
    write_end(tmp_path, 0, "a", 1, 10.0, ECHO.format(0))
    write_end(tmp_path, 1, "a", 1, 9.0, ECHO.format(1))
    write_end(tmp_path, 2, "b", 1, 12.0, "12:00 step 5\nerror on rank 2: OSError: disk is full")
    write_end(tmp_path, 3, "b", -15, 13.0, "12:00 step 5")
    cause, log = root_cause(tmp_path, hosts, [])
    assert cause == "rank 2 on b: OSError: disk is full"
    assert log == tmp_path / "rank_00002.log"
    assert [e.rank for e in ends(tmp_path)] == [1, 0, 2, 3]
    write_end(tmp_path, 3, "b", -9, 8.0, "12:00 step 5")
    assert root_cause(tmp_path, hosts, [])[0].startswith("rank 3 on b: ended by SIGKILL")
    for rank in (2, 3):
        (tmp_path / f"rank_{rank:05d}.json").unlink()
    assert root_cause(tmp_path, hosts, [])[0].startswith("rank 2 on b, rank 3 on b: ended from")
    assert root_cause(tmp_path, hosts, ["b"])[0].startswith("b cannot be reached; rank 1 on a:")


def test_where_no_rank_began_the_launcher_is_heard(tmp_path):
    (tmp_path / "launcher.log").write_text("-----\nmpirun: no such node\n-----\n")
    cause, _ = root_cause(tmp_path, {"a": 2}, [])
    assert cause == "no rank started: mpirun: no such node"


def test_a_traceback_is_read_to_its_last_line(tmp_path):
    log = tmp_path / "log"
    log.write_text("step 1\nTraceback (most recent call last):\n  File x\nKeyError: 'gene'\nbye\n")
    assert last_error(log) == "KeyError: 'gene'"
    log.write_text("[rank0]: │ 55 │ raise\n[rank0]: NameError: name 'x' is not defined\n")
    assert last_error(log) == "NameError: name 'x' is not defined"
    log.write_text("error: shards/x.tar: is damaged\nmore words\n")
    assert last_error(log) == "shards/x.tar: is damaged"
    assert last_error(tmp_path / "absent") == ""


def test_folders_and_arguments_of_verbs(tmp_path):
    given = ["--config", "tiny", "data.shards=x", f"run.out={tmp_path}/r", "--resume"]
    assert check_and_find_folder("pretrain", given) == tmp_path / "r"
    assert to_go_on("pretrain", given) == [*given[:-1], "--restart"]
    # A step that was chosen is gone back to once, not by each start.
    for step in (["--step", "500"], ["--step=best"]):
        assert to_go_on("pretrain", [*given, *step]) == [*given[:-1], "--restart"]
    (tmp_path / "from").mkdir()
    with pytest.raises(ValueError, match="from: no config.json"):
        check_and_find_folder("pretrain", [*given, "--resume-from", f"{tmp_path}/from"])
    assert check_and_find_folder("perturb", ["cells", f"--out={tmp_path}/o"]) == tmp_path / "o"
    assert to_go_on("perturb", ["cells"]) == ["cells"]
    with pytest.raises(ValueError, match="--out is missing"):
        check_and_find_folder("prepare", ["cells"])
    with pytest.raises(ValueError, match="does not run on several ranks"):
        check_and_find_folder("export", [])
    assert saved_step(tmp_path) == -1
