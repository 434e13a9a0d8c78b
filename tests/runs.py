"""Short pretraining runs for tests: their settings, functions for ranks, the real command."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from pretrain.config import RunConfig
from pretrain.ds_config import DEEPSPEED_CONFIG_FOLDER

_ROOT = Path(__file__).resolve().parent.parent
# Only the slow tests take these too.
OFFLOAD = tuple(sorted(p.stem for p in DEEPSPEED_CONFIG_FOLDER.glob("zero*offload*.json")))
# Of one start of a run on a machine that does a lot beside it.
LIMIT_S = 180


def tiny_config(shards: Path, out: Path, **changes: Any) -> RunConfig:
    """Return a run of seconds; `changes` are ``section__field=value``."""
    content: dict[str, dict[str, Any]] = {
        "data": {"shards": shards, "num_workers": 0},
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 64,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        },
        "batch": {"tokens_per_step": 1024, "tokens_per_micro_batch": 512},
        "optim": {"learning_rate": 5e-3, "warmup_steps": 3},
        "run": {"out": out, "epochs": 50, "max_steps": 10, "log_every_steps": 1, "threads": 1},
        "evaluation": {"every_steps": 1000, "max_cells": 20},
        "checkpoint": {"every_steps": 5},
    }
    for key, value in changes.items():
        section, _, field = key.partition("__")
        content.setdefault(section, {})[field] = value
    return RunConfig.model_validate(content)


def run_training(config: RunConfig, resume: bool = False, allow_changes: bool = False):
    """Train and return the losses and the final fp32 weights, flat by name."""
    from pretrain.ranks import dist
    from pretrain.train import train

    summary = train(config, resume, allow_changes)
    dist.leave()
    return summary, final_state(config.run.out)["weight"]


def elsewhere(config: RunConfig, out: Path) -> RunConfig:
    """Return the same run in another folder."""
    return config.model_copy(update={"run": config.run.model_copy(update={"out": out})})


def cut_off(whole: RunConfig, out: Path) -> RunConfig:
    """Return a copy of a run of 10 steps of which the checkpoint of step 5 is all that is left."""
    shutil.copytree(whole.run.out, out)
    shutil.rmtree(out / "checkpoints" / "step-00000010")
    return elsewhere(whole, out)


def final_state(run: Path) -> dict[str, dict[str, np.ndarray]]:
    """Return weights and moments of the newest checkpoint: kind -> name -> flat fp32."""
    from pretrain.checkpoints import checkpoint

    last = checkpoint.newest(run)
    assert last is not None
    reader = last.reader()
    found: dict[str, dict[str, np.ndarray]] = {}
    for name in reader.names:
        for kind in reader.kinds(name):
            values = reader.read(kind, name, 0, reader.numel(name)).numpy()
            found.setdefault(kind, {})[name] = values
    return found


def require_same_state(run: Path, other: Path) -> None:
    """Assert that the newest checkpoints of two runs hold the same bits."""
    state, expected = final_state(run), final_state(other)
    assert state.keys() == expected.keys()
    for kind in expected:
        assert state[kind].keys() == expected[kind].keys()
        for name, values in expected[kind].items():
            np.testing.assert_array_equal(state[kind][name], values, err_msg=f"{kind}/{name}")


def start_command(config: RunConfig, *arguments: str, ranks: int = 1) -> subprocess.Popen:
    """Start ``geneloom [launch local --ranks N] pretrain`` as a user would.

    What it says is added to `console`, a file: nobody empties a pipe while it runs.
    """
    path = _beside(config, "yaml")
    path.write_text(config.to_yaml())
    code = "import sys; from launch.cli import main; sys.argv[0] = 'geneloom'; main()"
    launcher = ("launch", "local", "--ranks", str(ranks)) if ranks > 1 else ()
    command = [sys.executable, "-c", code, *launcher, "pretrain", "--config", str(path), *arguments]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    with _beside(config, "log").open("a") as log:
        return subprocess.Popen(
            command, cwd=_ROOT, env=environment | {"OMP_NUM_THREADS": "1"},
            stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip


def rank_processes(launcher_pid: int, module: str) -> list[psutil.Process]:
    """Return the rank processes below a launcher: those whose command is ``python -m module``.

    They are in the order of ranks where the launcher sets RANK; on a busy machine they do not start
    in this order.
    """
    found: list[tuple[int, psutil.Process]] = []
    for process in psutil.Process(launcher_pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            words = process.cmdline()
            if ("-m", module) in zip(words, words[1:], strict=False):
                found.append((int(process.environ().get("RANK", 0)), process))
    return [process for _, process in sorted(found, key=lambda pair: pair[0])]


def console(config: RunConfig) -> str:
    """Return what all starts of a run have said so far."""
    return _beside(config, "log").read_text()


def _beside(config: RunConfig, suffix: str) -> Path:
    return config.run.out.with_name(f"{config.run.out.name}.{suffix}")


def wait_until(
    condition: Callable[[], bool], process: subprocess.Popen, look_every_s: float = 0.02
) -> bool:
    """Return True when a condition holds, False if the process ended before."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(look_every_s)
    return True


def metrics(run: Path, kind: str) -> list[dict[str, Any]]:
    """Return the records of one kind, of a run that may be writing them."""
    from pretrain.measure.metrics import read_metrics

    return [m for m in read_metrics(run) if m["kind"] == kind]


def last_step(run: Path) -> int:
    """Return how many steps a run has logged."""
    records = metrics(run, "train")
    return records[-1]["step"] if records else 0
