"""What `geneloom plan` says of a run beside what the run does, on this machine's CPU.

    python -m benchmarks.plan SHARDS [--json OUT.json]

Memory and the size of a checkpoint are compared; memory above that of a run of a model without
width, for Python and the libraries take as much in every run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from data_prep.files import read_json_lines
from pretrain.config import load_config
from pretrain.plan.corpus import read_corpus
from pretrain.plan.needs import (
    GIB,
    activation_bytes,
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


def run(shards: Path, out: Path, model: list[str], micro_batch: int) -> tuple[list[str], dict]:
    """Train a few steps as a user would; return the settings and what the last step recorded."""
    settings = [
        f"data.shards={shards}", f"run.out={out}", f"run.max_steps={_STEPS}", "run.epochs=1",
        "run.log_every_steps=1", "run.threads=1", "optim.warmup_steps=1", *model,
        f"batch.tokens_per_step={max(16_384, micro_batch)}",
        f"batch.tokens_per_micro_batch={micro_batch}", "evaluation.max_cells=1",
        "evaluation.baseline_cells=1",
    ]  # fmt: skip
    code = "import sys; from launch.cli import main; sys.argv[0] = 'geneloom'; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "pretrain", "--config", "geneformer_v1_6l", *settings],
        cwd=_ROOT, env=os.environ | {"DS_ACCELERATOR": "cpu"}, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return settings, [r for r in read_json_lines(out / "metrics.jsonl") if r["kind"] == "train"][-1]


def compare(shards: Path, folder: Path, name: str, base_gib: float) -> dict[str, Any]:
    """Return a run's figures, planned and measured."""
    model, micro_batch = _RUNS[name]
    out = folder / str(list(_RUNS).index(name))
    settings, record = run(shards, out, model, micro_batch)
    config = load_config("geneformer_v1_6l", settings)
    corpus, max_length = read_corpus(config, 0, 0, 0, 0)
    memory = memory_per_gpu(config, corpus, max_length, 1, 1, micro_batch)
    states = memory.weights + memory.gradients + memory.optimizer
    parameters = num_parameters(config.model, corpus.num_tokens, max_length)
    # A checkpoint is written from a copy in the host's memory.
    copy = checkpoint_bytes(parameters)
    activations = micro_batch * activation_bytes(config, on_gpu=False)
    planned = states + memory.logits + activations + copy
    saved = next((out / "checkpoints").glob("step-*"))
    size = sum(p.stat().st_size for p in saved.glob("*.safetensors"))
    measured = record["memory_gib"] - base_gib
    return {
        "run": name,
        "parameters": parameters,
        "memory_gib": {"planned": planned / GIB, "measured": measured},
        "memory_error": planned / GIB / measured - 1,
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
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _, base = run(shards, folder / "base", _NOTHING, 512)
        found = [compare(shards, folder, n, base["memory_gib"]) for n in _RUNS]
    result = {"base_gib": base["memory_gib"], "runs": found}
    print(json.dumps(result, indent=1))
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
