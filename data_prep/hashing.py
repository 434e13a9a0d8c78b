"""Counter-based random numbers: the same key gives the same numbers, in any process and order.

Everything random in this project (the global shuffle, the held-out split, the order of an epoch,
the masks) is a pure function of integers, so that no state of a generator has to be passed on.
`stream_key` makes a key of a seed and names; the other functions draw numbers with it.
"""

from __future__ import annotations

import zlib

import numba
import numpy as np

_WORD = 0xFFFFFFFFFFFFFFFF
_FEISTEL_ROUNDS = 6


@numba.njit("uint64(uint64)", inline="always", cache=True)
def mix64_of(x):
    """Return 64 well-mixed bits of one 64-bit integer (the splitmix64 finaliser), for kernels."""
    x += np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@numba.njit(cache=True, nogil=True)
def _mix64(values):
    out = np.empty(len(values), dtype=np.uint64)
    for i in range(len(values)):
        out[i] = mix64_of(values[i])
    return out


def mix64(values: np.ndarray | int) -> np.ndarray:
    """Return 64 well-mixed bits for each 64-bit integer (the splitmix64 finaliser).

    Parameters
    ----------
    values
        Integers of any shape; taken modulo 2**64.

    Returns
    -------
    uint64 array of the same shape (0-d for a scalar). Source: Steele, Lea & Flood, OOPSLA 2014.
    """
    bits = np.uint64(values & _WORD) if isinstance(values, int) else values
    words = np.asarray(bits).astype(np.uint64)
    return _mix64(words.reshape(-1)).reshape(words.shape)


def stream_key(seed: int, *parts: int | str) -> int:
    """Return one 64-bit key for a named stream, e.g. ``stream_key(seed, "mask", epoch)``."""
    key = mix64_of(np.uint64(seed & _WORD))
    for part in parts:
        number = zlib.crc32(part.encode()) if isinstance(part, str) else int(part) & _WORD
        key = mix64_of(np.uint64(key ^ mix64_of(np.uint64(number))))
    return int(key)


def stream_keys(key: int, parts: np.ndarray) -> np.ndarray:
    """Return uint64 [parts], ``stream_key(key, part)`` for each of many integer parts."""
    return mix64(mix64(key) ^ mix64(parts))


def keyed_hash(key: int, values: np.ndarray) -> np.ndarray:
    """Return uint64 hashes of integers under a key; equal keys give equal hashes."""
    return mix64(mix64(values) ^ np.uint64(key))


def hash_strings(key: int, values: list[str]) -> np.ndarray:
    """Return uint64 hashes of strings under a key (crc32 and adler32 joined, then mixed)."""
    raw = [v.encode() for v in values]
    joined = np.array([(zlib.crc32(r) << 32) | zlib.adler32(r) for r in raw], dtype=np.uint64)
    return keyed_hash(key, joined)


def unit_interval(hashes: np.ndarray) -> np.ndarray:
    """Return float64 in [0, 1) from uint64 hashes (53 bits)."""
    return (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permute(index: np.ndarray, size: int, key: int | np.ndarray) -> np.ndarray:
    """Return the images of indices under a keyed permutation of ``range(size)``.

    The permutation is not stored. It is a Feistel network over the next even power of two, applied
    until the image is below `size` (Black & Rogaway, CT-RSA 2002). The memory is constant, and
    position 10,000,000 takes as long as position 0.

    Parameters
    ----------
    index
        int64 array of any shape, values in [0, size); not checked.
    size
        Length of the permuted range, at least 1.
    key
        64-bit key; each key gives another permutation. A uint64 array gives each index its own key.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    out = np.array(index, dtype=np.uint64, ndmin=1)
    # The keys are copied, because numba compiles the loop anew for every memory layout.
    keys = np.array(np.broadcast_to(np.asarray(key, dtype=np.uint64), out.shape), order="C")
    _permute(out.reshape(-1), keys.reshape(-1), np.uint64(size), np.uint64(half_bits))
    return out.reshape(np.shape(index)).astype(np.int64)


@numba.njit(cache=True, nogil=True)
def _permute(index, keys, size, half_bits):
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    round_keys = np.empty(_FEISTEL_ROUNDS, dtype=np.uint64)
    for i in range(len(index)):
        if i == 0 or keys[i] != keys[i - 1]:
            mixed = mix64_of(keys[i])
            for number in range(_FEISTEL_ROUNDS):
                round_keys[number] = mix64_of(mixed ^ mix64_of(np.uint64(number)))
        x = index[i]
        while True:
            left, right = x >> half_bits, x & mask
            for round_key in round_keys:
                left, right = right, left ^ (mix64_of(right ^ round_key) & mask)
            x = (left << half_bits) | right
            if x < size:
                break
        index[i] = x
