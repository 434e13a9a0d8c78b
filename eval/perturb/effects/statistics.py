"""Statistics over donors: intervals, standardised sizes, tests, and the power of so few donors.

A donor is the unit. Cells of one donor share that donor's biology and batch, so a test over cells
finds thousands of "significant" genes in noise (Squair et al., Nature Communications 2021).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd
from scipy import optimize, special, stats

from eval.scores.metrics import CONFIDENCE

Test = Literal["t", "wilcoxon"]
FEW_DONORS, POWER = 5, 0.8
_TAIL = (1 - CONFIDENCE) / 2
_LARGEST_SIZE = 1e3  # standard deviations; larger detectable effects are not searched


def over_donors(values: np.ndarray, test: Test = "t") -> pd.DataFrame:
    """Return estimate, interval, standardised size and p value of every row over donors.

    Parameters
    ----------
    values
        float [rows, donors]; a donor's mean over its cells, NaN if it has none.
    test
        ``t`` (one-sample, two-sided) or ``wilcoxon`` (signed ranks; exact up to 50 donors).

    Returns
    -------
    DataFrame
        ``donors``, ``mean``, ``low``, ``high`` (Student's 95 % interval), ``size`` (mean over
        standard deviation, times Hedges' correction), ``size_low``, ``size_high`` (from the
        non-central t distribution), ``p``. All but the mean are NaN with fewer than two donors,
        sizes with fewer than three. A row of zeros has size 0 and p 1.
    """
    known = np.isfinite(values)
    donors = known.sum(axis=1)
    freedom = np.where(donors > 1, donors - 1, np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(known, values, 0.0).sum(axis=1) / donors
        squares = (np.where(known, values - mean[:, None], 0.0) ** 2).sum(axis=1)
        error = np.sqrt(squares / freedom / donors)
        statistic = np.where((error == 0) & (mean == 0), 0.0, mean / error)
        correction = np.where(donors > 2, hedges_correction(freedom), np.nan) / np.sqrt(donors)
    half = stats.t.ppf(1 - _TAIL, freedom) * error
    # The interval of a standardised mean contains the non-centralities at which the statistic is
    # not extreme.
    low, high = (special.nctdtrinc(freedom, q, statistic) for q in (1 - _TAIL, _TAIL))
    return pd.DataFrame(
        {
            "donors": donors.astype(np.int32),
            "mean": mean,
            "low": mean - half,
            "high": mean + half,
            "size": statistic * correction,
            "size_low": low * correction,
            "size_high": high * correction,
            "p": _p_values(values, statistic, freedom, test),
        }
    )


def _p_values(
    values: np.ndarray, statistic: np.ndarray, freedom: np.ndarray, test: Test
) -> np.ndarray:
    if test == "t":
        return 2 * stats.t.sf(np.abs(statistic), freedom)
    if test != "wilcoxon":
        raise ValueError(f"test {test!r}: must be t or wilcoxon")
    p = np.full(len(values), np.nan)
    for row in np.flatnonzero(np.isfinite(freedom)):
        known = values[row][np.isfinite(values[row])]
        p[row] = stats.wilcoxon(known).pvalue if known.any() else 1.0
    return p


def hedges_correction(freedom: np.ndarray) -> np.ndarray:
    """Return the exact factor that removes the bias of a standardised mean (Hedges, 1981)."""
    half = np.asarray(freedom, dtype=np.float64) / 2
    return np.exp(special.gammaln(half) - special.gammaln(half - 0.5)) / np.sqrt(half)


def over_cells(count: np.ndarray, total: np.ndarray, squares: np.ndarray) -> pd.DataFrame:
    """Return ``mean``, ``low`` and ``high`` over cells, for screens without several donors.

    Parameters
    ----------
    count, total, squares
        Number of cells, and float64 sums of the values and of their squares, one per row.

    The normal 95 % interval says how well the mean of *these* people's cells is known, and nothing
    about other people. Therefore there is no test.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = total / count
        variance = np.maximum(squares - count * mean**2, 0) / np.where(count > 1, count - 1, np.nan)
        half = stats.norm.ppf(1 - _TAIL) * np.sqrt(variance / count)
    return pd.DataFrame({"mean": mean, "low": mean - half, "high": mean + half})


def false_discovery_rate(p: np.ndarray) -> np.ndarray:
    """Return Benjamini and Hochberg's adjusted p values; NaN (not tested) stays NaN."""
    adjusted = np.full(len(p), np.nan)
    tested = np.isfinite(p)
    if tested.any():
        adjusted[tested] = stats.false_discovery_control(p[tested], method="bh")
    return adjusted


def detectable_size(num_donors: int, level: float, power: float = POWER) -> float:
    """Return the smallest standardised effect that a t test over donors finds with this power.

    Parameters
    ----------
    level
        Two-sided p value at which a gene counts as found.

    The result is infinite for fewer than two donors, or if it exceeds a thousand standard
    deviations.
    """
    if num_donors < 2:
        return float("inf")
    freedom = num_donors - 1
    limit = stats.t.isf(level / 2, freedom)

    def missing(size: float) -> float:
        # The other tail, below -limit, adds nothing for any effect of interest.
        return float(special.nctdtr(freedom, size * np.sqrt(num_donors), limit)) - (1 - power)

    if missing(_LARGEST_SIZE) > 0:
        return float("inf")
    return float(optimize.brentq(missing, 0.0, _LARGEST_SIZE))


def power_table(num_donors: int, num_tests: int, rate: float) -> list[dict[str, float]]:
    """Return the detectable sizes for a single test, and within a screen at a discovery rate.

    In a screen, Benjamini and Hochberg's threshold depends on how many genes are found: ``rate *
    found / tests``. The rows ``{found, level, size}`` are for no other gene found, and for 1 % and
    5 % of all found; the first row is a single test at `rate`.
    """
    found = sorted({1, round(0.01 * num_tests), round(0.05 * num_tests)} - {0})
    levels = [(0, rate), *((n, rate * n / max(num_tests, 1)) for n in found)]
    return [
        {"found": n, "level": level, "size": detectable_size(num_donors, level)}
        for n, level in levels
    ]
