"""Loops over tiles in the cache, compiled for the processor at hand by numba.

Numbers are float32, or the bits of bfloat16 as uint16; arithmetic is float32 in both cases.
"""

from __future__ import annotations

# pyright: reportCallIssue=false, reportRedeclaration=false
import math
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

_LOG2_E = np.float32(math.log2(math.e))
_LOWEST = np.float32(-3.0e38)
_LANES = np.uintp(16)


def numbers(tile: torch.Tensor) -> np.ndarray:
    """Return a tensor as the kernels take it: bfloat16 as the uint16 of its bits."""
    return tile.view(torch.uint16).numpy() if tile.dtype == torch.bfloat16 else tile.numpy()


@intrinsic
def _float_of(_context, bits):
    def generate(_context, builder, _signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def _bits_of(_context, number):
    def generate(_context, builder, _signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


def _get(number: Any) -> Any: ...  # float32 of an element: itself, or of a bfloat16's bits


def _put(row, place, number): ...  # write a float32 into a row of either, to nearest even


@overload(_get)
def _overload_get(number):
    if isinstance(number, types.Float):
        return lambda number: number
    return lambda number: _float_of(np.uint32(number) << np.uint32(16))


@overload(_put)
def _overload_put(row, place, number):
    if isinstance(row.dtype, types.Float):

        def put(row, place, number):
            row[place] = number

    else:

        def put(row, place, number):
            bits = _bits_of(number)
            odd = (bits >> np.uint32(16)) & np.uint32(1)
            row[place] = (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)

    return put


@numba.njit(cache=True)
def _power_of_2(number):
    """Return 2 ** number for number <= 0, to float32's last bits; vectorised, unlike libm's."""
    number = max(number, np.float32(-126.0))
    whole = np.rint(number)
    part = number - whole
    # Minimax on [-0.5, 0.5].
    power = np.float32(1.5353362e-4)
    power = power * part + np.float32(1.3398874e-3)
    power = power * part + np.float32(9.6184373e-3)
    power = power * part + np.float32(5.5503324e-2)
    power = power * part + np.float32(2.4022648e-1)
    power = power * part + np.float32(6.9314720e-1)
    power = power * part + np.float32(1.0)
    return power * _float_of(np.uint32(np.int32(whole) + np.int32(127)) << np.uint32(23))


@numba.njit(cache=True)
def mix(key, number):
    """Return a uint32 hash ("lowbias32" with a key)."""
    # numba computes products and sums of 32 bits in 64: each is cut.
    bits = np.uint32(np.uint32(number) * np.uint32(0x9E3779B9) + np.uint32(key))
    bits = np.uint32((bits ^ (bits >> np.uint32(16))) * np.uint32(0x7FEB352D))
    bits = np.uint32((bits ^ (bits >> np.uint32(15))) * np.uint32(0x846CA68B))
    return np.uint32(bits ^ (bits >> np.uint32(16)))


_FAST = {"reassoc", "contract", "nsz"}  # sums in any order; numbers that are not finite stay so


@numba.njit(cache=True, nogil=True)
def dropout_factors(factors, key, dropout):
    """Fill float32 [rows, L] with 0 where a weight is dropped, and with 1 / (1 - dropout)."""
    threshold = np.uint32(dropout * 2**32)
    kept = np.float32(1 / (1 - dropout))
    for number in range(np.uintp(factors.shape[0])):
        row, row_key = factors[number], mix(key, number)
        for place in range(np.uintp(factors.shape[1])):
            row[place] = np.float32(0.0) if mix(row_key, place) < threshold else kept


@numba.njit(cache=True, nogil=True, fastmath=_FAST)
def _largest(row, real, lanes):
    """Return the largest of the first `real` numbers; in lanes, for a maximum of one number at a
    time is not vectorised."""
    lanes[:] = _LOWEST
    even = real // _LANES * _LANES
    for start in range(np.uintp(0), even, _LANES):
        for lane in range(_LANES):
            score = _get(row[start + lane])
            lanes[lane] = score if score > lanes[lane] else lanes[lane]
    largest = _LOWEST
    for lane in range(_LANES):
        largest = max(largest, lanes[lane])
    for place in range(even, real):
        largest = max(largest, _get(row[place]))
    return np.float32(largest)


@numba.njit(cache=True, nogil=True, fastmath=_FAST)
def score_labels(logits, labels, losses, places, log_sums):
    """Write of each row of [M, V] logits: cross-entropy of the label in nats; the label's place
    among all guesses; the log of the sum of exponentials. Label < 0: 0, V, 0.

    Of T equal logits the label gets one of the T places, by its number modulo T.
    """
    size = np.uintp(logits.shape[1])
    lanes = np.empty(_LANES, dtype=np.float32)
    for number in range(np.uintp(logits.shape[0])):
        label = labels[number]
        if label < 0:
            losses[number], places[number], log_sums[number] = 0.0, size, 0.0
            continue
        row = logits[number]
        largest, own = _largest(row, size, lanes), _get(row[np.uintp(label)])
        total = np.float32(0.0)
        for gene in range(size):
            total += _power_of_2((_get(row[gene]) - largest) * _LOG2_E)
        above, tied = np.int32(0), np.int32(0)
        for gene in range(size):
            above += np.int32(not _get(row[gene]) <= own)
            tied += np.int32(_get(row[gene]) == own)
        log_sums[number] = largest + np.log(total)
        losses[number] = log_sums[number] - own
        places[number] = above + label % max(tied, np.int32(1))


@numba.njit(cache=True, nogil=True, fastmath=_FAST)
def slopes_of_logits(logits, labels, log_sums, slopes):
    """Turn [M, V] logits into slopes: softmax minus 1 at the label, times each row's slope."""
    size = np.uintp(logits.shape[1])
    for number in range(np.uintp(logits.shape[0])):
        row, label, slope = logits[number], labels[number], slopes[number]
        log_sum = np.float32(log_sums[number] * _LOG2_E)
        if label < 0:
            for gene in range(size):
                _put(row, gene, np.float32(0.0))
            continue
        own = _power_of_2(_get(row[np.uintp(label)]) * _LOG2_E - log_sum)
        for gene in range(size):
            weight = _power_of_2(_get(row[gene]) * _LOG2_E - log_sum)
            _put(row, gene, weight * slope)
        _put(row, np.uintp(label), (own - np.float32(1.0)) * slope)
