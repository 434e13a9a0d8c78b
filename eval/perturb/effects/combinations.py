"""Compare combined perturbations with the sum of their genes' single effects in the same cells."""

from __future__ import annotations

import numpy as np
import pandas as pd

from eval.perturb.effects.columns import COMBINATION_COLUMNS
from eval.perturb.effects.statistics import Test, false_discovery_rate, over_donors
from eval.perturb.screen.results import Results


def combination_table(
    results: Results, column: str, donors: list[str], min_cells: int, test: Test = "t"
) -> pd.DataFrame:
    """Return a row for each perturbation of several genes: combined, sum of singles, difference.

    Only those cells count in which the combination and every single perturbation of its genes (of
    the same kind) were computed. Differences are averaged over a donor's cells first, then over
    donors.

    Parameters
    ----------
    donors
        The donors that count; empty: all cells form one group, and nothing is tested.
    min_cells
        A donor with fewer such cells does not count.

    Combinations whose genes were not also perturbed singly have NaN, and ``cells`` 0.
    """
    table = results.perturbations
    is_combined = table["genes"].map(len).to_numpy() > 1
    combined = np.flatnonzero(is_combined)
    singles = _singles_of(table, combined)
    group_of_cell = donor_codes(results.cells, donors)
    shape = (len(combined), max(len(donors), 1))
    counts, together, apart = (np.zeros(shape[0] * shape[1]) for _ in range(3))
    if len(combined):
        place_of = np.full(len(table), -1)
        place_of[combined] = np.arange(len(combined))
        for part in results.shifts([column]):
            rows = _paired(part, column, is_combined, singles, place_of)
            group = group_of_cell[rows["cell"]]
            rows, group = rows[group >= 0], group[group >= 0]
            place = rows["place"].to_numpy() * shape[1] + group
            counts += np.bincount(place, minlength=len(counts))
            together += np.bincount(place, rows["combined"], minlength=len(counts))
            apart += np.bincount(place, rows["sum"], minlength=len(counts))
    few = counts < max(min_cells if donors else 1, 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        both = [np.where(few, np.nan, x / counts).reshape(shape) for x in (together, apart)]
    summary = over_donors(both[0] - both[1], test)
    levels = [over_donors(x)["mean"].to_numpy() for x in both]
    found = table.iloc[combined][["perturbation", "name", "genes", "kind"]].reset_index(drop=True)
    found["genes"] = [list(genes) for genes in found["genes"]]
    found["cells"] = counts.reshape(shape).sum(axis=1).astype(np.int64)
    found["donors"] = summary["donors"] if donors else np.int32(0)
    found["combined"], found["sum_of_singles"] = levels
    for name in ("mean", "low", "high", "size", "size_low", "size_high"):
        found["synergy" + f"_{name}".replace("_mean", "")] = summary[name]
    found["p"] = summary["p"]
    found["fdr"] = false_discovery_rate(found["p"].to_numpy())
    order = found["synergy"].abs().sort_values(ascending=False, kind="stable").index
    return found.loc[order, list(COMBINATION_COLUMNS)].reset_index(drop=True)


def donor_codes(cells: pd.DataFrame, donors: list[str]) -> np.ndarray:
    """Return cell number -> index in `donors`, -1 for other donors; all 0 if `donors` is empty."""
    codes = np.full(int(cells["cell"].max()) + 1, -1, dtype=np.int64)
    codes[cells["cell"]] = pd.Index(donors).get_indexer(cells["donor"]) if donors else 0
    return codes


def _singles_of(table: pd.DataFrame, combined: np.ndarray) -> np.ndarray:
    """Return int [perturbations, size of the largest set], the single perturbations of each set.

    The entries behind a set's genes are -1; the whole row is -2 if one of the genes was not
    perturbed singly.
    """
    kinds, sets = table["kind"].tolist(), table["genes"].tolist()
    alone = {
        (kind, genes[0]): number
        for number, (kind, genes) in enumerate(zip(kinds, sets, strict=True))
        if len(genes) == 1
    }
    largest = max((len(sets[number]) for number in combined), default=1)
    singles = np.full((len(table), largest), -1, dtype=np.int64)
    for number in combined:
        found = [alone.get((kinds[number], gene), -2) for gene in sets[number]]
        singles[number, : len(found)] = found
        if min(found) == -2:
            singles[number] = -2
    return singles


def _paired(
    part: pd.DataFrame,
    column: str,
    is_combined: np.ndarray,
    singles: np.ndarray,
    place_of: np.ndarray,
) -> pd.DataFrame:
    """Return a part's combined values (`place`, `cell`, `combined`) with the `sum` of singles."""
    number = part["perturbation"].to_numpy(np.int64)
    cell = part["cell"].to_numpy(np.int64)
    value = part[column].to_numpy(np.float64)
    key = cell * len(singles) + number
    order = np.argsort(key)
    sorted_key = key[order]
    rows = np.flatnonzero(is_combined[number])
    total, complete = np.zeros(len(rows)), np.ones(len(rows), dtype=bool)
    for gene in singles[number[rows]].T:
        wanted = cell[rows] * len(singles) + gene
        found = np.searchsorted(sorted_key, wanted).clip(max=len(key) - 1)
        is_there = (sorted_key[found] == wanted) & (gene >= 0)
        complete &= is_there | (gene == -1)
        total += np.where(is_there, value[order[found]], 0.0)
    kept = rows[complete]
    return pd.DataFrame(
        {
            "place": place_of[number[kept]],
            "cell": cell[kept],
            "combined": value[kept],
            "sum": total[complete],
        }
    )
