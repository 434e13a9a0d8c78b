"""Compare two screens of the same genes: do their effects agree more than those of other genes?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from eval.scores.metrics import CONFIDENCE

_UP = {"overexpress": 1, "activate": 1, "delete": -1, "inhibit": -1}
_FEWEST_GENES = 3


def expected_sign(kind: str, other_kind: str, signed: bool) -> int:
    """Return -1 if one screen raises the genes and the other lowers them, else 1.

    For a value without direction (`shift`) it is always 1: a gene that matters moves the cell more
    than similar genes do, whether it is raised or lowered.
    """
    return _UP[kind] * _UP[other_kind] if signed else 1


def compare_screens(
    genes: pd.DataFrame, other: pd.DataFrame, signed: bool
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return this screen's genes with the other's values, and how well the two agree.

    Parameters
    ----------
    genes, other
        Tables of `analyse`, of single genes; they are joined by gene id.

    Returns
    -------
    joined
        `genes` and ``other_effect``, ``other_matched_effect``, ``other_matched_fdr``, ``agrees``
        (whether the signs of the matched effects are as expected; missing if unknown).
    agreement
        ``expected`` sign; Spearman's correlation of effects and of matched effects, over all genes
        and over null genes (found in neither screen), with the number of genes; the share of
        agreeing genes among those found in this screen, with Clopper and Pearson's interval, the
        share among null genes, and the p value of a binomial test against that share.

    Raises
    ------
    ValueError
        No gene is in both screens.
    """
    mine, theirs = (t[t["genes"].map(len) == 1] for t in (genes, other))
    columns = ["effect", "matched_effect", "matched_fdr", "verdict"]
    renamed = theirs[columns].add_prefix("other_").assign(gene=theirs["genes"].str[0])
    joined = genes.assign(gene=genes["genes"].map(lambda g: g[0] if len(g) == 1 else None))
    joined = joined.merge(renamed.drop_duplicates("gene"), on="gene", how="left")
    both = joined["effect"].notna() & joined["other_effect"].notna()
    if not both.any():
        raise ValueError("--also: no gene was perturbed, one by one, in both screens")
    kinds = mine["kind"].iloc[0], theirs["kind"].iloc[0]
    sign = expected_sign(*kinds, signed)
    product = np.sign(joined["matched_effect"] * joined["other_matched_effect"]) * sign
    joined["agrees"] = (product > 0).astype("boolean").mask(product.isna())
    found = both & (joined["verdict"] == "found")
    null = both & ~found & (joined["other_verdict"] != "found")
    agreement = {
        "kind": kinds[0],
        "other_kind": kinds[1],
        "expected": sign,
        "correlations": [
            {"value": value, "genes": name, **_correlation(joined[of], value)}
            for value in ("effect", "matched_effect")
            for name, of in (("all", both), ("null", null))
        ],
        "signs": _signs(joined.loc[found, "agrees"], joined.loc[null, "agrees"]),
    }
    return joined.drop(columns=["gene", "other_verdict"]), agreement


def _correlation(table: pd.DataFrame, value: str) -> dict[str, Any]:
    pair = table[[value, f"other_{value}"]].dropna()
    if len(pair) < _FEWEST_GENES:
        return {"number": len(pair), "spearman": None}
    rho = float(stats.spearmanr(pair.iloc[:, 0], pair.iloc[:, 1]).statistic)
    return {"number": len(pair), "spearman": rho if np.isfinite(rho) else None}


def _signs(found: pd.Series, null: pd.Series) -> dict[str, Any]:
    found, null = found.dropna(), null.dropna()
    baseline = float(null.mean()) if len(null) else None
    signs: dict[str, Any] = {
        "found": len(found), "null": len(null), "share": None, "null_share": baseline, "p": None,
    }  # fmt: skip
    if len(found):
        test = stats.binomtest(int(found.sum()), len(found), 0.5 if baseline is None else baseline)
        interval = test.proportion_ci(CONFIDENCE)
        signs |= {"share": float(found.mean()), "low": interval.low, "high": interval.high}
        if baseline is not None:
            signs["p"] = float(test.pvalue)
    return signs
