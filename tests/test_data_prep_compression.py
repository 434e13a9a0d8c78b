"""Files compressed with filters that HDF5 or zarr lack are read with the plugin, or it is named."""

from __future__ import annotations

import json

import h5py
import numpy as np
import pytest

from data_prep.matrices import compression
from data_prep.sources.count_source import CountSource
from data_prep.sources.open_source import open_path
from data_prep.sources.source_spec import SourceOptions
from tests.data_files import write_loom, write_tenx
from tests.synthetic import make_cells

hdf5plugin = pytest.importorskip("hdf5plugin", reason="the filters of these files come with it")
FILTERS = ("zstd", "blosc", "lz4")


def compressed(path, name):
    """Write the numbers of the matrix anew, compressed."""
    kind = {"zstd": hdf5plugin.Zstd, "blosc": hdf5plugin.Blosc, "lz4": hdf5plugin.LZ4}[name]
    with h5py.File(path, "a") as file:
        for at in ("X/data", "X/indices", "matrix/data", "matrix/indices", "matrix"):
            if at not in file or not isinstance(file[at], h5py.Dataset):
                continue
            values, attributes = file[at][()], dict(file[at].attrs)
            del file[at]
            made = file.create_dataset(at, data=values, chunks=values.shape, **kind())
            made.attrs.update(attributes)
    return path


def write_h5ad(cells, folder):
    cells.write_h5ad(folder / "cells.h5ad")
    return folder / "cells.h5ad"


def sums(path) -> np.ndarray:
    source = open_path(path, SourceOptions())
    assert isinstance(source, CountSource)
    return np.concatenate([b.totals for b in source.blocks()])


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("write", [write_h5ad, write_loom, write_tenx])
def test_filters_of_the_plugin_are_read(write, name, tmp_path):
    cells = make_cells(30)
    path = compressed(write(cells, tmp_path), name)
    np.testing.assert_array_equal(sums(path), cells.X.toarray().sum(1))


@pytest.mark.parametrize("write", [write_h5ad, write_loom, write_tenx])
def test_without_the_plugin_it_is_named(write, tmp_path, monkeypatch):
    path = compressed(write(make_cells(30), tmp_path), "zstd")
    monkeypatch.setattr(compression, "is_available", lambda code: code < 300)
    monkeypatch.setattr(compression, "_import_plugins", lambda: False)
    with pytest.raises(ValueError, match="compressed with zstd .*needs hdf5plugin") as caught:
        sums(path)
    assert "damaged" not in str(caught.value)


def test_a_filter_that_nobody_knows_is_named(tmp_path, monkeypatch):
    path = compressed(write_h5ad(make_cells(30), tmp_path), "lz4")
    monkeypatch.setattr(compression, "is_available", lambda code: code != 32004)
    with pytest.raises(ValueError, match=r"lz4 \(.*needs hdf5plugin, or a version of it"):
        sums(path)


@pytest.mark.parametrize("codec", ["blosc", "zstd", "lz4", "nobodys"])
def test_zarr_codecs(codec, tmp_path):
    import numcodecs
    import zarr

    cells = make_cells(30)
    cells.write_zarr(tmp_path / "cells.zarr")
    group = zarr.open_group(str(tmp_path / "cells.zarr"), mode="a")
    kinds = {"blosc": numcodecs.Blosc, "zstd": numcodecs.Zstd, "lz4": numcodecs.LZ4}
    values, attributes = group["X/data"][:], dict(group["X/data"].attrs)
    del group["X/data"]
    made = group.create_array(
        "X/data", shape=values.shape, dtype=values.dtype, chunks=values.shape,
        compressors=kinds.get(codec, numcodecs.Zstd)(),
    )  # fmt: skip
    made[:] = values
    made.attrs.update(attributes)
    (tmp_path / "cells.zarr" / ".zmetadata").unlink(missing_ok=True)
    if codec in kinds:
        np.testing.assert_array_equal(sums(tmp_path / "cells.zarr"), cells.X.toarray().sum(1))
        return
    for record in (tmp_path / "cells.zarr").rglob(".zarray"):
        content = json.loads(record.read_text())
        if content["compressor"]:
            content["compressor"] = {"id": codec}
            record.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="codec that is not installed.*nobodys") as caught:
        sums(tmp_path / "cells.zarr")
    assert "damaged" not in str(caught.value)


@pytest.mark.long  # real cells; the cases beside it are synthetic
def test_real_file_with_zstd(case):
    assert len(sums(case("compressed") / "zstd.h5ad")) == 200
