"""Which genes a gene task tells apart, what was left out and why, and the folds over them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedKFold

from eval.benchmark.material.models_and_cells import Bench, Model, TaskCells, at_most
from eval.benchmark.task_file import OTHERS, TASKS_FOLDER, GeneTask
from eval.cells.gene_lists import GENE_COLUMNS

_YES, _NO = ("true", "1", "yes"), ("false", "0", "no", "")


@dataclass(frozen=True)
class LabelledGenes:
    """Genes of two classes.

    Attributes
    ----------
    ids
        Gene ids, each once.
    labels
        int64 [genes], 1 for the task's positive class, else 0.
    symbols
        What a reader calls the genes; '' where the table does not say.
    excluded
        Reason -> genes that were left out.
    """

    ids: list[str]
    labels: np.ndarray
    symbols: list[str]
    excluded: dict[str, int]

    def subset(self, kept: np.ndarray, excluded: dict[str, int]) -> LabelledGenes:
        """Return the genes where bool [genes] `kept` is True."""
        chosen = np.flatnonzero(kept)
        return LabelledGenes(
            [self.ids[i] for i in chosen],
            self.labels[chosen],
            [self.symbols[i] for i in chosen],
            excluded,
        )


def read_labels(task: GeneTask, data: Path | None) -> LabelledGenes:
    """Return the genes of a task's label table that belong to one of its two classes.

    The second one may be `OTHERS`: all genes with another label.

    The table is tab-separated (or comma-separated: ``.csv``), with the columns ``ensembl_id`` or
    ``gene``, ``label``, and perhaps ``symbol`` and ``ambiguous`` (true or false).

    Raises
    ------
    ValueError
        No such file, missing columns, a row without a gene, a value of ``ambiguous`` that is
        neither true nor false, a class that does not occur, or no gene left in one.
    """
    path = table_path(task.labels, data, task.cells.recipe)
    table = read_table(path)
    found = [c for c in GENE_COLUMNS if c in table]
    if not found or task.label_column not in table:
        raise ValueError(
            f"{path}: has the columns {list(table)}; needed are ensembl_id (or gene) and "
            f"{task.label_column}"
        )
    table = table.apply(lambda column: column.str.strip())
    genes, labels = table[found[0]], table[task.label_column]
    if (genes == "").any():
        rows = (np.flatnonzero(genes == "")[:5] + 2).tolist()
        raise ValueError(f"{path}: no gene in line(s) {rows} of column {found[0]}; fill them in")
    no_label = labels == ""
    if task.negative == OTHERS:
        labels = labels.where(no_label | (labels == task.positive), OTHERS)
    for name in (task.negative, task.positive):
        if name not in set(labels):
            raise ValueError(
                f"{path}: no gene has the label '{name}'; labels are {sorted(set(labels))[:10]}"
            )
    unknown = ~labels.isin([task.negative, task.positive]) & ~no_label
    known = ~no_label & ~unknown
    both = genes.isin(_in_both_classes(genes[known], labels[known]))
    ambiguous = known & (_flags(table, path) | both)
    repeated = known & ~ambiguous & (genes + "\t" + labels).duplicated()
    kept = known & ~ambiguous & ~repeated
    excluded = {
        "no label": int(no_label.sum()),
        "label of neither class": int(unknown.sum()),
        "ambiguous": genes[ambiguous].nunique(),
        "repeated": int(repeated.sum()),
    }
    counts = (known & ~repeated).groupby(labels).sum()
    for name, expected in task.expected_genes.items():
        if counts.get(name, 0) != expected:
            excluded[f"(expected {expected:,} of '{name}', found {counts.get(name, 0):,})"] = 0
    symbols = table["symbol"] if "symbol" in table else pd.Series("", index=table.index)
    positive = (labels == task.positive).to_numpy(np.int64)
    every = LabelledGenes(genes.tolist(), positive, symbols.tolist(), {})
    return every.subset(kept.to_numpy(), excluded)


def choose_genes(
    labelled: LabelledGenes, models: list[Model], draws: list[TaskCells], task: GeneTask
) -> LabelledGenes:
    """Return the genes that every model knows and reads in some cell of every draw.

    The same genes in all draws, so that a gene has a prediction in every repetition.

    Raises
    ------
    ValueError
        A class is left with fewer genes than folds.
    """
    excluded = dict(labelled.excluded)
    kept = np.ones(len(labelled.ids), dtype=bool)
    tokens = {m.name: m.reading_vocabulary.tokens_of(labelled.ids) for m in models}

    def drop(bad: np.ndarray, reason: str) -> None:
        excluded[reason] = int((kept & bad).sum())
        kept[bad] = False

    for model in models:
        drop(tokens[model.name] < 0, f"not in the vocabulary of {model.name}")
        # Aliases of one gene would put it on both sides of a fold.
        drop(pd.Series(tokens[model.name]).duplicated().to_numpy(), "another id of a gene above")
    seen = [_detected(draw, models[0]) for draw in draws]
    drop(~np.all([s[tokens[models[0].name]] for s in seen], axis=0), "not detected in the cells")
    for model in models:
        for draw in draws:
            read = np.zeros(model.vocabulary.num_tokens, dtype=bool)
            read[np.concatenate(draw.tokens[model.name])] = True
            reason = f"detected, but never among the tokens of a cell ({model.name})"
            before = excluded.get(reason, 0)
            drop(~read[tokens[model.name]], reason)
            excluded[reason] += before
    labels = labelled.labels[kept]
    for number, name in enumerate((task.negative, task.positive)):
        left = int((labels == number).sum())
        if left < task.folds:
            raise ValueError(
                f"{task.name}: {left} genes of the class '{name}' are left for {task.folds} folds "
                f"({ {k: v for k, v in excluded.items() if v} }); use more cells or fewer folds"
            )
    return labelled.subset(kept, {k: v for k, v in excluded.items() if v or k[0] == "("})


@dataclass(frozen=True)
class DrawnGenes:
    """Genes of two classes, and the cells of each seed that they are looked at in.

    Attributes
    ----------
    genes
        Those that every model reads in the cells of every seed.
    draws
        Cells of each seed.
    excluded
        Reason -> cells and genes that were left out.
    """

    genes: LabelledGenes
    draws: list[TaskCells]
    excluded: dict[str, int]


def draw_genes(
    task: GeneTask, most_cells: int | None, seeds: list[int], bench: Bench
) -> DrawnGenes:
    """Return the genes of a task, and for each seed at most so many cells.

    Raises
    ------
    ValueError
        As `read_labels`, `choose_genes` and `load_cells`.
    """
    labelled, every = read_labels(task, bench.data), bench.cells(task.cells)
    number = every.counts.shape[0]
    draws = [every] * len(seeds)
    if most_cells is not None and number > most_cells:
        draws = [every.subset(at_most(np.arange(number), most_cells, seed)) for seed in seeds]
    genes = choose_genes(labelled, bench.models, draws, task)
    excluded = {f"cells: {k}": v for k, v in every.excluded.items()}
    if not_drawn := number - draws[0].counts.shape[0]:
        excluded["cells: not drawn"] = not_drawn
    excluded |= {f"genes: {k}": v for k, v in genes.excluded.items()}
    return DrawnGenes(genes, draws, excluded)


def gene_folds(labels: np.ndarray, folds: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (training, test) int positions per fold, stratified; every gene is tested once."""
    splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
    return list(splitter.split(np.zeros(len(labels)), labels))


def table_path(file: str, data: Path | None, recipe: str) -> Path:
    """Return where a table of a task is: among the tasks, at its full path, or below the data.

    Raises
    ------
    ValueError
        It is in none of these places.
    """
    own = TASKS_FOLDER / file
    if own.exists():
        return own
    if data is None:
        raise ValueError(f"--data: the labels {file} are below it; give the folder")
    if not (data / file).is_file():
        raise ValueError(f"{data / file}: no such file. {recipe}")
    return data / file


def read_table(path: Path) -> pd.DataFrame:
    """Return a tab-separated (or comma-separated: ``.csv``) table, all as text; '' where empty."""
    separator = "," if path.suffix == ".csv" else "\t"
    try:
        return pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False)
    except pd.errors.EmptyDataError as error:
        raise ValueError(
            f"{path}: is empty; needed are the columns ensembl_id and label"
        ) from error
    except (pd.errors.ParserError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as a table ({error})") from error


def _flags(table: pd.DataFrame, path: Path) -> pd.Series:
    """Return bool [rows]: what the column ``ambiguous`` says, False without one."""
    if "ambiguous" not in table:
        return pd.Series(False, index=table.index)
    values = table["ambiguous"].str.lower()
    bad = ~values.isin([*_YES, *_NO])
    if bad.any():
        raise ValueError(
            f"{path}: column ambiguous holds '{values[bad].iloc[0]}'; use true or false"
        )
    return values.isin(_YES)


def _in_both_classes(genes: pd.Series, labels: pd.Series) -> list[str]:
    num_labels = labels.groupby(genes).nunique()
    return num_labels[num_labels > 1].index.tolist()


def _detected(cells: TaskCells, model: Model) -> np.ndarray:
    """Return bool [num_tokens]: whether a cell has counts of the token's gene."""
    found = np.zeros(model.vocabulary.num_tokens, dtype=bool)
    tokens = model.reading_vocabulary.tokens_of(cells.genes)
    expressed = np.asarray(cells.counts.sum(axis=0)).ravel() > 0
    found[tokens[expressed & (tokens >= 0)]] = True
    return found
