"""Rank value encoding: turns a cell's counts into gene tokens, highest normalised value first.

The value of a gene is counts * (1 / total) * 10,000 * (1 / median). Genes are sorted by falling
value, and genes of equal value by rising token id. The order of these float64 operations is the
published tokenizer's: scipy divides a sparse matrix by multiplying with the reciprocal, and where
two genes nearly tie, the last bit decides. The published code leaves exact ties to an unstable
sort; the rule above replaces that.

`encode_cells` is the entry. For each cell its kernel `_encode` makes one 64-bit sort key per gene
(`_make_keys`) and sorts the keys (`_sort_keys`). Where this is not possible (a gene stands in
several columns, values are too close, or the vocabulary is too large), it sums the counts by token
(`_add_up`) and sorts the full values (`_sort_descending`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np

from data_prep.genes.vocabulary import CLS, EOS, TARGET_SUM, Vocabulary

# A sort key of `_sort_keys` is the inverted bits of a value, with the token as its last 16 bits.
_TOKEN_MASK = np.uint64(0xFFFF)
_BIN_SHIFT, _NUM_BINS = np.uint64(43), 16384
# Unsigned indices: signed ones may be negative in Python, which costs a comparison per access.
_INDEX, _ZERO, _ONE, _COUNT_ONE = np.uintp, np.uintp(0), np.uintp(1), np.uint32(1)
# With this many keys in one bin, insertion sort is about as slow as the general sort.
_FULLEST_BIN = 64
_RADIX_BITS = 11
_RADIX_SIZE = 1 << _RADIX_BITS
# To find the only set bit of a word: multiply by a de Bruijn sequence and look up the top six bits.
_DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)
_BIT_INDEX = np.empty(64, np.int64)
_BIT_INDEX[[(int(_DE_BRUIJN) << i & 0xFFFFFFFFFFFFFFFF) >> 58 for i in range(64)]] = np.arange(64)


@dataclass(frozen=True)
class EncodedCells:
    """Ranked tokens of a block of cells, special tokens included.

    Attributes
    ----------
    tokens
        uint16 (uint32 above 65,536 tokens), the tokens of all cells one after the other.
    offsets
        int64 [cells + 1], where each cell begins in `tokens`.
    detected
        int32 [cells], number of vocabulary genes with a non-zero count, before truncation.
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
    """Return the ranked tokens of the cells of a CSR block.

    Parameters
    ----------
    data, indices, indptr
        CSR arrays of raw counts, cells x genes of the source; any numeric dtype. The entries must
        be finite and >= 0, which is not checked here (see `data_prep.sources.count_sums`).
        Explicit zeros are ignored.
    totals
        float64 [cells], sum of all counts of each cell, including genes outside the vocabulary.
    column_tokens
        int32 [source genes], token of each column or -1. Columns with the same token are summed.
    vocabulary
        Gives the medians, the special tokens and the maximum length.
    """
    # A column whose token an earlier column has already is coded as -2 - token. A cell with counts
    # in such a column takes the general way, which sums by token.
    first_of = np.full(vocabulary.num_tokens, -1)
    known = np.flatnonzero(column_tokens >= 0)[::-1]
    first_of[column_tokens[known]] = known
    is_repeat = (column_tokens >= 0) & (first_of[column_tokens] != np.arange(len(column_tokens)))
    coded = np.where(is_repeat, -2 - column_tokens, column_tokens).astype(np.int32)
    with np.errstate(divide="ignore", invalid="ignore"):
        reciprocal_median = 1.0 / vocabulary.median_of_token
    special = vocabulary.special_tokens
    frame = 2 if vocabulary.has_cls else 0
    gene_slots = vocabulary.max_length - frame
    num_cells = len(indptr) - 1
    most = int(np.minimum(np.diff(indptr), gene_slots).sum()) + frame * num_cells
    tokens = np.empty(most, token_dtype(vocabulary.num_tokens))
    offsets, detected = np.zeros(num_cells + 1, np.int64), np.empty(num_cells, np.int32)
    _encode(
        # numba compiles for each combination of dtypes, so only a few are let through.
        data if data.dtype in (np.float32, np.int32) else data.astype(np.float64, copy=False),
        indices.astype(np.int32, copy=False).view(np.uint32),
        indptr.astype(np.int64, copy=False),
        np.ascontiguousarray(totals, dtype=np.float64),
        coded,
        np.where(column_tokens >= 0, reciprocal_median[column_tokens], 0.0),
        vocabulary.num_tokens,
        gene_slots,
        special.get(CLS, -1),
        special.get(EOS, -1),
        tokens,
        offsets,
        detected,
    )
    return EncodedCells(tokens[: offsets[-1]], offsets, detected)


@numba.njit(cache=True, nogil=True)
def _sort_descending(values, tokens, work_values, work_tokens, size, histogram):
    """Sort `size` pairs of value and token by falling value, in place.

    The sort is stable: tokens that come in rising order stay so among equal values. Two radix
    passes use 22 bits of the value (exponent and 17 bits of the mantissa, counted from the cell's
    largest value down, so 32 octaves). An insertion sort on the full float64 follows; it finds the
    pairs almost in order.
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
def _sort_keys(keys, work, size, smallest, slots, bins):
    """Write the `slots` smallest of `size` keys into `work`, sorted; return how many, or -1.

    A counting sort puts the keys into bins by the exponent and 9 bits of the mantissa, from the
    smallest key (the largest value) up: 512 bins per octave, 32 octaves. Bins behind the last slot
    are left out. Keys of one bin are sorted by insertion. The function gives up and returns -1
    where too many keys share a bin, or where two values differ only in bits that the keys do not
    hold.
    """
    base, last, farthest = smallest >> _BIN_SHIFT, _ZERO, _INDEX(_NUM_BINS - 1)
    fullest = np.uint32(0)
    for i in range(size):
        b = min(_INDEX((keys[i] >> _BIN_SHIFT) - base), farthest)
        bins[b] += _COUNT_ONE
        last, fullest = max(last, b), max(fullest, bins[b])
    if fullest > _FULLEST_BIN:
        bins[: last + _ONE] = 0
        return -1
    start = np.uint32(0)
    for b in range(last + _ONE):
        count = bins[b]
        bins[b] = start
        start += count
    if size > slots:
        kept = _place_first(keys, work, size, base, slots, bins, last)
    else:
        kept = size
        for i in range(size):
            key = keys[i]
            b = min(_INDEX((key >> _BIN_SHIFT) - base), farthest)
            work[_INDEX(bins[b])] = key
            bins[b] += _COUNT_ONE
    bins[: last + _ONE] = 0
    # The insertion sort suffers from mispredicted branches. This pass without branches leaves few
    # pairs for it.
    carried = work[_ZERO]
    for i in range(_ONE, kept):
        key = work[i]
        work[i - _ONE] = min(carried, key)
        carried = max(carried, key)
    if kept > 0:
        work[kept - _ONE] = carried
    for i in range(_ONE, kept):
        key = work[i]
        j = i
        while j > 0 and work[j - _ONE] > key:
            work[j] = work[j - _ONE]
            j -= _ONE
        work[j] = key
    unclear = False
    for i in range(_ONE, kept):
        unclear |= work[i] ^ work[i - _ONE] <= _TOKEN_MASK
    return -1 if unclear else min(np.int64(kept), slots)


@numba.njit(cache=True, nogil=True)
def _place_first(keys, work, size, base, slots, bins, last):
    """Copy the keys of the bins up to the last slot's bin into `work`; return how many."""
    cut, farthest = last, _INDEX(_NUM_BINS - 1)
    kept = size
    for b in range(last):
        if bins[b + _ONE] >= slots:
            cut, kept = b, _INDEX(bins[b + _ONE])
            break
    for i in range(size):
        key = keys[i]
        b = min(_INDEX((key >> _BIN_SHIFT) - base), farthest)
        if b <= cut:
            work[_INDEX(bins[b])] = key
            bins[b] += _COUNT_ONE
    return kept


@numba.njit(cache=True, nogil=True)
def _make_keys(data, indices, first, stop, scale, column_tokens, column_factors, values, keys):
    """Fill `keys` with the sort keys of a cell's genes.

    Returns (number of keys, smallest key, whether each gene stands in one column only).
    """
    bits = values.view(np.uint64)
    size, smallest, is_once = _ZERO, ~np.uint64(0), True
    for k in range(first + _ONE, stop):
        is_once &= indices[k] > indices[k - _ONE]
    for k in range(first, stop):
        column = _INDEX(indices[k])
        token, count = column_tokens[column], np.float64(data[k])
        is_once &= (token > -2) | (count == 0.0)
        values[size] = count * scale * TARGET_SUM * column_factors[column]
        key = (~bits[size] & ~_TOKEN_MASK) | np.uint64(token & 0xFFFF)
        keys[size] = key
        is_gene = (token >= 0) & (count > 0.0)  # else the next gene overwrites this place
        smallest = min(smallest, key) if is_gene else smallest
        size += _INDEX(is_gene)
    return size, smallest, is_once


@numba.njit(cache=True, nogil=True)
def _add_up(
    data, indices, first, stop, scale, column_tokens, column_factors, counts, factors, present,
    values, ranked,
):  # fmt: skip
    """Sum a cell's counts by token; return how many genes `values` and `ranked` then hold.

    The tokens come out in rising order, which is the tie rule. `counts` and `present` are all zero
    before the call and after it.
    """
    for k in range(first, stop):
        column = _INDEX(indices[k])
        token = column_tokens[column]
        token = -2 - token if token < -1 else token
        count = np.float64(data[k])
        if token >= 0 and count > 0.0:
            counts[token] += count
            factors[token] = column_factors[column]
            present[token >> 6] |= np.uint64(1) << np.uint64(token & 63)
    size = 0
    for w in range(len(present)):
        bits = present[w]
        present[w] = np.uint64(0)
        while bits != np.uint64(0):
            lowest = bits & (~bits + np.uint64(1))
            bits ^= lowest
            token = w * 64 + _BIT_INDEX[(lowest * _DE_BRUIJN) >> np.uint64(58)]
            values[size] = counts[token] * scale * TARGET_SUM * factors[token]
            ranked[size] = token
            counts[token] = 0.0
            size += 1
    return size


@numba.njit(cache=True, nogil=True)
def _encode(
    data, indices, indptr, totals, column_tokens, column_factors, num_tokens, gene_slots,
    cls_token, eos_token, out, offsets, detected,
):  # fmt: skip
    """Fill `out`, `offsets` and `detected` for all cells of a block; see `encode_cells`."""
    counts, factors = np.zeros(num_tokens), np.zeros(num_tokens)
    present = np.zeros((num_tokens + 63) // 64, np.uint64)
    longest = num_tokens
    for cell in range(len(indptr) - 1):
        longest = max(longest, indptr[cell + 1] - indptr[cell])
    room = longest + 1
    values, work_values = np.empty(room), np.empty(room)
    keys, work_keys = np.empty(room, np.uint64), np.empty(room, np.uint64)
    ranked, work_ranked = np.empty(room, np.int32), np.empty(room, np.int32)
    bins = np.zeros(_NUM_BINS, np.uint32)
    histogram = np.empty(_RADIX_SIZE, np.int64)
    used = 0
    for cell in range(len(indptr) - 1):
        scale = 1.0 / totals[cell] if totals[cell] > 0.0 else 0.0
        first, stop = _INDEX(indptr[cell]), _INDEX(indptr[cell + 1])
        size, kept = 0, -1
        if num_tokens <= 1 << 16:  # a token fits into a key
            number, smallest, is_once = _make_keys(
                data, indices, first, stop, scale, column_tokens, column_factors, values, keys
            )
            size = np.int64(number)
            if is_once:
                kept = _sort_keys(keys, work_keys, number, smallest, gene_slots, bins)
        is_plain = kept >= 0
        if not is_plain:
            # The general way: slower for most cells, but its time does not depend on the values.
            size = _add_up(
                data, indices, first, stop, scale, column_tokens, column_factors, counts, factors,
                present, values, ranked,
            )  # fmt: skip
            if size > 1:
                _sort_descending(values, ranked, work_values, work_ranked, size, histogram)
            kept = min(size, gene_slots)
        if cls_token >= 0:
            out[used] = cls_token
            used += 1
        here = out[used : used + kept]
        if is_plain:
            for i in range(_INDEX(kept)):
                here[i] = work_keys[i] & _TOKEN_MASK
        else:
            for i in range(kept):
                here[i] = ranked[i]
        used += kept
        if eos_token >= 0:
            out[used] = eos_token
            used += 1
        offsets[cell + 1] = used
        detected[cell] = size
