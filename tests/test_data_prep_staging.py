"""Copies by row in the working folder are used again exactly when they are what was written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse

from data_prep.genes.vocabulary import Vocabulary
from data_prep.matrices import h5ad_zarr
from data_prep.matrices.matrix_store import decoded
from data_prep.matrices.row_copy import is_whole, staged_folder
from data_prep.prepare import run as prepare_module
from data_prep.prepare.options import PrepareOptions
from data_prep.prepare.run import prepare
from data_prep.sources.count_source import CountSource
from data_prep.sources.open_source import open_source
from data_prep.sources.source_spec import SourceOptions, source_at
from tests.synthetic import make_cells

VOCABULARY = Vocabulary(
    tuple(make_cells(2).var_names), np.ones(200), {"<pad>": 0, "<mask>": 1}, 256
)
OPTIONS = PrepareOptions(heldout_share=0.3, block_cells=16)


class Killed(BaseException):
    pass


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """Return a source stored by gene, and the folder of a run that ended before its cells."""
    cells = make_cells(60)
    cells.X = scipy.sparse.csc_matrix(cells.X)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    spec = source_at(tmp_path / "cells.h5ad", SourceOptions())

    def stop(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "decide_all", stop)
        with pytest.raises(Killed):
            prepare([spec], tmp_path / "out", VOCABULARY, OPTIONS)
    for path in (tmp_path / "out" / ".partial").glob("chunk-*"):
        path.unlink()
    return spec, tmp_path / "out"


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


@pytest.mark.parametrize("name", ["data.npy", "indices.npy", "indptr.npy", "done.json", None])
def test_a_flipped_bit_in_a_copy_is_found(name, interrupted, tmp_path, monkeypatch):
    spec, out = interrupted
    (copy,) = (out / ".partial").glob("rows-*")
    assert is_whole(copy)
    if name is not None:
        damaged = bytearray((copy / name).read_bytes())
        # Of the record a digit of a hash; of an array a value.
        damaged[-5 if name == "done.json" else -12] ^= 1
        (copy / name).write_bytes(damaged)
        assert not is_whole(copy)
    made = []
    real = h5ad_zarr.stage_rows
    monkeypatch.setattr(
        h5ad_zarr,
        "stage_rows",
        lambda entries, cells, folder: made.append(folder.exists()) or real(entries, cells, folder),
    )
    prepare([spec], out, VOCABULARY, OPTIONS)
    assert made[0] is (name is None)  # a whole copy is used again, any other is gone
    prepare([spec], tmp_path / "whole", VOCABULARY, OPTIONS)
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"sha256": {}}', '{"sha256": {"gone": "0"}}'])
def test_records_that_are_none(text, tmp_path):
    (tmp_path / "done.json").write_text(text)
    assert not is_whole(tmp_path)
    assert not is_whole(tmp_path / "absent")


def test_a_folder_is_complete_or_absent(tmp_path):
    def fails(aside: Path) -> dict[str, int]:
        (aside / "half").write_text("half")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        staged_folder(tmp_path / "copy", fails)
    assert not list(tmp_path.iterdir())

    def other(aside: Path) -> dict[str, int]:
        staged_folder(tmp_path / "copy", write)  # another process is faster
        return write(aside)

    def write(aside: Path) -> dict[str, int]:
        (aside / "part").write_text("whole")
        return {"cells": 3}

    staged_folder(tmp_path / "copy", other)
    assert [p.name for p in tmp_path.iterdir()] == ["copy"] and is_whole(tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "done.json").read_text())["cells"] == 3


def test_names_of_genes_are_read_once_for_a_file_that_stays(tmp_path, monkeypatch):
    """The survey and the encoding open a file each; its names are looked up and read once."""
    cells = make_cells(60)
    specs = []
    for number in range(3):
        cells.write_h5ad(tmp_path / f"cells{number}.h5ad")
        specs.append(source_at(tmp_path / f"cells{number}.h5ad", SourceOptions()))
    read, looked_up = [], []
    real = h5ad_zarr.AnnDataStore.var
    monkeypatch.setattr(
        h5ad_zarr.AnnDataStore, "var", lambda self, c: read.append(self.path) or real(self, c)
    )
    lookup = type(VOCABULARY.lookup)
    find_all = lookup.find_all
    monkeypatch.setattr(
        lookup, "find_all", lambda self, *a, **k: looked_up.append(1) or find_all(self, *a, **k)
    )
    prepare(specs, tmp_path / "out", replace(VOCABULARY), OPTIONS)  # one that nobody has seen
    assert len(looked_up) == 1
    assert len(read) == 6  # ids and symbols of each


def test_a_changed_file_is_another_table(tmp_path):
    cells = make_cells(20)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    spec = source_at(tmp_path / "cells.h5ad", SourceOptions())
    first = open_source(spec)
    cells.var_names = [*cells.var_names[::-1]]
    cells.write_h5ad(tmp_path / "other.h5ad")
    (tmp_path / "other.h5ad").replace(tmp_path / "cells.h5ad")
    second = open_source(spec)
    assert isinstance(first, CountSource) and isinstance(second, CountSource)
    assert second.gene_ids == first.gene_ids[::-1]


def test_memory_below_the_program_itself_says_so(tmp_path, caplog):
    make_cells(60).write_h5ad(tmp_path / "cells.h5ad")
    spec = source_at(tmp_path / "cells.h5ad", SourceOptions())
    for name, memory_gib in (("much", 0.5), ("little", 0.25)):
        caplog.clear()
        options = replace(OPTIONS, memory_gib=memory_gib)
        prepare([spec], tmp_path / name, VOCABULARY, options)
        said = [r.getMessage() for r in caplog.records if "--memory" in r.getMessage()]
        assert len(said) == (name == "little"), said
    assert "--memory 0.25" in said[0] and "0.5 GiB" in said[0]
    assert content(tmp_path / "much") == content(tmp_path / "little")


def test_texts_are_decoded_as_one_by_one():
    """Long tables are kept for the next file, under all their bytes."""
    for length in (3, 1500):
        names = [f"Gène{i}" for i in range(length)]
        stored = np.array([n.encode() for n in names], dtype=object)
        for values in (stored, stored.astype("S"), stored):
            assert decoded(values).tolist() == names
        other = stored.copy()
        other[-1] = b"another"
        assert decoded(other).tolist() == [*names[:-1], "another"]
        other[0] = b"with\0zero"  # no column of a file, but nothing may be shifted by it
        assert decoded(other).tolist() == ["with\0zero", *names[1:-1], "another"]
        other[1] = None
        assert decoded(other)[1] is None
