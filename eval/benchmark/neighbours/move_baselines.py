"""How far cells move when a regulator is edited, by what is known without a model.

Each function returns a shift, float [cells, regulators], and perhaps moves toward types, float64
[types, cells, regulators]. `edit` is ``delete`` or ``overexpress``.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse

# What is high and is taken away moves a cell far; what is put in front, where it was low.
SIGN = {"delete": 1.0, "overexpress": -1.0}


def by_connection(
    expression: np.ndarray, correlations: np.ndarray, regulators: np.ndarray
) -> np.ndarray:
    """Return the sum of a regulator's absolute correlations with the other genes of a cell.

    Parameters
    ----------
    expression
        float32 [cells, tokens], log-normalised.
    correlations
        float64 [regulators, tokens].
    regulators
        int64 [regulators] tokens.
    """
    together = np.abs(correlations)
    together[np.arange(len(together)), regulators] = 0
    return (expression > 0) @ together.T


def along_regressions(
    expression: np.ndarray,
    context: scipy.sparse.csr_matrix,
    correlations: np.ndarray,
    regulators: np.ndarray,
    kinds: np.ndarray,
    types: list[str],
    edit: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Return moves of log-normalised profiles along the genes' regressions on a regulator.

    A deleted regulator goes to 0, an overexpressed one to the cell's highest value.

    Parameters
    ----------
    expression, correlations, regulators
        As in `by_connection`.
    context
        CSR float32 [tokens, cells of the context]: what correlations are of.
    kinds, types
        str [cells], the type of each; the types that cells may move toward.
    """
    before = expression.astype(np.float64)
    spread = np.sqrt(_variances(context))
    profiles = np.stack([before[kinds == t].mean(axis=0) for t in types])
    shift = np.zeros((len(before), len(regulators)))
    toward = np.zeros((len(types), *shift.shape))
    for column, token in enumerate(regulators):
        own = spread[token]
        slopes = correlations[column] * spread / own if own > 0 else np.zeros_like(spread)
        slopes[token] = 0
        goal = before.max(axis=1) if edit == "overexpress" else 0.0
        after = before + (goal - before[:, token])[:, None] * slopes
        others = np.arange(len(spread)) != token
        old, new, goals = (_unit(m[:, others]) for m in (before, after, profiles))
        shift[:, column] = ((new - old) ** 2).sum(axis=1) / 2  # 1 - cosine of unit vectors
        toward[:, :, column] = goals @ (new - old).T
    return shift, toward


def _variances(profiles: scipy.sparse.csr_matrix) -> np.ndarray:
    """Return float64 [tokens]: variances over cells."""
    wide = profiles.astype(np.float64)
    mean = np.asarray(wide.mean(axis=1)).ravel()
    return np.asarray(wide.multiply(wide).mean(axis=1)).ravel() - mean**2


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
