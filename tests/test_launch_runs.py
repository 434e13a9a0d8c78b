"""``geneloom runs``: states of a real run, and of what remains of it when files are missing."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path

import pytest

from launch.runs import find_runs, format_age, look_at
from tests.test_cli import geneloom

DAY = 86_400


@pytest.fixture(scope="module")
def home(shards, trained, tmp_path_factory) -> Path:
    """A folder with shards, and with a run of ten steps that saved at 5 and 10."""
    folder = tmp_path_factory.mktemp("home")
    shutil.copytree(shards, folder / "shards")
    shutil.copytree(trained, folder / "runs" / "whole")
    return folder


@pytest.fixture
def run(home, tmp_path) -> Path:
    return Path(shutil.copytree(home / "runs" / "whole", tmp_path / "run"))


def state(run: Path, later: float = 0.0) -> str:
    found = look_at(run, time.time() + later)
    assert found is not None
    return found.state


def test_all_that_lies_there(home):
    shards, whole = sorted(find_runs(home), key=lambda r: r.kind)
    assert (shards.kind, shards.state, shards.unit) == ("prepare", "finished", "cells")
    assert shards.step == 120
    assert (whole.kind, whole.state, whole.step, whole.of) == ("pretrain", "finished", 10, 10)
    records = [json.loads(x) for x in (home / "runs/whole/metrics.jsonl").read_text().splitlines()]
    last = [r for r in records if r["kind"] == "train"][-1]
    assert (whole.loss, whole.tokens_per_s) == (last["loss"], last["tokens_per_s"])
    heldout = next(r for r in records if r["kind"] == "heldout")
    assert whole.heldout_loss == heldout["loss"]
    assert whole.beyond_arithmetic == heldout["baseline_arithmetic"] - heldout["loss"]


def test_a_finished_run_stays_finished(run):
    assert state(run, DAY) == "finished"


def test_a_run_that_is_heard_of_runs_and_one_that_is_not_is_silent(run):
    shutil.rmtree(run / "checkpoints" / "step-00000010")
    (run / "metrics.jsonl").touch()
    assert state(run) == "running"
    assert state(run, DAY) == "silent"


def test_a_run_that_was_asked_to_stop(run):
    """A checkpoint between the usual steps is that of a signal; metrics end with it or before."""
    shutil.rmtree(run / "checkpoints" / "step-00000010")
    (run / "checkpoints" / "step-00000005").rename(run / "checkpoints" / "step-00000007")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(x for x in lines if json.loads(x)["step"] <= 7))
    assert state(run) == state(run, DAY) == "stopped"


@pytest.mark.parametrize("said", ["stopped", "failed"])
def test_a_run_that_said_how_it_ended(said, run):
    shutil.rmtree(run / "checkpoints" / "step-00000010")
    (run / "ended.json").write_text(json.dumps({"state": said, "step": 10}))
    assert state(run, DAY) == said
    (run / "ended.json").write_text(json.dumps({"state": said, "step": 9}))
    assert state(run, DAY) == "silent", "that was an earlier start"


def test_a_run_whose_loss_was_no_number(run):
    shutil.rmtree(run / "checkpoints" / "step-00000010")
    (run / "not-finite-step-00000011-rank-00000.npz").touch()
    assert state(run) == "failed"


def test_a_run_before_its_first_line(run):
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.jsonl").unlink()
    (run / "env.json").touch()
    found = look_at(run, time.time())
    assert found is not None
    assert (found.state, found.step, found.of, found.loss) == ("running", 0, 10, None)


def test_a_torn_line_is_left_out(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 99')
    found = look_at(run, time.time())
    assert found is not None and found.step == 10


def test_work_of_prepare_that_is_not_done(tmp_path):
    (tmp_path / "shards" / ".partial").mkdir(parents=True)
    (found,) = find_runs(tmp_path)
    assert (found.kind, found.state) == ("unfinished", "running")
    assert state(tmp_path / "shards", DAY) == "silent"


def test_other_peoples_files_are_no_runs(tmp_path):
    (tmp_path / "manifest.json").write_text("[1]")
    (tmp_path / "results.json").write_bytes(b"\xff\xfe")
    assert find_runs(tmp_path) == []


def test_screens_and_benchmarks_that_are_done_or_not(tmp_path):
    """A screen's manifest says so; a benchmark writes its page last."""
    screen, benchmark = tmp_path / "screen", tmp_path / "benchmark"
    for folder, record in (
        (screen, {"format": "geneloom-perturb/1", "complete": False, "parts": 3}),
        (benchmark, {"format": "geneloom-benchmark/1", "tasks": [{}, {}]}),
    ):
        folder.mkdir()
        name = "manifest.json" if folder == screen else "results.json"
        (folder / name).write_text(json.dumps(record))
    (screen / "shifts").mkdir()
    (screen / "shifts" / "part-0.parquet").touch()
    found = look_at(screen, time.time())
    assert found and (found.kind, found.state, found.step, found.of) == ("perturb", "running", 1, 3)
    assert state(screen, DAY) == state(benchmark, DAY) == "silent"
    (benchmark / "report.html").touch()
    found = look_at(benchmark, time.time() + DAY)
    assert found and (found.state, found.step, found.of) == ("finished", 2, 2)


def test_evaluations_that_are_done_and_one_that_is_not(tmp_path):
    for kind, parts in (("finetune", "seeds"), ("saturate", "sizes")):
        folder = tmp_path / kind
        folder.mkdir()
        named = {"finetune": "geneloom-finetune/1", "saturate": "geneloom-saturation/1"}[kind]
        (folder / "results.json").write_text(json.dumps({"format": named, parts: [{}, {}, {}]}))
        found = look_at(folder, time.time())
        assert found and (found.kind, found.state, found.of) == (kind, "finished", 3)
        assert found.unit == parts
    (tmp_path / "begun" / ".partial").mkdir(parents=True)
    found = look_at(tmp_path / "begun", time.time())
    assert found and (found.kind, found.state) == ("unfinished", "running")
    assert state(tmp_path / "begun", DAY) == "silent"


def test_command(home, tmp_path):
    table = geneloom("runs", home, cwd=tmp_path)
    assert table.returncode == 0, table.stderr
    assert re.search(r"^runs/whole +pretrain +finished +10 steps", table.stdout, flags=re.M)
    listed = json.loads(geneloom("runs", home, "--json", cwd=tmp_path).stdout)
    assert {run["kind"] for run in listed} == {"prepare", "pretrain"}
    nothing = geneloom("runs", cwd=tmp_path)
    assert "nothing here" in nothing.stdout
    absent = geneloom("runs", "absent", cwd=tmp_path)
    assert (absent.returncode, absent.stderr) == (2, "error: absent: no such folder\n")


def test_ages():
    assert [format_age(s) for s in (5, 119, 120, 7_200, 2 * DAY)] == [
        "5 s", "119 s", "2 min", "2 h", "2 d",
    ]  # fmt: skip
