"""A batch effect of known shape, for cells that have no batches."""

from __future__ import annotations

import anndata
import numpy as np
import scipy.sparse

BATCHES = ("as measured", "changed")
# Spread of a gene's factor, as the natural logarithm: two thirds of genes within 0.6 and 1.6.
_FACTOR_SPREAD = 0.5
# Share of the molecules that the second batch still catches.
_CAPTURE = 0.6


def add_planted_batch(cells: anndata.AnnData, column: str, seed: int) -> anndata.AnnData:
    """Return cells with `column` in obs, half of them measured "otherwise".

    In the changed half every gene's counts are multiplied by a factor of its own, the same in all
    these cells (log-normal: reagents that favour some genes), and each count is then kept with
    probability 0.6 (shallower sequencing). Factors know nothing of cell types, so what separates
    types stays. A cell that would lose all its counts keeps them as they were.

    Parameters
    ----------
    cells
        Counts in X, integers; not changed.
    column
        Name of the new column of obs: ``as measured`` or ``changed``.
    seed
        Which half, the factors, and the draws.

    Raises
    ------
    ValueError
        The column exists.
    """
    if column in cells.obs:
        raise ValueError(f"planted batch: obs has a column '{column}' already; name another")
    rng = np.random.default_rng(seed)
    changed = rng.permutation(cells.n_obs) < cells.n_obs // 2
    factors = rng.lognormal(0, _FACTOR_SPREAD, cells.n_vars)
    counts = scipy.sparse.csr_matrix(cells.X).astype(np.float64)
    cell = np.repeat(np.arange(cells.n_obs), np.diff(counts.indptr))
    # A fraction of a molecule is one molecule with that probability, so means are kept.
    scaled = np.floor(counts.data * factors[counts.indices] + rng.random(counts.nnz))
    caught = rng.binomial(scaled.astype(np.int64), _CAPTURE)
    left = np.bincount(cell, caught, minlength=cells.n_obs) > 0
    counts.data = np.where((changed & left)[cell], caught, counts.data)
    counts.eliminate_zeros()
    out = cells.copy()
    out.X = counts.astype(np.int32)
    out.obs[column] = np.where(changed, BATCHES[1], BATCHES[0])
    return out
