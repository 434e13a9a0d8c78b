"""Every file format gives the cells that were written, whatever ranges they are read in."""

import gzip
import sys

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse
import zarr

from data_prep.matrices import tenx
from data_prep.sources.open_source import open_path, open_source
from data_prep.sources.source_spec import SourceOptions, source_at
from tests.synthetic import make_cells

NUM_CELLS = 150
COLUMNS = ("cell_type", "donor")


def write_zarr(kind, zarr_format=2):
    import anndata

    def write(cells, folder):
        convert = {"csr": cells.X.tocsr, "csc": cells.X.tocsc, "dense": cells.X.toarray}
        cells.X = convert[kind]()
        with anndata.settings.override(zarr_write_format=zarr_format):
            cells.write_zarr(folder / "cells.zarr")
        return folder / "cells.zarr"

    return write


def write_loom(cells, folder):
    """As loompy 3 does: a layer with the counts, and something else in /matrix."""
    counts = np.asarray(cells.X.T.todense())
    with h5py.File(folder / "cells.loom", "w") as file:
        file["attrs/LOOM_SPEC_VERSION"] = "3.0.0"
        for name, values in (("matrix", np.log1p(counts)), ("layers/counts", counts)):
            file.create_dataset(
                name, data=values, chunks=(64, 64), maxshape=(None, None), compression="gzip"
            )
        for name in ("row_graphs", "col_graphs"):
            file.create_group(name)
        file["row_attrs/Gene"] = list(cells.var["symbol"])
        file["row_attrs/Accession"] = list(cells.var_names)
        file["col_attrs/CellID"] = list(cells.obs_names)
        file["col_attrs/X_pca"] = np.zeros((cells.n_obs, 2))
        for column in COLUMNS:
            file[f"col_attrs/{column}"] = [str(v) for v in cells.obs[column]]
    return folder / "cells.loom"


def write_loom_v2(cells, folder):
    """Counts in /matrix, the version an attribute of the file, text of fixed length."""
    with h5py.File(folder / "cells.loom", "w") as file:
        file.attrs["LOOM_SPEC_VERSION"] = "2.0.1"
        counts = cells.X.toarray().T.astype(np.int32)
        file.create_dataset("matrix", data=counts, chunks=(64, 64), compression="gzip")
        file.create_group("layers")
        file["row_attrs/Gene"] = np.array(cells.var_names, dtype="S")
        file["col_attrs/cell_names"] = np.array(cells.obs_names, dtype="S")
        for column in COLUMNS:
            file[f"col_attrs/{column}"] = np.array(cells.obs[column], dtype="S")
    return folder / "cells.loom"


def with_antibodies(cells):
    """Return features x cells with an antibody as the third row, ids, names and types."""
    rows = cells.X.T.tocsr()
    antibody = scipy.sparse.csr_matrix(np.full((1, cells.n_obs), 7, dtype=np.float32))
    matrix = scipy.sparse.vstack([rows[:2], antibody, rows[2:]]).tocsc()
    ids = [*cells.var_names[:2], "CD3_TotalC", *cells.var_names[2:]]
    names = [*cells.var["symbol"][:2], "CD3", *cells.var["symbol"][2:]]
    types = ["Gene Expression"] * len(ids)
    types[2] = "Antibody Capture"
    return matrix, ids, names, types


def write_tenx_group(group, matrix, barcodes):
    group["data"], group["indices"] = matrix.data.astype(np.int32), matrix.indices.astype(np.int64)
    group["indptr"], group["shape"] = matrix.indptr.astype(np.int64), np.int32(matrix.shape)
    group["barcodes"] = np.array(barcodes, dtype="S18")


def write_tenx_v3(cells, folder):
    matrix, ids, names, types = with_antibodies(cells)
    with h5py.File(folder / "filtered_feature_bc_matrix.h5", "w") as file:
        group = file.create_group("matrix")
        write_tenx_group(group, matrix, cells.obs_names)
        values = {"id": ids, "name": names, "feature_type": types, "genome": ["GRCh38"] * len(ids)}
        for name, column in values.items():
            group[f"features/{name}"] = np.array(column, dtype="S")
        group["features/_all_tag_keys"] = np.array(["genome"], dtype="S")
    return folder / "filtered_feature_bc_matrix.h5"


def write_tenx_v2(cells, folder, genomes=("GRCh38",)):
    path = folder / "filtered_gene_bc_matrices_h5.h5"
    with h5py.File(path, "w") as file:
        for genome in genomes:
            group = file.create_group(genome)
            write_tenx_group(group, cells.X.T.tocsc(), cells.obs_names)
            group["genes"] = np.array(cells.var_names, dtype="S")
            group["gene_names"] = np.array(cells.var["symbol"], dtype="S")
    return path


def write_mtx_v2(cells, folder):
    """As Cell Ranger 2: plain text, genes.tsv of two columns."""
    scipy.io.mmwrite(
        folder / "matrix.mtx", cells.X.T.astype(np.int32), comment="a comment", field="integer"
    )
    genes = zip(cells.var_names, cells.var["symbol"], strict=True)
    (folder / "genes.tsv").write_text("".join(f"{i}\t{name}\n" for i, name in genes))
    (folder / "barcodes.tsv").write_text("".join(f"{b}\n" for b in cells.obs_names))
    return folder


def write_mtx_v3(cells, folder):
    """As Cell Ranger 3 and later: gzipped, features.tsv of three columns."""
    matrix, ids, names, types = with_antibodies(cells)
    matrix = matrix.tocoo()
    entries = zip(matrix.row + 1, matrix.col + 1, matrix.data.astype(int), strict=True)
    size = f"{len(ids)} {cells.n_obs} {matrix.nnz}"
    texts = {
        "matrix.mtx": f"%%MatrixMarket matrix coordinate integer general\n%metadata: {{}}\n{size}\n"
        + "".join(f"{feature} {cell} {value}\n" for feature, cell, value in entries),
        "features.tsv": "".join("\t".join(r) + "\n" for r in zip(ids, names, types, strict=True)),
        "barcodes.tsv": "".join(f"{b}\n" for b in cells.obs_names),
    }
    for name, text in texts.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    return folder


def write_soma(cells, folder):
    import tiledbsoma.io

    uri = folder / "experiment"
    tiledbsoma.io.from_anndata(str(uri), cells, measurement_name="RNA", X_layer_name="raw")
    return uri


def write_census(cells, folder):
    """The tree of a CELLxGENE Census, with the columns that it has."""
    import tiledbsoma

    cells.obs["observation_joinid"] = list(cells.obs_names)
    cells.obs["nnz"] = np.diff(cells.X.indptr).astype(np.int64)
    cells.var["feature_id"] = list(cells.var_names)
    cells.var_names = [f"index{i}" for i in range(cells.n_vars)]
    (folder / "data").mkdir()
    uri = write_soma(cells, folder / "data")
    with tiledbsoma.Collection.create(str(folder / "soma")) as census:
        data = census.add_new_collection("census_data")
        data.set("homo_sapiens", tiledbsoma.Experiment.open(str(uri)))
    return folder / "soma"


# name -> how it is written, how it is read
FORMATS = {
    **{f"zarr-{kind}": (write_zarr(kind), {}) for kind in ("csr", "csc", "dense")},
    "zarr-v3": (write_zarr("csr", 3), {}),
    "loom": (write_loom, {"counts": "layers/counts"}),
    "loom-v2": (write_loom_v2, {}),
    "tenx-v2": (write_tenx_v2, {"columns": ()}),
    "tenx-v3": (write_tenx_v3, {"columns": ()}),
    "mtx-v2": (write_mtx_v2, {"columns": ()}),
    "mtx-v3": (write_mtx_v3, {"columns": ()}),
    "soma": (write_soma, {}),
    "census": (write_census, {"organism": "human"}),
}


def read(source, edges):
    """Return all cells, read in the ranges between `edges`: arrays of CSR, ids, metadata."""
    blocks = [
        block
        for start, stop in zip(edges, edges[1:], strict=False)
        for block in source.blocks(start, stop)
    ]
    lengths = np.concatenate([np.diff(b.indptr) for b in blocks])
    return {
        "data": np.concatenate([b.data for b in blocks]),
        "indices": np.concatenate([b.indices for b in blocks]),
        "indptr": np.r_[0, np.cumsum(lengths)],
        "totals": np.concatenate([b.totals for b in blocks]),
        "cell_ids": [i for b in blocks for i in b.cell_ids],
        "metadata": {
            c: [v for b in blocks for v in b.metadata[c]] for c in source.options.column_names
        },
    }


@pytest.mark.filterwarnings(
    "ignore::UserWarning"
)  # anndata's and zarr's, about their next releases
@pytest.mark.parametrize("name", FORMATS)
def test_cells_are_those_written(name, tmp_path, monkeypatch):
    monkeypatch.setattr(tenx, "_BATCH_BYTES", 1000)
    monkeypatch.setattr("data_prep.sources.count_source._READ_CELLS", 64)
    cells = make_cells(NUM_CELLS)
    is_empty = np.isin(np.arange(NUM_CELLS), [64, 65])
    cells.X = scipy.sparse.csr_matrix(np.where(is_empty[:, None], 0, cells.X.toarray()))
    write, options = FORMATS[name]
    path = write(cells.copy(), tmp_path)
    source = open_path(path, SourceOptions(**{"columns": COLUMNS} | options))
    assert (source.num_cells, source.num_genes) == cells.shape
    assert source.gene_ids == list(cells.var_names)

    whole = read(source, [0, NUM_CELLS])
    dense = scipy.sparse.csr_matrix((whole["data"], whole["indices"], whole["indptr"]), cells.shape)
    np.testing.assert_array_equal(dense.toarray(), cells.X.toarray())
    np.testing.assert_array_equal(whole["totals"], np.asarray(cells.X.sum(axis=1)).ravel())
    assert whole["cell_ids"] == list(cells.obs_names)
    for column in source.options.columns:
        assert whole["metadata"][column] == list(cells.obs[column])

    for edges in ([0, 1, 64, 65, NUM_CELLS], range(0, NUM_CELLS + 1, 15)):
        parts = read(source, list(edges))
        for key in ("data", "indices", "indptr", "totals"):
            assert parts[key].tobytes() == whole[key].tobytes(), key
        assert parts["cell_ids"] == whole["cell_ids"]
        assert parts["metadata"] == whole["metadata"]


@pytest.mark.parametrize("name", ["tenx-v2", "tenx-v3", "mtx-v2", "mtx-v3", "loom", "soma"])
def test_symbols_stand_beside_the_ids(name, tmp_path):
    cells = make_cells(20)
    path = FORMATS[name][0](cells.copy(), tmp_path)
    source = open_path(path, SourceOptions(counts=FORMATS[name][1].get("counts", "X")))
    column = {"loom": "Gene", "soma": "symbol"}.get(name, "name")
    assert list(source.store.var(column)) == list(cells.var["symbol"])


def test_rows_by_cell_are_staged_once(tmp_path):
    (tmp_path / "matrix").mkdir()
    path = write_mtx_v3(make_cells(20), tmp_path / "matrix")
    spec = source_at(path, SourceOptions())
    first = open_source(spec, tmp_path / "staging")
    (staged,) = (tmp_path / "staging").iterdir()
    written = {p.name: p.stat().st_mtime_ns for p in staged.iterdir()}
    second = open_source(spec, tmp_path / "staging")
    assert {p.name: p.stat().st_mtime_ns for p in staged.iterdir()} == written
    assert next(first.blocks()).data.tobytes() == next(second.blocks()).data.tobytes()


def test_loom_without_ids_of_cells(tmp_path):
    path = write_loom(make_cells(20), tmp_path)
    with h5py.File(path, "a") as file:
        del file["col_attrs/CellID"]
    source = open_path(path, SourceOptions(counts="layers/counts"))
    assert source.store.cell_ids(3, 6) == ["3", "4", "5"]
    assert "X_pca" not in source.store.obs_columns()
    with pytest.raises(
        ValueError, match=r"cells\.loom.*log-transformed.*try --counts layers/counts"
    ):
        next(open_path(path, SourceOptions()).blocks())


def test_filter_over_obs_of_a_soma_experiment(tmp_path):
    cells = make_cells(NUM_CELLS)
    path = write_soma(cells.copy(), tmp_path)
    for obs_filter, kept in (
        ("cell_type == 'type1'", cells[1::3]),
        ("cell_type in ['type0', 'type1'] and donor == 'donor2'", None),
    ):
        if kept is None:
            kept = cells[
                cells.obs.cell_type.isin(["type0", "type1"]) & (cells.obs.donor == "donor2")
            ]
        source = open_path(path, SourceOptions(columns=COLUMNS, obs_filter=obs_filter))
        found = read(source, [0, 1, 7, kept.n_obs])
        assert source.num_cells == kept.n_obs
        assert found["cell_ids"] == list(kept.obs_names)
        assert found["metadata"]["donor"] == list(kept.obs["donor"])
        dense = scipy.sparse.csr_matrix((found["data"], found["indices"], found["indptr"]))
        np.testing.assert_array_equal(dense.toarray(), kept.X.toarray())


def test_missing_values_of_a_soma_experiment_do_not_depend_on_the_range(tmp_path):
    cells = make_cells(6)
    cells.obs["age"] = pd.array([1, None, 3, 4, 5, 6], dtype="Int64")
    cells.obs["site"] = pd.Categorical(["a", None, "b", "a", "a", "b"])
    cells.obs["quality"] = np.array([0.1, 0.2, np.nan, 0.4, 0.5, 0.6], dtype=np.float32)
    path = write_soma(cells, tmp_path)
    source = open_path(path, SourceOptions(columns=("age", "site", "quality")))
    for edges in ([0, 6], [0, 1, 2, 3, 6]):
        assert read(source, edges)["metadata"] == {
            "age": ["1", "", "3", "4", "5", "6"],
            "site": ["a", "", "b", "a", "a", "b"],
            "quality": ["0.1", "0.2", "", "0.4", "0.5", "0.6"],
        }


def test_census_states_how_many_values_a_cell_has(tmp_path):
    cells = make_cells(30)
    source = open_path(write_census(cells.copy(), tmp_path), SourceOptions())
    assert source.store.num_stored(3, 20) == cells.X[3:20].nnz
    assert source.store.counts_choices == ["X", "raw", "layers/raw"]
    assert open_path(f"census:{tmp_path / 'soma'}", SourceOptions()).num_cells == 30


def test_a_version_of_the_census(tmp_path, monkeypatch):
    """The release itself is not reached: what would be downloaded stands in a folder."""
    import cellxgene_census
    import tiledbsoma

    path, asked = write_census(make_cells(30), tmp_path), []

    def open_soma(census_version, tiledb_config):
        asked.append(census_version)
        if census_version != "2025-01-30":
            raise ValueError(f'The "{census_version}" Census version is not valid.')
        return tiledbsoma.open(str(path))

    monkeypatch.setattr(cellxgene_census, "open_soma", open_soma)
    source = open_path("census:2025-01-30", SourceOptions(obs_filter="cell_type == 'type0'"))
    assert source.num_cells == 10 and asked == ["2025-01-30"]
    refuse("census:1999", "census:1999: the Census cannot be opened .*not valid", "census:1999")


# --- wrong input: one sentence that names the file ------------------------------------------------


def refuse(path, message, named, **options):
    with pytest.raises(ValueError, match=message) as caught:
        open_path(path, SourceOptions(**options))
    assert str(named) in str(caught.value)


def test_wrong_loom(tmp_path):
    (tmp_path / "text.loom").write_text("no HDF5")
    refuse(tmp_path / "text.loom", "not an HDF5 file", "text.loom")
    make_cells(20).write_h5ad(tmp_path / "other.loom")
    refuse(tmp_path / "other.loom", "has no .*'matrix'", "other.loom")
    path = write_loom(make_cells(20), tmp_path)
    (tmp_path / "cut.loom").write_bytes(path.read_bytes()[:5000])
    refuse(tmp_path / "cut.loom", "not readable", "cut.loom")
    with h5py.File(path, "a") as file:
        del file["row_attrs/Gene"], file["row_attrs/Accession"]
    refuse(path, "no row attribute holds gene ids", path)
    refuse(path, r"has no 'layers/x'.*layers/counts", path, counts="layers/x")


def test_wrong_tenx(tmp_path):
    (tmp_path / "text.h5").write_text("no HDF5")
    refuse(tmp_path / "text.h5", "not an HDF5 file", "text.h5")
    path = write_tenx_v2(make_cells(20), tmp_path, genomes=("hg19", "mm10"))
    refuse(path, r"holds 2 matrices, \['hg19', 'mm10'\]", path)
    path = write_tenx_v3(make_cells(20), tmp_path)
    (tmp_path / "cut.h5").write_bytes(path.read_bytes()[:5000])
    refuse(tmp_path / "cut.h5", "not readable", "cut.h5")
    with h5py.File(path, "a") as file:
        file["matrix/features/feature_type"][:] = b"Peaks"
    refuse(path, r"no features of type 'Gene Expression', only \['Peaks'\]", path)


def test_tenx_without_a_barcode(tmp_path):
    path = write_tenx_v3(make_cells(20), tmp_path)
    with h5py.File(path, "a") as file:
        barcodes = file["matrix/barcodes"][:-1]
        del file["matrix/barcodes"]
        file["matrix/barcodes"] = barcodes
    refuse(path, "20 cells, but has .* 19 barcodes", path)


def test_damage_within_tenx_is_named_when_read(tmp_path):
    path = write_tenx_v3(make_cells(20), tmp_path)
    with h5py.File(path, "a") as file:
        file["matrix/indptr"][10] = 10**9
    source = open_path(path, SourceOptions())
    with pytest.raises(ValueError, match="index pointer of cells 0-20 is damaged") as caught:
        next(source.blocks())
    assert str(path) in str(caught.value)


BANNER = "%%MatrixMarket matrix coordinate integer general\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "begins with ''"),
        ("%%MatrixMarket matrix array integer general\n", "begins with '%%matrixmarket matrix arr"),
        (BANNER.replace("general", "symmetric") + "2 3 1\n1 1 1\n", "begins with"),
        (BANNER.replace("integer", "pattern") + "2 3 1\n1 1\n", "begins with"),
        (BANNER + "%\n2 3\n", "cells and entries are counted"),
        (BANNER + "4 3 1\n1 1 1\n", "4 features x 3 cells, but .* 2 features and 3 barcodes"),
        (BANNER + "2 4 1\n1 1 1\n", "2 features x 4 cells"),
        (BANNER + "2 3 3\n1 1 1\n2 1 1\n", "2 entries and should have 3.*truncated"),
        (BANNER + "2 3 1\n1 1 1\n2 1 1\n", "2 entries and should have 1"),
        (BANNER + "2 3 2\n1 1 1\n2 1", "Expected 3 columns"),
        (BANNER + "2 3 2\n1 1 1\n2 1 \n", "invalid value"),
        (BANNER + "2 3 1\n1 1 1.5\n", "invalid value '1.5'"),
        (BANNER + "2 3 1\n3 1 1\n", "names feature 3 of 1 to 2"),
        (BANNER + "2 3 1\n0 1 1\n", "names feature 0"),
        (BANNER + "2 3 1\n1 4 1\n", "names cell 4 of 1 to 3"),
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_wrong_mtx(text, message, compressed, tmp_path):
    name = "matrix.mtx.gz" if compressed else "matrix.mtx"
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if compressed else text.encode())
    (tmp_path / "genes.tsv").write_text("a\tA\nb\tB\n")
    (tmp_path / "barcodes.tsv").write_text("x\ny\nz\n")
    refuse(tmp_path, message, tmp_path / name)


def test_wrong_mtx_folders(tmp_path):
    path = write_mtx_v3(make_cells(20), tmp_path)
    whole = (path / "matrix.mtx.gz").read_bytes()
    (path / "matrix.mtx.gz").write_bytes(whole[: len(whole) // 2])
    refuse(path, "Truncated", path / "matrix.mtx.gz")
    (path / "matrix.mtx.gz").write_bytes(b"no gzip")
    refuse(path, "not readable", path / "matrix.mtx.gz")
    (path / "barcodes.tsv.gz").write_bytes(b"no gzip")
    refuse(path, "not readable", path / "barcodes.tsv.gz")
    (path / "features.tsv.gz").unlink()
    refuse(path, r"no features\.tsv or genes\.tsv", path)


def test_real_valued_mtx_is_read(tmp_path):
    text = BANNER.replace("integer", "real") + "2 3 2\n1 1 3\n2 3 4.0e0\n"
    (tmp_path / "matrix.mtx").write_text(text)
    (tmp_path / "genes.tsv").write_text("a\nb\n")
    (tmp_path / "barcodes.tsv").write_text("1\n2\n3\n")
    (block,) = open_path(tmp_path, SourceOptions()).blocks()
    assert block.data.tolist() == [3, 4] and block.indptr.tolist() == [0, 1, 1, 2]
    assert block.cell_ids == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"obs_filter": "cell_type = 'type1'"},
            r"the filter \"cell_type = 'type1'\" \(.*columns are .*donor",
        ),
        ({"obs_filter": "tissue == 'blood'"}, "Column tissue does not exist"),
        ({"obs_filter": "cell_type =="}, "cannot be read with the filter"),
        ({"obs_filter": "cell_type == 3"}, "cannot be read with the filter"),
        ({"obs_filter": "donor == 'nobody'"}, "no cell passes the filter"),
        ({"counts": "layers/x"}, "has no 'layers/x'.*layers/raw"),
        ({"columns": ("nope",)}, r"obs has no column \['nope'\].*donor"),
    ],
)
def test_wrong_questions_to_a_soma_experiment(options, message, tmp_path):
    path = write_soma(make_cells(20), tmp_path)
    refuse(path, message, path, **options)


def test_wrong_soma(tmp_path, monkeypatch):
    import tiledbsoma.io

    refuse(f"census:{tmp_path}/none", "not readable", tmp_path / "none")
    cells = make_cells(20)
    tiledbsoma.io.from_anndata(str(tmp_path / "protein"), cells, measurement_name="ADT")
    refuse(tmp_path / "protein", r"no measurement 'RNA', only \['ADT'\]", tmp_path / "protein")
    refuse(f"census:{tmp_path}/protein/obs", "is a SOMADataFrame", tmp_path / "protein")
    path = write_census(cells, tmp_path)
    refuse(path, r"no 'mouse'; readable: \['human'\]", path, organism="mouse")
    monkeypatch.setitem(sys.modules, "cellxgene_census", None)
    refuse(path, r"pip install 'geneloom\[census\]'", path)


def test_anndata_in_a_file_called_h5(tmp_path):
    cells = make_cells(20)
    cells.write_h5ad(tmp_path / "cells.h5")
    (block,) = open_path(tmp_path / "cells.h5", SourceOptions()).blocks()
    assert block.data.sum() == cells.X.sum()


def test_zarr_with_a_missing_chunk_is_refused(tmp_path):
    """zarr itself reads zeros there."""
    cells = make_cells(60)
    cells.write_zarr(tmp_path / "cells.zarr")
    group = zarr.open_group(str(tmp_path / "cells.zarr"), mode="r+")["X"]
    values = group["data"][:]
    del group["data"]
    group.create_array("data", data=values, chunks=(500,))
    zarr.consolidate_metadata(str(tmp_path / "cells.zarr"))
    open_path(tmp_path / "cells.zarr", SourceOptions())
    chunks = (tmp_path / "cells.zarr" / "X" / "data").rglob("*")
    next(p for p in chunks if p.is_file() and p.name.isdigit()).unlink()
    with pytest.raises(ValueError, match="1 of .* chunks of data are missing"):
        open_path(tmp_path / "cells.zarr", SourceOptions())


@pytest.mark.parametrize("part", ["X/indices", "X/indptr", "obs/_index", "var/_index"])
def test_h5ad_with_a_short_array_is_refused(part, tmp_path):
    make_cells(60).write_h5ad(tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad", "r+") as file:
        values, attributes = file[part][:-1], dict(file[part].attrs)
        del file[part]
        file[part] = values
        file[part].attrs.update(attributes)
    name = {"X/indices": "indices", "X/indptr": "indptr"}.get(part, part.split("/")[0])
    with pytest.raises(ValueError, match=f"cells.h5ad: is damaged: {name} has"):
        open_path(tmp_path / "cells.h5ad", SourceOptions())
