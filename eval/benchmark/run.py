"""All tasks of a suite, one after another: results.json after each of them, the page at the end."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from data_prep.files import complete_file, names_in
from data_prep.sources.source_spec import SourceOptions
from eval.benchmark.contest.contest import Contest
from eval.benchmark.contest.verdicts import FINE_TUNED, holm, mean_of, summarise, verdicts
from eval.benchmark.kinds.annotation import Annotation
from eval.benchmark.kinds.attention_task import AttentionToGenes
from eval.benchmark.kinds.cell_tasks import ClassesOfCells
from eval.benchmark.kinds.context import Context
from eval.benchmark.kinds.cooperativity import Cooperativity
from eval.benchmark.kinds.gene_tasks import ClassesOfGenes
from eval.benchmark.kinds.integration import Integration
from eval.benchmark.kinds.perturb_seq import MeasuredShifts
from eval.benchmark.kinds.perturbation import Perturbation
from eval.benchmark.kinds.simulated_shifts import SimulatedShifts
from eval.benchmark.kinds.targets import Targets
from eval.benchmark.material.models_and_cells import Bench, Model, load_models
from eval.benchmark.outcome import Store
from eval.benchmark.own_world import make_world, world_folder
from eval.benchmark.report.overview import score_label
from eval.benchmark.task_file import AnyTask, Suite, all_tasks, missing_files, read_task
from eval.finetune.results import FROZEN, below_frozen
from eval.owning import owning
from eval.scores.baselines import CELL_STATE
from pretrain.export.model_folder import RECORD_NAME
from pretrain.run_folder.run_record import environment

logger = logging.getLogger(__name__)

RESULTS_FORMAT = "geneloom-benchmark/1"
RESULTS_NAME = "results.json"
_IDENTITY_NAME, _WORLDS_NAME = "benchmark.json", "worlds"
# `kind` of a task file -> what it means.
KINDS: dict[str, type[Contest]] = {
    "genes": ClassesOfGenes,
    "cells": ClassesOfCells,
    "integration": Integration,
    "annotation": Annotation,
    "context": Context,
    "attention": AttentionToGenes,
    "perturb_seq": MeasuredShifts,
    "perturbation": Perturbation,
    "targets": Targets,
    "cooperativity": Cooperativity,
    "simulated_shifts": SimulatedShifts,
}
_PACKAGES = ("scikit-learn", "scanpy", "scib-metrics", "harmonypy", "scvi-tools", "peft", "optuna")


class UnitsShown(Protocol):
    """What is told while a benchmark runs."""

    def plan(self, units: int) -> None:
        """Take the number of outcomes to come; called once."""

    def task(self, title: str) -> None:
        """Take the title of the task that begins."""

    def unit(self, seconds: float) -> None:
        """Count one contender in one fold; 0 seconds: it was done before."""


class _Silent:
    def plan(self, units: int) -> None: ...
    def task(self, title: str) -> None: ...
    def unit(self, seconds: float) -> None: ...


SILENT = _Silent()


def choose_tasks(suite: Suite, names: list[str], own: Sequence[Path | AnyTask]) -> list[AnyTask]:
    """Return the tasks of a suite; those that are named, or else the user's own, if there are any.

    `own` are tasks, or YAML files that declare them.

    Raises
    ------
    ValueError
        An unknown name, a task that the suite does not have, or a file that is none.
    """
    added = {t.name: t for t in (read_task(t) if isinstance(t, Path) else t for t in own)}
    names = names or list(added)
    known = all_tasks() | added
    unknown = [n for n in names if n not in known]
    if unknown:
        raise ValueError(f"--task {unknown[0]}: no such task; there are {', '.join(known)}")
    chosen = [t for n, t in known.items() if suite in t.sizes and (not names or n in names)]
    outside = [n for n in names if suite not in known[n].sizes]
    if outside:
        suites = ", ".join(known[outside[0]].sizes)
        raise ValueError(f"--task {outside[0]}: suite {suite} does not have it, only {suites}")
    return chosen


@owning("benchmark")
def run_benchmark(
    folders: list[Path],
    suite: Suite,
    out: Path,
    data: Path | None = None,
    names: list[str] = [],  # noqa: B006  read only
    own: Sequence[Path | AnyTask] = (),
    vocabulary: Path | None = None,
    gene_names: Path | None = None,
    seed: int = 0,
    device: str = "cpu",
    bf16: bool = False,
    progress: UnitsShown = SILENT,
    reading: SourceOptions = SourceOptions(),
) -> dict[str, Any]:
    """Run a suite and return what ``out/results.json`` holds (docs/formats.md).

    A benchmark that was killed goes on in its folder: what is done is read from ``out/units``.

    Parameters
    ----------
    folders
        Models: folders of ``geneloom export`` or published ones.
    data
        Folder that the tasks' files are below.
    names, own
        Only these tasks; tasks of the user's own, as such or as YAML files. Without names they are
        the only ones.
    vocabulary, gene_names
        As in `eval.benchmark.material.models_and_cells.load_models`.
    reading
        How files are read, beside what a task says of its cells.

    Raises
    ------
    ValueError
        A model or task is none, `out` holds something else, or there are no data for any task.
    """
    tasks = choose_tasks(suite, names, own)
    missing = {t.name: missing_files(t, data) for t in tasks}
    runnable = [t for t in tasks if not missing[t.name]]
    # A positive control needs no data, and alone says nothing of a model.
    if not any(t.own_world is None or t.name in names for t in runnable):
        raise ValueError(
            f"--suite {suite}: there are no data for any of its {len(tasks)} tasks below "
            f"{data or '(no --data given)'}; `geneloom benchmark --list` names what each needs"
        )
    models = load_models(folders, vocabulary, gene_names)
    _claim(out, suite, seed, bf16, models)

    def bench_of(task: AnyTask) -> Bench:
        what_decides, units = _what_decides(task, suite), out / "units"
        if world := task.own_world:
            folder = world_folder(world, out / _WORLDS_NAME)
            own = [make_world(world, folder)]
            return Bench(own, folder, Store(units, what_decides), seed, device, bf16)
        store = Store(units, what_decides, lambda _, seconds: progress.unit(seconds))
        return Bench(models, data, store, seed, device, bf16, reading=reading)

    # Positive controls come first: what they say is about all others. Their units are not counted,
    # for their models are not there yet.
    runnable.sort(key=lambda t: t.own_world is None)
    contests = (KINDS[t.kind](t, t.sizes[suite], bench_of(t)) for t in runnable if not t.own_world)
    progress.plan(sum(contest.num_units for contest in contests))
    found = environment()
    results: dict[str, Any] = {
        "format": RESULTS_FORMAT,
        "suite": suite,
        "seed": seed,
        "bf16": bf16,
        "device": device,
        "command": found["command"],
        "environment": found | {"evaluation": _versions()},
        "models": [_describe(m) for m in models],
        "positive_controls": [],
        "tasks": [],
        "skipped": [
            _skipped(t, _what_is_missing(t, missing[t.name])) for t in tasks if missing[t.name]
        ],
    }
    for task in runnable:
        progress.task(task.title)
        try:
            record = _run_task(task, suite, bench_of(task))
        except (ValueError, OSError) as error:
            # A full disk hinders the others too; a world's training that failed does not.
            if isinstance(error, OSError) and not task.own_world:
                raise
            # The other tasks' results are worth having; the command says it and fails at the end.
            logger.error("%s: %s", task.name, error)
            results["skipped"].append(_skipped(task, str(error)) | {"failed": True})
        else:
            results["positive_controls" if task.own_world else "tasks"].append(record)
        _write(out, results)
    for part in ("positive_controls", "tasks"):
        results[part] = holm(results[part])
    _write(out, results)
    return results


def _run_task(task: AnyTask, suite: Suite, bench: Bench) -> dict[str, Any]:
    """Return one entry of the results' tasks."""
    started = time.perf_counter()
    size = task.sizes[suite]
    run = KINDS[task.kind](task, size, bench).run()
    rows = summarise(run)
    files = {p.stem for pattern in task.cells.files if bench.data for p in bench.data.glob(pattern)}
    return {
        **task.model_dump(
            mode="json", include={"name", "title", "kind", "applications", "published", "note"}
        ),
        "recipe": task.cells.recipe,
        "size": size.model_dump(mode="json"),
        "seconds": time.perf_counter() - started,
        "pretrained_on": {m.name: _seen(m, files) for m in bench.models},
        **asdict(run),
        "remarks": _remarks(rows, run.headline),
        "summary": rows,
        "verdicts": verdicts(run, [m.name for m in bench.models]),
    }


def _remarks(rows: list[dict[str, Any]], headline: str) -> list[str]:
    """Return what a reader has to know before the scores: trainings that failed."""
    means = {(r["contender"], r["role"], r["model"]): mean_of(r, headline) for r in rows}
    found = []
    for row in rows:
        key = (row["contender"], row["role"], row["model"])
        tuned = means[key]
        known = {name: means.get((name, *key[1:])) for name in (FROZEN, CELL_STATE)}
        frozen = {name: mean for name, mean in known.items() if mean is not None}
        if key[0] == FINE_TUNED and tuned is not None:
            found += below_frozen(row["name"], score_label(headline), tuned, frozen)
    return found


def _what_decides(task: AnyTask, suite: Suite) -> dict[str, Any]:
    """Return what of a task's file changes its outcomes; no text does, nor another suite's size.

    Cells, labels, models and seeds are in the keys that each kind of task adds.
    """
    shown = {"title", "note", "published", "applications", "expected_genes", "sizes"}
    about_cells = {"recipe", "expected_cells"}
    exclude: dict[str, Any] = dict.fromkeys(shown, True) | {"cells": about_cells}
    # More seeds are more folds; those that are there stay.
    size = task.sizes[suite].model_dump(mode="json", exclude={"seeds"}, exclude_none=True)
    return {"task": task.model_dump(mode="json", exclude=exclude, exclude_none=True), "size": size}


def _seen(model: Model, files: set[str]) -> list[str]:
    """Return the sources of a model's pretraining that are called like these files."""
    record = _record(model) or {}
    return sorted(files & {s["name"] for s in record.get("sources", [])})


def _record(model: Model) -> dict[str, Any] | None:
    """Return what `geneloom export` wrote about a model; None for published folders."""
    path = model.folder / RECORD_NAME
    return json.loads(path.read_text()) if path.exists() else None


def _versions() -> dict[str, str | None]:
    """Return the versions of packages that scores depend on; None for an extra that is absent."""
    found: dict[str, str | None] = dict.fromkeys(_PACKAGES)
    for package in found:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _skipped(task: AnyTask, reason: str) -> dict[str, Any]:
    return {"name": task.name, "title": task.title, "reason": reason}


def _what_is_missing(task: AnyTask, files: list[str]) -> str:
    return f"no {', '.join(files)} below the data folder. {task.cells.recipe}"


def _describe(model: Model) -> dict[str, Any]:
    return {
        "name": model.name,
        "folder": str(model.folder),
        "digest": model.digest,
        "vocabulary_sha256": model.vocabulary.sha256,
        "parameters": model.network.num_parameters(),
        "record": _record(model),
    }


def _claim(out: Path, suite: Suite, seed: int, bf16: bool, models: list[Model]) -> None:
    """Make the folder, or see that it holds this same benchmark."""
    own = {
        "format": RESULTS_FORMAT,
        "suite": suite,
        "seed": seed,
        "bf16": bf16,
        "models": {m.name: m.digest for m in models},
    }
    path = out / _IDENTITY_NAME
    if path.exists():
        found = json.loads(path.read_text())
        other = [k for k in own if found.get(k) != own[k]]
        if other:
            raise ValueError(
                f"{out}: holds a benchmark with other {', '.join(other)}; give --out a new folder"
            )
        return
    if out.exists() and (not out.is_dir() or names_in(out)):
        raise ValueError(f"{out}: exists and holds no benchmark; give --out a new folder")
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(own, indent=1) + "\n")


def _write(out: Path, results: dict[str, Any]) -> None:
    with complete_file(out / RESULTS_NAME) as aside:
        aside.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
