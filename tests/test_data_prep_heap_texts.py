"""Columns of texts read from HDF5's heaps at once: what HDF5 reads, or left to it."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from data_prep.matrices.heap_texts import joined_texts
from data_prep.matrices.matrix_store import decoded, decoded_texts
from tests.synthetic import make_cells

_TEXT = h5py.string_dtype()


def texts(number: int, seed: int = 0) -> list[str]:
    """Return names of genes, some empty, doubled, not ASCII, and longer than a heap is."""
    rng = np.random.default_rng(seed)
    found = [f"ENSG{i:011d}" for i in rng.integers(0, number, number)]
    found[3], found[5], found[7], found[-1] = "", "ä 😀 µ", "x" * 10_000, ""
    return found


def write(path: Path, values: list[str], **options) -> Path:
    with h5py.File(path, "w", **options.pop("file", {})) as file:
        file.create_dataset("other", data=["a", "b"], dtype=_TEXT)
        file.create_dataset("texts", data=values, dtype=_TEXT, **options)
    return path


def is_read_at_once(path: Path) -> bool:
    """Return whether `joined_texts` has read them; assert that it is what HDF5 reads."""
    with h5py.File(path) as file:
        expected = [t.decode() for t in np.asarray(file["texts"][:]).tolist()]
        joined = joined_texts(file["texts"])
    if joined is not None:
        assert joined.decode().split("\0") == expected
    return joined is not None


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunks": (700,)},
        {"compression": "gzip", "chunks": (999,)},
        {"compression": "gzip", "compression_opts": 9, "maxshape": (None,)},
        {"file": {"libver": "latest"}, "compression": "gzip"},
    ],
)
def test_as_hdf5_reads_them(options, tmp_path):
    assert is_read_at_once(write(tmp_path / "a.h5", texts(3000), **options))


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "gzip", "shuffle": True},
        {"compression": "lzf"},
        {"file": {"userblock_size": 512}},
    ],
)
def test_what_is_unusual_is_left_to_hdf5(options, tmp_path):
    assert not is_read_at_once(write(tmp_path / "a.h5", texts(3000), **options))


def test_other_kinds_are_left_to_hdf5(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["fixed"] = np.array([b"a", b"bc"] * 1000)
        file["numbers"] = np.arange(2000)
        file["two"] = np.array([["a", "b"]] * 1000, dtype=object)
        file["never written"] = h5py.Empty("i")
        file.create_dataset("empty", shape=(2000,), dtype=_TEXT)
    with h5py.File(tmp_path / "a.h5") as file:
        for name in ("fixed", "numbers", "two", "empty"):
            assert joined_texts(file[name]) is None, name
    assert joined_texts(np.array(["a"] * 2000, dtype=object)) is None


def test_texts_that_were_overwritten_and_heaps_that_are_shared(tmp_path):
    """References and heaps in another order than that of the texts, with free places between."""
    path = write(tmp_path / "a.h5", texts(2000), chunks=(300,))
    with h5py.File(path, "a") as file:
        rng = np.random.default_rng(1)
        for place in rng.integers(0, 2000, 200):
            file["texts"][place] = f"new {place}" * int(rng.integers(1, 40))
        file.create_dataset("more", data=texts(1500, seed=2), dtype=_TEXT)
        file["texts"][1] = file["more"][1]
    assert is_read_at_once(path)


def test_damage_is_read_as_hdf5_reads_it_or_left_to_it(tmp_path):
    path = write(tmp_path / "a.h5", texts(1500), compression="gzip", chunks=(500,))
    data, rng = path.read_bytes(), np.random.default_rng(3)
    for number in range(60):
        changed = bytearray(data)
        for place in rng.integers(0, len(data), 30):
            changed[place] = int(rng.integers(256))
        other = tmp_path / f"{number}.h5"
        other.write_bytes(changed[: len(changed) // 2] if number % 10 == 0 else changed)
        try:
            with h5py.File(other) as file:
                joined, whole = joined_texts(file["texts"]), file["texts"]
                if joined is not None:
                    expected = b"\0".join(np.asarray(whole[:]).tolist())
                    assert joined == expected
        except (OSError, RuntimeError, KeyError, ValueError):
            continue  # HDF5 cannot read it either


def test_a_gene_table_is_the_same_object_file_after_file(tmp_path):
    cells = make_cells(3, num_genes=1200)
    tables = []
    for name in ("a", "b"):
        cells.write_h5ad(tmp_path / f"{name}.h5ad")
        with h5py.File(tmp_path / f"{name}.h5ad") as file:
            index = file["var"][file["var"].attrs["_index"]]
            tables.append(decoded_texts(index))
            assert tables[-1] is not None
            assert tables[-1].tolist() == decoded(np.asarray(index[:])).tolist()
    assert tables[0] is tables[1]
