"""Which genes go with a state of cells: what must be beaten by edits in silico toward it."""

from __future__ import annotations

import numpy as np
import scipy.sparse
from sklearn.linear_model import LogisticRegression

from eval.benchmark.neighbours.gene_correlation import correlations


def fold_change(
    expression: scipy.sparse.csr_matrix,
    tokens: np.ndarray,
    start: np.ndarray,
    goal: np.ndarray,
    seed: int,
) -> np.ndarray:
    """Return float [tokens]: mean log expression in the goal's cells, minus that in the start's.

    Parameters
    ----------
    expression
        CSR [tokens of the vocabulary, cells], log-normalised; so for all functions here.
    start, goal
        bool [cells].
    seed
        Of a regression that draws something.
    """
    rows = expression[tokens]
    means = (np.asarray(rows[:, np.flatnonzero(c)].mean(axis=1)).ravel() for c in (goal, start))
    return next(means) - next(means)


def correlation_with_goal(
    expression: scipy.sparse.csr_matrix,
    tokens: np.ndarray,
    start: np.ndarray,
    goal: np.ndarray,
    seed: int,
) -> np.ndarray:
    """Return float64 [tokens]: Pearson's correlation with being in the goal, over both states."""
    both = np.flatnonzero(start | goal)
    state = scipy.sparse.csr_matrix(goal[both][None].astype(np.float32))
    stacked = scipy.sparse.vstack([expression[tokens][:, both], state]).tocsr()
    number = len(tokens)
    return correlations(stacked, np.array([number]), np.arange(number))[0]


def coefficients_of_goal(
    expression: scipy.sparse.csr_matrix,
    tokens: np.ndarray,
    start: np.ndarray,
    goal: np.ndarray,
    seed: int,
) -> np.ndarray:
    """Return float64 [tokens]: coefficients of a logistic regression on all genes' expression."""
    both = np.flatnonzero(start | goal)
    features = expression[:, both].T.tocsr()
    spread = np.sqrt(np.asarray(features.multiply(features).mean(axis=0)).ravel())
    scale = np.divide(1, spread, out=np.zeros_like(spread), where=spread > 0)
    model = LogisticRegression(max_iter=500, C=0.1, random_state=seed)
    model.fit(features @ scipy.sparse.diags(scale), goal[both])
    return model.coef_[0][tokens]


def connection(
    expression: scipy.sparse.csr_matrix, tokens: np.ndarray, min_cells: int
) -> np.ndarray:
    """Return float64 [tokens]: mean absolute correlation with genes in enough of the cells."""
    every = np.flatnonzero(np.diff(expression.indptr) >= min_cells)
    return np.abs(correlations(expression, tokens, every)).mean(axis=1)
