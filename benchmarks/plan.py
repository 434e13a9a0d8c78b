"""What `geneloom plan` says of a run beside what the run does, on this machine's CPU.

    python -m benchmarks.plan SHARDS [--json OUT.json]

Memory at the peak of three steps and the size of a checkpoint are compared; memory above that of a
model without width before its first step, for Python and the libraries take as much in every run.
Each run is measured twice: as it is, and with blocks from 1 MiB on given back to the system when
they are freed (``MALLOC_MMAP_THRESHOLD_``). What lies between them the program has freed, and the C
library keeps in pieces that are too small for what is asked for next.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.files import read_json_lines
from pretrain.config import load_config
from pretrain.plan.corpus import read_corpus
from pretrain.plan.needs import (
    GIB,
    checkpoint_bytes,
    memory_per_gpu,
    num_parameters,
)

_ROOT = Path(__file__).resolve().parent.parent
# name -> (model settings, micro-batch)
_NOTHING = ["model.hidden_size=8", "model.num_layers=1", "model.num_heads=1",
            "model.intermediate_size=8"]  # fmt: skip
_RUNS = {
    "6 layers, 256 wide, 4,096 tokens": ([], 4096),
    "6 layers, 256 wide, 16,384 tokens": ([], 16_384),
    "12 layers, 512 wide, 4,096 tokens": (
        ["model.hidden_size=512", "model.num_layers=12", "model.num_heads=8",
         "model.intermediate_size=1024"], 4096,
    ),
}  # fmt: skip
_STEPS = 3
_LOOK_S = 0.05
# What a run says after all is loaded, and before anything is computed.
_BEFORE_STEPS = "steps done; epoch"
_GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}


@dataclass(frozen=True)
class Run:
    """A run: its settings, memory before the first step and at most since, processor time."""

    settings: list[str]
    before_gib: float
    peak_gib: float
    cpu_s: float


def run(
    shards: Path, out: Path, model: list[str], micro_batch: int, more: Mapping[str, str]
) -> Run:
    """Train a few steps as a user would; `more` are variables of the environment."""
    settings = [
        f"data.shards={shards}", f"run.out={out}", f"run.max_steps={_STEPS}", "run.epochs=1",
        "run.log_every_steps=1", "run.threads=1", "optim.warmup_steps=1", *model,
        f"batch.tokens_per_step={micro_batch}",
        f"batch.tokens_per_micro_batch={micro_batch}", "evaluation.max_cells=1",
        "evaluation.baseline_cells=1",
    ]  # fmt: skip
    code = "import sys; from launch.cli import main; sys.argv[0] = 'geneloom'; main()"
    words = [sys.executable, "-c", code, "pretrain", "--config", "geneformer_v1_6l", *settings]
    log_path = out.with_suffix(".log")
    with log_path.open("w") as log:
        process = subprocess.Popen(
            words, cwd=_ROOT, env={**os.environ, "DS_ACCELERATOR": "cpu", **more}, stdout=log,
            stderr=log,
        )  # fmt: skip
        before, peak, ended = 0.0, 0.0, 0
        while not ended:
            time.sleep(_LOOK_S)
            resident = _resident_gib(process.pid)
            if not before and _BEFORE_STEPS in log_path.read_text():
                before = resident
            # A checkpoint, with its copy in memory, comes after the last step was recorded.
            if before and len(_steps(out)) < _STEPS:
                peak = max(peak, resident)
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
    if status:
        raise RuntimeError(log_path.read_text())
    return Run(settings, before, peak, usage.ru_utime + usage.ru_stime)


def _resident_gib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / GIB


def _steps(out: Path) -> list[dict[str, Any]]:
    return [r for r in read_json_lines(out / "metrics.jsonl") if r["kind"] == "train"]


def compare(shards: Path, folder: Path, name: str, base: tuple[Run, Run]) -> dict[str, Any]:
    """Return a run's figures, planned and measured; `base`: runs of a model without width."""
    model, micro_batch = _RUNS[name]
    out = folder / str(list(_RUNS).index(name))
    given_back = run(shards, out.with_name(f"{out.name}b"), model, micro_batch, _GIVEN_BACK)
    usual = run(shards, out, model, micro_batch, {})
    config = load_config("geneformer_v1_6l", usual.settings)
    corpus, max_length = read_corpus(config, 0, 0, 0, 0)
    memory = memory_per_gpu(config, corpus, max_length, 1, 1, micro_batch, on_gpu=False)
    states = memory.weights + memory.gradients + memory.optimizer
    parameters = num_parameters(config.model, corpus.num_tokens, max_length)
    planned = (states + memory.logits + memory.activations) / GIB
    saved = next((out / "checkpoints").glob("step-*"))
    size = sum(p.stat().st_size for p in saved.glob("*.safetensors"))
    measured = [r.peak_gib - b.before_gib for r, b in zip((usual, given_back), base, strict=True)]
    return {
        "run": name,
        "model": model,
        "micro_batch": micro_batch,
        "num_tokens": corpus.num_tokens,
        "max_length": max_length,
        "parameters": parameters,
        "memory_gib": {"planned": planned, "measured": measured[0], "given_back": measured[1]},
        "memory_error": planned / measured[0] - 1,
        "memory_error_given_back": planned / measured[1] - 1,
        "cpu_s": {"usual": usual.cpu_s, "given_back": given_back.cpu_s},
        "checkpoint_bytes": {"planned": checkpoint_bytes(parameters), "measured": size},
        "checkpoint_error": checkpoint_bytes(parameters) / size - 1,
    }


def main() -> None:
    """Compare, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shards", type=Path)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    shards = given.shards.absolute()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        base = (
            run(shards, folder / "base", _NOTHING, 1024, {}),
            run(shards, folder / "baseb", _NOTHING, 1024, _GIVEN_BACK),
        )
        found = []
        for name in _RUNS:
            found.append(compare(shards, folder, name, base))
            print(json.dumps(found[-1]), flush=True)
    result = {"base_gib": [r.before_gib for r in base], "runs": found}
    print(json.dumps(result, indent=1))
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
