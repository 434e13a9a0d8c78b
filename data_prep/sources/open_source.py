"""Opens a source of any format, recognised by its suffix and content.

`open_source` returns a `CountSource` or a `TokenSource`. The module of a format is imported only
when a file of that format is opened.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import h5py

from data_prep.genes.annotation import Annotation
from data_prep.matrices.choose_cells import choose_cells
from data_prep.matrices.compression import missing_codec
from data_prep.matrices.matrix_store import Store, mtx_sample
from data_prep.sources.corpus_list import expand_path
from data_prep.sources.count_source import DAMAGE, CountSource
from data_prep.sources.hugging_face import PREFIX, stage_dataset
from data_prep.sources.source_spec import (
    CENSUS,
    SourceOptions,
    SourceSpec,
    source_at,
    split_path,
)
from data_prep.sources.token_corpus import TokenSource

Source = CountSource | TokenSource
_NO_OBS = "obs_filter needs cells with columns of obs: a count matrix, or a Census"
ACCEPTED = (
    ".h5ad, .h5mu, .loom, AnnData or MuData .zarr, 10x .h5, 10x folders with matrix.mtx[.gz], "
    ".parquet, .arrow, Hugging Face folders of token ids, hf:NAME, census:VERSION"
)


def open_source(
    spec: SourceSpec, staging: Path | None = None, annotation: Annotation | None = None
) -> Source:
    """Return the opened source of a spec; suffix and content tell its format.

    Parameters
    ----------
    staging
        Folder for row-wise copies of matrices that are stored by gene; None: a temporary folder
        that is removed when the process ends.
    annotation
        Annotation table that names mitochondrial genes beyond the human ones.

    Raises
    ------
    ValueError
        The path does not exist, has no known format, is damaged, or lacks what the spec asks for.
    """
    if spec.path.startswith(PREFIX):
        folder = (staging or _temporary_folder()) / row_copy_name(spec)
        wanted = [*spec.options.column_sources.values()]
        wanted += [c for c in [spec.options.dataset_column] if c and c not in wanted]
        copy = stage_dataset(spec.path, wanted, folder)
        return TokenSource(replace(spec, path=str(copy)))
    path, split = split_path(spec.path)
    if split is not None or _is_tokens(path):
        if spec.options.obs_filter:
            raise ValueError(f"{spec.path}: {_NO_OBS}")
        return TokenSource(spec)
    try:
        return CountSource(spec, _open_store(spec, path, staging), annotation)
    except DAMAGE as error:
        codec = missing_codec(error)
        if codec:
            raise ValueError(f"{spec.path}: {codec}") from error
        if isinstance(error, ValueError) and spec.path in str(error):
            raise
        raise ValueError(
            f"{spec.path}: not readable ({error}); is it complete, and of the kind its name says?"
        ) from error


def open_path(path: Path | str, options: SourceOptions) -> Source:
    """Return the opened source at a path, as `open_source` does for a spec.

    A folder may hold it (GEO's three files of a sample); ValueError if it holds several.
    """
    inside = expand_path(str(path))
    if len(inside) > 1:
        raise ValueError(
            f"{path}: holds {len(inside)} sources, and one is read at a time; give one: {inside[0]}"
        )
    return open_source(source_at(inside[0], options))


def _is_tokens(path: Path) -> bool:
    if path.suffix in (".parquet", ".arrow"):
        return True
    return path.is_dir() and bool(
        (path / "dataset_dict.json").exists()
        or (path / "state.json").exists()
        or list(path.glob("*.arrow"))
        or list(path.glob("*.parquet"))
    )


def _open_store(spec: SourceSpec, path: Path, staging: Path | None) -> Store:
    counts = spec.options.counts
    if spec.path.startswith(f"{CENSUS}:") or (path / "__tiledb_group.tdb").exists():
        from data_prep.matrices.census import CensusStore

        return CensusStore(spec.path, counts, spec.options.organism, spec.options.obs_filter)
    if not path.exists():
        raise ValueError(f"{spec.path}: no such file or folder")
    found = _open_matrix(spec, path, staging)
    query = spec.options.obs_filter
    return choose_cells(spec.path, found, query) if query else found


def _open_matrix(spec: SourceSpec, path: Path, staging: Path | None) -> Store:
    counts = spec.options.counts
    folder = (staging or _temporary_folder()) / row_copy_name(spec)
    is_folder = path.is_dir() and any((path / n).exists() for n in ("matrix.mtx", "matrix.mtx.gz"))
    if is_folder or (path.is_file() and mtx_sample(path) is not None):
        from data_prep.matrices.tenx import MtxStore

        _require_plain(spec)
        return MtxStore(path, folder)
    if path.suffix == ".loom":
        from data_prep.matrices.loom import LoomStore

        return LoomStore(path, counts)
    if path.suffix == ".h5":
        from data_prep.matrices.tenx import TenxStore, is_tenx, refuse_molecules

        if is_tenx(path):
            _require_plain(spec)
            # A file of Cell Ranger 2 has one group per genome and names the genome nowhere else.
            return TenxStore(path, spec.options.genome)
        if h5py.is_hdf5(path):
            refuse_molecules(path)
    if path.suffix in (".h5ad", ".h5mu", ".h5", ".zarr") or path.name.endswith(".zarr.zip"):
        from data_prep.matrices.h5ad_zarr import AnnDataStore

        return AnnDataStore(path, counts, folder)
    if path.is_dir() and ((path / ".zgroup").exists() or (path / "zarr.json").exists()):
        from data_prep.matrices.h5ad_zarr import AnnDataStore

        return AnnDataStore(path, counts, folder)
    raise ValueError(f"{spec.path}: unknown kind of source; accepted: {ACCEPTED}")


def _require_plain(spec: SourceSpec) -> None:
    if spec.options.counts != "X":
        raise ValueError(f"{spec.path}: 10x files hold one matrix; leave out --counts")


def row_copy_name(spec: SourceSpec) -> str:
    """Return the name of the folder for a row-wise copy of a source."""
    return f"rows-{spec.signature()[:20]}"


def _temporary_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="geneloom-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
