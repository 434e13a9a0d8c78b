"""What a checkpoint costs the training: published in the background, beside written at once.

``python -m benchmarks.checkpoint WORK --shards SHARDS [--layers 6] [--steps 60]``

One CPU rank, ZeRO 1, the published 6-layer model (V1 vocabulary). Three runs of as many steps on
the same cells: without checkpoints; with one every `--every` steps, published by a thread; and the
same state saved by DeepSpeed's own ``save_checkpoint`` at the same steps, in line. Printed: seconds
that the step was blocked per checkpoint, the share of the interval, how much longer steps are while
a checkpoint is being written (the thread needs a core for it), bytes, and the time from a command
with ``--resume`` to the first step, in which all files are checked.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from data_prep.files import read_json_lines


def settings(shards: Path, out: Path, steps: int, every: int) -> list[str]:
    """Return the settings of a run of the published 6-layer model, small batches."""
    return [
        f"data.shards={shards}", f"run.out={out}", f"run.max_steps={steps}", "run.epochs=1000",
        "run.threads=1", "batch.tokens_per_step=4096", "batch.tokens_per_micro_batch=4096",
        "optim.warmup_steps=5", "model.attention_dropout=0", f"checkpoint.every_steps={every}",
        "evaluation.every_steps=1000000", "evaluation.max_cells=10", "run.log_every_steps=1",
    ]  # fmt: skip


def train_once(arguments: list[str], resume: bool, results) -> None:
    """Run in a process of its own; put the wall time of every step."""
    from pretrain import train
    from pretrain.config import load_config
    from pretrain.engine import Engine
    from pretrain.ranks import dist

    ends: list[float] = []
    one_step = Engine.step

    def timed(self: Engine, step: int, total_steps: int) -> tuple[dict[str, float], float]:
        result = one_step(self, step, total_steps)
        ends.append(time.perf_counter())
        return result

    Engine.step = timed
    started = time.perf_counter()
    train.train(load_config("geneformer_v1_6l", arguments), resume)
    dist.leave()
    results.put((ends[0] - started, np.diff(ends).tolist()))


def train_with_deepspeed_saves(arguments: list[str], every: int, folder: Path, results) -> None:
    """As `train_once`, saving with DeepSpeed's own engine after every so many steps."""
    from pretrain.engine import Engine

    one_step, saved = Engine.step, []

    def saving(self: Engine, step: int, total_steps: int) -> tuple[dict[str, float], float]:
        result = one_step(self, step, total_steps)
        if (step + 1) % every == 0:
            started = time.perf_counter()
            self.deepspeed.save_checkpoint(str(folder), tag=f"step{step + 1}")
            saved.append(time.perf_counter() - started)
        return result

    Engine.step = saving
    train_once(arguments, False, results)
    results.put(saved)


def apart(function, *arguments) -> list:
    """Return what a function put, from a fresh process."""
    context = get_context("spawn")
    results = context.Queue()
    process = context.Process(target=function, args=(*arguments, results))
    process.start()
    found = [results.get(timeout=1800)]
    process.join()
    while not results.empty():
        found.append(results.get())
    return found


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=12)
    arguments = parser.parse_args()
    work, steps, every = arguments.work, arguments.steps, arguments.every
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)

    def run(name: str, interval: int) -> list[str]:
        return settings(arguments.shards, work / name, steps, interval)

    _, plain = apart(train_once, run("plain", 10**6), False)[0]
    _, own = apart(train_once, run("own", every), False)[0]
    (_, _), saved = apart(
        train_with_deepspeed_saves, run("deepspeed", 10**6), every, work / "saves"
    )
    records = [
        r for r in read_json_lines(work / "own" / "metrics.jsonl") if r["kind"] == "checkpoint"
    ]
    blocked = float(np.median([r["blocked_s"] for r in records[1:]]))
    written = float(np.median([r["written_s"] for r in records]))
    usual = float(np.median(plain))
    shutil.rmtree(work / "own" / "checkpoints" / f"step-{steps:08d}")
    resumed, _ = apart(train_once, run("own", every), True)[0]
    print(
        json.dumps(
            {
                "bytes": records[0]["bytes"],
                "step_s": round(usual, 3),
                "blocked_s": round(blocked, 4),
                "first_blocked_s": round(records[0]["blocked_s"], 4),
                "written_s": round(written, 3),
                "deepspeed_save_s": round(float(np.median(saved)), 3),
                "ratio": round(float(np.median(saved)) / blocked, 1),
                "extra_s_per_interval": round((sum(own) - sum(plain)) / (steps / every), 3),
                "resume_to_first_step_s": round(resumed, 2),
            },
            indent=1,
        )
    )
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
