"""Counted tables are kept beside the shards, and read for those shards alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from data_prep.shards.reader import DamagedBlock, ShardSet
from pretrain.counting.counted_tables import FOLDER_NAME, counted_tables

pytestmark = pytest.mark.quick


class _Counter:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, left_out: set[int] | None) -> dict[str, np.ndarray]:
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


def _flip(shards: ShardSet, number: int) -> None:
    """Flip a bit of a block, or back."""
    index = shards.index
    path = shards.folder / shards.manifest["shards"][int(index["shard"][number])]["name"]
    content = bytearray(path.read_bytes())
    content[int(index["offset"][number]) + int(index["bytes"][number]) - 20] ^= 4
    path.write_bytes(content)


def test_what_lacks_a_damaged_block_is_counted_anew_when_it_heals(
    shards: Path, tmp_path: Path
) -> None:
    from pretrain.counting.arithmetic import arithmetic_tables
    from pretrain.counting.corpus_svd import corpus_svd

    opened = ShardSet(Path(shutil.copytree(shards, tmp_path / "copy")))
    shutil.rmtree(opened.folder / FOLDER_NAME, ignore_errors=True)
    number = int(opened.extents("train")[0].first_block)

    def cells(quarantine: bool) -> list[int]:
        now = ShardSet(opened.folder)
        tables = arithmetic_tables(now, 10**9, quarantine)
        return [
            int(tables["counted"][0]), corpus_svd(now, 5, quarantine=quarantine).origin["cells"]
        ]  # fmt: skip

    _flip(opened, number)
    fewer = cells(True)
    kept = {f: f.read_bytes() for f in (opened.folder / FOLDER_NAME).iterdir()}
    assert cells(True) == fewer, "kept as long as it is damaged"
    assert {f: f.read_bytes() for f in (opened.folder / FOLDER_NAME).iterdir()} == kept
    with pytest.raises(DamagedBlock):
        cells(False)
    _flip(opened, number)
    whole = cells(True)
    assert whole == [n + int(opened.index["cells"][number]) for n in fewer]
    assert whole[0] == sum(e.num_cells for e in opened.extents("train"))
    _flip(opened, number)
    assert cells(True) == whole, "more is known than can be read now"
