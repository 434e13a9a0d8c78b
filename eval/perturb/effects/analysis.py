"""Analyse a screen: effects with intervals over donors, compared with those of matched genes.

`analyse` puts the parts together: effects over donors, matched genes, groups with impact,
combinations, a second screen, gene sets, and warnings for the reader.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer

from eval.perturb.effects.agreement import compare_screens
from eval.perturb.effects.columns import GENE_COLUMNS, GENE_SET_COLUMNS
from eval.perturb.effects.combinations import combination_table
from eval.perturb.effects.gene_sets import gene_set_table
from eval.perturb.effects.impact import impact_groups
from eval.perturb.effects.matched_genes import FEWEST_MATCHED, against_matched
from eval.perturb.effects.statistics import (
    FEW_DONORS,
    Test,
    false_discovery_rate,
    over_cells,
    over_donors,
    power_table,
)
from eval.perturb.screen.results import Results

UNSIGNED = "shift"
FOUND, LIKE_OTHERS, NOT_TESTED = "found", "like matched genes", "not tested"
_SUMMARY = ("mean", "low", "high", "size", "size_low", "size_high")


@dataclass(frozen=True)
class AnalysisSettings:
    """The settings of an analysis.

    `effect` None: toward the goal where there is one, else the first value of the screen.
    """

    effect: Annotated[
        str | None, typer.Option(help="shift, toward_STATE, class_LABEL; default: toward the goal")
    ] = None
    test: Annotated[Test, typer.Option(help="t, or wilcoxon (over donors)")] = "t"
    num_matched: Annotated[
        int, typer.Option("--matched", help="genes that each one is held against")
    ] = 50
    rate: Annotated[float, typer.Option("--fdr", help="false discovery rate")] = 0.05
    min_cells: Annotated[int, typer.Option(help="cells of a donor that counts for a gene")] = 3

    def __post_init__(self) -> None:
        problems = []
        if self.test not in ("t", "wilcoxon"):
            problems.append(f"test {self.test!r}: must be t or wilcoxon")
        if self.num_matched < FEWEST_MATCHED:
            problems.append(f"matched {self.num_matched}: must be at least {FEWEST_MATCHED}")
        if not 0 < self.rate < 1:
            problems.append(f"false discovery rate {self.rate}: must lie between 0 and 1")
        if self.min_cells < 1:
            problems.append(f"min_cells {self.min_cells}: must be at least 1")
        if problems:
            raise ValueError("; ".join(problems))


@dataclass(frozen=True)
class Analysis:
    """The results of an analysis.

    Attributes
    ----------
    genes
        One row per perturbation, `GENE_COLUMNS`; the one furthest from its matched genes first.
    differences
        Effect minus that of matched genes by donor; the rows are perturbations in the order of
        `genes`.
    combinations
        See `combination_table`; empty if no genes were combined.
    agreement
        See `compare_screens`; empty without a second screen.
    gene_sets
        See `gene_set_table`; empty without sets.
    """

    effect: str
    settings: AnalysisSettings
    donors: list[str]
    genes: pd.DataFrame
    differences: pd.DataFrame
    combinations: pd.DataFrame
    impact: dict[str, Any]
    power: list[dict[str, float]]
    warnings: list[str]
    agreement: dict[str, Any]
    gene_sets: pd.DataFrame

    @property
    def signed(self) -> bool:
        """Return whether the effect has a direction; `shift` has none."""
        return self.effect != UNSIGNED

    @property
    def has_donors(self) -> bool:
        return len(self.donors) > 1


def analyse(
    results: Results,
    settings: AnalysisSettings,
    other: Results | None = None,
    gene_sets: dict[str, list[str]] | None = None,
) -> Analysis:
    """Return the statistics of one value of a screen.

    Parameters
    ----------
    other
        A second screen of the same genes to compare with: the opposite kind, or other donors.
    gene_sets
        Name -> gene ids or symbols, to compare with their matched genes.

    The memory is that of perturbations x donors, and of one part of the screen.

    Raises
    ------
    ValueError
        The screen has no such value or no cells, or lacks columns.
    """
    effect = settings.effect or default_effect(results)
    if effect not in results.columns:
        raise ValueError(
            f"{results.folder}: has no value {effect!r}; --effect must be one of "
            + ", ".join(results.columns)
        )
    _require_columns(results)
    donors = sorted(set(results.cells["donor"]) - {""})
    counted = donors if len(donors) > 1 else []
    if counted:
        values = _donor_values(results, effect, counted, settings.min_cells)
        summary = over_donors(values, settings.test)
    else:
        values, summary = _over_cells(results, effect, settings.test)
    genes = _effects(results, effect, summary)
    genes, differences = _matched(genes, values, settings, bool(counted))
    fit, genes["impact_probability"] = impact_groups(genes["matched_z"].to_numpy())
    order = genes["matched_z"].abs().sort_values(ascending=False, kind="stable").index
    genes = genes.loc[order, list(GENE_COLUMNS)].reset_index(drop=True)
    names = counted or ["all cells"]
    by_donor = pd.DataFrame(differences[order], columns=names)
    combined = combination_table(results, effect, counted, settings.min_cells, settings.test)
    sets = pd.DataFrame(columns=list(GENE_SET_COLUMNS))
    if gene_sets:
        sets = gene_set_table(
            gene_sets, genes, by_donor.to_numpy(), settings.num_matched, settings.test
        )
    agreement: dict[str, Any] = {}
    if other is not None:
        _require_one_score(results, other, effect)
        second = analyse(other, replace(settings, effect=effect))
        genes, agreement = compare_screens(genes, second.genes, effect != UNSIGNED)
        agreement["folder"] = str(other.folder)
    tested = int(genes["matched_p"].notna().sum())
    return Analysis(
        effect, settings, donors, genes, by_donor, combined, fit,
        power_table(len(donors), tested, settings.rate) if counted else [],
        _warnings(results, donors, genes, combined, settings), agreement, sets,
    )  # fmt: skip


def _require_one_score(results: Results, other: Results, effect: str) -> None:
    scores = [r.manifest["settings"].get("score", "mean_state") for r in (results, other)]
    if len(set(scores)) > 1 and not effect.startswith("class_"):
        raise ValueError(
            f"--also: {other.folder} has --score {scores[1]}, this screen {scores[0]}; "
            "make one of them again with the other's score"
        )


def default_effect(results: Results) -> str:
    """Return the value that a report uses by default: toward the goal."""
    states = results.manifest["settings"].get("states") or {}
    preferred = [f"toward_{states.get('goal')}"]
    preferred += [c for c in results.columns if c.startswith(("toward_", "class_"))]
    return next((c for c in preferred if c in results.columns), results.columns[0])


def _require_columns(results: Results) -> None:
    wanted = {
        "cells.parquet": (results.cells, ["cell", "donor"]),
        "perturbations.parquet": (
            results.perturbations,
            ["perturbation", "kind", "genes", "name", "cells", "mean_rank", "detection"],
        ),
    }
    for file, (table, columns) in wanted.items():
        missing = [c for c in columns if c not in table]
        if missing:
            raise ValueError(
                f"{results.folder / file}: has no column {', '.join(missing)}; "
                "make the screen again with `geneloom perturb`"
            )
        if table.empty:
            raise ValueError(f"{results.folder / file}: holds no rows; nothing to report")


def _donor_values(results: Results, effect: str, donors: list[str], min_cells: int) -> np.ndarray:
    """Return float64 [perturbations, donors], means over cells."""
    means = results.donor_means(effect)
    means = means[(means["cells"] >= min_cells) & means["donor"].isin(donors)]
    values = np.full((len(results.perturbations), len(donors)), np.nan)
    values[means["perturbation"], pd.Index(donors).get_indexer(means["donor"])] = means["mean"]
    return values


def _cell_sums(results: Results, effect: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return number of cells, sum and sum of squares of every perturbation, over all cells."""
    sums = np.zeros((3, len(results.perturbations)))
    for part in results.shifts([effect]):
        known = part[part[effect].notna()]
        value = known[effect].to_numpy(np.float64)
        for row, weights in zip(sums, (np.ones_like(value), value, value**2), strict=True):
            row += np.bincount(known["perturbation"], weights, minlength=len(row))
    return sums[0], sums[1], sums[2]


def _over_cells(results: Results, effect: str, test: Test) -> tuple[np.ndarray, pd.DataFrame]:
    """Return means over all cells, float64 [perturbations, 1], and a table like `over_donors`."""
    count, total, squares = _cell_sums(results, effect)
    with np.errstate(invalid="ignore"):
        values = (total / count)[:, None]
    summary = over_donors(values, test)
    summary[["mean", "low", "high"]] = over_cells(count, total, squares)
    summary["donors"] = np.int32(0)
    return values, summary


def _effects(results: Results, effect: str, summary: pd.DataFrame) -> pd.DataFrame:
    """Return the perturbations with their effects, and tests against 0 if these are meaningful."""
    genes = results.perturbations.reset_index(drop=True)
    genes["genes"] = [list(g) for g in genes["genes"]]
    genes["donors"] = summary["donors"]
    for name in _SUMMARY:
        genes["effect" + f"_{name}".replace("_mean", "")] = summary[name]
    # A distance is never negative, so a difference from 0 says nothing.
    genes["p"] = summary["p"] if effect != UNSIGNED else np.nan
    genes["fdr"] = false_discovery_rate(genes["p"].to_numpy())
    return genes


def _matched(
    genes: pd.DataFrame, values: np.ndarray, settings: AnalysisSettings, has_donors: bool
) -> tuple[pd.DataFrame, np.ndarray]:
    """Return the table with the columns for matched genes, and the differences by donor."""
    differences = np.full(values.shape, np.nan)
    genes = genes.assign(num_matched=np.int32(0), empirical_p=np.nan, matched_z=np.nan)
    new = ["matched_null", *(f"matched_{n}".replace("_mean", "_effect") for n in _SUMMARY)]
    genes[[*new, "donor_p", "null_p"]] = np.nan
    usable = (genes["genes"].map(len) == 1) & np.isfinite(values).any(axis=1)
    usable &= genes["mean_rank"].notna() & genes["detection"].notna()
    for _, rows in genes[usable].groupby("kind"):
        place = rows.index.to_numpy()
        if len(place) <= FEWEST_MATCHED:
            continue
        table, differences[place] = against_matched(
            values[place], rows["mean_rank"].to_numpy(np.float64),
            rows["detection"].to_numpy(np.float64), settings.num_matched, settings.test,
        )  # fmt: skip
        summary = table[["null", *_SUMMARY]].to_numpy()
        genes.loc[place, new] = summary
        genes.loc[place, "num_matched"] = table["num_matched"].to_numpy()
        genes.loc[place, ["matched_z", "empirical_p"]] = table[["z", "empirical_p"]].to_numpy()
        if has_donors:
            genes.loc[place, ["donor_p", "null_p"]] = table[["p", "null_p"]].to_numpy()
    # Both tests must reject: the difference holds over donors, and exceeds those of matched genes.
    genes["matched_p"] = np.maximum(genes["donor_p"], genes["null_p"])
    genes["matched_fdr"] = false_discovery_rate(genes["matched_p"].to_numpy())
    is_found = genes["matched_fdr"] < settings.rate
    genes["verdict"] = np.where(
        genes["matched_p"].isna(), NOT_TESTED, np.where(is_found, FOUND, LIKE_OTHERS)
    )
    return genes, differences


def _warnings(
    results: Results,
    donors: list[str],
    genes: pd.DataFrame,
    combined: pd.DataFrame,
    settings: AnalysisSettings,
) -> list[str]:
    """Return the warnings that a reader must know before the numbers, the most serious first."""
    found = []
    if len(donors) < 2:
        having = f"one donor ({donors[0]})" if donors else "no donors"
        found.append(
            f"The screen has {having}. Intervals are over cells and say nothing about other "
            "people; nothing is tested, and nothing is called significant. Give `geneloom perturb` "
            "cells of several donors, and --donor COLUMN."
        )
    elif len(donors) < FEW_DONORS:
        found.append(
            f"Only {len(donors)} donors: below {FEW_DONORS} only very large, very even effects "
            "can be found. What is not found here is not thereby absent."
        )
    if len(donors) > 1 and settings.test == "wilcoxon" and 2 / 2 ** len(donors) > settings.rate:
        found.append(
            f"Wilcoxon's test over {len(donors)} donors has no p below {2 / 2 ** len(donors):.3g}: "
            "nothing can be found. Use --test t."
        )
    nameless = int((results.cells["donor"] == "").sum())
    if len(donors) > 1 and nameless:
        found.append(f"{nameless} of {len(results.cells)} cells have no donor and do not count.")
    if results.manifest["settings"].get("top"):
        found.append(
            "The genes were chosen by an estimate of this same effect: matched genes are strong "
            "ones as well, so that fewer genes are found than in a screen of all."
        )
    singles = genes[genes["genes"].map(len) == 1]
    if len(singles) and singles["matched_effect"].isna().all():
        found.append(
            f"{len(singles)} genes were perturbed one by one: too few to match any by rank and "
            "detection. Add others (at least a few hundred, drawn at random) to have a null."
        )
    elif len(singles) and len(singles) <= 2 * settings.num_matched:
        found.append(
            f"{len(singles)} genes were perturbed one by one: their {settings.num_matched} nearest "
            "are half of them or more, and differ in rank and detection. Add more genes."
        )
    if len(combined) and not combined["cells"].any():
        found.append(
            "No synergy: the genes of the combinations were not perturbed one by one as well."
        )
    return found
