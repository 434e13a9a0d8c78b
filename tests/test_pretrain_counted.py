"""Counted tables are kept beside the shards, and only read for the shards they were made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_prep.shards import ShardSet
from pretrain.counted import FOLDER_NAME, counted_tables


class _Counter:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> dict[str, np.ndarray]:
        self.calls += 1
        return {"a": np.arange(6.0).reshape(2, 3).T, "b": np.array([self.calls], dtype=np.int32)}


@pytest.fixture()
def opened(shards: Path, tmp_path: Path) -> ShardSet:
    opened = ShardSet(shards)
    opened.folder = tmp_path / "shards"  # where tables are kept; the shards themselves are shared
    return opened


def test_counted_once_and_again_for_other_settings(opened: ShardSet) -> None:
    count = _Counter()
    first = counted_tables(opened, "x", {"version": 1}, count)
    again = counted_tables(opened, "x", {"version": 1}, count)
    np.testing.assert_array_equal(first["a"], again["a"])
    assert count.calls == 1
    assert counted_tables(opened, "x", {"version": 2}, count)["b"] == 2


def test_a_damaged_table_is_counted_again(opened: ShardSet) -> None:
    count = _Counter()
    counted_tables(opened, "x", {}, count)
    (file,) = (opened.folder / FOLDER_NAME).iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert counted_tables(opened, "x", {}, count)["b"] == 2
    file.write_bytes(b"")
    assert counted_tables(opened, "x", {}, count)["b"] == 3


def test_the_fallback_keeps_what_the_folder_of_shards_cannot(
    opened: ShardSet, tmp_path: Path
) -> None:
    count = _Counter()
    opened.folder.mkdir()
    (opened.folder / FOLDER_NAME).write_text("a file stands in the way")
    for _ in range(2):
        counted_tables(opened, "x", {}, count, tmp_path / "run")
    assert count.calls == 1
    assert len(list((tmp_path / "run" / FOLDER_NAME).iterdir())) == 1
    counted_tables(opened, "x", {}, count)
    assert count.calls == 2
