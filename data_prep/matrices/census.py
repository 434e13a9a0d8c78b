"""Reads CELLxGENE Census releases and other SOMA experiments, on disk or at a URI.

`CensusStore` holds the cells that pass a filter over obs, in order of their soma_joinid.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import scipy.sparse

from data_prep.matrices.matrix_store import Rows

_PREFIX = "census:"
_ORGANISMS = {"human": "homo_sapiens", "mouse": "mus_musculus"}
_CELL_IDS = ("observation_joinid", "obs_id", "_index", "index")
_LAYER, _NUM_STORED = "raw", "nnz"  # the Census' layer of raw counts; genes per cell in obs
# Assumed number of genes of a cell where obs does not state it; more than most 10x cells have.
_GENES_OF_CELL = 4000
# Size of SOMA's buffer for each column of a table that is read; the default is 1 GiB.
_BUFFER_BYTES = 1 << 27


class CensusStore:
    """The measurement ``RNA`` of a SOMA experiment, as a count matrix (`matrix_store.Store`).

    Parameters
    ----------
    path
        ``census:VERSION`` (``census:stable``, ``census:2025-01-30``) for a published release, or
        ``census:URI`` or a local folder for another Census or a single experiment.
    counts
        ``X`` or ``raw`` (both the layer ``raw``) or ``layers/NAME``.
    organism
        ``human`` or ``mouse``: the experiment of a Census to read; None: ``human``.
    obs_filter
        SOMA value filter, e.g. ``tissue == 'blood' and is_primary_data == True``.
    """

    def __init__(
        self, path: str, counts: str, organism: str | None, obs_filter: str | None
    ) -> None:
        self.path, self._name = Path(path), path
        self._opened = _open(path)  # kept open: its parts are closed when it is freed
        with _soma_errors():
            experiment = self._experiment(self._opened, organism)
            self._obs = experiment.obs
            if tuple(self._obs.index_column_names) != ("soma_joinid",):
                raise ValueError(f"{path}: obs is not indexed by soma_joinid alone")
            self._open_layer(experiment, counts)
            self._var = _read(experiment.ms["RNA"].var)
            self._gene_joinids = self._var["soma_joinid"].to_numpy()
        self._read_joinids(obs_filter)
        # The number of cells left out is unknown: counting them would read all of obs.
        self.num_filtered_out = None if obs_filter else 0
        self.num_cells, self.num_genes = len(self._joinids), len(self._gene_joinids)

    def _experiment(self, opened: Any, organism: str | None) -> Any:
        """Return the opened experiment, or of an opened Census the organism's experiment."""
        if opened.soma_type == "SOMAExperiment":
            return opened
        if opened.soma_type != "SOMACollection" or "census_data" not in opened:
            raise ValueError(f"{self._name}: is a {opened.soma_type}, expected a SOMAExperiment")
        experiments = opened["census_data"]
        readable = [o for o, name in _ORGANISMS.items() if name in experiments]
        if (organism or "human") not in readable:
            raise ValueError(f"{self._name}: has no '{organism or 'human'}'; readable: {readable}")
        return experiments[_ORGANISMS[organism or "human"]]

    def _open_layer(self, experiment: Any, counts: str) -> None:
        import tiledbsoma

        if "RNA" not in experiment.ms:
            raise ValueError(f"{self._name}: has no measurement 'RNA', only {list(experiment.ms)}")
        layers = experiment.ms["RNA"].X
        self.counts_choices = ["X", "raw"] if _LAYER in layers else []
        self.counts_choices += [f"layers/{name}" for name in layers]
        if counts not in self.counts_choices:
            raise ValueError(
                f"{self._name}: has no '{counts}'; --counts may be one of {self.counts_choices}"
            )
        layer = _LAYER if counts in ("X", "raw") else counts.removeprefix("layers/")
        self._matrix = layers[layer]
        if not isinstance(self._matrix, tiledbsoma.SparseNDArray):
            raise ValueError(f"{self._name}: '{counts}' is dense; only sparse layers are readable")
        self._states_stored = layer == _LAYER and _NUM_STORED in self.obs_columns()

    def _read_joinids(self, obs_filter: str | None) -> None:
        """Read the joinids of the cells that pass the filter, and their numbers of stored values.

        This takes 8 bytes of memory per cell, and 4 more where obs states the number of values.
        """
        columns = ["soma_joinid", *([_NUM_STORED] if self._states_stored else [])]
        try:
            with _soma_errors():
                table = _read(self._obs, columns, obs_filter=obs_filter)
        except OSError as error:
            if obs_filter is None:
                raise
            raise ValueError(
                f"{self._name}: obs cannot be read with the filter {obs_filter!r} ({error}); write "
                f"it like: cell_type == 'B cell'; the columns are {self.obs_columns()}"
            ) from error
        self._joinids = table["soma_joinid"].to_numpy()
        if len(self._joinids) == 0 and obs_filter is not None:
            raise ValueError(f"{self._name}: no cell passes the filter {obs_filter!r}")
        if self._states_stored:
            self._stored = table[_NUM_STORED].to_numpy().astype(np.int32)

    def rows(self, start: int, stop: int) -> Rows:
        joinids, parts = self._joinids[start:stop], []
        with _soma_errors():
            for table in self._matrix.read((_coordinate(joinids),)).tables():
                cells = np.searchsorted(joinids, table["soma_dim_0"].to_numpy())
                genes = np.searchsorted(self._gene_joinids, table["soma_dim_1"].to_numpy())
                values = table["soma_data"].to_numpy()
                parts.append((values, cells.astype(np.int32), genes.astype(np.int32)))
        values, cells, genes = (np.concatenate(p) for p in zip(*parts, strict=True))
        matrix = scipy.sparse.csr_matrix(
            (values, (cells, genes)), shape=(stop - start, self.num_genes)
        )
        matrix.sort_indices()
        return matrix.data, matrix.indices, matrix.indptr.astype(np.int64)

    def num_stored(self, start: int, stop: int) -> int:
        if self._states_stored:
            return int(self._stored[start:stop].sum(dtype=np.int64))
        return (stop - start) * min(self.num_genes, _GENES_OF_CELL)

    def cell_ids(self, start: int, stop: int) -> list[str]:
        columns = self.obs_columns()
        column = next((c for c in _CELL_IDS if c in columns), "soma_joinid")
        return [str(v) for v in self.obs(column, start, stop)]

    def obs_columns(self) -> list[str]:
        return list(self._obs.keys())

    def obs(self, column: str, start: int, stop: int) -> np.ndarray:
        joinids = self._joinids[start:stop]
        with _soma_errors():
            table = _read(self._obs, ["soma_joinid", column], _coordinate(joinids))
        if not np.array_equal(table["soma_joinid"].to_numpy(), joinids):
            raise OSError(f"obs lacks some of the cells {start}-{stop}")
        return _values(table[column])

    def var_columns(self) -> list[str]:
        return self._var.column_names

    def var(self, column: str | None) -> np.ndarray:
        if column is None:
            texts = [f.name for f in self._var.schema if _is_text(f.type)]
            if not texts:
                raise ValueError(f"{self._name}: var has no column of text, so no gene ids")
            column = "feature_id" if "feature_id" in texts else texts[0]
        return _values(self._var[column])


def _open(path: str) -> Any:
    """Return the opened SOMA collection or experiment at a path."""
    location = path.removeprefix(_PREFIX)
    config: dict[str, Any] = {"soma.init_buffer_bytes": _BUFFER_BYTES}
    try:
        import cellxgene_census
        import tiledbsoma
    except ImportError as error:
        raise ValueError(
            f"{path}: reading a Census needs the optional packages: pip install 'geneloom[census]'"
        ) from error
    with _soma_errors():
        if "/" in location or Path(location).exists():
            return tiledbsoma.open(location, context=tiledbsoma.SOMATileDBContext(config))
        try:
            return cellxgene_census.open_soma(census_version=location, tiledb_config=config)
        except (ValueError, OSError) as error:  # the version is unknown, or the network fails
            raise ValueError(f"{path}: the Census cannot be opened ({error})") from error


def _coordinate(joinids: np.ndarray) -> slice | np.ndarray:
    """Return the coordinate that asks SOMA for ascending joinids.

    It is a slice, both ends included, if the joinids have no gaps, and the array itself otherwise.
    """
    if len(joinids) and joinids[-1] - joinids[0] + 1 == len(joinids):
        return slice(int(joinids[0]), int(joinids[-1]))
    return joinids


def _read(
    frame: Any,
    columns: list[str] | None = None,
    coordinate: slice | np.ndarray = slice(None),
    obs_filter: str | None = None,
) -> pa.Table:
    """Return rows of a SOMA data frame in order of soma_joinid; columns None: all columns."""
    names = None if columns is None else list(dict.fromkeys(columns))
    reads = frame.read((coordinate,), names, value_filter=obs_filter, result_order="row-major")
    return reads.concat()


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _values(column: pa.ChunkedArray) -> np.ndarray:
    """Return the values of a column; integers stay integers even if some values are missing."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return column.to_pandas(integer_object_nulls=True).to_numpy()


@contextlib.contextmanager
def _soma_errors() -> Iterator[None]:
    """Raise errors of SOMA and TileDB as OSError; those of TileDB are RuntimeErrors."""
    import tiledbsoma

    try:
        yield
    except (tiledbsoma.SOMAError, RuntimeError) as error:
        raise OSError(str(error).partition("\n")[0]) from error
