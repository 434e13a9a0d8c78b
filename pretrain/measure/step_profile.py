"""Profile training steps: a trace for a browser, and a table of where the time goes."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from pretrain.ranks.dist import Ranks

logger = logging.getLogger(__name__)

# The first steps of a process allocate and compile, so they are not profiled.
_WARMUP_STEPS = 2
_TOP_OPERATORS = 15
# The parts of a step that `pretrain.engine` marks; "data wait" is marked in this module.
PHASES = ("data wait", "forward", "backward", "optimizer", "communication")
FOLDER = "profile"


def mark(phase: str) -> record_function:
    """Return a context whose time counts as one of `PHASES`; it costs a microsecond."""
    return record_function(f"geneloom::{phase}")


def profiled(steps: Iterator[Any], num_steps: int, run: Path, ranks: Ranks) -> Iterator[Any]:
    """Yield the steps; profile `num_steps` of them after the warm-up (0: none).

    Every rank writes ``RUN/profile/rank-N.trace.json`` for chrome://tracing or Perfetto. Rank 0
    also logs the table, and writes it as ``RUN/profile/table.txt`` and ``table.json``.
    """
    if num_steps == 0:
        yield from steps
        return
    activities = [ProfilerActivity.CPU]
    if ranks.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    profiler, seconds = profile(activities=activities), 0.0
    number, started = 0, 0.0
    while True:
        if number == _WARMUP_STEPS:
            profiler.start()
            started = time.perf_counter()
        with mark("data wait"):
            step = next(steps, None)
        if step is None:
            break
        yield step
        number += 1
        if number == _WARMUP_STEPS + num_steps:
            if ranks.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
            profiler.stop()
            _write(profiler, num_steps, seconds, run / FOLDER, ranks)
    if number < _WARMUP_STEPS + num_steps:
        if number >= _WARMUP_STEPS:
            profiler.stop()
        logger.warning(
            "--profile %d: nothing was written, the run had %d steps and the first %d are not "
            "profiled", num_steps, number, _WARMUP_STEPS,
        )  # fmt: skip


def _write(profiler: profile, num_steps: int, seconds: float, folder: Path, ranks: Ranks) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(folder / f"rank-{ranks.rank}.trace.json"))
    if not ranks.is_first:
        return
    found = summarise(profiler, num_steps, seconds)
    text = table(found)
    (folder / "table.json").write_text(json.dumps(found, indent=1))
    (folder / "table.txt").write_text(text + "\n")
    logger.info("profile of %d steps in %s\n%s", num_steps, folder, text)


def summarise(profiler: profile, num_steps: int, seconds: float) -> dict[str, Any]:
    """Return the milliseconds of a step: as a whole, by phase, by operator.

    ``host`` is the time in which the process worked or waited, ``device`` the time of a GPU's
    kernels (0 on a CPU). The phases of the host follow one another; a GPU works with some delay
    behind them.
    """
    averages = profiler.key_averages()
    phases = {}
    for phase in PHASES:
        of_phase = [a for a in averages if a.key == f"geneloom::{phase}"]
        phases[phase] = {
            "host": sum(a.cpu_time_total for a in of_phase) / 1000 / num_steps,
            "device": max((a.device_time_total for a in of_phase), default=0) / 1000 / num_steps,
        }
    whole = seconds * 1000 / num_steps
    rest = whole - sum(p["host"] for p in phases.values())
    phases["other"] = {"host": rest, "device": 0.0}
    operators = [
        {
            "operator": a.key,
            "calls": a.count / num_steps,
            "host": a.self_cpu_time_total / 1000 / num_steps,
            "device": a.self_device_time_total / 1000 / num_steps,
        }
        for a in averages
        if not a.key.startswith("geneloom::")
    ]
    operators.sort(key=lambda o: -max(o["host"], o["device"]))
    return {
        "steps": num_steps, "step_ms": whole, "phases": phases,
        "operators": operators[:_TOP_OPERATORS],
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """Return a profile summary as a text table."""
    whole = found["step_ms"]
    lines = [f"{'':<40} {'calls':>7} {'host ms':>10} {'share':>6} {'device ms':>10}"]

    def add(name: str, calls: str, row: dict[str, float]) -> None:
        share = row["host"] / whole
        lines.append(
            f"{name[:40]:<40} {calls:>7} {row['host']:>10.1f} {share:>6.1%} {row['device']:>10.1f}"
        )

    add("a step", "", {"host": whole, "device": 0.0})
    for name, row in found["phases"].items():
        add("  " + name, "", row)
    lines.append("operators, by their own time")
    for row in found["operators"]:
        add("  " + row["operator"], f"{row['calls']:.0f}", row)
    return "\n".join(lines)
