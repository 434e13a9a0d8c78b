"""Power cuts and signals: the real command, killed at random moments, loses and repeats nothing."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest

from data_prep.hashing import mix64
from data_prep.shards.order import EpochPlan
from data_prep.shards.reader import ShardSet
from pretrain.config import RunConfig
from tests.ranks import Command, run_ranks, start_commands
from tests.runs import (
    LIMIT_S,
    console,
    last_step,
    metrics,
    rank_processes,
    require_same_state,
    run_training,
    start_command,
    tiny_config,
    wait_until,
)

_SAVE_EVERY = 3
# When a start is killed: while it starts or resumes, while it trains, while it writes a checkpoint.
_MOMENTS = ("starting", "training", "writing")
_SHARES = (0.2, 0.3, 0.5)
_STARTING_S = 6.0
# Never killed on purpose: a busy machine lets a run get on while we look away.
_LAST_STEPS = 30


def _config(shards: Path, out: Path, deepspeed: str, epochs: int) -> RunConfig:
    """Return a run of whole epochs; the model is wide, so that writing it takes a while."""
    return tiny_config(
        shards, out, data__num_workers=1, model__num_layers=1, model__hidden_size=256,
        model__intermediate_size=256, model__hidden_dropout=0.1,
        # More steps where more kills have to find one.
        batch__tokens_per_step=768 if epochs == 1 else 384,
        batch__tokens_per_micro_batch=192, run__max_steps=None, run__epochs=epochs,
        run__deepspeed=deepspeed, run__heartbeat_s=8, evaluation__every_steps=20,
        checkpoint__every_steps=_SAVE_EVERY,
    )  # fmt: skip


@dataclass
class Forked:
    """Ranks of a run that were forked from a server, without a launcher: they start in a second.

    It is asked as a `subprocess.Popen` of the command is.
    """

    ranks: list[Command]

    def poll(self) -> int | None:
        codes = [rank.process.exitcode for rank in self.ranks]
        return None if None in codes else max(map(abs, codes))

    def wait(self, timeout: float) -> int:
        return max(abs(rank.code(timeout)) for rank in self.ranks)


Start = subprocess.Popen | Forked


@pytest.mark.parametrize(
    ("ranks", "deepspeed", "kills", "epochs", "way"),
    [
        (2, "zero2", 1, 1, "forked"),
        pytest.param(2, "zero2", 3, 2, "forked", marks=pytest.mark.long),
        pytest.param(1, "zero1", 3, 2, "launched", marks=pytest.mark.slow),
        pytest.param(2, "zero2", 3, 2, "launched", marks=pytest.mark.slow),
        pytest.param(1, "zero0", 20, 2, "launched", marks=pytest.mark.slow),
        pytest.param(2, "zero3", 20, 2, "launched", marks=pytest.mark.slow),
    ],
)
def test_killed_again_and_again_is_bit_exact(
    ranks, deepspeed, kills, epochs, way, shards, tmp_path
):
    """Weights, moments, losses and cells are those of the run that nobody disturbed."""
    whole = _config(shards, tmp_path / "whole", deepspeed, epochs)
    run_ranks(ranks, run_training, whole)
    cut = _config(shards, tmp_path / "cut", deepspeed, epochs)
    seed = time.time_ns() % 2**32
    print(f"seed {seed}")
    _kill_again_and_again(cut, ranks, kills, way, np.random.default_rng(seed))
    process = _go_on(cut, ranks, way)
    assert process.wait(LIMIT_S) == 0, _said(cut, process)

    require_same_state(cut.run.out, whole.run.out)
    _require_same_metrics(cut.run.out, whole.run.out)
    _require_every_cell_in_every_epoch(cut)
    assert _names(cut.run.out / "checkpoints") == _names(whole.run.out / "checkpoints")
    latest = cut.run.out / "checkpoints" / "latest"
    assert latest.read_text() == (whole.run.out / "checkpoints" / "latest").read_text()


def _kill_again_and_again(
    config: RunConfig, ranks: int, kills: int, way: str, rng: np.random.Generator
) -> None:
    """Kill starts of a run: so many, and more until one was writing a checkpoint."""
    plan = EpochPlan(
        ShardSet(config.data.shards), "train", config.run.seed, config.batch.tokens_per_step
    )
    total = config.run.epochs * plan.steps_per_epoch
    done = hits = 0
    while done < kills or not hits:
        assert done < kills + 10, "no kill came while a checkpoint was written"
        # What is left of the run has to do for the kills that are left.
        steps_left = total - _LAST_STEPS - _saved_step(config.run.out)
        most = max(_SAVE_EVERY + 1, steps_left // max(1, kills + 1 - done)) if steps_left > 0 else 1
        # "starting" needs luck to hit anything: not in the first two.
        moment = ("writing", "training")[done] if done < 2 else str(rng.choice(_MOMENTS, p=_SHARES))
        before = _partial_folders(config.run.out)
        process = _go_on(config, ranks, way)
        of_ranks, others = _wait_for_moment(moment, process, config, ranks, most, before, rng)
        # Of a launched run: one rank, and the others end by themselves; or all processes.
        # With three kills both happen. Until ranks have met, only a launcher sees that one is gone.
        have_met = way == "launched" or moment != "starting"
        half = done == 1 or (done > 1 and rng.random() < 0.5)
        alone = len(of_ranks) == ranks > 1 and have_met and half
        _kill([of_ranks[int(rng.integers(ranks))]] if alone else of_ranks + others)
        _wait_for_the_end(process, config, alone)
        hit = bool(_partial_folders(config.run.out) - before)
        who = "one rank" if alone else "all"
        print(f"killed while {moment}: {who}, {last_step(config.run.out)} steps, writing: {hit}")
        done, hits = done + 1, hits + hit


def _go_on(config: RunConfig, ranks: int, way: str) -> Start:
    words = ["--resume"] if _saved_step(config.run.out) else []
    if not words:
        # Nothing was saved yet: what the command asks a user to do.
        shutil.rmtree(config.run.out, ignore_errors=True)
    if way == "launched":
        return start_command(config, *words, ranks=ranks)
    path = config.run.out.with_name("cut.yaml")
    path.write_text(config.to_yaml())
    return Forked(start_commands([["--config", str(path), *words]] * ranks, path.parent / "logs"))


def _said(config: RunConfig, process: Start) -> str:
    if isinstance(process, Forked):
        return "\n".join(rank.said for rank in process.ranks)
    return console(config)


def _wait_for_moment(
    moment: str,
    process: Start,
    config: RunConfig,
    ranks: int,
    most: int,
    before: set[Path],
    rng: np.random.Generator,
) -> tuple[list[psutil.Process], list[psutil.Process]]:
    """Return the ranks and the other processes of a start when it is time to kill it.

    Parameters
    ----------
    most
        Steps that it may get on.
    before
        What was left of checkpoints when it started.
    """
    run, started, saved = config.run.out, time.time(), _saved_step(config.run.out)

    def steps_of_this_start() -> int:
        records = metrics(run, "train")
        return records[-1]["step"] if records and records[-1]["time"] > started else 0

    def writes_after(step: int) -> bool:
        return any(int(p.name.split(".")[1][5:]) > step for p in _partial_folders(run) - before)

    if moment == "starting":
        until = time.monotonic() + rng.uniform(0, _STARTING_S)
        wait_until(lambda: time.monotonic() > until or steps_of_this_start() > 0, process)
        return _processes(process, ranks)
    assert wait_until(lambda: steps_of_this_start() > 0, process), _said(config, process)
    # Now, for it takes as long as writing a checkpoint does.
    processes = _processes(process, ranks)
    if moment == "training":
        target = saved + int(rng.integers(1, most + 1))
        in_time = wait_until(lambda: steps_of_this_start() >= target, process)
        time.sleep(float(rng.uniform(0, 0.1)))
    else:
        target = saved + int(rng.integers(0, most + 1))
        # Writing a checkpoint of this model takes 10 ms.
        in_time = wait_until(lambda: writes_after(target), process, look_every_s=0.003)
    assert in_time, f"the run has ended, too early to be killed:\n{_said(config, process)}"
    return processes


def _processes(process: Start, ranks: int) -> tuple[list[psutil.Process], list[psutil.Process]]:
    """Return the ranks of a started command, and what else it runs."""
    try:
        if isinstance(process, Forked):
            return [psutil.Process(rank.pid) for rank in process.ranks], []
        root = psutil.Process(process.pid)
        of_ranks = rank_processes(process.pid, "pretrain") if ranks > 1 else [root]
        return of_ranks, [p for p in (root, *root.children(recursive=True)) if p not in of_ranks]
    except psutil.NoSuchProcess:
        return [], []


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _wait_for_the_end(process: Start, config: RunConfig, alone: bool) -> None:
    """Return when no process of a run is left; if all were killed, kill one just started too."""
    deadline = time.monotonic() + LIMIT_S
    assert process.wait(LIMIT_S) != 0, _said(config, process)
    name = str(config.run.out)
    while left := [
        p
        for p in psutil.process_iter(["cmdline"])
        if any(name in word for word in p.info["cmdline"] or [])
    ]:
        assert time.monotonic() < deadline, f"still running: {left}"
        if not alone:
            _kill(left)
        time.sleep(0.05)


def _partial_folders(run: Path) -> set[Path]:
    return set((run / "checkpoints").glob(".step-*.partial"))


def _saved_step(run: Path) -> int:
    steps = [int(p.name.removeprefix("step-")) for p in (run / "checkpoints").glob("step-*")]
    return max(steps, default=0)


def _names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def _require_same_metrics(run: Path, other: Path) -> None:
    """Assert that two runs logged every step once, with the same numbers where time is no part."""
    numbers = ("step", "loss", "masked_accuracy", "grad_norm", "learning_rate", "cells_seen",
               "cells_digest")  # fmt: skip
    for kind, fields in (("train", numbers), ("heldout", ("step", "loss"))):
        mine, theirs = metrics(run, kind), metrics(other, kind)
        assert [{k: m[k] for k in fields} for m in mine] == [
            {k: m[k] for k in fields} for m in theirs
        ]
    steps = [m["step"] for m in metrics(run, "train")]
    assert steps == list(range(1, len(steps) + 1))
    saved = [m["step"] for m in metrics(run, "checkpoint")]
    assert len(saved) == len(set(saved))


def _require_every_cell_in_every_epoch(config: RunConfig) -> None:
    """Assert that each step served the cells that belong to it, and each epoch the whole corpus."""
    from pretrain.checkpoints import checkpoint

    shards = ShardSet(config.data.shards)
    corpus = np.concatenate(
        [np.arange(e.first_cell, e.first_cell + e.num_cells) for e in shards.extents("train")]
    )
    plan = EpochPlan(shards, "train", config.run.seed, config.batch.tokens_per_step)
    steps = [plan.cells(plan.step(s)) for s in range(config.run.epochs * plan.steps_per_epoch)]
    for epoch in range(config.run.epochs):
        of_epoch = steps[epoch * plan.steps_per_epoch : (epoch + 1) * plan.steps_per_epoch]
        np.testing.assert_array_equal(np.sort(np.concatenate(of_epoch)), np.sort(corpus))

    seen = digest = 0
    records = metrics(config.run.out, "train")
    for cells, record in zip(steps, records, strict=True):
        assert record["cells_seen"] - seen == len(cells), f"step {record['step']}"
        running = int(record["cells_digest"], 16)
        assert (running - digest) % 2**64 == _digest(cells), f"step {record['step']}"
        seen, digest = record["cells_seen"], running

    last = checkpoint.newest(config.run.out)
    assert last is not None
    assert last.record["cells_seen"] == config.run.epochs * len(corpus)
    assert last.record["cells_digest"] == f"{config.run.epochs * _digest(corpus) % 2**64:016x}"
    assert last.record["cells_quarantined"] == 0


def _digest(cells: np.ndarray) -> int:
    return int(mix64(cells).sum(dtype=np.uint64))


@pytest.mark.long
def test_signal_through_the_launcher_saves_and_exits_75(shards, tmp_path):
    from pretrain.checkpoints import checkpoint

    config = tiny_config(shards, tmp_path / "run", run__max_steps=20000, run__epochs=5000)
    process = start_command(config, ranks=2)
    assert wait_until(lambda: last_step(config.run.out) >= 3, process), console(config)
    process.send_signal(signal.SIGTERM)
    assert process.wait(LIMIT_S) == 75, console(config)
    last = checkpoint.newest(config.run.out)
    assert last is not None
    assert last.step == last_step(config.run.out)
    assert "continue with --resume" in console(config)
    assert (config.run.out / "checkpoints" / "latest").read_text().strip() == last.folder.name
