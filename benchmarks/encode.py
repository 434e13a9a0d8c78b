"""Rank value encoding: cells per second on one core, beside per-cell numpy argsorts.

``python -m benchmarks.encode CELLS.h5ad --vocab DICTIONARIES``. Two references: one does, operation
by operation, what the published tokenizer does with a chunk of 512 cells (a column selection, three
sparse products, then two row selections and one ``np.argsort(-values)`` for each cell); the other
is the best that a numpy argsort per cell can do, on slices of the CSR arrays. All run in turn,
several times; on a shared machine the ratio of the medians is what counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import scipy.sparse

from data_prep.genes.rank_genes import encode_cells
from data_prep.genes.vocabulary import TARGET_SUM, Vocabulary, open_vocabulary

_BLOCK_CELLS = 512
_REPEATS = 5


def reference(counts: scipy.sparse.csr_matrix, tokens: np.ndarray, vocabulary: Vocabulary) -> list:
    """Return ranked tokens per cell, one numpy argsort each."""
    known = np.flatnonzero(tokens >= 0)
    gene_tokens = tokens[known]
    norm = vocabulary.median_of_token[gene_tokens]
    totals = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    cells = []
    for start in range(0, counts.shape[0], _BLOCK_CELLS):
        block = counts[start : start + _BLOCK_CELLS][:, known]
        total = totals[start : start + _BLOCK_CELLS, None]
        scaled = scipy.sparse.csr_matrix(block.multiply(1 / total) * TARGET_SUM)
        scaled = scipy.sparse.csr_matrix(scaled.multiply(1 / norm))
        for i in range(scaled.shape[0]):
            row = slice(scaled.indptr[i], scaled.indptr[i + 1])
            order = np.argsort(-scaled.data[row])
            cells.append(gene_tokens[scaled.indices[row][order]][: vocabulary.max_length])
    return cells


def as_published(data: anndata.AnnData, tokens: np.ndarray, vocabulary: Vocabulary) -> list:
    """Return ranked tokens per cell by the published sequence of operations.

    Column selection, normalisation and ranking of a chunk as geneformer/tokenizer.py does them for
    an h5ad in memory.
    """
    known = np.flatnonzero(tokens >= 0)
    gene_tokens = tokens[known]
    norm = vocabulary.median_of_token[gene_tokens]
    cells = []
    for start in range(0, data.n_obs, _BLOCK_CELLS):
        rows = np.arange(start, min(start + _BLOCK_CELLS, data.n_obs))
        total = data[rows].obs["n_counts"].to_numpy()[:, None]
        chunk = data[rows, :].X[:, known]
        scaled = scipy.sparse.csr_matrix(chunk / total * TARGET_SUM / norm)
        for i in range(scaled.shape[0]):
            order = np.argsort(-scaled[i].data)
            cells.append(gene_tokens[scaled[i].indices][order][: vocabulary.max_length])
    return cells


def seconds(function: Callable[[], object]) -> float:
    """Return the wall time of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cells", type=Path)
    parser.add_argument("--vocab", type=Path, required=True)
    arguments = parser.parse_args()
    vocabulary = open_vocabulary(arguments.vocab)
    data = anndata.read_h5ad(arguments.cells)
    counts = scipy.sparse.csr_matrix(data.X).astype(np.float32)
    data.X = counts
    data.obs["n_counts"] = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    names = data.var.get("ensembl_id", data.var_names)
    tokens = vocabulary.tokens_of([str(n) for n in names])
    totals = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()

    def ours() -> object:
        return encode_cells(counts.data, counts.indices, counts.indptr, totals, tokens, vocabulary)

    ours()  # compiles
    runs = [
        (
            seconds(ours),
            seconds(lambda: reference(counts, tokens, vocabulary)),
            seconds(lambda: as_published(data, tokens, vocabulary)),
        )
        for _ in range(_REPEATS)
    ]
    fast, slices, published = (statistics.median(r[i] for r in runs) for i in range(3))
    result = {
        "cells": counts.shape[0],
        "genes_per_cell": counts.nnz / counts.shape[0],
        "cells_per_s": counts.shape[0] / fast,
        "argsort_on_slices_cells_per_s": counts.shape[0] / slices,
        "as_published_cells_per_s": counts.shape[0] / published,
        "ratio_to_slices": slices / fast,
        "ratio_to_published": published / fast,
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
