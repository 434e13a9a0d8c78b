import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.hashing import (
    hash_strings,
    keyed_hash,
    mix64,
    permute,
    stream_key,
    unit_interval,
)

pytestmark = pytest.mark.quick


def test_mix64_is_splitmix64():
    # First outputs of splitmix64 seeded with 0 (Vigna's reference implementation).
    state = np.array([0, 0x9E3779B97F4A7C15], dtype=np.uint64)
    assert [hex(v) for v in mix64(state)] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4"]


@settings(deadline=None)  # the first example compiles
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size, key):
    image = permute(np.arange(size), size, key)
    assert np.array_equal(np.sort(image), np.arange(size))


def test_permute_looks_random_and_depends_on_the_key():
    a, b = permute(np.arange(10_000), 10_000, 1), permute(np.arange(10_000), 10_000, 2)
    assert abs(np.corrcoef(np.arange(10_000), a)[0, 1]) < 0.05
    assert (a == b).mean() < 0.01


def test_streams_and_hashes_differ():
    keys = {stream_key(0, "mask", e) for e in range(100)} | {stream_key(1, "mask", 0)}
    assert len(keys) == 101
    values = unit_interval(keyed_hash(stream_key(0, "x"), np.arange(100_000)))
    assert values.min() >= 0
    assert values.max() < 1
    assert abs(values.mean() - 0.5) < 0.005
    assert hash_strings(1, ["a", "b"])[0] != hash_strings(1, ["a", "b"])[1]
