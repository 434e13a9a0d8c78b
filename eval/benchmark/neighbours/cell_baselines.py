"""Classifiers of cells without pretraining, all on the same highly variable genes.

Genes are chosen, and everything else is learnt, on training cells only.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import anndata
import numpy as np
import scanpy
import scipy.sparse
from sklearn.base import BaseEstimator
from sklearn.decomposition import PCA
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import MaxAbsScaler, StandardScaler
from threadpoolctl import threadpool_limits

from eval.scores.baselines import log_normalise

NUM_VARIABLE_GENES = 2_000
LOGISTIC_REGRESSION = "logistic regression"
KNN_ON_PCA = "kNN on PCA"
SCVI = "scVI + kNN"
# Above this, more cells no longer change these classifiers much, and some would take longer than
# the model itself.
MOST_TRAINING_CELLS = 20_000
_MIN_CELLS_OF_GENE = 3
_PCA_COMPONENTS = 50
_MOST_NEIGHBOURS = 15
_SCVI_EPOCHS = 100


def _majority(labels: np.ndarray, width: int, seed: int) -> BaseEstimator:
    return DummyClassifier(strategy="prior")


def _nearest_centroid(labels: np.ndarray, width: int, seed: int) -> BaseEstimator:
    return NearestCentroid()


def nearest_neighbours(labels: np.ndarray, metric: str = "euclidean") -> KNeighborsClassifier:
    """Return a vote of at most 15 neighbours, near ones weighing more, for these labels."""
    # More neighbours than the smallest class has cells could never vote for it.
    smallest = int(np.unique(labels, return_counts=True)[1].min())
    return KNeighborsClassifier(min(_MOST_NEIGHBOURS, smallest), weights="distance", metric=metric)


def _pca(labels: np.ndarray, width: int, seed: int) -> PCA:
    return PCA(min(_PCA_COMPONENTS, len(labels) - 1, width - 1), random_state=seed)


def _knn(labels: np.ndarray, width: int, seed: int) -> BaseEstimator:
    return make_pipeline(_pca(labels, width, seed), nearest_neighbours(labels))


def _l2(labels: np.ndarray, width: int, seed: int) -> BaseEstimator:
    return make_pipeline(MaxAbsScaler(), LogisticRegression(max_iter=500, random_state=seed))


def _l1(labels: np.ndarray, width: int, seed: int) -> BaseEstimator:
    # A loose tolerance: the scores are settled long before the last digits of weights.
    sparse = LogisticRegression(
        l1_ratio=1.0, C=10.0, solver="saga", tol=1e-2, max_iter=200, random_state=seed
    )
    return make_pipeline(MaxAbsScaler(), sparse)


def _forest(labels: np.ndarray, width: int, seed: int) -> BaseEstimator:
    return RandomForestClassifier(300, random_state=seed)


def _boosting(labels: np.ndarray, width: int, seed: int) -> BaseEstimator:
    # On components: on 2,000 genes it takes 15 times as long and is no better (60 cells a type of
    # PBMC 3k: macro-F1 0.950 in 17 s, 0.948 in 1 s).
    trees = HistGradientBoostingClassifier(
        max_iter=100, min_samples_leaf=5, early_stopping=False, random_state=seed
    )
    return make_pipeline(_pca(labels, width, seed), trees)


# Name -> estimator for training labels (int [cells]), a number of features and a seed.
BASELINES: dict[str, Callable[[np.ndarray, int, int], BaseEstimator]] = {
    "majority class": _majority,
    "nearest centroid": _nearest_centroid,
    KNN_ON_PCA: _knn,
    "L1 logistic regression": _l1,
    LOGISTIC_REGRESSION: _l2,
    "random forest": _forest,
    "gradient boosting": _boosting,
}


def embedding_classifier(labels: np.ndarray, width: int, seed: int) -> Pipeline:
    """Return what is trained on embeddings of cells: standardised, logistic regression."""
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, random_state=seed))


def variable_genes(features: scipy.sparse.csr_matrix) -> np.ndarray:
    """Return sorted positions of at most 2,000 highly variable genes (scanpy's Seurat method).

    Parameters
    ----------
    features
        CSR [training cells, genes], log-normalised. Genes found in fewer than 3 cells are left out
        (fewer than 1 of fewer than 30 cells).

    Raises
    ------
    ValueError
        No gene is detected in enough cells.
    """
    detected = np.asarray((features > 0).sum(axis=0)).ravel()
    fewest = _MIN_CELLS_OF_GENE if features.shape[0] >= 10 * _MIN_CELLS_OF_GENE else 1
    kept = np.flatnonzero(detected >= fewest)
    if len(kept) < 2:
        raise ValueError(f"{len(kept)} genes are detected in {fewest} training cells; need two")
    if len(kept) <= NUM_VARIABLE_GENES:
        return kept
    data = anndata.AnnData(features[:, kept])
    found = scanpy.pp.highly_variable_genes(data, n_top_genes=NUM_VARIABLE_GENES, inplace=False)
    assert found is not None
    return kept[found["highly_variable"].to_numpy()]


def predict_probabilities(
    estimator: Any,
    train: np.ndarray | scipy.sparse.csr_matrix,
    labels: np.ndarray,
    test: np.ndarray | scipy.sparse.csr_matrix,
    num_classes: int,
) -> np.ndarray:
    """Return float64 [test cells, classes] probabilities of an estimator fitted here.

    Parameters
    ----------
    estimator
        Of scikit-learn, with ``predict_proba``.
    train, test
        Features of training and test cells.
    labels
        int [training cells]; classes that do not occur get probability 0.
    """
    # One thread: boosting has thousands of tiny loops, and two threads that wait for each other on
    # a busy machine took 50 s for what one does in 0.3 s.
    with threadpool_limits(1, user_api="openmp"), warnings.catch_warnings():
        # A stopped optimisation is a weaker baseline, not a wrong one; the cap is on purpose.
        warnings.simplefilter("ignore", ConvergenceWarning)
        estimator.fit(train, labels)
    out = np.zeros((test.shape[0], num_classes))
    out[:, estimator.classes_] = estimator.predict_proba(test)
    return out


def gene_features(
    counts: scipy.sparse.csr_matrix, train: np.ndarray, test: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return log-normalised variable genes of training and test cells, float32 [cells, genes]."""
    fitted = log_normalise(counts[train])
    genes = variable_genes(fitted)
    return fitted[:, genes].toarray(), log_normalise(counts[test])[:, genes].toarray()


def scvi_missing() -> str | None:
    """Return why scVI cannot run, or None."""
    if importlib.util.find_spec("scvi") is None:
        return "the package scvi-tools is not installed"
    return None


def scvi_latent(
    train: scipy.sparse.csr_matrix,
    test: scipy.sparse.csr_matrix,
    seed: int,
    batches: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return scVI's latent states of training and test cells, learnt from training cells only.

    Parameters
    ----------
    train, test
        CSR [cells, genes], raw counts of the variable genes.
    batches
        str [cells], whose effect scVI takes out: of cells that are in both, `train` and `test`.
    """
    import scvi  # pyright: ignore[reportMissingImports]  optional

    scvi.settings.seed = seed
    data = [anndata.AnnData(counts.astype(np.float32)) for counts in (train, test)]
    if batches is not None:
        for part in data:
            part.obs["batch"] = batches
    scvi.model.SCVI.setup_anndata(data[0], batch_key=None if batches is None else "batch")
    model = scvi.model.SCVI(data[0])
    model.train(max_epochs=_SCVI_EPOCHS, enable_progress_bar=False, logger=False)
    fitted, new = (np.asarray(model.get_latent_representation(d)) for d in data)
    return fitted, new


def predict_scvi(
    counts: scipy.sparse.csr_matrix,
    labels: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
    num_classes: int,
    seed: int,
) -> np.ndarray:
    """Return float64 [test cells, classes] of nearest neighbours in scVI's latent space.

    Parameters
    ----------
    labels
        int [cells of `counts`].
    """
    genes = variable_genes(log_normalise(counts[train]))
    fitted, new = scvi_latent(counts[train][:, genes], counts[test][:, genes], seed)
    known = labels[train]
    return predict_probabilities(nearest_neighbours(known), fitted, known, new, num_classes)
