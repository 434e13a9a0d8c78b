"""Scores of integration, as scIB defines them (Luecken et al., Nature Methods 2022)."""

from __future__ import annotations

import warnings

import numpy as np
import scib_metrics
from scib_metrics.nearest_neighbors import NeighborsResults
from sklearn.neighbors import NearestNeighbors

HEADLINE = "overall"
# The share of what is kept of biology in the headline; the rest is the removal of batches.
_BIO_SHARE = 0.6
# scib-metrics' numbers of neighbours: for LISI, and for the connectivity of the graph.
_LISI_NEIGHBOURS = 90
_GRAPH_NEIGHBOURS = 15
_BIO = ("ari", "nmi", "silhouette_label", "clisi")
_BATCH = ("silhouette_batch", "ilisi", "kbet", "graph_connectivity", "pcr_comparison")
_AVERAGE_BIO = ("ari", "nmi", "silhouette_label")


def score_embedding(
    embedding: np.ndarray, labels: np.ndarray, batches: np.ndarray, unintegrated: np.ndarray
) -> dict[str, float]:
    """Return scores from 0 (bad) to 1: what is kept of labels, and how far batches are mixed.

    ``ari``, ``nmi`` (k-means with as many clusters as labels; chance is 0, and ``ari`` may be just
    below), ``silhouette_label`` and ``clisi`` make ``bio``; ``silhouette_batch``, ``ilisi``,
    ``kbet`` (within each label), ``graph_connectivity`` and ``pcr_comparison`` make ``batch``;
    ``overall`` is 0.6 bio + 0.4 batch, ``avg_bio`` the mean of the first three.

    Parameters
    ----------
    embedding
        float32 [cells, width].
    labels
        int64 [cells].
    batches
        str [cells].
    unintegrated
        float32 [cells, components] of the same cells, what `pcr_comparison` compares with: an
        embedding that holds as much of the batch as these scores 0.

    Raises
    ------
    ValueError
        Not finite, constant, other numbers of cells, or fewer than two labels or batches.
    """
    _require_scorable(embedding, labels, batches, unintegrated)
    embedding = np.ascontiguousarray(embedding, dtype=np.float32)
    codes = np.unique(batches, return_inverse=True)[1]
    lisi = _neighbours(embedding, _LISI_NEIGHBOURS)
    graph = _neighbours(embedding, _GRAPH_NEIGHBOURS)
    clusters = scib_metrics.nmi_ari_cluster_labels_kmeans(embedding, labels)
    with warnings.catch_warnings():
        # That batch explains more than before is the score 0, and no surprise.
        warnings.filterwarnings("ignore", message="PCR comparison score is negative")
        pcr = scib_metrics.pcr_comparison(unintegrated, embedding, codes, categorical=True)
    scores = {
        "ari": clusters["ari"],
        "nmi": clusters["nmi"],
        "silhouette_label": scib_metrics.silhouette_label(embedding, labels),
        "clisi": scib_metrics.clisi_knn(lisi, labels),
        "silhouette_batch": scib_metrics.silhouette_batch(embedding, labels, codes),
        "ilisi": scib_metrics.ilisi_knn(lisi, codes),
        "kbet": kbet_by_label(embedding, labels, codes),
        "graph_connectivity": scib_metrics.graph_connectivity(graph, labels),
        "pcr_comparison": pcr,
    }
    scores = {name: float(value) for name, value in scores.items()}
    bio, batch = (float(np.nanmean([scores[k] for k in part])) for part in (_BIO, _BATCH))
    average = float(np.mean([scores[k] for k in _AVERAGE_BIO]))
    overall = _BIO_SHARE * bio + (1 - _BIO_SHARE) * batch
    return {HEADLINE: overall, "avg_bio": average, "bio": bio, "batch": batch} | scores


def kbet_by_label(embedding: np.ndarray, labels: np.ndarray, batches: np.ndarray) -> float:
    """Return the mean over labels of kBET's acceptance rate among the label's own cells.

    Neighbours are those in the embedding, a quarter of the mean batch in number (10 to 70), as in
    scIB. Labels with one batch, or with too few cells for 10 neighbours, say nothing; NaN if that
    is all of them.

    Parameters
    ----------
    batches
        int64 [cells].
    """
    rates = []
    for label in np.unique(labels):
        inside = labels == label
        sizes = np.unique(batches[inside], return_counts=True)[1]
        if len(sizes) < 2 or inside.sum() <= 10:
            continue
        number = min(max(10, int(sizes.mean() / 4)), 70)
        codes = np.unique(batches[inside], return_inverse=True)[1]
        rates.append(scib_metrics.kbet(_neighbours(embedding[inside], number), codes)[0])
    return float(np.mean(rates)) if rates else float("nan")


def _neighbours(embedding: np.ndarray, number: int) -> NeighborsResults:
    """Return exact nearest neighbours, each cell the first of its own."""
    number = min(number, len(embedding))
    distances, indices = NearestNeighbors(n_neighbors=number).fit(embedding).kneighbors(embedding)
    return NeighborsResults(indices=indices, distances=distances)


def _require_scorable(
    embedding: np.ndarray, labels: np.ndarray, batches: np.ndarray, unintegrated: np.ndarray
) -> None:
    if not len(embedding) == len(labels) == len(batches) == len(unintegrated):
        raise ValueError(
            f"integration: {len(embedding)} embeddings, {len(labels)} labels, {len(batches)} "
            f"batches, {len(unintegrated)} cells before; they have to be of the same cells"
        )
    if not np.isfinite(embedding).all():
        raise ValueError("integration: the embedding has values that are not finite")
    for name, values in (("labels", labels), ("batches", batches)):
        if len(np.unique(values)) < 2:
            raise ValueError(f"integration: fewer than two {name} among {len(labels)} cells")
