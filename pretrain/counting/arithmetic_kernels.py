"""Loops of the arithmetic baseline over rows of tokens, compiled by numba.

Rows are padded. A hidden gene appears in them as <mask>, and `labels` contains the hidden genes of
all rows in order; every other gene is visible. The *place* of a gene is its index on the grid of
log(1 / median). A *slot* is a position among the neighbours of a hidden gene: 0 is the farthest on
the left (higher expression), `SLOTS` - 1 the farthest on the right.

The loops use no array expressions, `min` or `max`, because numba compiles those again for every
function that contains one, and the first start of a run waits for it.
"""

from __future__ import annotations

import math

import numba
import numpy as np

NEIGHBOURS = 4  # number of visible genes used on each side
SLOTS = 2 * NEIGHBOURS
RANK_CLASSES = 5
_STRETCH = 64


@numba.njit(cache=True, nogil=True)
def _context(place, length, edges):
    """Return the context number of a position in a cell: its class of rank and class of length."""
    length_class = 0
    for number in range(len(edges)):
        length_class += int(length > edges[number])
    return length_class * RANK_CLASSES + place * RANK_CLASSES // length


@numba.njit(cache=True, nogil=True)
def _room(width):
    """Return three int64 [width] arrays, into which `_visible_genes` writes."""
    return np.empty(width, np.int64), np.empty(width, np.int64), np.empty(width, np.int64)


@numba.njit(cache=True, nogil=True)
def _visible_genes(inputs, row, length, mask_token, first_gene, genes, before, positions):
    """Collect the visible genes of a row, and for each hidden gene its position.

    `before` receives how many visible genes come before each hidden gene.

    Returns
    -------
    Number of visible genes (entries of `genes`), and of hidden genes (entries of `before` and
    `positions`).
    """
    visible, hidden = 0, 0
    for i in range(length):
        token = inputs[row, i]
        if token == mask_token:
            before[hidden], positions[hidden] = visible, i
            hidden += 1
        elif token >= first_gene:
            genes[visible] = token
            visible += 1
    return visible, hidden


@numba.njit(cache=True, nogil=True)
def _neighbour(slot, before, visible):
    """Return the index of the visible gene in a slot of a hidden gene; -1 outside the cell."""
    at = before + slot - NEIGHBOURS
    return at if 0 <= at < visible else -1


@numba.njit(cache=True, nogil=True)
def _mark(is_visible, genes, visible, value):
    """Set `is_visible` (bool [V]) of a row's visible genes to a value."""
    for i in range(visible):
        is_visible[genes[i]] = value


@numba.njit(cache=True, nogil=True)
def count_hidden(
    inputs, lengths, labels, mask_token, first_gene, place_of, edges, differences, neighbours
):
    """Add the hidden genes of some rows to the counts; return how many there were.

    Parameters
    ----------
    inputs, lengths
        int32 [rows, L], int64 [rows].
    labels
        int64 [M].
    place_of
        int32 [V].
    edges
        int64, longest cell lengths of all length classes except the last.
    differences
        int64 [contexts, SLOTS, 2 G - 1], counts are added at index: place of the hidden gene -
        place of the neighbour + G - 1.
    neighbours
        int64 [contexts, SLOTS, G], counts are added at the neighbour's place.
    """
    genes, before, positions = _room(inputs.shape[1])
    zero = neighbours.shape[2] - 1
    found = 0
    for row in range(len(inputs)):
        visible, hidden = _visible_genes(
            inputs, row, lengths[row], mask_token, first_gene, genes, before, positions
        )
        for i in range(hidden):
            own = place_of[labels[found]]
            found += 1
            context = _context(positions[i], lengths[row], edges)
            for slot in range(SLOTS):
                at = _neighbour(slot, before[i], visible)
                if at >= 0:
                    other = place_of[genes[at]]
                    differences[context, slot, own - other + zero] += 1
                    neighbours[context, slot, other] += 1
    return found


@numba.njit(cache=True, nogil=True)
def _free_mass(mass, genes, visible, place_of, frequency, free):
    """Fill `free` (float32 [G]) with the frequency at each place, without visible genes."""
    left = np.empty(len(mass))
    for place in range(len(mass)):
        left[place] = mass[place]
    for i in range(visible):
        left[place_of[genes[i]]] -= frequency[genes[i]]
    for place in range(len(left)):
        # If all genes of a place are visible, rounding leaves a small rest, which must not count as
        # a gene.
        free[place] = left[place] if left[place] > 1e-9 * mass[place] else 0.0


@numba.njit(cache=True, nogil=True)
def _factors_of(context, slot, genes, before, visible, place_of, factors, ones):
    """Return float32 [G], the factor that the neighbour in a slot gives a gene at each place."""
    at = _neighbour(slot, before, visible)
    if at < 0:
        return ones
    start = len(ones) - 1 - place_of[genes[at]]
    return factors[context, slot, start : start + len(ones)]


@numba.njit(cache=True, nogil=True)
def _windows(context, genes, before, visible, place_of, factors, nothing):
    """Return the factors that each of the eight neighbours gives a gene at each place, SLOTS x [G].

    `nothing` is the array of factors for a missing neighbour.
    """
    slot = np.int64(0)  # numba would compile each literal number separately
    a = _factors_of(context, slot, genes, before, visible, place_of, factors, nothing)
    b = _factors_of(context, slot + 1, genes, before, visible, place_of, factors, nothing)
    c = _factors_of(context, slot + 2, genes, before, visible, place_of, factors, nothing)
    d = _factors_of(context, slot + 3, genes, before, visible, place_of, factors, nothing)
    e = _factors_of(context, slot + 4, genes, before, visible, place_of, factors, nothing)
    f = _factors_of(context, slot + 5, genes, before, visible, place_of, factors, nothing)
    g = _factors_of(context, slot + 6, genes, before, visible, place_of, factors, nothing)
    h = _factors_of(context, slot + 7, genes, before, visible, place_of, factors, nothing)
    return a, b, c, d, e, f, g, h


@numba.njit(cache=True, nogil=True)
def _fill_product(context, genes, before, visible, place_of, factors, ones, product):
    """Fill `product` (float32 [G]) with the product of the factors of all neighbours."""
    size = len(product)
    a, b, c, d, e, f, g, h = _windows(context, genes, before, visible, place_of, factors, ones)
    # A single pass multiplies all eight, because eight passes are twice as slow.
    for i in range(size):
        product[i] = ((a[i] * b[i]) * (c[i] * d[i])) * ((e[i] * f[i]) * (g[i] * h[i]))


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "nsz"})
def _dot(first, second):
    total = np.float32(0)
    for i in range(len(first)):
        total += first[i] * second[i]
    return total


@numba.njit(cache=True, nogil=True)
def _add_scaled(total, factor, values):
    for i in range(len(total)):
        total[i] += factor * values[i]


@numba.njit(cache=True, nogil=True)
def _mixed_loss(share, mixed, frequency):
    """Return the cross-entropy (nats) of a gene's share, at most 1, mixed with its frequency."""
    share = share if share < 1.0 else 1.0
    return -math.log((1 - mixed) * share + mixed * frequency)


@numba.njit(cache=True, nogil=True)
def score_hidden(
    inputs, lengths, labels, mask_token, first_gene, place_of, frequency, mass, edges, factors,
    most, ordered, starts, mixed, losses, places,
):  # fmt: skip
    """Fill the losses and places of hidden genes.

    Parameters
    ----------
    frequency, mass
        float64 [V], [G]: the frequency of each gene, and its sum at each place.
    factors
        float32 [contexts, SLOTS, 2 G - 1], the factor that a neighbour gives a gene's frequency.
    most, ordered, starts
        float32 [G], the largest frequency at each place; int64 [genes], genes by place, the most
        frequent first; int64 [G + 1], where each place begins.
    mixed
        Share of the plain frequency in the prediction.
    losses, places
        float64, int32 [M], written: cross-entropy in nats; number of possible genes that are more
        likely than the label.
    """
    size = len(mass)
    genes, before, positions = _room(inputs.shape[1])
    product, free = np.empty(size, np.float32), np.empty(size, np.float32)
    ones = np.ones(size, np.float32)
    is_visible = np.zeros(len(frequency), np.bool_)
    found = 0
    for row in range(len(inputs)):
        visible, hidden = _visible_genes(
            inputs, row, lengths[row], mask_token, first_gene, genes, before, positions
        )
        if hidden == 0:
            continue
        _mark(is_visible, genes, visible, True)
        _free_mass(mass, genes, visible, place_of, frequency, free)
        for i in range(hidden):
            label = labels[found]
            context = _context(positions[i], lengths[row], edges)
            _fill_product(context, genes, before[i], visible, place_of, factors, ones, product)
            total = np.float64(_dot(product, free))
            own = 0.0 if is_visible[label] else product[place_of[label]] * frequency[label]
            share = own / total if total > 0 else 0.0
            losses[found] = _mixed_loss(share, mixed, frequency[label])
            places[found] = _more_likely(product, frequency, most, ordered, starts, is_visible, own)
            found += 1
        _mark(is_visible, genes, visible, False)
    return found


@numba.njit(cache=True, nogil=True)
def add_prior(
    logits, inputs, lengths, tables, hidden_places, labels, first_gene, place_of, edges,
    log_factors, log_frequency, seen,
):  # fmt: skip
    """Add the logarithm of the unnormalised weights to the logits of hidden genes.

    Parameters
    ----------
    logits
        float32 [M, V], added to where the label is not negative.
    inputs, lengths, tables
        int32 [rows, L], int64 [rows], int64 [rows]: the number of the table for each row.
    hidden_places, labels
        int64 [M], flat positions in rows x L. Entries with a label that is not negative come first
        and are ascending.
    place_of, log_frequency
        int32, float32 [V].
    log_factors
        float32 [tables, contexts, SLOTS, 2 G - 1], logarithm of the factor that a neighbour gives a
        gene's frequency.
    seen
        float32, added for each visible gene.
    """
    num_rows, width = inputs.shape
    size = (log_factors.shape[3] + 1) // 2
    genes = np.empty(width, np.int64)
    total, zeros = np.empty(size, np.float32), np.zeros(size, np.float32)
    first, number = 0, len(labels)
    for row in range(num_rows):
        last = first
        while last < number and labels[last] >= 0 and hidden_places[last] < (row + 1) * width:
            last += 1
        if last == first:
            continue
        visible, hidden = 0, first
        before = np.empty(last - first, np.int64)
        for i in range(lengths[row]):
            if hidden < last and hidden_places[hidden] == row * width + i:
                before[hidden - first] = visible
                hidden += 1
            elif inputs[row, i] >= first_gene:
                genes[visible] = inputs[row, i]
                visible += 1
        for m in range(first, last):
            context = _context(hidden_places[m] - row * width, lengths[row], edges)
            _fill_sum(
                context, genes, before[m - first], visible, place_of, log_factors[tables[row]],
                zeros, total,
            )  # fmt: skip
            own = logits[m]
            for token in range(len(log_frequency)):
                own[token] += total[place_of[token]] + log_frequency[token]
            for i in range(visible):
                own[genes[i]] += seen
        first = last


@numba.njit(cache=True, nogil=True)
def _fill_sum(context, genes, before, visible, place_of, log_factors, zeros, total):
    """Fill `total` (float32 [G]) with the sum of the log-factors of all neighbours."""
    a, b, c, d, e, f, g, h = _windows(context, genes, before, visible, place_of, log_factors, zeros)
    for i in range(len(total)):
        total[i] = ((a[i] + b[i]) + (c[i] + d[i])) + ((e[i] + f[i]) + (g[i] + h[i]))


@numba.njit(cache=True, nogil=True)
def _more_likely(product, frequency, most, ordered, starts, is_visible, own):
    """Return how many genes that are not visible have a larger weight than `own`."""
    better, size = 0, len(product)
    # Most places have no such gene, so whole stretches of places are skipped at once.
    bound = np.float32(own * (1 - 1e-6))
    for first in range(0, size, _STRETCH):
        last = first + _STRETCH if first + _STRETCH < size else size
        candidates = 0
        for place in range(first, last):
            candidates += int(product[place] * most[place] > bound)
        if candidates == 0:
            continue
        for place in range(first, last):
            if product[place] * most[place] > bound:
                for at in range(starts[place], starts[place + 1]):
                    gene = ordered[at]
                    if product[place] * frequency[gene] <= own:
                        break  # the remaining genes of this place are less frequent
                    better += int(not is_visible[gene])
    return better


@numba.njit(cache=True, nogil=True)
def exponents_step(
    inputs, lengths, labels, mask_token, first_gene, place_of, frequency, mass, edges,
    log_factors, exponents, every, gradient, curvature,
):  # fmt: skip
    """Add up the gradient and curvature of the loss in the exponents; return the loss.

    Parameters
    ----------
    every
        Only every n-th hidden gene is used.
    log_factors
        float32 [contexts, SLOTS, 2 G - 1], before the exponents are applied.
    exponents
        float64 [SLOTS].
    gradient, curvature
        float64 [SLOTS], [SLOTS, SLOTS], added to.
    """
    size = len(mass)
    genes, before, positions = _room(inputs.shape[1])
    free, weight = np.empty(size, np.float32), np.empty(size, np.float32)
    scaled, ones = np.empty(size, np.float32), np.ones(size, np.float32)
    zeros = np.zeros(size, np.float32)
    logs = np.zeros((SLOTS, size), np.float32)
    mean, own = np.empty(SLOTS), np.empty(SLOTS)
    loss, found = 0.0, 0
    for row in range(len(inputs)):
        visible, hidden = _visible_genes(
            inputs, row, lengths[row], mask_token, first_gene, genes, before, positions
        )
        _free_mass(mass, genes, visible, place_of, frequency, free)
        for i in range(hidden):
            label = labels[found]
            found += 1
            if found % every:
                continue
            context = _context(positions[i], lengths[row], edges)
            explained = 0.0
            for place in range(size):
                weight[place] = 0
            for slot in range(SLOTS):
                found_logs = _factors_of(
                    context, slot, genes, before[i], visible, place_of, log_factors, zeros
                )
                for place in range(size):
                    logs[slot, place] = found_logs[place]
                own[slot] = logs[slot, place_of[label]]
                explained += exponents[slot] * own[slot]
                _add_scaled(weight, np.float32(exponents[slot]), found_logs)
            for place in range(size):
                weight[place] = np.exp(weight[place]) * free[place]
            total = np.float64(_dot(weight, ones))
            if not total > 0:
                continue
            loss += math.log(total / frequency[label]) - explained
            for slot in range(SLOTS):
                mean[slot] = _dot(weight, logs[slot]) / total
                gradient[slot] += mean[slot] - own[slot]
            for slot in range(SLOTS):
                for place in range(size):
                    scaled[place] = weight[place] * logs[slot, place]
                for other in range(slot + 1):
                    second = _dot(scaled, logs[other]) / total
                    curvature[slot, other] += second - mean[slot] * mean[other]
    for slot in range(SLOTS):
        for other in range(slot):
            curvature[other, slot] = curvature[slot, other]
    return loss


@numba.njit(cache=True, nogil=True)
def score_without_repeats(
    inputs, lengths, labels, bins, mask_token, first_gene, by_rank, larger, frequency, mixed,
    losses, places,
):  # fmt: skip
    """Fill the losses and places of hidden genes from a table by rank, without visible genes.

    Parameters
    ----------
    bins
        int64 [M], the bins of the hidden genes' ranks.
    by_rank, larger
        float64 [bins, V] probabilities; int32 [bins, V], for each entry the number of larger
        entries in its row.
    """
    genes, before, positions = _room(inputs.shape[1])
    is_visible = np.zeros(len(frequency), np.bool_)
    found = 0
    for row in range(len(inputs)):
        visible, hidden = _visible_genes(
            inputs, row, lengths[row], mask_token, first_gene, genes, before, positions
        )
        _mark(is_visible, genes, visible, True)
        last, taken = -1, 0.0
        for _ in range(hidden):
            label, rank = labels[found], bins[found]
            table = by_rank[rank]
            if rank != last:
                last, taken = rank, 0.0
                for i in range(visible):
                    taken += table[genes[i]]
            own = 0.0 if is_visible[label] else table[label]
            left = 1 - taken if 1 - taken > own else own
            losses[found] = _mixed_loss(own / left if own > 0 else 0.0, mixed, frequency[label])
            better = larger[rank, label]
            for i in range(visible):
                better -= int(table[genes[i]] > table[label])
            places[found] = better
            found += 1
        _mark(is_visible, genes, visible, False)
    return found
