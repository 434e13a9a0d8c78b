"""Compare gene sets with their matched genes: does a set stand out as a group?

`read_gene_sets` reads the sets of a file, and `gene_set_table` scores them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from eval.perturb.effects.columns import GENE_SET_COLUMNS
from eval.perturb.effects.matched_genes import match_genes
from eval.perturb.effects.statistics import Test, false_discovery_rate, over_donors

FEWEST_GENES = 5
_DRAWS = 2000


def read_gene_sets(path: Path) -> dict[str, list[str]]:
    """Return name -> genes of a .gmt file, or of a list with one gene per line, named by its file.

    Raises
    ------
    ValueError
        The file does not exist or is not text, a .gmt line has no genes, or two sets have the same
        name.
    """
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as text ({error})") from error
    if path.suffix != ".gmt":
        sets = {path.stem: [line.split()[0] for line in lines]}
    else:
        rows = [line.rstrip().split("\t") for line in lines]
        for number, row in enumerate(rows, 1):
            if len(row) < 3:
                raise ValueError(f"{path}: set {number}: expected name, description and genes")
        sets = {row[0]: [g for g in row[2:] if g] for row in rows}
        if len(sets) < len(rows):
            raise ValueError(f"{path}: two sets have one name")
    if not any(sets.values()):
        raise ValueError(f"{path}: holds no genes")
    return sets


def gene_set_table(
    sets: dict[str, list[str]],
    genes: pd.DataFrame,
    differences: np.ndarray,
    num_matched: int,
    test: Test = "t",
    seed: int = 0,
) -> pd.DataFrame:
    """Return a row of `GENE_SET_COLUMNS` for each set; the set furthest from chance comes first.

    For each donor, the differences of the set's genes from matched genes, in the units of
    ``matched_z``, are ranked against those of their matched genes outside the set. Sets with fewer
    than five genes in the screen are not scored.

    Parameters
    ----------
    sets
        Name -> gene ids or names, as in `genes`.
    genes, differences
        Those of `Analysis`. With a single column of differences (no donors) nothing is tested.
    """
    scored = (genes["matched_z"].notna() & (genes["genes"].map(len) == 1)).to_numpy()
    table = genes[scored]
    with np.errstate(invalid="ignore", divide="ignore"):
        unit = (table["matched_z"] / table["matched_effect"]).to_numpy()[:, None]
        values = np.where(np.isfinite(unit), differences[scored] * unit, 0.0)
    values[~np.isfinite(differences[scored])] = np.nan
    matched = np.zeros((len(table), 0), dtype=int)
    if len(table) > 1:
        ranks, detection = (table[c].to_numpy(np.float64) for c in ("mean_rank", "detection"))
        matched = match_genes(ranks, detection, num_matched)
    place = {name: p for p, name in enumerate(table["name"])}
    place |= {ids[0]: p for p, ids in enumerate(table["genes"])}
    rng = np.random.default_rng(seed)
    rows = []
    for name, members in sets.items():
        inside = np.array(sorted({place[g] for g in members if g in place}), dtype=int)
        missing = len({g for g in members if g not in place})
        row = {"name": name, "genes": len(inside), "missing": missing}
        rows.append(row | _score(inside, matched, values, test, rng))
    scores = pd.DataFrame(rows)
    scores["fdr"] = false_discovery_rate(scores["p"].to_numpy(np.float64))
    order = (scores["auroc"] - 0.5).abs().sort_values(ascending=False, kind="stable").index
    return scores.loc[order, list(GENE_SET_COLUMNS)].reset_index(drop=True)


def _score(
    inside: np.ndarray,
    matched: np.ndarray,
    values: np.ndarray,
    test: Test,
    rng: np.random.Generator,
) -> dict[str, float]:
    empty: dict[str, float] = dict.fromkeys(
        ("auroc", "auroc_low", "auroc_high", "donor_p", "null_p", "p"), np.nan
    )
    if len(inside) < FEWEST_GENES:
        return empty
    is_inside = np.zeros(len(values), dtype=bool)
    is_inside[inside] = True
    neighbours = [row[~is_inside[row]] for row in matched[inside]]
    if any(len(row) == 0 for row in neighbours):
        return empty
    areas = np.array([_auroc(v[inside], v[np.concatenate(neighbours)]) for v in values.T])
    over = over_donors(areas[None] - 0.5, test).iloc[0]
    scores = {
        "auroc": 0.5 + over["mean"],
        "auroc_low": 0.5 + over["low"],
        "auroc_high": 0.5 + over["high"],
        "donor_p": over["p"],
    }
    # A random set contains one matched gene for each gene of the set.
    percentile = stats.rankdata(np.nanmean(values, axis=1))
    drawn = np.mean([percentile[rng.choice(row, _DRAWS)] for row in neighbours], axis=0)
    distance = np.abs(drawn - drawn.mean())
    as_far = (distance >= abs(percentile[inside].mean() - drawn.mean())).sum()
    scores["null_p"] = (1 + as_far) / (1 + _DRAWS)
    # Without donors the p value stays NaN, because a test over genes alone says nothing about other
    # people.
    return scores | {"p": float(np.maximum(scores["donor_p"], scores["null_p"]))}


def _auroc(inside: np.ndarray, outside: np.ndarray) -> float:
    inside, outside = inside[np.isfinite(inside)], outside[np.isfinite(outside)]
    if not len(inside) or not len(outside):
        return float("nan")
    statistic = stats.mannwhitneyu(inside, outside, method="asymptotic").statistic
    return float(statistic / len(inside) / len(outside))
