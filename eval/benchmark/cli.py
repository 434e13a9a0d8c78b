"""``geneloom benchmark``: parse and call."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from data_prep.errors import EXIT_RESUMABLE
from data_prep.options import AsJson, spread
from data_prep.sources.source_spec import MATRIX_AND_FILTER, SourceOptions
from eval.benchmark.task_file import (
    SUITES,
    AnyTask,
    Suite,
    all_tasks,
    missing_files,
    read_task,
)
from eval.options import Bf16Option, DeviceOption, VocabOption, choose_device, quiet
from eval.train_run import Stopped

_LINE_EVERY_S = 30.0


@dataclass(frozen=True)
class BenchmarkOptions:
    """Which tasks are run, and how; the help of an option says what it is."""

    suite: Annotated[Suite, typer.Option(help=", ".join(SUITES))] = "quick"
    data: Annotated[Path | None, typer.Option(help="folder the tasks' files are below")] = None
    task: Annotated[tuple[str, ...], typer.Option(help="only this one; may be repeated")] = ()
    task_file: Annotated[
        tuple[Path, ...],
        typer.Option(help="YAML of a task of your own; without --task only it"),
    ] = ()
    seed: Annotated[int, typer.Option(min=0, help="splits, draws and heads follow from it")] = 0
    bf16: Bf16Option = False
    vocabulary: VocabOption = None
    gene_names: Annotated[
        Path | None, typer.Option(help="symbol -> gene id (JSON), for cells named by symbols")
    ] = None
    device: DeviceOption = "auto"

    def __post_init__(self) -> None:
        if self.suite not in SUITES:
            raise ValueError(f"--suite {self.suite}: must be one of {', '.join(SUITES)}")


@dataclass(frozen=True)
class OwnTask:
    """A task that files and a column describe (`eval.benchmark.own_task`)."""

    cells: Annotated[
        Path | None, typer.Option(help="a task of your own: cells whose --label is predicted")
    ] = None
    label: Annotated[str | None, typer.Option(help="column of --cells, or of --genes")] = None
    genes: Annotated[
        Path | None, typer.Option(help="table of genes whose --label is predicted, in --cells")
    ] = None
    positive: Annotated[
        str | None, typer.Option(help="class of --genes that is looked for among all others")
    ] = None
    group: Annotated[
        str | None, typer.Option(help="column of --cells: groups (donors) stay whole")
    ] = None
    batch: Annotated[
        str | None, typer.Option(help="column of --cells: score integration over it")
    ] = None


@spread
def benchmark_command(
    options: BenchmarkOptions,
    own: OwnTask,
    reading: Annotated[SourceOptions, MATRIX_AND_FILTER],
    model: Annotated[
        list[Path] | None,
        typer.Option(help="folder of `geneloom export`, or Geneformer's; repeat it to compare"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="folder of the report; one that was stopped goes on")
    ] = None,
    list_tasks: Annotated[bool, typer.Option("--list", help="show all tasks and end")] = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tuning tasks beside the baselines that matter: did pretraining help?

    How files are read (--counts and what follows it) is asked of --cells; a task's own file says it
    of its cells.
    """
    if list_tasks:
        data = _own_tasks(own, options, reading)[1]
        tasks = list_of_tasks(data, list(options.task_file))
        if as_json:
            print(json.dumps(tasks, indent=1))
        else:
            print_tasks(tasks, data)
        return
    if not model or out is None:
        raise ValueError("--model and --out: a benchmark needs both (or only --list)")
    quiet()
    from eval.benchmark.report.page import print_results

    try:
        with _Shown() as shown:
            results, page = run_tasks(model, out, options, own, shown, reading)
    except Stopped:
        print(f"stopped; the same command goes on with {out}")
        raise SystemExit(EXIT_RESUMABLE) from None
    if as_json:
        print(json.dumps(results, indent=1))
    else:
        print_results(results)
        print(page)
    failed = [s for s in results["skipped"] if s.get("failed")]
    if failed:
        raise ValueError(
            f"{len(failed)} tasks could not be run; the others' results stand. "
            + "; ".join(f"{s['name']}: {s['reason']}" for s in failed)
        )


def run_tasks(
    models: list[Path],
    out: Path,
    options: BenchmarkOptions,
    own: OwnTask,
    shown: _Shown | None = None,
    reading: SourceOptions = SourceOptions(),
) -> tuple[dict[str, Any], Path]:
    """Run the tasks; return what ``results.json`` holds, and the page that was written."""
    from eval.benchmark.report.page import write_report
    from eval.benchmark.run import SILENT, run_benchmark

    tasks, data = _own_tasks(own, options, reading)
    results = run_benchmark(
        models, options.suite, out, data, list(options.task), tasks, options.vocabulary,
        options.gene_names, options.seed, choose_device(options.device), options.bf16,
        shown or SILENT, reading,
    )  # fmt: skip
    return results, write_report(results, out)


def list_of_tasks(data: Path | None, files: list[Path]) -> list[dict[str, Any]]:
    """Return every task, its suites, what of its data is missing, and how to get it.

    With `files` only theirs.
    """
    tasks = {t.name: t for t in map(read_task, files)} or all_tasks()
    return [
        {
            "name": name,
            "kind": task.kind,
            "suites": list(task.sizes),
            "applications": list(task.applications),
            "title": task.title,
            "missing": missing_files(task, data),
            "recipe": task.cells.recipe,
        }
        for name, task in tasks.items()
    ]


def print_tasks(tasks: list[dict[str, Any]], data: Path | None) -> None:
    """Print what `list_of_tasks` returned."""
    console = Console()
    for task in tasks:
        there = "data missing" if task["missing"] else "data there"
        about = ", ".join([task["kind"], *task["suites"], *task["applications"], there])
        console.print(f"[bold]{task['name']}[/bold] ({about})\n  {task['title']}", highlight=False)
    console.print()
    absent = [task for task in tasks if task["missing"]]
    for task in absent:
        console.print(
            f"[bold]{task['name']}[/bold] lacks {', '.join(task['missing'])}\n  {task['recipe']}",
            highlight=False,
        )
    if absent and data is None:
        console.print("Files are looked for below --data.", highlight=False)


def _own_tasks(
    own: OwnTask, options: BenchmarkOptions, reading: SourceOptions
) -> tuple[list[Path | AnyTask], Path | None]:
    """Return the tasks of the user's own, and the folder in which all tasks' files are."""
    files = list[Path | AnyTask](options.task_file)
    if reading != SourceOptions() and (not own.cells or files):
        raise ValueError(
            "--counts, --genome and other options of reading are of --cells alone; the YAML of a "
            "task says how its cells are read"
        )
    if own == OwnTask():
        return files, options.data
    if not own.cells or not own.label:
        raise ValueError("--cells and --label: a task of your own needs both")
    if options.data is not None:
        raise ValueError("--data: is of the supplied tasks; --cells says where its file is")
    from eval.benchmark.own_task import own_task

    made = own_task(own.cells, own.label, own.genes, own.group, own.batch, own.positive)
    read = {"counts": reading.counts, "gene_column": reading.gene_column}
    made = made.model_copy(update={"cells": made.cells.model_copy(update=read)})
    return [*files, made], own.cells.resolve().parent


class _Shown:
    """Progress on stderr: a bar with the time left, or a line now and then without a terminal."""

    def __init__(self) -> None:
        self._title, self._done, self._total = "", 0, 0
        self._computed, self._seconds, self._last = 0, 0.0, time.monotonic()
        self._bar: Bar | None = None

    def __enter__(self) -> _Shown:
        if sys.stderr.isatty():
            self._bar = Bar(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                TimeRemainingColumn(), console=Console(stderr=True), transient=True,
            )  # fmt: skip
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar:
            self._bar.stop()

    def plan(self, units: int) -> None:
        self._total = units
        if self._bar:
            self._bar.add_task("", total=units)

    def task(self, title: str) -> None:
        self._title = title
        if self._bar:
            self._bar.update(self._bar.task_ids[0], description=title)
        else:
            self._line()

    def unit(self, seconds: float) -> None:
        self._done += 1
        if seconds:  # what an earlier call had done says nothing about the time left
            self._computed, self._seconds = self._computed + 1, self._seconds + seconds
        if self._bar:
            self._bar.advance(self._bar.task_ids[0])
        elif time.monotonic() - self._last > _LINE_EVERY_S:
            self._line()

    def _line(self) -> None:
        self._last = time.monotonic()
        left = ""
        if self._computed:
            seconds = self._seconds / self._computed * (self._total - self._done)
            left = f", about {seconds / 60:.0f} min left"
        done = f": {self._done} of {self._total} trainings and fits" if self._total else ""
        print(f"{self._title}{done}{left}", file=sys.stderr, flush=True)
