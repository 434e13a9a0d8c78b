"""How far cells move when a regulator is edited, by what is known without a model.

A shift is float [cells, regulators], moves toward types float64 [types, cells, regulators].
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse

from eval.benchmark.neighbours.gene_correlation import correlations

MOVE_BASELINES = (
    "no change",
    "expression of the regulator",
    "rank of the regulator",
    "correlation with the cell's genes",
    "linear shift by correlation",
)
# What is high and is taken away moves a cell far; what is put in front, where it was low.
_SIGN = {"delete": 1.0, "overexpress": -1.0}


@dataclass(frozen=True, eq=False)
class KnownOfCells:
    """What is known of cells without a model.

    Attributes
    ----------
    profiles, ranks
        CSR float32 [tokens, cells]: log-normalised expression, and the cells as a model reads them.
    context
        CSR float32 [tokens, cells of the context]: what correlations are of.
    regulators
        int64 [regulators] tokens.
    kinds, types
        str [cells], the type of each; the types that cells may move toward.
    """

    profiles: scipy.sparse.csr_matrix
    ranks: scipy.sparse.csr_matrix
    context: scipy.sparse.csr_matrix
    regulators: np.ndarray
    kinds: np.ndarray
    types: list[str]

    @cached_property
    def expression(self) -> np.ndarray:
        """float32 [cells, tokens]."""
        return self.profiles.toarray().T

    @cached_property
    def correlations(self) -> np.ndarray:
        """float64 [regulators, tokens], over the context's cells."""
        return correlations(self.context, self.regulators, np.arange(self.context.shape[0]))

    def moves(self, name: str, edit: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the shift by one of `MOVE_BASELINES`, and moves toward types where it has some.

        `edit` is ``delete`` or ``overexpress``.
        """
        if name == "no change":
            shape = (len(self.kinds), len(self.regulators))
            return np.zeros(shape), np.zeros((len(self.types), *shape))
        if name == "expression of the regulator":
            return _SIGN[edit] * self.expression[:, self.regulators], None
        if name == "rank of the regulator":
            return _SIGN[edit] * self.ranks[self.regulators].toarray().T, None
        if name == "correlation with the cell's genes":
            together = np.abs(self.correlations)
            together[np.arange(len(together)), self.regulators] = 0
            return (self.expression > 0) @ together.T, None
        return along_regressions(
            self.expression, self.context, self.correlations, self.regulators, self.kinds,
            self.types, edit,
        )  # fmt: skip


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
    expression, context, correlations, regulators, kinds, types
        As in `KnownOfCells`.
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
