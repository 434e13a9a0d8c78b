"""--obs-filter reads the cells that a query over obs names, in every format that has obs."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse

from data_prep.genes.vocabulary import Vocabulary
from data_prep.matrices import choose_cells
from data_prep.prepare.check import check_sources
from data_prep.prepare.options import PrepareOptions
from data_prep.prepare.run import prepare
from data_prep.running.workers import SERIAL
from data_prep.sources.count_source import CountSource
from data_prep.sources.open_source import open_path
from data_prep.sources.source_spec import SourceOptions, source_at
from tests.data_files import WRITERS, write_h5ad, write_mtx, write_tenx
from tests.synthetic import make_cells

QUERY = "is_primary_data == True and disease == 'normal'"


def census_like(num_cells: int = 150):
    cells = make_cells(num_cells)
    cells.obs["is_primary_data"] = np.arange(num_cells) % 2 == 0
    cells.obs["disease"] = np.where(np.arange(num_cells) % 3 == 0, "normal", "melanoma")
    cells.obs["age"] = np.arange(num_cells)
    return cells


def read(path, query, stretches=((0, 7), (7, None)), **options):
    source = open_path(path, SourceOptions(obs_filter=query, **options))
    assert isinstance(source, CountSource)
    blocks = [b for start, stop in stretches for b in source.blocks(start, stop)]
    counts = scipy.sparse.vstack([
        scipy.sparse.csr_matrix((b.data, b.indices, b.indptr), shape=(len(b.totals), 200))
        for b in blocks
    ])  # fmt: skip
    return source, blocks, counts.toarray()


@pytest.mark.parametrize("write", [w for w in WRITERS if w not in (write_mtx, write_tenx)])
def test_the_chosen_cells_in_every_format(write, tmp_path, monkeypatch):
    monkeypatch.setattr(choose_cells, "_STRETCH_CELLS", 40)
    monkeypatch.setattr(choose_cells, "_SMALL_GAP", 5)
    cells = census_like()
    path = write(cells, tmp_path)
    for query, chosen in (
        (QUERY, np.arange(150) % 6 == 0),
        ("age > 130", np.arange(150) > 130),
        ("disease in ['normal'] and (age < 20 or age >= 100)",
         (np.arange(150) % 3 == 0) & ((np.arange(150) < 20) | (np.arange(150) >= 100))),
    ):  # fmt: skip
        source, blocks, counts = read(path, query, columns=("donor",))
        wanted = cells[chosen]
        assert source.num_cells == wanted.n_obs and source.num_filtered_out == 150 - wanted.n_obs
        np.testing.assert_array_equal(counts, wanted.X.toarray())
        assert sum((b.cell_ids for b in blocks), []) == list(wanted.obs_names)
        assert sum((b.metadata["donor"] for b in blocks), []) == list(wanted.obs["donor"])


def test_texts_and_missing_values(tmp_path):
    cells = census_like(60)
    cells.obs["flag"] = pd.Categorical(["True", "False"] * 30)
    cells.obs["count"] = pd.array([1, None, 3] * 20, dtype="Int64")
    cells.obs["site"] = pd.Categorical(["a", None, "is_primary_data"] * 20)
    cells.obs["with space"] = np.arange(60)
    path = write_h5ad(cells, tmp_path)
    for query, expected in (
        ("flag == True", 30),
        ("site.str.startswith('is_')", 20),
        ("count > 2", 20),
        ("site == 'is_primary_data'", 20),
        ("`with space` < 3", 3),
        ("~is_primary_data", 30),
    ):
        source, _, _ = read(path, query, ((0, None),))
        assert source.num_cells == expected, query


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("nothing == 1", r"names no column of obs; it has \['cell_type'"),
        ("disease == 'other'", "no cell passes the filter"),
        ("disease ==", "is not understood"),
        ("age + 1", "is not true or false for each cell"),
        ("@pd.io.common.os.system('x') == disease", "is not understood"),
        ("disease.str.__class__ == 1", "is not understood"),
    ],
)
def test_wrong_queries_are_named(query, message, tmp_path):
    path = write_h5ad(census_like(20), tmp_path)
    with pytest.raises(ValueError, match=message):
        open_path(path, SourceOptions(obs_filter=query))


def test_formats_without_obs_say_so(tmp_path):
    for write, message in ((write_tenx, "no column of obs"), (write_mtx, "no column of obs")):
        folder = tmp_path / write.__name__
        folder.mkdir()
        with pytest.raises(ValueError, match=message):
            open_path(write(make_cells(20), folder), SourceOptions(obs_filter=QUERY))
    pq.write_table(pa.table({"input_ids": [[2, 3]], "length": [2]}), tmp_path / "tokens.parquet")
    with pytest.raises(ValueError, match="obs_filter needs cells with columns"):
        open_path(tmp_path / "tokens.parquet", SourceOptions(obs_filter=QUERY))


def vocabulary() -> Vocabulary:
    genes = tuple(make_cells(2).var_names)
    return Vocabulary(genes, np.ones(200), {"<pad>": 0, "<mask>": 1}, 256)


def test_unfiltered_secondary_data_is_a_warning_with_the_number(tmp_path):
    path = write_h5ad(census_like(), tmp_path)
    said = {}
    for query in (None, QUERY):
        spec = source_at(path, SourceOptions(obs_filter=query))
        options = PrepareOptions(heldout_share=0.3, max_sd_counts=0)
        manifest = prepare([spec], tmp_path / f"out-{bool(query)}", vocabulary(), options)
        (source,) = manifest["sources"]
        said[query] = manifest["warnings"]
        assert source["options"]["obs_filter"] == query
        assert source["filtered_out"] == (125 if query else 0)
        assert source["cells_read"] == 150 - source["filtered_out"]
        work = tmp_path / f"work-{bool(query)}"
        work.mkdir()
        checked = check_sources([spec], work, vocabulary(), options, SERIAL, lambda *_: None)
        assert checked.warnings == said[query]
    assert "75 of 150 cells are not primary data" in said[None][0] and said[QUERY] == []


@pytest.mark.long  # real cells; the cases beside it are synthetic
def test_real_census_like_file(case):
    path = case("obs_filter") / "census_like.h5ad"
    source = open_path(path, SourceOptions(obs_filter=QUERY))
    assert source.num_cells == 34
    plain = open_path(path, SourceOptions())
    assert isinstance(plain, CountSource)
    assert "100 of 200 cells are not primary data" in plain.warnings()[0]


def test_class_labels_keep_their_names(tmp_path):
    import datasets

    features = datasets.Features({
        "input_ids": datasets.Sequence(datasets.Value("int64")), "length": datasets.Value("int64"),
        "kind": datasets.ClassLabel(names=["B cell", "T cell"]),
    })  # fmt: skip
    rows = {"input_ids": [[2, 3]] * 4, "length": [2] * 4, "kind": [1, 0, 1, -1]}
    made = datasets.Dataset.from_dict(rows, features=features)
    made.save_to_disk(str(tmp_path / "saved"))
    made.to_parquet(str(tmp_path / "cells.parquet"))
    for name in ("saved", "cells.parquet"):
        source = open_path(tmp_path / name, SourceOptions(columns=("kind",)))
        (block,) = source.blocks()
        assert block.metadata["kind"] == ["T cell", "B cell", "T cell", ""]
        assert source.group_sizes("kind") == {"T cell": 2, "B cell": 1, "": 1}
