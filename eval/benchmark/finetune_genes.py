"""``geneloom finetune genes``: the benchmark's gene task, with settings and a head of one's own."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.files import file_sha256, require_new
from data_prep.sources.source_spec import SourceOptions, content_sha256
from data_prep.version import VERSION
from eval.benchmark.contest.contest import Contender, Fold, Scored
from eval.benchmark.contest.verdicts import corrected_interval, display_name, overlap_ratio
from eval.benchmark.kinds.gene_tasks import LOADINGS, ClassesOfGenes, Guess
from eval.benchmark.material.models_and_cells import Bench, Model, load_models
from eval.benchmark.material.twin_encoders import GeneTraining
from eval.benchmark.outcome import Outcome, Role, Store, TaskRun
from eval.benchmark.own_task import own_task
from eval.benchmark.task_file import GeneTask, Size
from eval.finetune.classifier import Head, save_classifier
from eval.finetune.progress import Unfinished
from eval.finetune.results import (
    FINE_TUNED,
    PRETRAINED,
    RANDOM,
    RESULTS_FORMAT,
    remarks,
    summarise,
    write_results,
)
from eval.finetune.settings import FinetuneGenesOptions, FinetuneSettings
from eval.options import choose_device
from eval.owning import owning
from eval.scores.metrics import score_classes
from pretrain.model.architectures import encoder_of
from pretrain.ranks.dist import Ranks

SCORES = ("auroc", "macro_f1", "balanced_accuracy", "accuracy")
_OF_CLASSES = ("f1_by_class", "confusion")
# What the record of a saved head keeps of its scores.
_OF_HEAD = ("task", "label", "cells", "genes", "split", "model", "summary")


class _TunedGenes(ClassesOfGenes):
    """The contest of a gene task, without its controls; every training has the given settings."""

    def __init__(
        self, task: GeneTask, size: Size, bench: Bench, how: tuple[FinetuneSettings, Unfinished]
    ) -> None:
        """Take the settings, and where trainings that were killed go on."""
        super().__init__(task, size, bench)
        self._settings, self._unfinished = how

    @property
    def settings(self) -> FinetuneSettings:
        """Those that were asked for."""
        return self._settings

    def contenders(self) -> list[Contender[Fold]]:
        """Return all that predict the labels themselves."""
        return [row for row in super().contenders() if row.role != "control"]

    def training(self, model: Model, role: Role, fold: Fold) -> GeneTraining:
        """Return a training whose progress is kept."""
        folder = self._unfinished.training(f"fold-{fold.number}, {role}")
        return replace(super().training(model, role, fold), folder=folder)

    def score(self, contender: Contender[Fold], fold: Fold, predicted: Guess) -> Scored:
        """Return the scores of the benchmark, and those of the more probable classes."""
        scores, details = super().score(contender, fold, predicted)
        guessed = (predicted.probability[0] >= 0.5).astype(np.int64)
        classes = [self.task.negative, self.task.positive]
        found = score_classes(predicted.truth[0], guessed, classes)
        return scores | {"accuracy": found["accuracy"]}, details | {
            k: found[k] for k in _OF_CLASSES
        }


@dataclass(frozen=True)
class _Asked:
    """What was asked for, once it is read."""

    contest: _TunedGenes
    model: Model
    unfinished: Unfinished
    is_first: bool


@owning("finetune")
def finetune_genes(
    cells: Path,
    genes: Path,
    model_folder: Path,
    label: str,
    out: Path,
    options: FinetuneGenesOptions = FinetuneGenesOptions(),
    reading: SourceOptions = SourceOptions(),
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Write and return the scores of an encoder fine-tuned on genes, beside its baselines.

    Folds, features and baselines are those of `eval.benchmark.kinds.gene_tasks`. A killed run that
    is started again with the same settings goes on.

    Parameters
    ----------
    cells
        Cells with raw counts, in which genes are looked at.
    genes
        Table (.csv, .tsv) with the column ``ensembl_id`` or ``gene`` and `label`, which has two
        classes, or more and `options.positive`; genes without a label are left out.
    ranks
        Of `pretrain.ranks.dist.start`: training is divided over them, and the first one writes.

    Raises
    ------
    ValueError
        A file is missing or has no such column or not two classes; too few genes are in the cells;
        or `out` or `save_head` is not empty.
    """
    for folder in (out, options.save_head):
        if folder is not None:
            require_new(folder)
    asked = _ask(cells, genes, model_folder, label, out, options, reading, ranks)
    run = asked.contest.run()
    results = _results(asked, run, f"{label} of {genes.name} in {cells.name}", label)
    results |= {"folds": options.folds, "max_cells": options.max_cells}
    if options.save_head is not None:
        _save_head(asked, label, options.save_head, results)
    if asked.is_first:
        write_results(out, results)
        asked.unfinished.remove()
    return results


def _ask(
    cells: Path,
    genes: Path,
    model_folder: Path,
    label: str,
    out: Path,
    options: FinetuneGenesOptions,
    reading: SourceOptions,
    ranks: Ranks | None,
) -> _Asked:
    """Return the contest, after what was given is looked at."""
    device = ranks.device.type if ranks else choose_device(options.device)
    settings = replace(options.settings, device=device)
    task = own_task(cells, label, genes, positive=options.positive)
    assert isinstance(task, GeneTask)
    read = {"counts": reading.counts, "gene_column": reading.gene_column}
    changes = {"folds": options.folds, "cells": task.cells.model_copy(update=read)}
    task = task.model_copy(update=changes)
    (model,) = load_models([model_folder], options.vocabulary, options.gene_names)
    is_first = ranks is None or ranks.is_first
    identity = {
        "cells": content_sha256(cells),
        "genes": file_sha256(genes),
        "model": model.digest,
        "label": label,
        "classes": [task.negative, task.positive],
        "reading": repr(reading),
        "gene_names": model.gene_names,
        "settings": settings.deciding() | settings.of_training_on_genes,
    }
    unfinished = Unfinished(out, identity, writes=is_first)
    size = Size.model_validate({"seeds": options.seeds, "max_cells": options.max_cells})
    # A key names the cells, the genes, the folds and the model itself.
    store = Store(unfinished.training("units"), {}, writes=is_first)
    data = cells.resolve().parent
    bench = Bench([model], data, store, 0, device, settings.bf16, ranks, reading)
    contest = _TunedGenes(task, size, bench, (settings, unfinished))
    return _Asked(contest, model, unfinished, is_first)


def _results(asked: _Asked, run: TaskRun, title: str, label: str) -> dict[str, Any]:
    """Return what ``results.json`` holds."""
    per_fold = [_fold(asked, run, number) for number in sorted({o.fold for o in run.outcomes})]
    ratio = overlap_ratio(run)

    def interval(values: list[float]) -> dict[str, float]:
        found = corrected_interval(np.array(values), ratio)
        return {"mean": found["mean"], "half_width": found["high"] - found["mean"]}

    tuned = display_name(FINE_TUNED, "model", asked.model.name)
    return {
        "format": RESULTS_FORMAT,
        "geneloom": VERSION,
        "kind": "genes",
        "task": title,
        "label": label,
        "classes": run.classes,
        "cells": run.cells,
        "genes": sum(run.details["genes"]),
        "dropped": run.excluded,
        "split": run.split,
        "model": asked.model.folder.name,
        "vocabulary_sha256": asked.model.vocabulary.sha256,
        "settings": asdict(asked.contest.settings),
        "summary": summarise(per_fold, SCORES, interval),
        "remarks": remarks(per_fold, LOADINGS, "auroc", "AUROC"),
        "seeds": per_fold,
        "predictions": run.details["predictions"][tuned],
    }


def _fold(asked: _Asked, run: TaskRun, number: int) -> dict[str, Any]:
    """Return the scores of all contenders in one fold."""
    outcomes = {_name(o): o for o in run.outcomes if o.fold == number}
    test = next(iter(outcomes.values())).details["test_genes"]
    return {
        "seed": number // asked.contest.folds_per_seed,
        "fold": number % asked.contest.folds_per_seed,
        "train_genes": sum(run.details["genes"]) - test,
        "test_genes": test,
        "scores": {
            name: {s: o.scores[s] for s in SCORES} | {k: o.details[k] for k in _OF_CLASSES}
            for name, o in outcomes.items()
        },
        "trainings": {
            n: o.details["training"] for n, o in outcomes.items() if n.startswith(FINE_TUNED)
        },
    }


def _name(outcome: Outcome) -> str:
    """Return what a contender is called where there is one model."""
    weights = {"model": PRETRAINED, "twin": RANDOM}.get(outcome.role)
    return f"{outcome.contender}, {weights}" if weights else outcome.contender


def _save_head(asked: _Asked, label: str, folder: Path, results: dict[str, Any]) -> None:
    """Train a classifier of all labelled genes in the cells of the first seed, and save it."""
    contest, model = asked.contest, asked.model
    genes, seed = contest.genes, contest.seed_of(0)
    training = GeneTraining(
        contest.settings, seed, asked.unfinished.training("head"), contest.bench.ranks
    )
    classifier = training.run(
        encoder_of(model.network), model.vocabulary, contest.drawn.draws[0].tokens[model.name],
        (model.tokens_of(genes.ids), genes.labels), Head(label, "genes", tuple(results["classes"])),
    )  # fmt: skip
    if asked.is_first:
        save_classifier(classifier, folder, {k: results[k] for k in _OF_HEAD})
