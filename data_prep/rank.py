"""Rank value encoding: one cell's counts -> gene tokens, highest normalised expression first.

value = counts * (1 / total) * 10,000 * (1 / median), sorted downwards; equal values by ascending
token id. The order of these float64 operations is the published tokenizer's: scipy divides a
sparse matrix by multiplying with the reciprocal, and where two genes nearly tie the last bit
decides. The published code leaves exact ties to an unstable sort; the rule above replaces that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np

from data_prep.vocab import TARGET_SUM, Vocabulary

_RADIX_BITS = 11
_RADIX_SIZE = 1 << _RADIX_BITS
# Position of the only set bit of a word: multiply by a de Bruijn sequence, look the top bits up.
_DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)
_BIT_INDEX = np.empty(64, np.int64)
_BIT_INDEX[[(int(_DE_BRUIJN) << i & 0xFFFFFFFFFFFFFFFF) >> 58 for i in range(64)]] = np.arange(64)


@dataclass(frozen=True)
class EncodedCells:
    """Ranked tokens of a block of cells, special tokens included.

    Attributes
    ----------
    tokens
        uint16 (uint32 above 65,535 tokens), all cells one after the other.
    offsets
        int64 [cells + 1] into `tokens`.
    detected
        int32 [cells], genes of the vocabulary with a non-zero count, before truncation.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    detected: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


def token_dtype(num_tokens: int) -> np.dtype:
    """Return the smallest dtype that holds every token id of a vocabulary."""
    return np.dtype(np.uint16 if num_tokens <= 1 << 16 else np.uint32)


def encode_cells(
    data: np.ndarray,
    indices: np.ndarray,
    indptr: np.ndarray,
    totals: np.ndarray,
    column_tokens: np.ndarray,
    vocabulary: Vocabulary,
) -> EncodedCells:
    """Return the ranked tokens of a CSR block.

    Parameters
    ----------
    data, indices, indptr
        CSR arrays of raw counts, cells x genes of the source; any numeric dtype. Entries >= 0 and
        finite are not checked here (see `sources.check_counts`). Explicit zeros are ignored.
    totals
        float64 [cells], all counts of each cell, genes outside the vocabulary included.
    column_tokens
        int32 [source genes], token of each column or -1. Columns with the same token are summed.
    vocabulary
        Gives medians, special tokens and the maximum length.
    """
    median = vocabulary.median_of_token
    with np.errstate(divide="ignore", invalid="ignore"):
        reciprocal_median = 1.0 / median
    gene_slots = vocabulary.max_length - (2 if vocabulary.has_cls else 0)
    tokens, lengths, detected = _encode(
        np.ascontiguousarray(data, dtype=np.float64),
        indices,
        indptr,
        np.ascontiguousarray(totals, dtype=np.float64),
        column_tokens,
        reciprocal_median,
        gene_slots,
    )
    if vocabulary.has_cls:
        tokens, lengths = _add_special(
            tokens,
            lengths,
            np.int32(vocabulary.special_tokens["<cls>"]),
            np.int32(vocabulary.special_tokens["<eos>"]),
        )
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return EncodedCells(tokens.astype(token_dtype(vocabulary.num_tokens)), offsets, detected)


@numba.njit(cache=True, nogil=True)
def _sort_descending(values, tokens, work_values, work_tokens, size, histogram):
    """Sort `size` pairs by falling value, in place; stable, so tokens that come in rise on ties.

    Two radix passes over a 22-bit image of the value (exponent and 17 bits of the mantissa, counted
    from the cell's largest value down, so 32 octaves), then insertion on the full float64, which
    finds the pairs almost in order.
    """
    bits, work_bits = values.view(np.int64), work_values.view(np.int64)
    top = np.int64(0)
    for i in range(size):
        top = max(top, bits[i])
    top >>= 35
    limit = np.int64(_RADIX_SIZE * _RADIX_SIZE - 1)
    for shift in (0, _RADIX_BITS):
        histogram[:] = 0
        for i in range(size):
            key = min(top - (bits[i] >> 35), limit)
            histogram[(key >> shift) & (_RADIX_SIZE - 1)] += 1
        start = 0
        for b in range(_RADIX_SIZE):
            count = histogram[b]
            histogram[b] = start
            start += count
        for i in range(size):
            key = min(top - (bits[i] >> 35), limit)
            digit = (key >> shift) & (_RADIX_SIZE - 1)
            at = histogram[digit]
            histogram[digit] = at + 1
            work_bits[at] = bits[i]
            work_tokens[at] = tokens[i]
        bits, work_bits = work_bits, bits
        tokens, work_tokens = work_tokens, tokens
    for i in range(1, size):
        value, token = values[i], tokens[i]
        j = i - 1
        while j >= 0 and values[j] < value:
            values[j + 1], tokens[j + 1] = values[j], tokens[j]
            j -= 1
        values[j + 1], tokens[j + 1] = value, token


@numba.njit(cache=True, nogil=True)
def _encode(data, indices, indptr, totals, column_tokens, reciprocal_median, gene_slots):
    """Return (tokens, lengths, detected) of a CSR block; see `encode_cells`."""
    num_cells = len(indptr) - 1
    num_tokens = len(reciprocal_median)
    words = (num_tokens + 63) // 64
    counts = np.zeros(num_tokens)
    present = np.zeros(words, np.uint64)
    values, work_values = np.empty(num_tokens), np.empty(num_tokens)
    ranked, work_ranked = np.empty(num_tokens, np.int32), np.empty(num_tokens, np.int32)
    histogram = np.empty(_RADIX_SIZE, np.int64)
    upper = 0
    for cell in range(num_cells):
        upper += min(indptr[cell + 1] - indptr[cell], gene_slots)
    tokens = np.empty(upper, np.int32)
    lengths = np.empty(num_cells, np.int64)
    detected = np.empty(num_cells, np.int32)
    used = 0
    for cell in range(num_cells):
        for k in range(indptr[cell], indptr[cell + 1]):
            count = data[k]
            token = column_tokens[indices[k]]
            if token >= 0 and count > 0.0:
                counts[token] += count
                present[token >> 6] |= np.uint64(1) << np.uint64(token & 63)
        scale = 1.0 / totals[cell] if totals[cell] > 0.0 else 0.0
        size = 0
        # Walking the bitmap yields the tokens in ascending order: the tie rule needs no key.
        for w in range(words):
            bits = present[w]
            if bits == np.uint64(0):
                continue
            present[w] = np.uint64(0)
            while bits != np.uint64(0):
                lowest = bits & (~bits + np.uint64(1))
                bits ^= lowest
                token = w * 64 + _BIT_INDEX[(lowest * _DE_BRUIJN) >> np.uint64(58)]
                values[size] = counts[token] * scale * TARGET_SUM * reciprocal_median[token]
                ranked[size] = token
                counts[token] = 0.0
                size += 1
        if size > 1:
            _sort_descending(values, ranked, work_values, work_ranked, size, histogram)
        kept = min(size, gene_slots)
        for i in range(kept):
            tokens[used + i] = ranked[i]
        used += kept
        lengths[cell] = kept
        detected[cell] = size
    return tokens[:used], lengths, detected


@numba.njit(cache=True, nogil=True)
def _add_special(tokens, lengths, cls_token, eos_token):
    """Return the sequences with <cls> in front and <eos> behind (also of empty cells)."""
    out = np.empty(len(tokens) + 2 * len(lengths), np.int32)
    new_lengths = lengths + 2
    read = write = 0
    for cell in range(len(lengths)):
        out[write] = cls_token
        out[write + 1 : write + 1 + lengths[cell]] = tokens[read : read + lengths[cell]]
        out[write + 1 + lengths[cell]] = eos_token
        read += lengths[cell]
        write += new_lengths[cell]
    return out, new_lengths
