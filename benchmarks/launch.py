"""Launching over two hosts: start-up, and what watching costs (traffic: `benchmarks.traffic`).

    python -m benchmarks.launch SHARDS [--json OUT.json]

Needs root: the hosts are network namespaces (`tests.hosts`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from data_prep.files import read_json_lines
from data_prep.running.owner import LAUNCH_ID
from tests.hosts import Host, hosts, why_no_hosts
from tests.ranks import free_port

_ROOT = Path(__file__).resolve().parent.parent
_REPEATS = 3
_WATCHED_S = 60
_LIMIT_S = 300


def config_of(shards: Path, out: Path, **more: str) -> list[str]:
    """Return the arguments of a small run."""
    settings = {
        "data.shards": str(shards), "run.out": str(out), "run.log_every_steps": "1",
        "run.threads": "1", "model.hidden_size": "128", "model.num_layers": "2",
        "model.intermediate_size": "256", "batch.tokens_per_step": "2048",
        "batch.tokens_per_micro_batch": "1024", "optim.warmup_steps": "2",
        "evaluation.every_steps": "100000", "evaluation.max_cells": "16",
        "checkpoint.every_steps": "100000", "run.epochs": "10000",
    } | {k.replace("__", "."): v for k, v in more.items()}  # fmt: skip
    return ["pretrain", "--config", "tiny", *(f"{k}={v}" for k, v in settings.items())]


def start(host: Host, hostfile: Path, words: list[str], log: Path) -> subprocess.Popen:
    gone = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {k: v for k, v in os.environ.items() if k not in gone}
    code = "import sys; from launch.cli import main; sys.argv[0] = 'geneloom'; main()"
    launch = ["launch", "hostfile", "--device", "cpu", "--hostfile", str(hostfile)]
    return host.start(
        [sys.executable, "-c", code, *launch, *words], log,
        env=environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)},
    )  # fmt: skip


def records(run: Path) -> list[dict[str, Any]]:
    return [r for r in read_json_lines(run / "metrics.jsonl") if r["kind"] == "train"]


def wait_for_step(run: Path, step: int, process: subprocess.Popen, log: Path) -> None:
    until = time.monotonic() + _LIMIT_S
    while not (found := records(run)) or found[-1]["step"] < step:
        if process.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"the run does not get to step {step}:\n{log.read_text()}")
        time.sleep(0.01)


def startup(pair: list[Host], hostfile: Path, shards: Path, folder: Path) -> dict[str, float]:
    """Return seconds from the command: hosts checked, ranks started, first step done."""
    out, log = folder / "run", folder / "log"
    began = time.time()
    process = start(pair[0], hostfile, config_of(shards, out, run__max_steps="3"), log)
    wait_for_step(out, 1, process, log)
    first_step = records(out)[0]["time"] - began
    process.wait(_LIMIT_S)
    events = [json.loads(x) for x in (out / "launch" / "events.jsonl").read_text().splitlines()]
    end = json.loads((out / "launch" / "attempt_1" / "rank_00000.json").read_text())
    return {
        "hosts_checked_s": events[0]["time"] - began,
        "rank_started_s": end["from"] - began,
        "first_step_s": first_step,
    }


def steady(pair: list[Host], hostfile: Path, shards: Path, folder: Path) -> dict[str, float]:
    """Return CPU seconds, per second of training, of the processes that only watch."""
    out, log = folder / "run", folder / "log"
    process = start(pair[0], hostfile, config_of(shards, out), log)
    try:
        wait_for_step(out, 5, process, log)
        at, cpu, first = time.monotonic(), watching(process.pid), records(out)[-1]["step"]
        time.sleep(_WATCHED_S)
        seconds, cpu = time.monotonic() - at, watching(process.pid) - cpu
        steps = records(out)[-1]["step"] - first
    finally:
        process.terminate()
        process.wait(_LIMIT_S)
    return {"seconds": seconds, "steps": steps, "processes_cpu_share": cpu / seconds}


def idle(limit_s: float) -> float:
    """Return CPU seconds a second of one of two idle ranks; `limit_s` 0: nobody watches."""
    code = (
        "import time, sys\n"
        "from pretrain.ranks import dist\n"
        "from pretrain.ranks.watch import Watch\n"
        "ranks = dist.start(60, 1)\n"
        f"with Watch(ranks, {limit_s}, 480) as watch:\n"
        "    watch.progress(0)\n"
        "    cpu, at = time.process_time(), time.monotonic()\n"
        f"    time.sleep({_WATCHED_S})\n"
        "    print((time.process_time() - cpu) / (time.monotonic() - at), flush=True)\n"
        "dist.leave()\n"
    )
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=_ROOT, stdout=subprocess.PIPE, text=True,
            env=os.environ | {
                "RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": "2", "DS_ACCELERATOR": "cpu",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(_ROOT),
            },
        )
        for r in range(2)
    ]  # fmt: skip
    return max(float(r.communicate(timeout=_LIMIT_S)[0].splitlines()[-1]) for r in ranks)


def watching(supervisor: int) -> float:
    """Return CPU seconds so far of the supervisor, its ssh, and the parents of the ranks."""
    total = 0.0
    below = {p.pid for p in psutil.Process(supervisor).children(recursive=True)}
    for process in psutil.process_iter(["cmdline"]):
        words = " ".join(process.info["cmdline"] or [])
        try:
            ours = process.pid in below or LAUNCH_ID in process.environ()
            if ours and "-m pretrain " not in words:
                times = process.cpu_times()
                total += times.user + times.system
        except psutil.Error:
            continue
    return total


def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shards", type=Path)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if (why := why_no_hosts()) is not None:
        raise SystemExit(f"two hosts: {why}")
    shards = given.shards.absolute()
    found: dict[str, Any] = {"load_before": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        hostfile = folder / "hostfile"
        hostfile.write_text("ds1 slots=1\nds2 slots=1\n")
        with hosts(2, folder / "hosts") as pair:
            starts = []
            for number in range(_REPEATS):
                own = folder / f"start{number}"
                own.mkdir()
                starts.append(startup(pair, hostfile, shards, own))
            found["startup"] = {k: statistics.median(s[k] for s in starts) for k in starts[0]}
            found["startup_runs"] = starts
            (folder / "steady").mkdir()
            found["steady"] = steady(pair, hostfile, shards, folder / "steady")
        # What watching adds to a rank that does nothing else, at the default interval.
        found["idle_rank_cpu_share"] = {"watched": idle(20), "unwatched": idle(0)}
    found["load_after"] = os.getloadavg()[0]
    print(json.dumps(found, indent=1))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
