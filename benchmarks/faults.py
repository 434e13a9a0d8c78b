"""How soon a fault is noticed, and how soon the run trains again, on two loaded cores.

    python -m benchmarks.faults SHARDS [--json OUT.json] [--idle] [--repeats N] [--only WORDS]

Three hosts (network namespaces, `tests.hosts`: needs root): one starts the run, two train with the
default signs of life. A fault is caused on the second of them; the launcher's own record says when
it ended the attempt, ``metrics.jsonl`` when the first training step of the next one was done. One
process for each core computes beside it all the time, at the same priority.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.launch import config_of, records, start, wait_for_step
from launch.attempts.rank_logs import read_events
from tests.busy import busy
from tests.hosts import Host, hosts, why_no_hosts

_STOP = "import sys; from launch.cli import main; sys.argv[1:1] = ['stop', '--now']; main()"
_LIMIT_S = 300


def rank_of(run: Path, host: Host) -> str:
    """Return the process id, as a host counts, of the rank of a run; not of what started it."""
    of_run = host.processes(f"run.out={run} ")
    (rank,) = [p for p in host.processes("-m pretrain ") if p in of_run]
    return str(rank)


def _kill_rank(run: Path, host: Host) -> None:
    host.run(["kill", "-KILL", rank_of(run, host)])


def _freeze_rank(run: Path, host: Host) -> None:
    host.run(["kill", "-STOP", rank_of(run, host)])


def _unplug(_run: Path, host: Host) -> None:
    host.unplug()


FAULTS: dict[str, Callable[[Path, Host], None]] = {
    "a rank is killed": _kill_rank,
    "a rank stands still": _freeze_rank,
    "a host loses its cable": _unplug,
}


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}


def disturbed(three: list[Host], shards: Path, folder: Path, fault: str) -> dict[str, float]:
    """Return seconds from a fault until it was noticed, and until the next training step."""
    out, log, hostfile = folder / "run", folder / "log", folder / "hostfile"
    hostfile.write_text("ds2 slots=1\nds3 slots=1\n")
    # A checkpoint every five steps: what is trained again does not belong to what is measured.
    words = config_of(shards, out, checkpoint__every_steps="5")
    process = start(three[0], hostfile, words, log)
    try:
        wait_for_step(out, 12, process, log)
        FAULTS[fault](out, three[2])
        at = time.time()
        while len(read_events(out / "launch")) < 2 or not _trains_again(out):
            if process.poll() is not None or time.time() > at + _LIMIT_S:
                raise RuntimeError(f"{fault}: the run does not go on:\n{log.read_text()}")
            time.sleep(0.05)
    finally:
        three[2].plug_in(three[0])
        # `process` is what entered the host: the run inside is ended by its own command.
        three[0].run([sys.executable, "-c", _STOP, str(out)], timeout=_LIMIT_S, env=_environment())
        process.wait(_LIMIT_S)
    (ended,) = [e for e in read_events(out / "launch") if e["event"] == "ended"][:1]
    again = [r["time"] for r in records(out) if r["time"] > ended["time"]]
    return {"noticed_s": ended["time"] - at, "trains_again_s": again[0] - at}


def _trains_again(out: Path) -> bool:
    ended = [e["time"] for e in read_events(out / "launch") if e["event"] == "ended"]
    return bool(ended) and any(r["time"] > ended[0] for r in records(out))


def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shards", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--idle", action="store_true", help="without the load")
    parser.add_argument("--repeats", type=int, default=3, help="of each fault; the median counts")
    parser.add_argument("--only", default="", help="faults whose name holds these words")
    given = parser.parse_args()
    if (why := why_no_hosts()) is not None:
        raise SystemExit(f"three hosts: {why}")
    cores = 0 if given.idle else len(os.sched_getaffinity(0))
    found: dict[str, Any] = {"load_before": os.getloadavg()[0], "busy_processes": cores}
    with tempfile.TemporaryDirectory() as name, hosts(3, Path(name) / "hosts") as three:
        for fault in (f for f in FAULTS if given.only in f):
            runs = []
            for number in range(given.repeats):
                folder = Path(name) / f"{fault.replace(' ', '_')}_{number}"
                folder.mkdir()
                with busy(cores):
                    runs.append(disturbed(three, given.shards.absolute(), folder, fault))
                print(fault, json.dumps(runs[-1]), flush=True)
            found[fault] = {k: statistics.median(r[k] for r in runs) for k in runs[0]}
            found[f"{fault}: runs"] = runs
    found["load_after"] = os.getloadavg()[0]
    print(json.dumps(found, indent=1))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
