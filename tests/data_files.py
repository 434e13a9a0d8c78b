"""Cells written as files of every format of count matrices."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np
import scipy.io
import scipy.sparse

if TYPE_CHECKING:
    import anndata

    from data_prep.sources.count_source import CountSource


def read_counts(
    path: Path, stretches: tuple[tuple[int, ...], ...] = ((),), **options
) -> tuple[CountSource, np.ndarray]:
    """Return a file's source and its counts, cells x genes, read in (start, stop) stretches."""
    from data_prep.sources.count_source import CountSource
    from data_prep.sources.open_source import open_path
    from data_prep.sources.source_spec import SourceOptions

    source = open_path(path, SourceOptions(**options))
    assert isinstance(source, CountSource)
    parts = [
        scipy.sparse.csr_matrix(
            (b.data, b.indices, b.indptr), shape=(len(b.cell_ids), source.num_genes)
        ).toarray()
        for stretch in stretches
        for b in source.blocks(*stretch)
    ]
    return source, np.concatenate(parts)


def write_h5ad(cells: anndata.AnnData, folder: Path) -> Path:
    cells.write_h5ad(folder / "cells.h5ad")
    return folder / "cells.h5ad"


def write_zarr(cells: anndata.AnnData, folder: Path) -> Path:
    cells.write_zarr(folder / "cells.zarr")
    return folder / "cells.zarr"


def write_loom(cells: anndata.AnnData, folder: Path) -> Path:
    with h5py.File(folder / "cells.loom", "w") as file:
        file["matrix"] = cells.X.toarray().T
        file["row_attrs/Accession"] = [str(i) for i in cells.var_names]
        if "feature_types" in cells.var:
            file["row_attrs/feature_types"] = [str(k) for k in cells.var["feature_types"]]
        file["col_attrs/CellID"] = list(cells.obs_names)
        for name in cells.obs:
            values = cells.obs[name].to_numpy()
            file[f"col_attrs/{name}"] = values.tolist() if values.dtype == object else values
    return folder / "cells.loom"


def write_tenx(cells: anndata.AnnData, folder: Path, genome: list[str] | None = None) -> Path:
    matrix = scipy.sparse.csr_matrix(cells.X)
    with h5py.File(folder / "cells.h5", "w") as file:
        group = file.create_group("matrix")
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(matrix, name)
        group["shape"] = matrix.shape[::-1]
        group["barcodes"] = [str(i).encode() for i in cells.obs_names]
        features = group.create_group("features")
        features["id"] = features["name"] = [str(i).encode() for i in cells.var_names]
        features["feature_type"] = [k.encode() for k in _kinds(cells)]
        features["genome"] = [g.encode() for g in genome or ["GRCh38"] * cells.n_vars]
    return folder / "cells.h5"


def write_mtx(cells: anndata.AnnData, folder: Path) -> Path:
    rows = zip(cells.var_names, _kinds(cells), strict=True)
    for name, lines in (
        ("features", [f"{i}\t{i}\t{kind}" for i, kind in rows]),
        ("barcodes", list(cells.obs_names)),
    ):
        with gzip.open(folder / f"{name}.tsv.gz", "wt") as file:
            file.write("\n".join(lines) + "\n")
    whole = np.array_equal(cells.X.data, np.rint(cells.X.data))
    entries = scipy.sparse.coo_matrix(cells.X.T).astype(np.int64 if whole else np.float64)
    scipy.io.mmwrite(folder / "matrix.mtx", entries, field="integer" if whole else "real")
    return folder


def _kinds(cells: anndata.AnnData) -> list[str]:
    return [str(k) for k in cells.var.get("feature_types", ["Gene Expression"] * cells.n_vars)]


def _modalities(cells: anndata.AnnData) -> dict[str, anndata.AnnData]:
    is_gene = np.array(_kinds(cells)) == "Gene Expression"
    parts = {"rna": cells[:, is_gene].copy(), "prot": cells[:, ~is_gene].copy()}
    for part in parts.values():
        part.var = part.var.drop(columns="feature_types", errors="ignore")
    return {name: part for name, part in parts.items() if part.n_vars}


def write_mudata(cells: anndata.AnnData, folder: Path) -> Path:
    """As mudata does: a group for each modality, obs and var of all."""

    import anndata

    with h5py.File(folder / "cells.h5mu", "w") as file:
        for name, part in _modalities(cells).items():
            anndata.io.write_elem(file, f"mod/{name}", part)
        anndata.io.write_elem(file, "obs", cells.obs)
        anndata.io.write_elem(file, "var", cells.var)
    return folder / "cells.h5mu"


WRITERS = (write_h5ad, write_zarr, write_loom, write_tenx, write_mtx, write_mudata)
