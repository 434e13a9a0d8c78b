"""The corpus SVD: seconds, memory and exactness, beside scikit-learn's of the whole matrix.

``python -m benchmarks.corpus_svd SHARDS [--cells 20000 100000] [--exact]`` reads the training
blocks of prepared shards, over and over until there are so many cells: the cost of a corpus of that
size that lies in the page cache. ``--exact`` compares with scikit-learn's TruncatedSVD (ARPACK),
which needs the whole matrix, on the cells that the shards have.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse
from sklearn.decomposition import TruncatedSVD

from data_prep.shards.reader import ShardSet
from pretrain.counting.corpus_svd import (
    NUM_COMPONENTS,
    RankWeights,
    chosen_blocks,
    leading_vectors,
)


def measure(shards: ShardSet, num_cells: int) -> dict[str, Any]:
    """Return the seconds of the SVD of so many cells, and of one pass over them."""
    numbers = chosen_blocks(shards, shards.num_cells)
    inside = shards.index["cells"][numbers]
    rounds = np.cumsum(np.tile(inside, -(-num_cells // int(inside.sum()))))
    numbers = np.resize(numbers, int(np.searchsorted(rounds, num_cells)) + 1)
    matrix = RankWeights(shards, numbers)
    size = shards.vocabulary.num_tokens
    RankWeights(shards, numbers[:1]).gram(np.zeros((size, 1)))  # compiled before it is timed
    passes = []

    def gram(vectors: np.ndarray) -> np.ndarray:
        started = time.perf_counter()
        product = matrix.gram(vectors)
        passes.append(time.perf_counter() - started)
        return product

    wall, processor = time.perf_counter(), time.process_time()
    _, _, residual = leading_vectors(gram, size, NUM_COMPONENTS)
    return {
        "cells": matrix.num_cells,
        "tokens": int(shards.index["tokens"][numbers].sum()),
        "seconds": time.perf_counter() - wall,
        "processor_seconds": time.process_time() - processor,
        "passes": len(passes),
        "seconds_of_a_pass": float(np.median(passes)),
        "residual": residual,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def compare(shards: ShardSet) -> dict[str, Any]:
    """Return how far the SVD is from scikit-learn's, and the processor seconds of that one."""
    rows, genes, weights, first = [], [], [], 0
    for block in shards.iter_blocks("train"):
        lengths = np.diff(block.offsets)
        places = np.arange(len(block.tokens)) - np.repeat(block.offsets[:-1], lengths)
        rows.append(np.repeat(np.arange(first, first + len(lengths)), lengths))
        genes.append(block.tokens.astype(np.int64))
        weights.append(1 - places / np.repeat(lengths, lengths))
        first += len(lengths)
    size = shards.vocabulary.num_tokens
    whole = scipy.sparse.csr_matrix(
        (np.concatenate(weights), (np.concatenate(rows), np.concatenate(genes))), (first, size)
    )
    started = time.process_time()
    reference = TruncatedSVD(NUM_COMPONENTS, algorithm="arpack", random_state=0).fit(whole)
    seconds = time.process_time() - started
    matrix = RankWeights(shards, chosen_blocks(shards, shards.num_cells))
    values, vectors, _ = leading_vectors(matrix.gram, size, NUM_COMPONENTS)
    angles = scipy.linalg.subspace_angles(vectors, reference.components_.T)
    cosines = np.abs(np.sum(vectors * reference.components_.T, axis=0))
    return {
        "reference_processor_seconds": seconds,
        "largest_sine": float(np.sin(angles.max())),
        "lowest_cosine_of_a_component": float(cosines.min()),
        "singular_values_off_by": float(
            np.abs(np.sqrt(values) / reference.singular_values_ - 1).max()
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--cells", type=int, nargs="+", default=[20_000, 100_000])
    parser.add_argument("--exact", action="store_true")
    arguments = parser.parse_args()
    shards = ShardSet(arguments.shards)
    for number in arguments.cells:
        print(json.dumps(measure(shards, number)), flush=True)
    if arguments.exact:
        print(json.dumps(compare(shards)))


if __name__ == "__main__":
    main()
