"""A task from the command line: a file of cells or genes, and the column that has their classes."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any

import pandas as pd

from eval.benchmark.material.gene_labels import read_table
from eval.benchmark.task_file import OTHERS, AnyTask, CellTask, GeneTask, IntegrationTask

_PUBLISHED = {
    "batch_cells": 12, "learning_rate": 5e-5, "head_learning_rate": None, "start": "random",
}  # fmt: skip
_OF_CELLS = {
    "quick": {
        "max_cells": 600, "max_train_per_class": 25, "max_test_per_class": 50, "seeds": 3,
        "epochs": 3, "batch_cells": 4,
    },
    "standard": {
        "max_cells": 2000, "max_train_per_class": 100, "max_test_per_class": 100, "seeds": 5,
        "epochs": 3, "batch_cells": 8, "steps": 100,
    },
    "paper": {"seeds": 5, "epochs": 10, **_PUBLISHED},
}  # fmt: skip
_OF_GENES = {
    "quick": {"max_cells": 60, "seeds": 1, "batch_cells": 4, "freeze_layers": 4},
    "standard": {
        "max_cells": 120,
        "seeds": 1,
        "batch_cells": 4,
        "freeze_layers": 2,
        "steps": 100,
    },
    "paper": {"max_cells": 10_000, "seeds": 5, "freeze_layers": 4, **_PUBLISHED},
}
_RECIPE = "The file was given on the command line."


def own_task(
    cells: Path,
    label: str,
    genes: Path | None = None,
    group: str | None = None,
    batch: str | None = None,
    positive: str | None = None,
) -> AnyTask:
    """Return the task that files and a column describe; its data folder is that of the cells.

    Parameters
    ----------
    cells
        Any file of cells that `geneloom` reads.
    label
        Column with classes: of obs, or with `genes` of that table, where it has two, or more and
        `positive`.
    genes
        Table (.csv, .tsv) with the column ``ensembl_id`` or ``gene`` and `label`.
    group
        Column of obs whose groups (donors) stay whole.
    batch
        Column of obs: integration is scored, instead of classes.
    positive
        Class of genes that is looked for among all others; None: the smaller one of two.

    Raises
    ------
    ValueError
        A file is missing, or the table has no such column, not two classes, or not `positive`.
    """
    if not cells.exists():
        raise ValueError(f"--cells {cells}: no such file")
    common: dict[str, Any] = {"cells": {"files": [glob.escape(cells.name)], "recipe": _RECIPE}}
    if genes is not None:
        if group or batch:
            raise ValueError("--genes: folds are over genes; --group and --batch are of cells")
        positive, negative = _two_classes(genes, label, positive)
        return GeneTask.model_validate(
            common | {
                "kind": "genes", "name": genes.stem, "sizes": _OF_GENES,
                "title": f"{positive} against {negative} ({genes.name})",
                "labels": str(genes.resolve()), "label_column": label,
                "positive": positive, "negative": negative,
            }
        )  # fmt: skip
    if positive is not None:
        raise ValueError(f"--positive {positive}: is a class of --genes; cells are told into all")
    common |= {"sizes": _OF_CELLS, "label": label}
    if batch:
        return IntegrationTask.model_validate(
            common | {
                "kind": "integration", "name": f"{cells.stem}_{batch}", "batch": batch,
                "title": f"{batch} of {cells.name}",
            }
        )  # fmt: skip
    return CellTask.model_validate(
        common | {
            "kind": "cells", "name": f"{cells.stem}_{label}", "title": f"{label} of {cells.name}",
            "group": group, "group_missing": "" if group else "no --group was given",
        }
    )  # fmt: skip


def _two_classes(path: Path, label: str, positive: str | None) -> tuple[str, str]:
    """Return the class of a table's column that is looked for, and the other one or `OTHERS`."""
    if not path.is_file():
        raise ValueError(f"--genes {path}: no such file")
    table = read_table(path)
    if label not in table:
        raise ValueError(f"--label {label}: {path} has the columns {list(table)}")
    values: pd.Series = table[label].str.strip()
    sizes = values[values != ""].value_counts()
    names = [str(name) for name in sizes.index]
    if positive is not None and positive not in names:
        raise ValueError(f"--positive {positive}: column {label} of {path} has {names[:10]}")
    if len(names) < 2 or (len(names) > 2 and positive is None):
        raise ValueError(
            f"{path}: column {label} has {len(names)} classes ({sizes.head(5).to_dict()}); two are "
            "told apart: name one with --positive, which is looked for among all others, or leave "
            "the labels of others empty"
        )
    if positive is None:
        return names[1], names[0]
    others = [name for name in names if name != positive]
    return positive, others[0] if len(others) == 1 else OTHERS
