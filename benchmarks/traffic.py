"""What crosses the network in a step: two hosts with one CPU rank each, for DeepSpeed's files.

``python -m benchmarks.traffic zero1 zero3:4 nodes_fast:1:bf16``: a file, micro-batches of a rank in
a step, precision. Prints bytes sent by a rank in a step, per parameter of the model. Needs root:
the hosts are network namespaces (`tests.hosts`); the network is gloo over a virtual cable.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

from pretrain.checkpoints import checkpoint
from pretrain.config import RunConfig
from tests.hosts import Host, hosts, why_no_hosts
from tests.runs import tiny_config
from tests.synthetic import make_shards

_STEPS = (3, 13)
_TOKENS_PER_STEP = 1024
_LIMIT_S = 300
_DEFAULTS = ["", "1", "fp32"]


def main(specs: list[str]) -> None:
    """Measure each file, and print a row for it."""
    reason = why_no_hosts()
    if reason:
        raise SystemExit(f"traffic: {reason}")
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        (base / "cells").mkdir()
        shards = make_shards(base / "cells")
        with hosts(2, base / "hosts") as pair:
            print("| file | precision | micro-batches | bytes per parameter |\n|---|---|---|---|")
            for spec in specs:
                parts = spec.split(":")
                file, micro, precision = [*parts, *_DEFAULTS[len(parts) :]]
                sent = bytes_per_parameter(pair, shards, base, file, int(micro), precision)
                print(f"| `{file}` | {precision} | {micro} | {sent:.1f} |", flush=True)


def bytes_per_parameter(
    pair: list[Host], shards: Path, base: Path, file: str, micro: int, precision: str
) -> float:
    """Return what a rank sends in a step: the difference of a longer and a shorter run."""
    total = []
    for steps in _STEPS:
        config = tiny_config(
            shards, base / f"{Path(file).stem}-{micro}-{precision}-{steps}", run__max_steps=steps,
            run__deepspeed=file, run__precision=precision, run__heartbeat_s=0,
            batch__tokens_per_micro_batch=_TOKENS_PER_STEP // (2 * micro), optim__warmup_steps=1,
            model__hidden_size=256, model__num_layers=4, model__intermediate_size=1024,
            checkpoint__every_steps=10**6,
        )  # fmt: skip
        before = sum(sent_bytes(host) for host in pair)
        run(pair, config)
        total.append(sum(sent_bytes(host) for host in pair) - before)
    last = checkpoint.newest(config.run.out)
    assert last is not None
    reader = last.reader()
    parameters = sum(reader.numel(n) for n in reader.names)
    return (total[1] - total[0]) / (_STEPS[1] - _STEPS[0]) / len(pair) / parameters


def sent_bytes(host: Host) -> int:
    """Return the bytes that a host has sent so far."""
    return int(host.run(["cat", "/sys/class/net/eth0/statistics/tx_bytes"]).stdout)


def run(pair: list[Host], config: RunConfig) -> None:
    """Train with one rank on each host."""
    path = config.run.out.with_suffix(".yaml")
    path.write_text(config.to_yaml())
    port = 20_000 + time.time_ns() // 10**8 % 10_000
    processes = []
    for rank, host in enumerate(pair):
        own = {"RANK": str(rank), "WORLD_SIZE": str(len(pair)), "LOCAL_RANK": "0",
               "MASTER_ADDR": pair[0].address, "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu",
               "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}  # fmt: skip
        words = [sys.executable, "-m", "pretrain", "--config", str(path)]
        processes.append(host.start(words, path.with_suffix(".log"), env=os.environ | own))
    if [p.wait(_LIMIT_S) for p in processes] != [0] * len(pair):
        raise SystemExit(
            f"traffic: {config.run.deepspeed}:\n{path.with_suffix('.log').read_text()}"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
