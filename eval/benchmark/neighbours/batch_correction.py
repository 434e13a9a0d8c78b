"""Embeddings of cells without pretraining, some with the effect of batches taken out; pictures."""

from __future__ import annotations

import importlib.util

import anndata
import numpy as np
import scanpy
import scipy.sparse
from sklearn.decomposition import PCA

from eval.benchmark.neighbours.cell_baselines import (
    scvi_latent,
    scvi_missing,
    variable_genes,
)
from eval.scores.baselines import log_normalise

_COMPONENTS = 50


def missing_methods() -> dict[str, str]:
    """Return name of a baseline -> why it cannot run here."""
    found = {}
    if importlib.util.find_spec("harmonypy") is None:
        found["Harmony"] = "the package harmonypy is not installed"
    if why := scvi_missing():
        found["scVI"] = why
    return found


def log_variable_genes(counts: scipy.sparse.csr_matrix) -> np.ndarray:
    """Return float32 [cells, genes], log-normalised variable genes."""
    features = log_normalise(counts)
    return features[:, variable_genes(features)].toarray()


def components(features: np.ndarray, seed: int) -> np.ndarray:
    """Return float32 [cells, components], a PCA of features."""
    num = min(_COMPONENTS, *(s - 1 for s in features.shape))
    return PCA(num, random_state=seed).fit_transform(features).astype(np.float32)


def harmony(components: np.ndarray, batches: np.ndarray, seed: int) -> np.ndarray:
    """Return float32 [cells, components] without the effect of batches (str [cells])."""
    import harmonypy
    import pandas as pd

    obs = pd.DataFrame({"batch": batches})
    found = harmonypy.run_harmony(
        components.astype(np.float64), obs, ["batch"], verbose=False, random_state=seed
    )
    corrected = np.asarray(found.Z_corr, dtype=np.float32)
    # Cells are rows in new versions and columns in old ones.
    return corrected if len(corrected) == len(components) else corrected.T


def combat(genes: np.ndarray, batches: np.ndarray, seed: int) -> np.ndarray:
    """Return float32 [cells, components] of log-normalised genes that ComBat corrected."""
    data = anndata.AnnData(genes.astype(np.float64))
    data.obs["batch"] = batches
    data.obs["batch"] = data.obs["batch"].astype("category")
    # A gene without any spread within batches has no correction, and nothing to tell.
    with np.errstate(divide="ignore", invalid="ignore"):
        corrected = np.asarray(scanpy.pp.combat(data, inplace=False))
    return components(corrected[:, np.isfinite(corrected).all(axis=0)], seed)


def scvi_states(counts: scipy.sparse.csr_matrix, batches: np.ndarray, seed: int) -> np.ndarray:
    """Return float32 [cells, width]: scVI's latent states, batches taken out."""
    counts = counts[:, variable_genes(log_normalise(counts))]
    return scvi_latent(counts, counts, seed, batches)[1]


def umap(embedding: np.ndarray, seed: int) -> list[list[float]]:
    """Return [x, y] of each cell, to 2 decimals: a picture, scores do not use it."""
    data = anndata.AnnData(obsm={"X": embedding}, shape=(len(embedding), 0))
    scanpy.pp.neighbors(data, min(15, len(embedding) - 1), use_rep="X", random_state=seed)
    scanpy.tl.umap(data, random_state=seed)
    return np.asarray(data.obsm["X_umap"], dtype=np.float64).round(2).tolist()
