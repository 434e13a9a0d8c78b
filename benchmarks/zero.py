"""What a ZeRO stage costs by size of the model, and what a second rank costs, on CPU cores.

``python -m benchmarks.zero SHARDS [--models ...] [--stages 0 1 2 3] [--worlds 1 2]``

Each rank has one core and one thread; the ranks talk by gloo. Every rank gets the same work at any
number of ranks (`--tokens` padded tokens a step and rank, in one micro-batch, the same cells in
every step), without attention dropout, which on a CPU would be much of the step. Prints JSON:
medians over steps, of rank 0, of wall and processor seconds of a step, and the peak memory of a
rank. Processor time leaves out waiting, for the other rank as for other programs on the machine.
The cases take turns as a whole, `--rounds` times.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from pretrain.config import load_config


def rank_main(arguments: argparse.Namespace) -> None:
    """Be one rank: train, and let rank 0 print."""
    from data_prep.shards.reader import ShardSet
    from pretrain.batches.step_dataset import StepDataset
    from pretrain.ds_config import derive_ds_config
    from pretrain.engine import Engine
    from pretrain.ranks import dist

    case = json.loads(arguments.case)
    rank, world = int(os.environ["RANK"]), case["world"]
    os.sched_setaffinity(0, {rank % (os.cpu_count() or 1)})
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    config = load_config(
        case["model"],
        [
            f"data.shards={arguments.shards}", "run.out=unused", "run.threads=1",
            f"run.precision={case['precision']}", f"run.deepspeed=zero{case['stage']}",
            f"batch.tokens_per_step={arguments.tokens * world}",
            f"batch.tokens_per_micro_batch={arguments.tokens}",
            "model.activation_checkpointing=false", "model.attention_dropout=0",
        ],
    )  # fmt: skip
    shards = ShardSet(str(arguments.shards), None)
    ranks = dist.start(600, 1)
    engine = Engine(config, derive_ds_config(config), shards, ranks, None)
    data = StepDataset(
        shards, "train", 0, arguments.tokens * world, arguments.tokens, config.masking, rank, world
    )
    work = data[0]
    wall, processor = [], []
    for step in range(arguments.steps + 1):
        dist.wait_for_all()
        started, used = time.perf_counter(), time.process_time()
        masked = dist.count_over_ranks({"masked": work.masked})["masked"]
        engine.forward_backward(work, step, masked)
        engine.step(step, 1000)
        if step:  # the first one allocates
            wall.append(time.perf_counter() - started)
            processor.append(time.process_time() - used)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    dist.leave()
    if rank == 0:
        found = {
            "parameters": engine.num_parameters, "padded_tokens": work.padded_tokens,
            "wall_s": wall, "processor_s": processor, "peak_gib": memory,
        }  # fmt: skip
        print(json.dumps(found), file=answers, flush=True)


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Start the ranks of a case and return what rank 0 found."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.zero", *sys.argv[1:], "--case", json.dumps(case)]
    processes = []
    for rank in range(case["world"]):
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case["world"]}
        environment = os.environ | {k: str(v) for k, v in places.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        processes.append(
            subprocess.Popen(
                command, env=environment | {"THP_MEM_ALLOC_ENABLE": "1"}, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )
        )  # fmt: skip
    answers = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        return {"failed": [process.returncode for process in processes]}
    return json.loads(answers[0])


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--models", nargs="+", default=["geneformer_v1_6l"])
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--worlds", type=int, nargs="+", default=[2])
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--tokens", type=int, default=2048, help="a step and rank")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        rank_main(arguments)
        return
    cases = [
        {"model": m, "stage": s, "world": w, "precision": arguments.precision}
        for m in arguments.models
        for s in arguments.stages
        for w in arguments.worlds
    ]
    found: list[list[dict]] = [[] for _ in cases]
    for _ in range(arguments.rounds):
        for place, case in enumerate(cases):
            found[place].append(run(case))
    table = []
    for case, rounds in zip(cases, found, strict=True):
        good = [r for r in rounds if "failed" not in r]
        row: dict[str, Any] = case | {"failed": len(rounds) - len(good)}
        for what in ("wall_s", "processor_s"):
            every = [seconds for r in good for seconds in r[what]]
            row[what] = statistics.median(every) if every else None
        if good:
            row |= {k: good[-1][k] for k in ("parameters", "padded_tokens", "peak_gib")}
        table.append(row)
        print(json.dumps(row), flush=True)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(
            json.dumps({"load": os.getloadavg(), "cases": table}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
