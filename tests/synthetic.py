"""Fake cells: written as real files, read by the real code."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse

from data_prep.prepare import PrepareOptions, prepare
from data_prep.sources import SourceOptions, source_at


def make_cells(
    num_cells: int = 120, num_genes: int = 200, seed: int = 0, detected: float = 0.4
) -> anndata.AnnData:
    """Return cells of three types with different expressed genes, raw counts, obs and var."""
    rng = np.random.default_rng(seed)
    kinds = np.arange(num_cells) % 3
    rates = rng.gamma(0.8, 2.0, size=(3, num_genes))
    depth = rng.uniform(0.3, 1.5, size=num_cells) * detected / 0.4
    counts = rng.poisson(rates[kinds] * depth[:, None]).astype(np.float32)
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical([f"type{k}" for k in kinds]),
            "donor": [f"donor{i % 4}" for i in range(num_cells)],
        },
        index=[f"cell{i}" for i in range(num_cells)],
    )
    var = pd.DataFrame(
        {"symbol": [f"G{i}" for i in range(num_genes)]},
        index=[f"ENSG{i:011d}" for i in range(num_genes)],
    )
    return anndata.AnnData(scipy.sparse.csr_matrix(counts), obs=obs, var=var)


def write_cells(path: Path, **kwargs) -> Path:
    """Write `make_cells` as h5ad and return the path."""
    make_cells(**kwargs).write_h5ad(path)
    return path


def make_shards(folder: Path, heldout: float = 0.1, block_cells: int = 16, **kwargs) -> Path:
    """Return a folder of shards of fake cells, with a vocabulary built from them."""
    source = write_cells(folder / "cells.h5ad", **kwargs)
    options = PrepareOptions(heldout_share=heldout, block_cells=block_cells, vocabulary_min_cells=1)
    spec = source_at(source, SourceOptions(columns=("cell_type", "donor")))
    prepare([spec], folder / "shards", None, options)
    return folder / "shards"
