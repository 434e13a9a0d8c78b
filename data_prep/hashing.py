"""Counter-based randomness: the same numbers for the same key, on any process, in any order.

Everything random in this project (the global shuffle, the held-out split, the order of an epoch,
the masks) is a pure function of integers, so that no generator state has to travel.
"""

from __future__ import annotations

import zlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLY_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = np.uint64(0x94D049BB133111EB)
_FEISTEL_ROUNDS = 6


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
    bits = np.uint64(values & 0xFFFFFFFFFFFFFFFF) if isinstance(values, int) else values
    with np.errstate(over="ignore"):
        x = np.asarray(bits).astype(np.uint64) + _GOLDEN
        x = (x ^ (x >> np.uint64(30))) * _MULTIPLY_1
        x = (x ^ (x >> np.uint64(27))) * _MULTIPLY_2
        return x ^ (x >> np.uint64(31))


def stream_key(seed: int, *parts: int | str) -> int:
    """Return one 64-bit key for a named stream, e.g. ``stream_key(seed, "mask", epoch)``."""
    key = mix64(seed)
    for part in parts:
        number = zlib.crc32(part.encode()) if isinstance(part, str) else part
        key = mix64(key ^ mix64(number))
    return int(key)


def stream_keys(key: int, parts: np.ndarray) -> np.ndarray:
    """Return uint64, ``stream_key(key, part)`` for each of many integer parts."""
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
    """Return where a keyed permutation of ``range(size)`` sends each index, without storing it.

    A Feistel network over the next even power of two, walked until the image falls below `size`
    (Black & Rogaway, CT-RSA 2002). Constant memory: position 10,000,000 costs what position 0 does.

    Parameters
    ----------
    index
        int64 array of any shape, values in [0, size); not checked.
    size
        Length of the permuted range, at least 1.
    key
        64-bit key; each key is another permutation. An array (uint64) gives each index its own.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    out = np.array(index, dtype=np.uint64, ndmin=1)
    mixed = np.broadcast_to(mix64(key), out.shape).reshape(-1)
    round_keys = [mix64(mixed ^ mix64(r)) for r in range(_FEISTEL_ROUNDS)]
    pending = np.arange(out.size)
    flat = out.reshape(-1)
    while pending.size:
        left, right = flat[pending] >> shift, flat[pending] & mask
        for round_key in round_keys:
            left, right = right, left ^ (mix64(right ^ round_key[pending]) & mask)
        flat[pending] = (left << shift) | right
        pending = pending[flat[pending] >= np.uint64(size)]
    return out.reshape(np.shape(index)).astype(np.int64)
