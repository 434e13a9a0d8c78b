"""The command ``geneloom runs``: lists the runs below a folder with their state and progress.

`find_runs` searches the folders, `look_at` reads the state of one folder from its files, and
`print_runs` prints the table.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_prep.files import PARTIAL, read_json_lines
from data_prep.running.stages import stage_of

State = Literal["running", "finished", "stopped", "failed", "silent"]
# A run that usually writes a record every second may still evaluate for minutes without one.
_LEAST_SILENCE_S = 120.0
_INTERVALS = 3
_RECENT = 20
_STATE_STYLES = {"running": "green", "failed": "red", "silent": "yellow"}


@dataclass(frozen=True)
class Run:
    """A folder that a command filled; `step` counts what `unit` says: steps, cells, parts, ..."""

    folder: str
    kind: str
    state: State
    step: int | None = None
    of: int | None = None
    unit: str = ""
    loss: float | None = None
    heldout_loss: float | None = None
    tokens_per_s: float | None = None
    age_s: float | None = None
    beyond_arithmetic: float | None = None


def runs_command(
    folder: Annotated[Path, typer.Argument(help="looked at with two levels below it")] = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """List runs, shards, screens and scores below a folder: state, step, loss, speed, age.

    beyond arithmetic: by how many nats the held-out loss is below what counting tells.

    running: it wrote something within three of its usual intervals, or two minutes. stopped: on a
    signal, after a checkpoint. failed: it ended with an error of its own. silent: neither finished
    nor heard of; killed, hanging, or on a machine whose clock differs.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    found = find_runs(folder)
    if as_json:
        print(json.dumps([asdict(run) for run in found], indent=1))
    elif not found:
        print(f"{folder}: nothing here, nor two levels below, was made by geneloom")
    else:
        print_runs(found, folder)


def find_runs(folder: Path, now: float | None = None) -> list[Run]:
    """Return the runs in a folder and at most two levels below it, in the order of names."""
    now = time.time() if now is None else now
    found = []
    for path in _folders(folder, 2):
        run = look_at(path, now)
        if run:
            found.append(run)
    return found


def _folders(folder: Path, levels: int) -> Iterator[Path]:
    """Yield a folder and the folders below it; those below a run are left out."""
    yield folder
    if levels and (levels == 2 or look_at(folder, 0) is None):
        for below in sorted(folder.iterdir()):
            if below.is_dir() and not below.is_symlink() and not below.name.startswith("."):
                yield from _folders(below, levels - 1)


def look_at(folder: Path, now: float) -> Run | None:
    """Return the run in a folder with its state at the time `now`; None if there is no run."""
    stage, record = stage_of(folder)
    if stage == "pretrain":
        return _pretraining(folder, now)
    if stage == "prepare":
        cells = sum(b["cells"] for b in record["buckets"])
        age = _age(folder / "manifest.json", now)
        return Run(str(folder), stage, "finished", cells, cells, "cells", age_s=age)
    if stage == "perturb":
        return _screen(folder, record, now)
    if stage == "benchmark":
        return _benchmark(folder, record, now)
    if stage == "finetune":
        done, age = len(record["seeds"]), _age(folder / "results.json", now)
        return Run(str(folder), stage, "finished", done, done, "seeds", age_s=age)
    if stage == "saturate":
        done, age = len(record["sizes"]), _age(folder / "results.json", now)
        return Run(str(folder), stage, "finished", done, done, "sizes", age_s=age)
    if (folder / PARTIAL).is_dir():
        files = (folder / PARTIAL, *(folder / PARTIAL).glob("*"))
        age = min(_age(path, now) for path in files)
        return Run(str(folder), "unfinished", _alive(age), age_s=age)
    return None


def _pretraining(folder: Path, now: float) -> Run:
    records = read_json_lines(folder / "metrics.jsonl")
    train = [r for r in records if r["kind"] == "train"]
    heldout = [r for r in records if r["kind"] == "heldout"]
    last: dict[str, Any] = train[-1] if train else {}
    saved = max((_step(p) for p in folder.glob("checkpoints/step-*")), default=0)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    of = _total_steps(config["run"], last)
    step = max(last.get("step", 0), saved)
    age = min(_age(folder / name, now) for name in ("env.json", "metrics.jsonl"))
    return Run(
        str(folder),
        "pretrain",
        _state(folder, records, step, saved, of, age, config["checkpoint"]["every_steps"]),
        step,
        of,
        "steps",
        last.get("loss"),
        heldout[-1]["loss"] if heldout else None,
        last.get("tokens_per_s"),
        age,
        heldout[-1].get("beyond_arithmetic") if heldout else None,
    )


def _total_steps(run: dict[str, Any], last: dict[str, Any]) -> int | None:
    """Return the total number of steps of a run.

    Before the first record it is the setting ``max_steps``, which may be None.
    """
    if not last:
        return run["max_steps"]
    steps = run["epochs"] * round(last["step"] / last["epoch"])
    return steps if run["max_steps"] is None else min(steps, run["max_steps"])


def _state(
    folder: Path,
    records: list[dict[str, Any]],
    step: int,
    saved: int,
    of: int | None,
    age: float,
    every_steps: int,
) -> State:
    if of is not None and saved >= of:
        return "finished"
    dumps = [int(p.name.split("-")[3]) for p in folder.glob("not-finite-step-*.npz")]
    if any(dump > step for dump in dumps):
        return "failed"
    said = _said_at_its_end(folder, step)
    if said is not None:
        return said
    # A checkpoint at another than the usual steps is saved only when a run was asked to stop.
    if saved == step and saved % every_steps:
        return "stopped"
    times = [r["time"] for r in records[-_RECENT:]]
    longest = max((b - a for a, b in itertools.pairwise(times)), default=0.0)
    return _alive(age, _INTERVALS * longest)


def _said_at_its_end(folder: Path, step: int) -> State | None:
    """Return the state in a run's ``ended.json``; None if there is none or the run continued."""
    for ended in read_json_lines(folder / "ended.json"):
        if ended.get("step") == step and ended.get("state") in ("stopped", "failed"):
            return ended["state"]
    return None


def _alive(age: float, patience: float = 0.0) -> State:
    return "running" if age < max(patience, _LEAST_SILENCE_S) else "silent"


def _screen(folder: Path, manifest: dict[str, Any], now: float) -> Run:
    parts = list(folder.glob("shifts/part-*.parquet"))
    age = min(_age(path, now) for path in (folder / "manifest.json", *parts))
    state: State = "finished" if manifest["complete"] else _alive(age)
    return Run(str(folder), "perturb", state, len(parts), manifest["parts"], "parts", age_s=age)


def _benchmark(folder: Path, results: dict[str, Any], now: float) -> Run:
    """Return the run of a benchmark's folder.

    The page is written last, so a page that is older than the results is from an earlier call.
    """
    page, table = folder / "report.html", folder / "results.json"
    age = min(_age(path, now) for path in (table, *folder.glob("units/*")))
    is_done = page.exists() and page.stat().st_mtime >= table.stat().st_mtime
    state: State = "finished" if is_done else _alive(age)
    tasks = len(results["tasks"])
    return Run(
        str(folder), "benchmark", state, tasks, tasks if is_done else None, "tasks", age_s=age
    )


def print_runs(runs: list[Run], below: Path, console: Console | None = None) -> None:
    """Print a table with one line for each run; folders are relative to `below`."""
    # If the output is a file, lines are not cut to the width of a terminal.
    console = console or (Console() if sys.stdout.isatty() else Console(width=160))
    table = Table(box=None, pad_edge=False)
    table.add_column("folder", overflow="fold", min_width=12)
    for name in ("kind", "state"):
        table.add_column(name, no_wrap=True)
    for name in ("done", "loss", "held out", "beyond arithmetic", "tokens/s", "age"):
        table.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        style = _STATE_STYLES.get(run.state, "")
        table.add_row(
            escape(str(Path(run.folder).relative_to(below))),
            run.kind,
            f"[{style}]{run.state}[/{style}]" if style else run.state,
            _done(run),
            "-" if run.loss is None else f"{run.loss:.4f}",
            "-" if run.heldout_loss is None else f"{run.heldout_loss:.4f}",
            "-" if run.beyond_arithmetic is None else f"{run.beyond_arithmetic:+.4f}",
            "-" if run.tokens_per_s is None else f"{run.tokens_per_s:,.0f}",
            "-" if run.age_s is None else format_age(run.age_s),
        )
    console.print(table)


def _done(run: Run) -> str:
    if run.step is None:
        return "-"
    of = "" if run.of in (None, run.step) else f"/{run.of:,}"
    return f"{run.step:,}{of} {run.unit}"


def format_age(seconds: float) -> str:
    """Return a time span as text: ``12 s``, ``5 min``, ``3 h`` or ``2 d``."""
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.removeprefix("step-")
    return int(number) if number.isdigit() else 0


def _age(path: Path, now: float) -> float:
    return now - path.stat().st_mtime if path.exists() else float("inf")
