"""What a run has learned after the same tokens: architecture by optimizer, beside counting.

``python -m benchmarks.learning SHARDS WORK [--steps 366] [--only modernbert-muon ...]``

Each run is `geneloom pretrain` in a process of its own: the same shards, order of cells, masks and
held-out cells; 4 layers of width 128, 8,192 padded tokens a step, one thread, no attention dropout.
366 steps are 3.0 million tokens. Rates, first weights and betas are those under which each was
measured to learn (``RUNS``): the published recipe is post-norm BERT with AdamW. A run that is there
goes on. ``--json FILE`` gathers the curves; ``--plot FILE`` draws them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from pretrain.config import load_config
from pretrain.measure.metrics import read_metrics

TOKENS_PER_STEP = 8_192
_COMMON = (
    "model.num_layers=4", "model.hidden_size=128", "model.num_heads=4",
    "model.intermediate_size=256", f"batch.tokens_per_step={TOKENS_PER_STEP}",
    f"batch.tokens_per_micro_batch={TOKENS_PER_STEP}", "run.threads=1", "run.log_every_steps=10",
    "evaluation.max_cells=200", "evaluation.baseline_cells=20000", "optim.schedule=linear",
)  # fmt: skip
_MODERNBERT = ("model.architecture=modernbert", "model.init_genes=counted")
_BERT = ("model.architecture=bert", "model.attention_dropout=0")
_MUON = ("optim.kind=muon", "optim.learning_rate=2e-3", "optim.beta2=0.98")
# A supplied configuration, and what is changed in it beside `_COMMON`. AdamW's rate: 1e-3 for
# both is published and what was measured; 2e-3 where Muon has the rest.
RUNS = {
    "bert-adamw": ("tiny", *_BERT, "optim.learning_rate=1e-3"),
    "bert-muon": ("tiny", *_BERT, *_MUON),
    "modernbert-adamw": ("tiny", *_MODERNBERT, "optim.learning_rate=1e-3"),
    "modernbert-muon": ("tiny", *_MODERNBERT, *_MUON),
    "recommended-without-prior": ("geneloom_tiny", "objective.prior=none"),
    "recommended": ("geneloom_tiny",),
}


def train(name: str, shards: Path, work: Path, steps: int) -> None:
    """Run one of `RUNS`, or go on with it."""
    out = work / name
    done = json.loads((out / "done.json").read_text()) if (out / "done.json").exists() else {}
    if done.get("steps") == steps:
        return
    evaluations = max(1, steps // 12)
    config, *settings = RUNS[name]
    schedule = [f"run.max_steps={steps}", f"optim.warmup_steps={max(1, steps // 8)}"]
    schedule += [f"{k}.every_steps={evaluations}" for k in ("evaluation", "checkpoint")]
    pretrain(config, [*schedule, *settings], shards, out)
    (out / "done.json").write_text(json.dumps({"steps": steps}))


def pretrain(config: str, settings: list[str], shards: Path, out: Path) -> None:
    """Run `geneloom pretrain` in a process of its own, or go on with it."""
    words = [
        "pretrain", "--config", config, f"data.shards={shards}", f"run.out={out}",
        "run.epochs=100", *_COMMON, *settings,
    ]  # fmt: skip
    code = "import sys; from launch.cli import main; sys.argv[0] = 'geneloom'; main()"
    resume = ["--restart"] if out.exists() else []
    subprocess.run([sys.executable, "-c", code, *words, *resume], check=True)


def curves(work: Path) -> dict[str, dict]:
    """Return what each finished run has reached: settings, held-out curve, the lines beside it."""
    found = {}
    for name in RUNS:
        if not (work / name / "done.json").exists():
            continue
        heldout = [m for m in read_metrics(work / name) if m["kind"] == "heldout"]
        last = heldout[-1]
        found[name] = {
            "settings": load_config(work / name / "config.yaml").recipe(),
            "curve": [
                {
                    "step": m["step"],
                    "tokens": m["step"] * TOKENS_PER_STEP,
                    "loss": m["loss"],
                    "top1": m["masked_accuracy"],
                    "beyond_arithmetic": m.get("beyond_arithmetic"),
                }
                for m in heldout
            ],
            "lines": {
                k.removeprefix("baseline_"): last[k]
                for k in ("unigram", "unigram_by_rank", "mean_rank", "no_repeat", "arithmetic")
                for k in [f"baseline_{k}"]
                if k in last
            },
            "heldout_cells": last["cells"],
            "hidden_genes": last["genes"],
        }
    return found


def print_table(found: dict[str, dict]) -> None:
    """Print the last loss of each run, the best first, and the lines beside them."""
    print(f"{'run':18s} {'tokens':>10s} {'nats':>7s} {'top-1':>7s} {'beyond arithmetic':>18s}")
    ordered = sorted(found.items(), key=lambda item: item[1]["curve"][-1]["loss"])
    for name, run in ordered:
        last = run["curve"][-1]
        print(
            f"{name:18s} {last['tokens']:10,d} {last['loss']:7.3f} {last['top1']:7.2%} "
            f"{last['beyond_arithmetic']:18.3f}"
        )
    for line, loss in next(iter(found.values()))["lines"].items():
        print(f"{line:18s} {'':10s} {loss:7.3f}")


def plot(found: dict[str, dict], path: Path) -> None:
    """Draw held-out loss over tokens, the lines of counting beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for name, run in found.items():
        axes.plot(
            [p["tokens"] / 1e6 for p in run["curve"]], [p["loss"] for p in run["curve"]],
            marker="o", markersize=3, label=name.replace("-", ", "),
        )  # fmt: skip
    for line, loss in next(iter(found.values()))["lines"].items():
        if line in ("unigram_by_rank", "no_repeat", "arithmetic"):
            axes.axhline(loss, color="0.5", linewidth=0.8, linestyle="--")
            axes.annotate(line.replace("_", " "), (0, loss), color="0.35", fontsize=8, va="bottom")
    axes.set_xlabel("tokens seen (millions)")
    axes.set_ylabel("held-out loss (nats per hidden gene)")
    axes.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("shards", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=366)
    parser.add_argument("--only", nargs="*", choices=[*RUNS], default=[*RUNS])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    for name in options.only:
        train(name, options.shards, options.work, options.steps)
    found = curves(options.work)
    print_table(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.plot:
        plot(found, options.plot)


if __name__ == "__main__":
    main()
