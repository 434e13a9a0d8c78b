"""What is known of a gene without training: its counts and ranks in cells, and its embeddings."""

from __future__ import annotations

import numpy as np
import scipy.sparse
import torch
from sklearn.decomposition import TruncatedSVD

from data_prep.genes.vocabulary import Vocabulary
from eval.scores.baselines import log_normalise
from pretrain.cell_states.frozen_states import computing, encode_batch, length_batches
from pretrain.model.architectures import Encoder

_COMPONENTS = 50
STATIC_NAMES = (
    "mean rank", "mean expression", "non-zero median", "median of the vocabulary", "detection rate"
)  # fmt: skip


def expression_of_tokens(
    counts: scipy.sparse.csr_matrix, genes: list[str], vocabulary: Vocabulary
) -> scipy.sparse.csr_matrix:
    """Return log-normalised expression, CSR float32 [num_tokens, cells]; ids of a gene are summed.

    Genes outside of the vocabulary count for a cell's total only.
    """
    tokens = vocabulary.tokens_of(genes)
    columns = np.flatnonzero(tokens >= 0)
    to_tokens = scipy.sparse.csr_matrix(
        (np.ones(len(columns), np.float32), (columns, tokens[columns])),
        shape=(len(genes), vocabulary.num_tokens),
    )
    # Sums of log values are none of counts: totals come from all genes, logarithms after the sum.
    totals = np.asarray(counts.sum(axis=1)).ravel()
    rest = scipy.sparse.csr_matrix((totals - _row_sums(counts @ to_tokens))[:, None])
    whole = log_normalise(scipy.sparse.hstack([counts @ to_tokens, rest]).tocsr())
    return whole[:, :-1].T.tocsr()


def ranks_of_tokens(cells: list[np.ndarray], vocabulary: Vocabulary) -> scipy.sparse.csr_matrix:
    """Return rank profiles, CSR float32 [num_tokens, cells]: 1 for a cell's first gene, down to 0.

    The value is 1 - place / length; genes that are not among a cell's tokens are 0.
    """
    lengths = np.array([len(c) for c in cells])
    start = 1 if vocabulary.has_cls else 0
    num_genes = np.maximum(lengths - 2 * start, 1)
    cell = np.repeat(np.arange(len(cells)), lengths)
    place = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths) - start
    tokens = np.concatenate(cells).astype(np.int64)
    value = (1 - place / num_genes[cell]).astype(np.float32)
    is_gene = tokens >= vocabulary.first_gene_token
    shape = (vocabulary.num_tokens, len(cells))
    return scipy.sparse.csr_matrix((value[is_gene], (tokens[is_gene], cell[is_gene])), shape=shape)


def reduce_profiles(profiles: scipy.sparse.csr_matrix, tokens: np.ndarray, seed: int) -> np.ndarray:
    """Return float64 [len(tokens), components]: profiles over cells, reduced by a truncated SVD.

    The SVD sees all detected genes, and no label; at most 50 components.
    """
    detected = np.flatnonzero(np.diff(profiles.indptr))
    place = np.full(profiles.shape[0], -1)
    place[detected] = np.arange(len(detected))
    components = min(_COMPONENTS, len(detected) - 1, profiles.shape[1] - 1)
    svd = TruncatedSVD(components, random_state=seed)
    return svd.fit_transform(profiles[detected])[place[tokens]]


def static_features(
    expression: scipy.sparse.csr_matrix,
    ranks: scipy.sparse.csr_matrix,
    tokens: np.ndarray,
    vocabulary: Vocabulary,
) -> np.ndarray:
    """Return float64 [len(tokens), 5], columns as in `STATIC_NAMES`: one number a gene and kind.

    Mean rank is taken over the cells that have the gene, mean expression over all of them; medians
    are logarithms. Every token has to be detected.
    """
    chosen, ranked = expression[tokens], ranks[tokens]
    num_cells = expression.shape[1]
    num_detected = np.diff(chosen.indptr)
    medians = [np.median(chosen.data[a:b]) for a, b in zip(chosen.indptr, chosen.indptr[1:])]  # noqa: B905  pairs
    return np.column_stack(
        [
            _row_sums(ranked) / np.maximum(np.diff(ranked.indptr), 1),
            _row_sums(chosen) / num_cells,
            medians,
            np.log(vocabulary.median_of_token[tokens]),
            num_detected / num_cells,
        ]
    )


def features_without_model(
    kind: str,
    expression: scipy.sparse.csr_matrix,
    ranks: scipy.sparse.csr_matrix,
    tokens: np.ndarray,
    vocabulary: Vocabulary,
    seed: int,
) -> np.ndarray:
    """Return float64 [len(tokens), features] of a kind.

    ``counts`` and ``ranks``: reduced profiles over cells; ``static features``: all of
    `static_features`, or the name of one of them.
    """
    if kind in ("counts", "ranks"):
        return reduce_profiles(expression if kind == "counts" else ranks, tokens, seed)
    static = static_features(expression, ranks, tokens, vocabulary)
    return static[:, [STATIC_NAMES.index(kind)]] if kind in STATIC_NAMES else static


def embed_genes(
    cells: list[np.ndarray],
    encoder: Encoder,
    vocabulary: Vocabulary,
    token_budget: int = 16_384,
    device: str = "cpu",
    bf16: bool = False,
) -> np.ndarray:
    """Return float32 [num_tokens, width]: mean last-layer state of every token over its cells.

    NaN for tokens that occur in no cell.
    """
    lengths = np.array([len(c) for c in cells], dtype=np.int64)
    sums = torch.zeros(vocabulary.num_tokens, encoder.config.hidden_size, device=device)
    occurrences = torch.zeros(vocabulary.num_tokens, device=device)
    with computing(encoder, 0, device, bf16):
        for batch in length_batches(lengths, token_budget):
            chosen = [cells[i] for i in batch]
            hidden_BLD, lengths_B = encode_batch(encoder, chosen, vocabulary)
            place_L = torch.arange(hidden_BLD.shape[1], device=device)
            tokens = torch.from_numpy(np.concatenate(chosen).astype(np.int64)).to(device)
            sums.index_add_(0, tokens, hidden_BLD[place_L < lengths_B[:, None]].float())
            occurrences.index_add_(0, tokens, torch.ones_like(tokens, dtype=torch.float32))
    return (sums / occurrences[:, None]).cpu().numpy()


def input_embeddings(encoder: Encoder) -> np.ndarray:
    """Return float32 [num_tokens, width]: the table that tokens are looked up in."""
    return encoder.get_input_embeddings().weight.detach().float().cpu().numpy()


def _row_sums(matrix: scipy.sparse.csr_matrix) -> np.ndarray:
    return np.asarray(matrix.sum(axis=1)).ravel()
