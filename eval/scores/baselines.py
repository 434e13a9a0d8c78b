"""Baseline classifiers without pretraining; a model is only worth what it adds to them.

Boiarsky et al. (Nature Machine Intelligence 2024): logistic regression matches or beats pretrained
encoders in annotation. `predict_baselines` gives the predictions of all of them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.sparse
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MaxAbsScaler, StandardScaler

# The names in results of neighbours and contenders that more than one evaluation uses.
CORPUS_SVD, CELL_STATE = "corpus SVD", "cell state"
_PCA_COMPONENTS = 50
_NEIGHBOURS = 15
_MIN_CELLS_OF_GENE = 3


def log_normalise(counts: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
    """Return log1p(counts / total x 10,000), float32 CSR; empty cells stay zero."""
    totals = np.asarray(counts.sum(axis=1)).ravel()
    scale = np.divide(1e4, totals, out=np.zeros_like(totals), where=totals > 0)
    scaled = scipy.sparse.diags(scale).dot(counts).tocsr().astype(np.float32)
    scaled.data = np.log1p(scaled.data)
    return scaled


def _majority(train, labels, test, seed) -> np.ndarray:
    return np.full(test.shape[0], np.bincount(labels).argmax())


def _logistic_regression(train, labels, test, seed) -> np.ndarray:
    model = make_pipeline(
        MaxAbsScaler(), LogisticRegression(max_iter=500, C=1.0, random_state=seed)
    )
    return model.fit(train, labels).predict(test)


def _knn_on_pca(train, labels, test, seed) -> np.ndarray:
    components = min(_PCA_COMPONENTS, min(train.shape) - 1)
    model = make_pipeline(
        PCA(components, svd_solver="arpack", random_state=seed),
        KNeighborsClassifier(min(_NEIGHBOURS, len(labels))),
    )
    return model.fit(train, labels).predict(test)


BASELINES: dict[str, Callable] = {
    "majority class": _majority,
    "logistic regression on genes": _logistic_regression,
    "kNN on PCA": _knn_on_pca,
}


def predict_from_embedding(
    embedding: np.ndarray, labels: np.ndarray, train: np.ndarray, test: np.ndarray, seed: int
) -> np.ndarray:
    """Return int [test], predictions of logistic regression on standardised embeddings.

    Parameters
    ----------
    embedding
        float32 [cells, width], finite at `train` and `test`.
    """
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, random_state=seed))
    return model.fit(embedding[train], labels[train]).predict(embedding[test])


def predict_baselines(
    counts: scipy.sparse.csr_matrix,
    labels: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
    seed: int,
) -> dict[str, np.ndarray]:
    """Return the predictions (int [test]) of every baseline.

    Genes detected in fewer than 3 training cells are dropped; nothing is learnt from test cells.

    Parameters
    ----------
    counts
        CSR [cells, genes], raw.
    labels
        int [cells].
    train, test
        int indices of cells.
    """
    features = log_normalise(counts)
    kept = np.asarray((features[train] > 0).sum(axis=0)).ravel() >= _MIN_CELLS_OF_GENE
    features = features[:, np.flatnonzero(kept)]
    return {
        name: fit(features[train], labels[train], features[test], seed)
        for name, fit in BASELINES.items()
    }
