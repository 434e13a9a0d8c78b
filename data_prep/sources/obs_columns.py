"""Interprets columns of obs: ``filter_pass``, total counts per cell, and ``is_primary_data``."""

from __future__ import annotations

import numpy as np

FILTER_COLUMN = "filter_pass"
PRIMARY = "is_primary_data"  # column of CELLxGENE; False for copies of cells
_PASS = frozenset({"1", "1.0", "true", "t", "yes", "y", "pass", "passed"})
_FAIL = frozenset({"0", "0.0", "false", "f", "no", "n", "fail", "failed", ""})


def passes(path: str, values: list[str]) -> np.ndarray:
    """Return bool [cells], whether each value of ``filter_pass`` means that the cell passes.

    An unknown word raises a ValueError.
    """
    words = {v: v.strip().lower() for v in set(values)}
    unknown = sorted(v for v, word in words.items() if word not in _PASS | _FAIL)
    if unknown:
        raise ValueError(
            f"{path}: obs['{FILTER_COLUMN}'] holds {unknown[:3]}; a cell passes with one of "
            f"{sorted(_PASS)}, and does not with {sorted(_FAIL - {''})} or nothing"
        )
    return np.array([words[v] in _PASS for v in values], dtype=bool)


def checked_totals(
    path: str, column: str, values: list[str], sums: np.ndarray, ids: list[str]
) -> np.ndarray:
    """Return float64 [cells], the total counts that a column of obs gives, after checking them.

    Parameters
    ----------
    sums
        float64 [cells], sum of the counts in the file. A total must not be smaller.
    ids
        Ids of the cells, for messages.

    Raises
    ------
    ValueError
        A total is text, infinite, negative, missing or below the sum of counts.
    """
    try:
        totals = np.array([float(v) if v else np.nan for v in values])
    except ValueError as error:
        raise ValueError(f"{path}: obs['{column}'] holds text: {error}") from error
    endless = np.flatnonzero(np.isinf(totals))
    if endless.size:
        raise ValueError(
            f"{path}: obs['{column}'] is infinite for {endless.size} cells, e.g. "
            f"{ids[endless[0]]}; it is no total of counts"
        )
    wrong = np.flatnonzero(~(totals >= sums - 0.5) | (totals < 0))
    if wrong.size:
        raise ValueError(
            f"{path}: obs['{column}'] is no number or below the counts of {wrong.size} cells, e.g. "
            f"{totals[wrong[0]]:g} against {sums[wrong[0]]:g} in {ids[wrong[0]]}; it is no total "
            "of these counts"
        )
    return totals


def count_secondary(values: list[str]) -> int:
    """Return how many values of ``is_primary_data`` are false."""
    return sum(v.lower() in ("false", "0", "0.0") for v in values)
