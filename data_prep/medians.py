"""Non-zero medians per gene: the numbers that make a gene's expression comparable across genes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from data_prep.sources import CountBlock, H5adSource
from data_prep.vocab import MASK, MAX_LENGTH_PLAIN, PAD, TARGET_SUM, Vocabulary

# 16 B per value (gene number, value): 200 million values are 3.2 GB, the bound of the exact way.
MAX_EXACT_VALUES = 200_000_000
_BLOCK_CELLS = 4096


def build_vocabulary(
    sources: Iterable[H5adSource], min_cells: int, max_length: int | None
) -> Vocabulary:
    """Return a vocabulary of the genes in count matrices, medians computed exactly.

    The median of a gene is taken over the cells that express it, of counts / total x 10,000
    (Geneformer, Nature 2023, Methods). Genes are ordered by id, so the result does not depend on
    the order of the sources. No ``<cls>``/``<eos>``.

    Parameters
    ----------
    sources
        Count matrices whose gene ids are in one name space.
    min_cells
        Genes detected in fewer cells are left out.
    max_length
        Longest sequence; None: 2,048.

    Raises
    ------
    ValueError
        No gene is left, or there are more values than the exact computation may hold.
    """
    number_of: dict[str, int] = {}
    genes_seen: list[np.ndarray] = []
    values_seen: list[np.ndarray] = []
    held = 0
    for source in sources:
        columns = np.array(
            [number_of.setdefault(g, len(number_of)) if g else -1 for g in source.gene_ids]
        )
        for block in source.blocks(_BLOCK_CELLS):
            genes, values = _normalised_values(block, columns)
            genes_seen.append(genes)
            values_seen.append(values)
            held += values.size
            if held > MAX_EXACT_VALUES:
                raise ValueError(
                    f"{source.path}: more than {MAX_EXACT_VALUES:,} non-zero values; build the "
                    "vocabulary from fewer files, or give --vocab a published one"
                )
    medians = _group_medians(np.concatenate(genes_seen), np.concatenate(values_seen), min_cells)
    names = list(number_of)
    chosen = sorted((names[g], m) for g, m in medians.items())
    if not chosen:
        raise ValueError(f"no gene is detected in at least {min_cells} cells: no vocabulary")
    return Vocabulary(
        genes=tuple(name for name, _ in chosen),
        medians=np.array([m for _, m in chosen]),
        special_tokens={PAD: 0, MASK: 1},
        max_length=max_length or MAX_LENGTH_PLAIN,
    )


def _normalised_values(block: CountBlock, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (gene numbers, counts / total x 10,000) of a block; same gene in a cell summed."""
    cells = np.repeat(np.arange(len(block.indptr) - 1), np.diff(block.indptr))
    genes = columns[block.indices]
    use = (genes >= 0) & (block.data > 0) & block.passes[cells]
    keys = cells[use] * (columns.max() + 1) + genes[use]
    unique, inverse = np.unique(keys, return_inverse=True)
    summed = np.bincount(inverse, weights=block.data[use])
    cell = unique // (columns.max() + 1)
    return unique % (columns.max() + 1), summed / block.totals[cell] * TARGET_SUM


def _group_medians(genes: np.ndarray, values: np.ndarray, min_cells: int) -> dict[int, float]:
    """Return gene number -> median of its values, for genes with at least `min_cells` values."""
    order = np.lexsort((values, genes))
    genes, values = genes[order], values[order]
    starts = np.flatnonzero(np.r_[True, genes[1:] != genes[:-1]]) if genes.size else np.array([])
    stops = np.r_[starts[1:], genes.size] if genes.size else np.array([])
    result = {}
    for start, stop in zip(starts, stops, strict=True):
        if stop - start >= min_cells:
            result[int(genes[start])] = float(np.median(values[start:stop]))
    return result
