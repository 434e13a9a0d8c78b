"""What a classifier is given of each cell: frozen states of a model, and its neighbours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse
from sklearn.decomposition import PCA, TruncatedSVD

from data_prep.genes.vocabulary import Vocabulary
from eval.benchmark.neighbours.cell_baselines import variable_genes
from eval.scores.baselines import CELL_STATE, log_normalise
from pretrain.cell_states.cell_state import CellState
from pretrain.cell_states.frozen_states import embed_layers

LAST, SECOND_LAST, WITH_INPUTS = "last layer", "second-last layer", "last layer + input embeddings"
OWN_SVD = "SVD of these cells"
PCA_OF_GENES, GENES = "PCA of these cells", "genes"
_COMPONENTS = 50


def frozen_features(
    network: Any,
    tokens: list[np.ndarray],
    vocabulary: Vocabulary,
    state_of: Callable[[np.ndarray], CellState] | None = None,
    **settings: Any,
) -> dict[str, np.ndarray]:
    """Return name -> float32 [cells, width]: means over a cell's genes, of several layers.

    Parameters
    ----------
    network
        Hugging Face's model; its encoder is used.
    state_of
        Returns the cell state that belongs to the network, from these cells' means of the last
        layer; None: the network has none.
    settings
        ``token_budget``, ``device`` and ``bf16`` of `eval.cells.embed.embed_layers`.
    """
    encoder = network.base_model
    layers = (0, -1) if encoder.config.num_hidden_layers > 1 else (0,)
    states = embed_layers(tokens, encoder, vocabulary, layers, **settings)
    inputs = mean_inputs(network, tokens, vocabulary)
    found = {LAST: states[0], WITH_INPUTS: np.concatenate([states[0], inputs], axis=1)}
    if state_of:
        found[CELL_STATE] = state_of(states[0]).of_means(tokens, states[0])
    return found | ({SECOND_LAST: states[-1]} if -1 in states else {})


def mean_inputs(network: Any, tokens: list[np.ndarray], vocabulary: Vocabulary) -> np.ndarray:
    """Return float32 [cells, width]: the mean of the input embeddings of a cell's genes."""
    table = network.get_input_embeddings().weight.detach().float().cpu().numpy()
    first = vocabulary.first_gene_token
    return np.stack([table[t[t >= first]].mean(axis=0) for t in tokens])


def cell_features(
    counts: scipy.sparse.csr_matrix, tokens: list[np.ndarray], vocabulary: Vocabulary
) -> dict[str, np.ndarray]:
    """Return name -> float32 [cells, width]: what needs these cells only, and no label.

    Genes: log-normalised counts of the 2,000 most variable ones of all cells given.
    """
    normalised = log_normalise(counts)
    genes = normalised[:, variable_genes(normalised)].toarray()
    weights = rank_weights(tokens, vocabulary)
    svd = TruncatedSVD(min(_COMPONENTS, min(weights.shape) - 1), algorithm="arpack", random_state=0)
    pca = PCA(min(_COMPONENTS, min(genes.shape) - 1), svd_solver="arpack", random_state=0)
    return {
        OWN_SVD: svd.fit_transform(weights).astype(np.float32),
        PCA_OF_GENES: pca.fit_transform(genes).astype(np.float32),
        GENES: genes,
    }


def rank_weights(tokens: list[np.ndarray], vocabulary: Vocabulary) -> scipy.sparse.csr_matrix:
    """Return CSR float32 [cells, tokens]: 1 - i / L for the gene at place i of a cell's L."""
    genes = [t[t >= vocabulary.first_gene_token].astype(np.int64) for t in tokens]
    weights = [1 - np.arange(len(g)) / max(len(g), 1) for g in genes]
    pointers = np.cumsum([0, *map(len, genes)])
    return scipy.sparse.csr_matrix(
        (np.concatenate(weights).astype(np.float32), np.concatenate(genes), pointers),
        shape=(len(genes), vocabulary.num_tokens),
    )
