"""Cells of two classes or more, which were left out and why, and divisions that leak nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import anndata
import numpy as np
from sklearn.model_selection import train_test_split

from eval.benchmark.material.models_and_cells import Bench, TaskCells
from eval.benchmark.task_file import AnnotationTask, CellTask, IntegrationTask, Size
from eval.finetune.score_cells import FEWEST_CELLS_OF_CLASS, NO_VALUE
from eval.scores.splits import (
    limit_per_class,
    require_clean_split,
    seen_in_training,
    split_cells,
)

_SCORED_SHARE = 0.5
# Of the held-out cells, so that seeds differ even where batches can be held out in one way only.
_DRAWN_SHARE = 0.8
_FEWEST_BATCHES_TO_HOLD_OUT = 3


@dataclass(frozen=True)
class LabelledCells:
    """Cells that can be classified.

    Attributes
    ----------
    labels
        int64 [cells], positions in `classes`, which are sorted.
    groups
        str [cells] (donors or batches), or None.
    excluded
        Reason -> cells that were left out.
    """

    cells: TaskCells
    labels: np.ndarray
    classes: list[str]
    groups: np.ndarray | None
    excluded: dict[str, int]

    @property
    def batches(self) -> np.ndarray:
        """str [cells]: the groups, where the task has some."""
        assert self.groups is not None, "the task names no groups"
        return self.groups


def labelled_cells(
    task: CellTask | AnnotationTask | IntegrationTask,
    group: str | None,
    size: Size,
    bench: Bench,
    change: Callable[[anndata.AnnData], anndata.AnnData] | None = None,
) -> LabelledCells:
    """Return the cells of a task with the classes of its `label`.

    `group` is a column of obs; `change` is as in `load_cells`.

    Raises
    ------
    ValueError
        The cells cannot be had, or fewer than two classes are left.
    """
    loaded = bench.cells(task.cells, (task.label, group), size.max_cells, change)
    cells, excluded = usable_cells(loaded, task.label, group)
    classes = sorted(set(cells.metadata[task.label]))
    labels = np.array([classes.index(v) for v in cells.metadata[task.label]], dtype=np.int64)
    groups = cells.metadata[group].to_numpy(dtype=str) if group else None
    return LabelledCells(cells, labels, classes, groups, excluded)


def usable_cells(
    cells: TaskCells, label: str, group: str | None
) -> tuple[TaskCells, dict[str, int]]:
    """Return the cells that can be classified, and reason -> cells that were left out.

    Left out are cells without a label or group, classes below 5 cells, and, where groups stay
    whole, classes that only one group has: they cannot be in training and in test.

    Raises
    ------
    ValueError
        Fewer than two classes are left.
    """
    labels = cells.metadata[label]
    reasons = {"no label": labels.isin(NO_VALUE).to_numpy()}
    if group:
        reasons["no group"] = cells.metadata[group].isin(NO_VALUE).to_numpy()
    kept = ~np.any(list(reasons.values()), axis=0)
    sizes = labels[kept].value_counts()
    small = sizes.index[sizes < FEWEST_CELLS_OF_CLASS]
    reasons[f"class below {FEWEST_CELLS_OF_CLASS} cells"] = labels.isin(small).to_numpy()
    if group:
        spread = cells.metadata[kept].groupby(label, observed=True)[group].nunique()
        alone = spread.index[spread < 2].difference(small)
        reasons[f"class in one {group} only"] = labels.isin(alone).to_numpy()
    excluded = dict(cells.excluded)
    left = np.ones(len(labels), dtype=bool)
    for reason, wrong in reasons.items():
        excluded[reason] = int((left & wrong).sum())
        left &= ~wrong
    if labels[left].nunique() < 2:
        found = labels.value_counts().head(5).to_dict()
        raise ValueError(
            f"column '{label}': fewer than two classes can be told apart"
            + (f" with '{group}' kept whole" if group else "")
            + f"; it holds {found}, left out: { {k: v for k, v in excluded.items() if v} }"
        )
    kept_reasons = {k: v for k, v in excluded.items() if v or k.startswith("(")}
    return cells.subset(np.flatnonzero(left)), kept_reasons


def divide(
    cells: TaskCells, labels: np.ndarray, groups: np.ndarray | None, size: Size, seed: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return training and test cells (int positions), and how many test cells were removed.

    Test cells with exactly the counts of a training cell are removed: they are in the data twice.
    """
    training, test = split_cells(labels, groups, seed)
    training = limit_per_class(training, labels, size.max_train_per_class, seed)
    known = seen_in_training(training, test, cells.counts)
    test = limit_per_class(test[~known], labels, size.max_test_per_class, seed)
    require_clean_split(training, test, groups, cells.counts)
    return training, test, int(known.sum())


def divide_batches(
    labels: np.ndarray, batches: np.ndarray, size: Size, seed: int, folds: int = 1
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return cells to learn labels from, and disjoint parts to score (int positions, sorted).

    With three batches or more, about half of them, two at least, are scored; with two, half of the
    cells of each class and batch. Of these, 80 % of each class and batch are drawn, and dealt out
    to parts of one size.

    Raises
    ------
    ValueError
        Fewer than two batches, no division has every class on both sides, or a batch has fewer
        scored cells than there are parts.
    """
    names = np.unique(batches)
    if len(names) < 2:
        raise ValueError(f"batches: {len(names)} ({', '.join(names)}); integration needs two")
    held_out = held_out_batches(batches)
    strata = np.unique(np.char.add(labels.astype(str), batches), return_inverse=True)[1]
    if held_out is not None:
        training, scored = split_cells(labels, held_out, seed, _SCORED_SHARE, 2)
    else:
        # A class with one cell in a batch cannot be halved there: it is halved over batches.
        rare = np.bincount(strata)[strata] < 2
        by = np.where(rare, strata.max() + 1 + labels, strata)
        by = np.where(np.bincount(by)[by] < 2, -1, by)
        everywhere = np.arange(len(labels))
        halves = train_test_split(
            everywhere[by >= 0], test_size=_SCORED_SHARE, stratify=by[by >= 0], random_state=seed
        )
        training, scored = (np.sort(h) for h in halves)
    rng = np.random.default_rng(seed)
    drawn = [
        rng.permutation(part)[: math.ceil(_DRAWN_SHARE * len(part))]
        for part in (scored[strata[scored] == s] for s in np.unique(strata[scored]))
    ]
    training = limit_per_class(training, labels, size.max_train_per_class, seed)
    most = None if size.max_test_per_class is None else folds * size.max_test_per_class
    scored = limit_per_class(np.concatenate(drawn), labels, most, seed)
    if folds == 1:
        return training, [np.sort(scored)]
    return training, _parts(scored, strata, batches, folds, rng)


def _parts(
    scored: np.ndarray,
    strata: np.ndarray,
    batches: np.ndarray,
    folds: int,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """Return so many disjoint parts of one size, each with its share of every stratum."""
    names, sizes = np.unique(batches[scored], return_counts=True)
    if sizes.min() < folds:
        raise ValueError(
            f"batches: '{names[sizes.argmin()]}' has {sizes.min()} scored cells for {folds} folds; "
            "give more cells, or fewer `folds` in the task's file"
        )
    # Dealt like cards, stratum after stratum, so that no part has two more than another.
    shuffled = rng.permutation(scored)
    dealt = shuffled[np.argsort(strata[shuffled], kind="stable")]
    dealt = np.concatenate([dealt[batches[dealt] == b] for b in names])
    size = len(dealt) // folds
    return [np.sort(dealt[part::folds][:size]) for part in range(folds)]


def how_batches_are_divided(batches: np.ndarray, column: str) -> str:
    """Return in words what `divide_batches` does with these."""
    if held_out_batches(batches) is not None:
        return f"about half of the '{column}', two at least, are held out whole"
    return f"half of the cells of each class and '{column}' are held out"


def held_out_batches(batches: np.ndarray) -> np.ndarray | None:
    """Return the batches if they are held out whole; None: cells of each are on both sides."""
    return batches if len(np.unique(batches)) >= _FEWEST_BATCHES_TO_HOLD_OUT else None
