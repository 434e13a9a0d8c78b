"""What goes together in cells: baselines of everything that asks which gene acts on which."""

from __future__ import annotations

import numpy as np
import scipy.sparse


def correlations(
    profiles: scipy.sparse.csr_matrix, rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """Return float64 [rows, columns]: Pearson's correlation over cells; 0 if one is constant.

    Parameters
    ----------
    profiles
        CSR [tokens, cells].
    rows, columns
        int tokens; a negative one is unknown and correlates with nothing.
    """
    first, second = _standardised(profiles, rows), _standardised(profiles, columns)
    return first @ second.T


def _standardised(profiles: scipy.sparse.csr_matrix, tokens: np.ndarray) -> np.ndarray:
    """Return float64 [tokens, cells] of mean 0 and length 1; zeros for constant rows."""
    found = profiles[np.maximum(tokens, 0)].toarray().astype(np.float64)
    found -= found.mean(axis=1, keepdims=True)
    length = np.linalg.norm(found, axis=1, keepdims=True)
    usable = (length > 1e-9) & (np.asarray(tokens)[:, None] >= 0)
    return np.divide(found, length, out=np.zeros_like(found), where=usable)
