"""Wrong input is named: what, where, what to do."""

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.genes.vocabulary import from_dictionaries
from data_prep.sources.open_source import open_path
from data_prep.sources.source_spec import SourceOptions
from tests.synthetic import make_cells


@pytest.fixture
def vocabulary():
    genes = [f"ENSG{i:011d}" for i in range(200)]
    tokens = {"<pad>": 0, "<mask>": 1} | {g: i + 2 for i, g in enumerate(genes)}
    return from_dictionaries(tokens, dict.fromkeys(genes, 1.0))


def read_all(path, vocabulary, **options):
    source = open_path(path, SourceOptions(**options))
    source.column_tokens(vocabulary, 0.1)
    return [
        b
        for at in range(0, source.num_cells, 50)
        for b in source.blocks(at, min(at + 50, source.num_cells))
    ]


def test_blocks_hold_every_cell_once(tmp_path, vocabulary):
    cells = make_cells(120)
    for layout in ("csr", "csc", "dense"):
        path = tmp_path / f"{layout}.h5ad"
        data = cells.copy()
        data.X = {"csr": cells.X, "csc": cells.X.tocsc(), "dense": cells.X.toarray()}[layout]
        data.write_h5ad(path)
        blocks = read_all(path, vocabulary, columns=("donor",))
        assert [len(b.cell_ids) for b in blocks] == [50, 50, 20]
        assert sum((b.cell_ids for b in blocks), []) == list(cells.obs_names)
        assert sum((b.metadata["donor"] for b in blocks), []) == list(cells.obs["donor"])
        assert np.concatenate([b.data for b in blocks]).sum() == cells.X.sum()


def test_raw_and_layers(tmp_path, vocabulary):
    cells = make_cells(30)
    cells.layers["counts"] = cells.X.copy()
    cells.raw = cells
    cells.X = np.log1p(cells.X.toarray())
    cells.write_h5ad(tmp_path / "cells.h5ad")
    for where in ("raw", "layers/counts"):
        assert len(read_all(tmp_path / "cells.h5ad", vocabulary, counts=where)) == 1
    with pytest.raises(ValueError, match="looks log-transformed.*try --counts raw"):
        read_all(tmp_path / "cells.h5ad", vocabulary)
    with pytest.raises(ValueError, match=r"no 'layers/x'.*layers/counts"):
        read_all(tmp_path / "cells.h5ad", vocabulary, counts="layers/x")


def _log(data):
    data.X = np.log1p(data.X.toarray())


def _negative(data):
    data.X = data.X.toarray() - 3


def _nan(data):
    data.X.data[3] = np.nan


def _symbols(data):
    data.var_names = [f"G{i}" for i in range(data.n_vars)]


def _symbols_with_ids(data):
    data.var["ids"] = list(data.var_names)
    _symbols(data)


def _versioned(data):
    data.var_names = [f"{n}.4" for n in data.var_names]


def _mouse(data):
    data.var_names = [n.replace("ENSG", "ENSMUSG") for n in data.var_names]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_log, "looks log-transformed"),
        (_negative, "negative"),
        (_nan, "NaN"),
        (_symbols, "--gene-mapping"),
        (_symbols_with_ids, r"Column \['ids'\].*--gene-column"),
        (_mouse, "0 of 200 gene ids"),
    ],
)
def test_wrong_matrices(damage, message, tmp_path, vocabulary):
    cells = make_cells(30)
    damage(cells)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(ValueError, match=message) as caught:
        read_all(tmp_path / "cells.h5ad", vocabulary)
    assert "cells.h5ad" in str(caught.value)


def test_stripped_versions_are_found(tmp_path, vocabulary):
    cells = make_cells(30)
    _versioned(cells)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    assert read_all(tmp_path / "cells.h5ad", vocabulary, strip_versions=True)
    found = open_path(tmp_path / "cells.h5ad", SourceOptions()).gene_report(vocabulary)
    assert found.found_as == {"id without version or genome": 200}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gene_column": "nope"}, r"no column 'nope'.*symbol"),
        ({"columns": ("nope",)}, r"obs has no column \['nope'\]"),
        ({"total_column": "small"}, "below the counts"),
    ],
)
def test_wrong_columns(options, message, tmp_path, vocabulary):
    cells = make_cells(30)
    cells.obs["small"] = 1.0
    cells.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(ValueError, match=message):
        read_all(tmp_path / "cells.h5ad", vocabulary, **options)


def test_files_that_are_no_h5ad(tmp_path):
    (tmp_path / "text.h5ad").write_text("no HDF5")
    with pytest.raises(ValueError, match="not an HDF5 file"):
        open_path(tmp_path / "text.h5ad", SourceOptions())
    with h5py.File(tmp_path / "other.h5ad", "w") as file:
        file["x"] = [1]
    with pytest.raises(ValueError, match="no AnnData file"):
        open_path(tmp_path / "other.h5ad", SourceOptions())
    make_cells(30).write_h5ad(tmp_path / "cut.h5ad")
    whole = (tmp_path / "cut.h5ad").read_bytes()
    (tmp_path / "cut.h5ad").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut.h5ad"):
        open_path(tmp_path / "cut.h5ad", SourceOptions())
    with pytest.raises(ValueError, match="no such file"):
        open_path(tmp_path / "absent.h5ad", SourceOptions())


def token_file(path, cells, lengths=None):
    lengths = lengths or [len(c) for c in cells]
    pq.write_table(pa.table({"input_ids": cells, "length": lengths}), path)
    return open_path(path, SourceOptions())


@pytest.mark.parametrize(
    ("cells", "lengths", "message"),
    [
        ([[2, 3, 500]], None, "token 500 does not exist"),
        ([[2, 1, 3]], None, "special tokens stand between genes"),
        ([[2, 3, 4]], [2], "row 0: 'length' is 2"),
        ([list(range(2, 60))], None, "maximum length"),
    ],
)
def test_wrong_tokens(cells, lengths, message, tmp_path):
    tokens = {"<pad>": 0, "<mask>": 1} | {f"g{i}": i + 2 for i in range(100)}
    small = from_dictionaries(tokens, {f"g{i}": 1.0 for i in range(100)}, max_length=50)
    source = token_file(tmp_path / "cells.parquet", cells, lengths)
    with pytest.raises(ValueError, match=message):
        for block in source.blocks():
            source.checked_tokens(block, small)


def test_hugging_face_folder_equals_parquet(tmp_path):
    import datasets

    cells = [[2, 3, 4], [5, 6], [7]]
    table = {"input_ids": cells, "length": [3, 2, 1]}
    datasets.Dataset.from_dict(table).save_to_disk(str(tmp_path / "corpus.dataset"))
    # What map() and filter() leave behind are no further cells.
    first = next((tmp_path / "corpus.dataset").glob("data-*.arrow"))
    (tmp_path / "corpus.dataset" / "cache-1234.arrow").write_bytes(first.read_bytes())
    folder = open_path(tmp_path / "corpus.dataset", SourceOptions())
    parquet = token_file(tmp_path / "cells.parquet", cells)
    assert folder.num_cells == parquet.num_cells == 3
    for a, b in zip(folder.blocks(), parquet.blocks(), strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.offsets, b.offsets)


def test_corpus_of_a_version_with_cls_is_refused(tmp_path):
    tokens = {"<pad>": 0, "<mask>": 1} | {f"g{i}": i + 2 for i in range(100)}
    plain = from_dictionaries(tokens, {f"g{i}": 1.0 for i in range(100)})
    cells = [[2, 10 + i % 40, 60 + i % 30, 3] for i in range(50)]
    source = token_file(tmp_path / "cells.parquet", cells)
    with pytest.raises(ValueError, match="<cls> and <eos> of another version"):
        source.checked_tokens(next(source.blocks()), plain)


def test_counts_in_a_layer_of_a_file_without_x(tmp_path, vocabulary):
    import anndata

    cells = make_cells(30)
    layered = anndata.AnnData(
        None, obs=cells.obs, var=cells.var, layers={"counts": cells.X}, shape=cells.shape
    )
    layered.write_h5ad(tmp_path / "cells.h5ad")
    blocks = read_all(tmp_path / "cells.h5ad", vocabulary, counts="layers/counts")
    assert blocks[0].data.sum() == cells.X.sum()


def test_missing_values_are_empty_text(tmp_path, vocabulary):
    import pandas as pd

    cells = make_cells(4)
    cells.obs["age"] = pd.array([1, None, 3, 4], dtype="Int64")
    cells.obs["site"] = pd.Categorical(["a", None, "b", "a"])
    cells.write_h5ad(tmp_path / "cells.h5ad")
    (block,) = read_all(tmp_path / "cells.h5ad", vocabulary, columns=("age", "site"))
    assert block.metadata == {"age": ["1", "", "3", "4"], "site": ["a", "", "b", "a"]}


@pytest.mark.parametrize("values", [[1, 0, 1, 0], ["True", "False", "True", "False"]])
def test_filter_pass_as_numbers_or_words(values, tmp_path, vocabulary):
    cells = make_cells(4)
    cells.obs["filter_pass"] = values
    cells.write_h5ad(tmp_path / "cells.h5ad")
    (block,) = read_all(tmp_path / "cells.h5ad", vocabulary)
    assert block.passes.tolist() == [True, False, True, False]
