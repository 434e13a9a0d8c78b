"""Sum the scores of hidden genes in held-out cells, by decile of rank, bucket and data set."""

from __future__ import annotations

from typing import Any

import numpy as np

from data_prep.shards.reader import ShardSet

TOP_GUESSES = 10
RANK_DECILES = 10
SCORES = ("loss", "accuracy", "top10")
CELL_LOSS = "cell_loss"
CURVES = ("rank_decile", "bucket", "dataset")
# The data sets with the most hidden genes have a curve each, and all others share one.
MOST_DATASETS = 50
OTHER_DATASETS = "all other data sets"


class CellDatasets:
    """The data set of each held-out cell; a block is read when it is needed for the first time."""

    def __init__(self, shards: ShardSet) -> None:
        self._shards = shards
        # Shards of format 1 list sources only.
        listed = shards.manifest.get("datasets") or shards.manifest["sources"]
        self.names = [*dict.fromkeys(str(d["name"]) for d in listed), OTHER_DATASETS]
        self._number_of = {name: i for i, name in enumerate(self.names)}
        self._first_cells = np.asarray(shards.index["first_cell"])
        self._blocks: dict[int, np.ndarray] = {}

    def of(self, cells: np.ndarray) -> np.ndarray:
        """Return int64 [cells], the index of each cell's data set in `names`."""
        numbers = np.searchsorted(self._first_cells, cells, side="right") - 1
        found = np.empty(len(cells), np.int64)
        for number in np.unique(numbers).tolist():
            if number not in self._blocks:
                column = self._shards.read_block(number).batch.column("dataset").to_pylist()
                other = len(self.names) - 1
                block = [self._number_of.get(name, other) for name in column]
                self._blocks[number] = np.array(block, np.int32)
            mine = numbers == number
            found[mine] = self._blocks[number][cells[mine] - self._first_cells[number]]
        return found


class HeldoutSums:
    """Counts and sums of scores over hidden genes.

    ``cells`` float64 [buckets, deciles, 1 + scores]. ``datasets`` float64 [data sets, 1 + scores].
    ``cell_loss`` float64 [2]: the number of cells and the sum of their losses in the cell
    objective. ``by_cell`` float64 [2, cells]: the number of hidden genes of each held-out cell, and
    the sum of their losses; the numbers of these cells are `numbers`, ascending.
    """

    def __init__(self, num_buckets: int, num_datasets: int, numbers: np.ndarray) -> None:
        self.cells = np.zeros((num_buckets, RANK_DECILES, 1 + len(SCORES)))
        self.datasets = np.zeros((num_datasets, 1 + len(SCORES)))
        self.cell_loss = np.zeros(2)
        self.numbers, self.by_cell = numbers, np.zeros((2, len(numbers)))

    def add(
        self,
        bucket: int,
        ranks: np.ndarray,
        datasets: np.ndarray,
        cells: np.ndarray,
        losses: np.ndarray,
        places: np.ndarray,
    ) -> None:
        """Add hidden genes of one bucket: ranks, numbers of data set and cell, scores, all [H]."""
        decile = np.minimum((ranks * RANK_DECILES).astype(np.int64), RANK_DECILES - 1)
        columns = (np.ones(len(losses)), losses, places == 0, places < TOP_GUESSES)
        for number, column in enumerate(columns):
            self.cells[bucket, :, number] += np.bincount(decile, column, RANK_DECILES)
            self.datasets[:, number] += np.bincount(datasets, column, len(self.datasets))
        rows = np.searchsorted(self.numbers, cells)
        for total, weights in zip(self.by_cell, (None, losses), strict=True):
            total += np.bincount(rows, weights, len(total))

    def add_cells(self, losses: np.ndarray) -> None:
        """Add the losses of cells in the cell objective."""
        self.cell_loss += len(losses), losses.sum()

    def flat(self) -> list[float]:
        """Return all sums as one list."""
        parts = [self.cells.ravel(), self.datasets.ravel(), self.by_cell.ravel(), self.cell_loss]
        return np.concatenate(parts).tolist()

    def replace(self, flat: list[float]) -> None:
        """Replace the sums by others in the order of `flat`, such as those over all ranks."""
        values = np.array(flat)
        self.cells[:] = values[: self.cells.size].reshape(self.cells.shape)
        of_cells = len(values) - self.by_cell.size - 2
        self.datasets[:] = values[self.cells.size : of_cells].reshape(self.datasets.shape)
        self.by_cell[:] = values[of_cells:-2].reshape(self.by_cell.shape)
        self.cell_loss[:] = values[-2:]

    def losses_of_cells(self) -> np.ndarray:
        """Return float64 [cells], the mean loss of each cell; NaN for one without hidden genes."""
        genes, losses = self.by_cell
        return np.divide(losses, genes, out=np.full(len(genes), np.nan), where=genes > 0)

    def means(self, buckets: list[str], datasets: list[str]) -> dict[str, Any]:
        """Return the number of hidden genes and their mean scores, overall and as curves.

        The mean loss of cells is added if any cell has one.
        """
        overall = _scores(self.cells.sum(axis=(0, 1)))
        by_decile = [_scores(row) for row in self.cells.sum(axis=0)]
        rows = zip(buckets, self.cells.sum(axis=1), strict=True)
        by_bucket = {length: _scores(row) for length, row in rows if row[0]}
        by_dataset = {k: _scores(row) for k, row in self.by_dataset(datasets).items()}
        result: dict[str, Any] = dict(overall)
        if self.cell_loss[0]:
            result[CELL_LOSS] = float(self.cell_loss[1] / self.cell_loss[0])
        for name in overall:
            result[f"{name}_by_rank_decile"] = [scores[name] for scores in by_decile]
            result[f"{name}_by_bucket"] = {k: scores[name] for k, scores in by_bucket.items()}
            result[f"{name}_by_dataset"] = {k: scores[name] for k, scores in by_dataset.items()}
        return result

    def by_dataset(self, names: list[str]) -> dict[str, np.ndarray]:
        """Return the sums of the data sets with most hidden genes, and of all others together."""
        found = dict(zip(names, self.datasets, strict=True))
        other = found.pop(OTHER_DATASETS).copy()
        ordered = sorted(found, key=lambda name: -found[name][0])
        kept = {name for name in ordered[:MOST_DATASETS] if found[name][0]}
        for name in ordered[MOST_DATASETS:]:
            other += found[name]
        rows = {name: row for name, row in found.items() if name in kept}
        return rows | ({OTHER_DATASETS: other} if other[0] else {})


def _scores(sums: np.ndarray) -> dict[str, Any]:
    """Return the number of hidden genes and the mean scores in a row of sums; None without any."""
    count = int(sums[0])
    means = [float(value) / count if count else None for value in sums[1:]]
    return {"genes": count, **dict(zip(SCORES, means, strict=True))}
