"""What Muon's step costs beside AdamW's and beside the rest of a training step, on one CPU core.

``python -m benchmarks.muon SHARDS [--model geneformer_v1_6l] [--steps 10] [--out FILE.json]``

Both optimizers in one process, ZeRO 1, one thread, one core, small steps in turns: what an
optimizer costs does not depend on the batch. Forward and backward are the same for both; they are
measured on one full micro-batch, and a step of the configuration has so many of them. Processor
seconds. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from pretrain.config import load_config

KINDS = ("adamw", "muon")


class Trainer:
    """One optimizer's model, and the seconds that its steps took."""

    def __init__(self, kind: str, arguments: argparse.Namespace) -> None:
        from data_prep.shards.reader import ShardSet
        from pretrain.ds_config import derive_ds_config
        from pretrain.engine import Engine
        from pretrain.ranks import dist

        self.config = load_config(
            arguments.model,
            [
                f"data.shards={arguments.shards}", "run.out=unused", "run.threads=1",
                "run.deepspeed=zero1", f"batch.tokens_per_micro_batch={arguments.micro_batch}",
                f"optim.kind={kind}",
            ],
        )  # fmt: skip
        self.shards = ShardSet(str(arguments.shards), None)
        ranks = dist.start(600, 1)
        self.engine = Engine(self.config, derive_ds_config(self.config), self.shards, ranks, None)
        self.computing_s: list[float] = []
        self.stepping_s: list[float] = []

    def step(self, tokens: int) -> int:
        """Train one step of so many padded tokens; return how many there were."""
        from pretrain.batches.step_dataset import StepDataset

        batch = self.config.batch
        data = StepDataset(
            self.shards, "train", 0, tokens, batch.tokens_per_micro_batch, self.config.masking, 0, 1
        )
        work = data[0]
        times = [time.process_time()]
        self.engine.forward_backward(work, len(self.stepping_s), work.masked)
        times.append(time.process_time())
        self.engine.step(len(self.stepping_s), 1000)
        times.append(time.process_time())
        self.computing_s.append(times[1] - times[0])
        self.stepping_s.append(times[2] - times[1])
        return work.padded_tokens


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--model", default="geneformer_v1_6l")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--micro-batch", type=int, default=16384, help="padded tokens")
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {arguments.core})
    torch.set_num_threads(1)
    trainers = {kind: Trainer(kind, arguments) for kind in KINDS}
    for _ in range(arguments.steps + 1):
        for trainer in trainers.values():
            trainer.step(1024)
    found: dict[str, Any] = {"model": arguments.model, "load": os.getloadavg()}
    for kind, trainer in trainers.items():
        # The first step makes the moments.
        found[kind] = {"step_s": statistics.median(trainer.stepping_s[1:])}
    for kind, trainer in trainers.items():
        found[kind]["state_bytes"] = trainer.engine.state_bytes
    muon, step_s = trainers["muon"], found["muon"]["step_s"]
    tokens = muon.step(arguments.micro_batch)
    of_a_step = muon.config.batch.tokens_per_step
    whole_s = muon.computing_s[-1] * of_a_step / tokens + step_s
    found |= {
        "parameters": muon.engine.num_parameters,
        "micro_batch_tokens": tokens,
        "micro_batch_s": muon.computing_s[-1],
        "step_tokens": of_a_step,
        "whole_step_s": whole_s,
        "share_of_muon": step_s / whole_s,
        "added_by_muon": (step_s - found["adamw"]["step_s"]) / whole_s,
    }
    print(json.dumps(found, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
