"""What each part of the recommended recipe brings: each taken away, at equal tokens, over seeds.

``python -m benchmarks.recipe SHARDS WORK [--steps 32] [--seeds 0 1 2] [--only recommended ...]``

Each run is `geneloom pretrain --config geneloom_tiny` in a process of its own, on the same shards
and held-out cells and masks; the seed decides weights, order of cells and masks. 8,192 padded
tokens a step, so 32 steps are 0.26 million; warm-up over an eighth of the steps, rates that fall to
0 at the last one. ``published`` is BERT with AdamW, nothing counted. Processor seconds are of the
whole process: start, counting that is not kept yet, training, evaluation. A run that is there is
not repeated. ``--json FILE`` gathers all.
"""

from __future__ import annotations

import argparse
import json
import resource
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.learning import TOKENS_PER_STEP, pretrain
from pretrain.measure.metrics import read_metrics

_ADAMW = (
    "optim.kind=adamw", "optim.learning_rate=1e-3", "optim.beta2=0.999",
    "optim.muon_learning_rate=null",
)  # fmt: skip
_BERT = ("model.architecture=bert", "model.local_window=null", "model.attention_dropout=0")
# What is changed in `geneloom_tiny`.
RUNS: dict[str, tuple[str, ...]] = {
    "recommended": (),
    "without the prior": ("objective.prior=none",),
    "without ModernBERT": _BERT,
    "without Muon": _ADAMW,
    "without counted weights": ("model.init_genes=random",),
    "15 % hidden, not 30 %": ("masking.probability=0.15",),
    "window of 32, not 8": ("model.local_window=32",),
    "published": (
        *_BERT, *_ADAMW, "objective.prior=none", "model.init_genes=random",
        "model.hidden_dropout=0.02", "masking.probability=0.15",
    ),
}  # fmt: skip


def run(name: str, seed: int, shards: Path, work: Path, steps: int) -> dict[str, Any]:
    """Return what one run reached after so many steps, from its folder if it is there."""
    out = work / f"{name.replace(' ', '-').replace('%', 'percent').replace(',', '')}-{seed}-{steps}"
    kept = out / "reached.json"
    if kept.exists():
        return json.loads(kept.read_text())
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    settings = [*RUNS[name], f"run.seed={seed}", f"run.max_steps={steps}"]
    settings += [f"optim.warmup_steps={max(1, steps // 8)}", "checkpoint.every_steps=100000"]
    settings += [f"evaluation.every_steps={steps}", "evaluation.at_start=true"]
    pretrain("geneloom_tiny", settings, shards, out)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    first, *_, last = [m for m in read_metrics(out) if m["kind"] == "heldout"]
    reached = {
        "run": name, "seed": seed, "tokens": steps * TOKENS_PER_STEP,
        "processor_seconds": sum(after[:2]) - sum(before[:2]), "loss_at_start": first["loss"],
        **{k: last[k] for k in ("loss", "masked_accuracy", "top10", "beyond_arithmetic", "cells")},
        "beyond_arithmetic_by_dataset": last["beyond_arithmetic_by_dataset"],
    }  # fmt: skip
    kept.write_text(json.dumps(reached, indent=1))
    return reached


def print_table(found: list[dict[str, Any]]) -> None:
    """Print mean and standard deviation over the seeds of each run."""
    columns = f"{'nats':>16s} {'beyond arithmetic':>18s} {'top-1':>7s} {'CPU s':>6s}"
    print(f"{'':26s} {'seeds':>5s} {columns}")
    for name in RUNS:
        mine = [r for r in found if r["run"] == name]
        if not mine:
            continue
        loss, beyond, top1, seconds = (
            np.array([r[k] for r in mine])
            for k in ("loss", "beyond_arithmetic", "masked_accuracy", "processor_seconds")
        )
        spread = loss.std(ddof=1) if len(mine) > 1 else float("nan")
        print(
            f"{name:26s} {len(mine):5d} {loss.mean():8.3f} ± {spread:5.3f} {beyond.mean():+18.3f} "
            f"{top1.mean():7.2%} {seconds.mean():6.0f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("shards", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="*", choices=[*RUNS], default=[*RUNS])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    # Seed by seed: cut off, it has compared all parts.
    found = []
    for seed in options.seeds:
        for name in options.only:
            found.append(run(name, seed, options.shards, options.work, options.steps))
            print_table(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
