"""The corpus SVD: a linear embedding of cells, made from the training cells without a network.

A cell is a row of a matrix, cells x tokens. The entry of a gene is its rank weight: 1 - i / L for
the gene at position i (from 0) of a cell's L genes, 0 for genes that the cell does not have and for
special tokens. The leading right singular vectors of that matrix (not centred) are the loadings of
the genes; a new cell times the loadings is its embedding. Every frozen embedding of a model is
compared with it.

The matrix is never stored. scipy's LOBPCG (Knyazev, SIAM J. Sci. Comput. 2001) needs only its
product with a block of vectors, which is one pass over the shards; it needs memory for a few tables
of tokens x 64.

`corpus_svd` reads or computes the SVD of shards, and `CorpusSvd.embed` embeds cells.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numba
import numpy as np
import scipy.linalg
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from scipy.sparse.linalg import LinearOperator, lobpcg

from data_prep.files import complete_file
from data_prep.genes.vocabulary import Vocabulary
from data_prep.shards.reader import DamagedBlock, ShardSet
from pretrain.counting.counted_tables import counted_tables

FILE_NAME = "corpus_svd.safetensors"
NUM_COMPONENTS = 50
MAX_CELLS = 50_000
_FORMAT = "geneloom-corpus-svd/1"
# The method's version is part of the key of stored tables, and must be raised when the method
# changes.
_METHOD = 1
# Additional vectors: the wider the gap behind the last requested vector, the fewer passes are
# needed.
_SPARE = 14
# Columns of one product, for which the loops below are compiled; 16 or 32 are slower in total.
_WIDTH = 64
_ITERATIONS = 5
_SEED = 0
# Problems up to this vocabulary size are solved completely, which is as fast, and exact.
_DENSE = 1024
# One thread adds up the products of so many cells in float32, and these sums are added in float64
# in order, so the result does not depend on the number of threads.
_GROUP_CELLS = 8192
_MOST_THREADS = 4


@dataclass(frozen=True)
class CorpusSvd:
    """Loadings of genes that embed any cell of the same vocabulary.

    Attributes
    ----------
    components
        float32 [tokens, components], columns of length 1; zero for special tokens. The entry of a
        column with the largest absolute value is positive.
    singular_values
        float32 [components], descending.
    vocabulary_sha256
        Hash of the vocabulary that the tokens belong to.
    first_gene_token
        Lower tokens are special tokens, which have no rank and no weight.
    origin
        ``shards_fingerprint``; ``cells``, the number of cells used; ``residual``, the largest
        distance between a component times the matrix (and back) and its multiple, relative to the
        latter.
    """

    components: np.ndarray
    singular_values: np.ndarray
    vocabulary_sha256: str
    first_gene_token: int
    origin: dict[str, Any] = field(default_factory=dict)

    def embed(self, tokens: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """Return float32 [cells, components]; NaN for cells without a gene.

        Parameters
        ----------
        tokens
            uint16 or uint32, ranked tokens of all cells, one cell after another.
        offsets
            int64 [cells + 1], where each cell begins.
        """
        out = np.empty((len(offsets) - 1, self.components.shape[1]), dtype=np.float32)
        _project(tokens, offsets, self.first_gene_token, self.components, out)
        return out

    def embed_cells(self, tokens: list[np.ndarray]) -> np.ndarray:
        """Return the result of `embed` for a list with one array of tokens per cell."""
        offsets = np.cumsum([0, *map(len, tokens)], dtype=np.int64)
        flat = np.concatenate(tokens) if tokens else np.zeros(0, dtype=np.uint16)
        return self.embed(flat, offsets)

    def save(self, folder: Path) -> Path:
        """Write ``corpus_svd.safetensors`` into a folder and return its path."""
        tables = {"components": self.components, "singular_values": self.singular_values}
        # The writer copies memory as it is, so the arrays must be contiguous.
        tables = {name: np.ascontiguousarray(table) for name, table in tables.items()}
        metadata = {
            "format": _FORMAT,
            "vocabulary_sha256": self.vocabulary_sha256,
            "first_gene_token": str(self.first_gene_token),
            **{name: str(value) for name, value in self.origin.items()},
        }
        with complete_file(folder / FILE_NAME) as aside:
            save_file(tables, aside, metadata)
        return folder / FILE_NAME

    @classmethod
    def found_in(cls, folder: Path, vocabulary: Vocabulary) -> CorpusSvd | None:
        """Return the result of `load`, or None if the folder has no such file."""
        return cls.load(folder, vocabulary) if (folder / FILE_NAME).is_file() else None

    @classmethod
    def load(cls, folder: Path, vocabulary: Vocabulary) -> CorpusSvd:
        """Return the SVD that `save` wrote.

        Raises
        ------
        ValueError
            The file is missing, cannot be read, or belongs to another vocabulary.
        """
        path = folder / FILE_NAME
        try:
            with safe_open(path, "numpy") as opened:
                metadata = opened.metadata() or {}
                tables = {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118
        except FileNotFoundError as error:
            raise ValueError(f"{folder}: has no {FILE_NAME}; give the shards") from error
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: cannot be read ({error}); copy it again") from error
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{path}: is of format {metadata.get('format')!r}, not {_FORMAT!r}")
        found = metadata["vocabulary_sha256"]
        if found != vocabulary.sha256:
            raise ValueError(
                f"{path}: was made with vocabulary {found[:12]}, the model has "
                f"{vocabulary.sha256[:12]}; it belongs to another model"
            )
        origin = {
            "shards_fingerprint": metadata["shards_fingerprint"],
            "cells": int(metadata["cells"]),
            "residual": float(metadata["residual"]),
        }
        first = int(metadata["first_gene_token"])
        return cls(tables["components"], tables["singular_values"], found, first, origin)


def corpus_svd(
    shards: ShardSet,
    num_components: int = NUM_COMPONENTS,
    fallback: Path | None = None,
    max_cells: int = MAX_CELLS,
    quarantine: bool = False,
) -> CorpusSvd:
    """Return the SVD of training cells, stored beside the shards or newly computed.

    Parameters
    ----------
    num_components
        Number of components, limited by the number of training cells and of genes.
    fallback
        Folder for the SVD if the folder of the shards is not writable; None: it is not stored.
    max_cells
        If there are more training cells, whole blocks that are spread over the corpus are used.
    quarantine
        Leave damaged blocks out, instead of raising.

    Raises
    ------
    ValueError
        There are no training cells, no components, or a block is damaged.
    """
    if num_components < 1 or max_cells < 1:
        raise ValueError(
            f"corpus SVD: {num_components} components of {max_cells} cells; both must be at least 1"
        )
    cells = sum(extent.num_cells for extent in shards.extents("train"))
    settings = {
        "method": _METHOD, "components": num_components, "cells": min(max_cells, cells),
        "quarantine": quarantine,
    }  # fmt: skip
    tables = counted_tables(
        shards,
        "corpus-svd",
        settings,
        lambda left_out: _count(shards, num_components, max_cells, left_out),
        fallback,
        quarantine,
    )
    return CorpusSvd(
        tables["components"],
        tables["singular_values"],
        shards.vocabulary.sha256,
        shards.vocabulary.first_gene_token,
        {
            "shards_fingerprint": shards.fingerprint,
            "cells": int(tables["cells"][0]),
            "residual": float(tables["residual"][0]),
        },
    )


def _count(
    shards: ShardSet, num_components: int, max_cells: int, left_out: set[int] | None
) -> dict[str, np.ndarray]:
    numbers = chosen_blocks(shards, max_cells)
    matrix = RankWeights(shards, numbers, left_out)
    vocabulary = shards.vocabulary
    most = min(num_components, matrix.num_cells, len(vocabulary.genes))
    values, vectors, residual = leading_vectors(matrix.gram, vocabulary.num_tokens, most)
    vectors[: vocabulary.first_gene_token] = 0
    read = np.setdiff1d(numbers, list(left_out or ()))
    return {
        "components": np.ascontiguousarray(vectors, dtype=np.float32),
        "singular_values": np.sqrt(values).astype(np.float32),
        "cells": np.array([shards.cells_of_blocks(read).sum()]),
        "residual": np.array([residual]),
    }


def leading_vectors(gram: Any, size: int, number: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the largest eigenvalues, their vectors and the largest residual of a product A'A.

    Parameters
    ----------
    gram
        A function that takes float64 [size, columns] and returns A'A times them.

    Returns
    -------
    values : float64 [number], descending, not negative
    vectors : float64 [size, number]
    residual : |A'A v - value v| / value, the largest of all vectors; NaN for a value of 0
    """
    if size <= _DENSE:
        values, vectors = scipy.linalg.eigh(gram(np.eye(size)))
        residuals = np.linalg.norm(gram(vectors) - vectors * values, axis=0)
        return _ordered(values, vectors, residuals, number)
    start = np.random.default_rng(_SEED).standard_normal((size, number + _SPARE))
    # The product comes first, because its columns lie near the leading vectors. QR also fills
    # columns that a matrix of lower rank leaves empty.
    start = np.linalg.qr(gram(start))[0]
    operator = LinearOperator((size, size), matvec=gram, matmat=gram, dtype=np.float64)
    with warnings.catch_warnings():
        # The warning only says that lobpcg stopped at the given number of iterations.
        warnings.simplefilter("ignore", UserWarning)
        values, vectors, residuals = lobpcg(
            operator, start, largest=True, maxiter=_ITERATIONS, retResidualNormsHistory=True
        )
    return _ordered(values, vectors, residuals[-1], number)


def _ordered(
    values: np.ndarray, vectors: np.ndarray, residuals: np.ndarray, number: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the result of `leading_vectors`.

    The entry of a vector with the largest absolute value is positive.
    """
    order = np.argsort(-values, kind="stable")[:number]
    values, vectors = np.maximum(values[order], 0), vectors[:, order]
    largest = np.abs(vectors).argmax(axis=0)
    vectors *= np.sign(vectors[largest, np.arange(number)])
    with np.errstate(invalid="ignore", divide="ignore"):
        return values, vectors, float(np.max(residuals[order] / values))


class RankWeights:
    """The matrix of rank weights of the cells in some blocks, given as its product with vectors.

    Parameters
    ----------
    numbers
        int [blocks], rows of the index.
    left_out
        As in `pretrain.counting.counted_tables.train_blocks`.
    """

    def __init__(
        self, shards: ShardSet, numbers: np.ndarray, left_out: set[int] | None = None
    ) -> None:
        self._shards, self._left_out = shards, left_out
        blocks_of_a_group = max(1, _GROUP_CELLS // shards.manifest["settings"]["block_cells"])
        cuts = range(blocks_of_a_group, len(numbers), blocks_of_a_group)
        self._groups = np.split(numbers, cuts)
        self.num_cells = int(shards.cells_of_blocks(numbers).sum())

    def gram(self, vectors: np.ndarray) -> np.ndarray:
        """Return float64 [tokens, columns]: transposed matrix times matrix times `vectors`."""
        return np.concatenate(
            [
                self._gram_of_few(vectors[:, start : start + _WIDTH])
                for start in range(0, vectors.shape[1], _WIDTH)
            ],
            axis=1,
        )

    def _gram_of_few(self, vectors: np.ndarray) -> np.ndarray:
        basis = np.zeros((len(vectors), _WIDTH), dtype=np.float32)
        basis[:, : vectors.shape[1]] = vectors
        total = np.zeros(basis.shape)
        threads = min(_MOST_THREADS, os.cpu_count() or 1, len(self._groups))
        with ThreadPoolExecutor(threads, thread_name_prefix="corpus-svd") as pool:
            for start in range(0, len(self._groups), threads):
                groups = self._groups[start : start + threads]
                for part in pool.map(lambda group: self._group_gram(group, basis), groups):
                    total += part
        return total[:, : vectors.shape[1]]

    def _group_gram(self, numbers: Iterable[int], basis: np.ndarray) -> np.ndarray:
        first = self._shards.vocabulary.first_gene_token
        out = np.zeros_like(basis)
        for number in numbers:
            try:
                block = self._shards.read_block(int(number))
            except DamagedBlock:
                if self._left_out is None:
                    raise
                self._left_out.add(int(number))
                continue
            _add_gram(block.tokens, block.offsets, first, basis, out)
        return out


def chosen_blocks(shards: ShardSet, max_cells: int) -> np.ndarray:
    """Return numbers of training blocks with about `max_cells` cells, spread evenly."""
    extents = shards.extents("train")
    if not extents:
        raise ValueError(f"{shards.name}: holds no training cells")
    numbers = np.concatenate([shards.block_numbers("train", e.length) for e in extents])
    share = min(1.0, max_cells / sum(e.num_cells for e in extents))
    wanted = max(1, int(len(numbers) * share))
    return numbers[np.linspace(0, len(numbers) - 1, wanted).astype(np.int64)]


_ONE, _INDEX = np.float32(1), np.uintp


@numba.njit(cache=True, nogil=True)
def _gene_places(tokens, start, stop, first):
    """Return the range of a cell's genes; special tokens stand before and after them."""
    while start < stop and tokens[start] < first:
        start += 1
    while start < stop and tokens[stop - 1] < first:
        stop -= 1
    return start, stop


@numba.njit(cache=True, nogil=True)
def _add_gram(tokens, offsets, first, basis, out):
    """Add transposed rank weights times rank weights times `basis` [tokens, 64] to `out`."""
    row = np.empty(_WIDTH, np.float32)
    for cell in range(len(offsets) - 1):
        start, stop = _gene_places(tokens, offsets[cell], offsets[cell + 1], first)
        if start == stop:
            continue
        step = _ONE / np.float32(stop - start)
        row[:] = 0
        for place in range(stop - start):
            weight = _ONE - np.float32(place) * step
            source = basis[_INDEX(tokens[_INDEX(start + place)])]
            for j in range(_WIDTH):
                row[_INDEX(j)] += weight * source[_INDEX(j)]
        for place in range(stop - start):
            weight = _ONE - np.float32(place) * step
            target = out[_INDEX(tokens[_INDEX(start + place)])]
            for j in range(_WIDTH):
                target[_INDEX(j)] += weight * row[_INDEX(j)]


@numba.njit(cache=True, nogil=True)
def _project(tokens, offsets, first, components, out):
    """Fill `out` [cells, components] with the cells' rank weights times `components`."""
    for cell in range(len(offsets) - 1):
        start, stop = _gene_places(tokens, offsets[cell], offsets[cell + 1], first)
        out[cell] = np.nan if start == stop else 0
        for place in range(start, stop):
            weight = _ONE - np.float32(place - start) / np.float32(stop - start)
            source = components[_INDEX(tokens[_INDEX(place)])]
            for j in range(components.shape[1]):
                out[cell, j] += weight * source[j]
