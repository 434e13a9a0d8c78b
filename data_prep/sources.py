"""Sources of cells: count matrices (h5ad) and corpora of token ids (parquet, Hugging Face folders).

Every source is read in blocks of bounded size. What is wrong with a source is said once, with the
file, the share concerned and what to do.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import scipy.sparse

from data_prep.vocab import Vocabulary

_ENSEMBL = re.compile(r"^ENS[A-Z]*G\d{11}$")
_ENSEMBL_VERSIONED = re.compile(r"^ENS[A-Z]*G\d{11}\.\d+$")
# Largest share of non-integers that is still taken for rounding noise: none at all.
_INTEGER_TOLERANCE = 1e-6
_GROUP_BATCH_CELLS = 65_536
# More cells than this never share their first and their last gene by chance.
_FRAME_CELLS = 20


@dataclass(frozen=True)
class CountBlock:
    """Consecutive cells of one count matrix.

    `data`, `indices`, `indptr` are CSR arrays (cells x genes of the source); `metadata` maps an
    asked-for column to one string per cell; `passes` is False where the source itself marks a cell
    as filtered out (``filter_pass`` other than 1); `totals` float64 [cells], all counts of a cell.
    """

    data: np.ndarray
    indices: np.ndarray
    indptr: np.ndarray
    cell_ids: list[str]
    metadata: dict[str, list[str]]
    passes: np.ndarray
    totals: np.ndarray


@dataclass(frozen=True)
class TokenBlock:
    """Cells of a tokenised corpus in a row: `tokens` flat (int64), `offsets` int64 [cells + 1]."""

    tokens: np.ndarray
    offsets: np.ndarray
    cell_ids: list[str]
    metadata: dict[str, list[str]]


@dataclass(frozen=True)
class SourceOptions:
    """How count matrices are read; one setting for all sources of a call.

    Attributes
    ----------
    counts
        Where the raw counts are: ``X``, ``raw``, or ``layers/NAME``.
    gene_column
        Column of ``var`` with gene ids; None: ``ensembl_id`` where it exists, else the index.
    columns
        Columns of ``obs`` to carry along, as strings.
    total_column
        Column of ``obs`` with a cell's total counts, for files that hold some genes only; None: the
        sum over the file.
    strip_versions
        Cut ``.5`` from ``ENSG00000141510.5``.
    """

    counts: str = "X"
    gene_column: str | None = None
    columns: tuple[str, ...] = ()
    total_column: str | None = None
    strip_versions: bool = False


class H5adSource:
    """An AnnData file with raw counts, opened for reading in blocks of cells."""

    kind = "counts"

    def __init__(self, path: Path, options: SourceOptions) -> None:
        self.path = path
        self.name = path.stem
        self.options = options
        if not h5py.is_hdf5(path):
            raise ValueError(
                f"{path}: is not an HDF5 file, or is truncated; expected an .h5ad with raw counts"
            )
        try:
            self._file = h5py.File(path, "r")
            self._open_matrix()
        except (OSError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: not readable as h5ad ({error}); is it complete? A file of an old anndata "
                "is renewed by reading and writing it with anndata 0.8 or newer"
            ) from error

    def _open_matrix(self) -> None:
        file, counts = self._file, self.options.counts
        for key in ("obs", "var"):
            if key not in file:
                raise ValueError(f"{self.path}: has no '{key}'; it is HDF5 but not an AnnData file")
        location = {"X": "X", "raw": "raw/X"}.get(counts, counts)
        if location not in file or location in ("obs", "var", "layers", "uns"):
            layers = [f"layers/{name}" for name in file.get("layers", {})]
            choices = [
                *(["X"] if "X" in file else []),
                *(["raw"] if "raw" in file else []),
                *layers,
            ]
            raise ValueError(f"{self.path}: has no '{counts}'; --counts may be {choices}")
        element = file[location]
        self._is_sparse = isinstance(element, h5py.Group)
        self._matrix = anndata.io.sparse_dataset(element) if self._is_sparse else element
        self.num_cells, self.num_genes = (int(n) for n in self._matrix.shape)
        if self.num_cells == 0 or self.num_genes == 0:
            raise ValueError(
                f"{self.path}: is empty: {self.num_cells} cells, {self.num_genes} genes"
            )
        self._obs: pd.DataFrame = anndata.io.read_elem(file["obs"])
        self._var: pd.DataFrame = anndata.io.read_elem(
            file["raw/var" if counts == "raw" else "var"]
        )
        total = self.options.total_column
        wanted = [*self.options.columns, *([total] if total else [])]
        missing = [c for c in wanted if c not in self._obs]
        if missing:
            raise ValueError(
                f"{self.path}: obs has no column {missing}; it has {list(self._obs.columns)}"
            )

    @cached_property
    def gene_ids(self) -> list[str]:
        """Gene ids, one per matrix column; '' where the source has none."""
        column = self.options.gene_column
        if column is not None and column not in self._var:
            raise ValueError(
                f"{self.path}: var has no column '{column}'; --gene-column may be "
                f"{list(self._var.columns)}, or leave it out to use the index"
            )
        if column is None and "ensembl_id" in self._var:
            column = "ensembl_id"
        values = self._var.index if column is None else self._var[column]
        ids = ["" if pd.isna(v) else str(v) for v in values]
        if self.options.strip_versions:
            ids = [i.rsplit(".", 1)[0] if _ENSEMBL_VERSIONED.match(i) else i for i in ids]
        return ids

    def column_tokens(self, vocabulary: Vocabulary, min_overlap: float) -> np.ndarray:
        """Return int32 [genes] tokens, -1 where unknown; refuse ids that do not fit the vocabulary.

        Raises
        ------
        ValueError
            Fewer than `min_overlap` of the source's genes are in the vocabulary.
        """
        ids = self.gene_ids
        tokens = vocabulary.tokens_of(ids)
        known = int((tokens >= 0).sum())
        versioned = sum(bool(_ENSEMBL_VERSIONED.match(i)) for i in ids)
        if versioned and not self.options.strip_versions:
            raise ValueError(
                f"{self.path}: {versioned} of {len(ids)} gene ids carry a version "
                f"(e.g. {next(i for i in ids if _ENSEMBL_VERSIONED.match(i))}); add "
                "--strip-gene-versions to cut them off"
            )
        if known < max(1, min_overlap * len(ids)):
            raise ValueError(
                f"{self.path}: {known} of {len(ids)} gene ids ({known / max(1, len(ids)):.1%}) are "
                f"in the vocabulary, less than {min_overlap:.0%}; they look like "
                f"{[i for i in ids if i][:3]}, the vocabulary like {list(vocabulary.genes[:2])}. "
                + self._gene_advice(ids)
            )
        return tokens

    def _gene_advice(self, ids: list[str]) -> str:
        """Return what to try when ids do not match."""
        candidates = [
            str(c)
            for c in self._var.columns
            if sum(bool(_ENSEMBL.match(str(v).split(".")[0])) for v in self._var[c][:200]) > 100
        ]
        if candidates:
            return f"Column {candidates} of var holds Ensembl ids: give --gene-column."
        symbols = sum(not _ENSEMBL.match(i) for i in ids) > len(ids) / 2
        if symbols:
            return (
                "For gene symbols give --gene-mapping FILE (symbol -> Ensembl id), or build a "
                "vocabulary of symbols with --vocab build."
            )
        return "Another species or annotation? Lower --min-overlap only if this is meant."

    @property
    def duplicated_genes(self) -> int:
        """Number of columns whose id stood before; their counts are summed."""
        return sum(n - 1 for i, n in Counter(self.gene_ids).items() if i and n > 1)

    def group_sizes(self, column: str) -> Counter[str]:
        """Return how many cells each value of an asked-for column has."""
        return Counter(_as_text(self._obs[column]))

    def blocks(self, max_cells: int) -> Iterator[CountBlock]:
        """Yield consecutive blocks of at most `max_cells` cells."""
        matrix = self._matrix
        stop = self.num_cells
        if self._is_sparse and matrix.format == "csc":  # type: ignore[union-attr]
            # Rows of a column-major file are scattered over all of it: one conversion in memory.
            with self._damage_named(0, stop):
                matrix = matrix.to_memory().tocsr()  # type: ignore[union-attr]
        for start in range(0, self.num_cells, max_cells):
            stop = min(start + max_cells, self.num_cells)
            with self._damage_named(start, stop):
                csr = scipy.sparse.csr_matrix(matrix[start:stop])
            check_counts(self.path, csr.data, self.options.counts, "raw" in self._file)
            csr.eliminate_zeros()
            obs = self._obs.iloc[start:stop]
            yield CountBlock(
                csr.data,
                csr.indices,
                csr.indptr,
                [str(i) for i in obs.index],
                {c: _as_text(obs[c]) for c in self.options.columns},
                _filter_passes(obs),
                self._totals(csr, obs),
            )

    @contextlib.contextmanager
    def _damage_named(self, start: int, stop: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ValueError(
                f"{self.path}: cells {start}-{stop} cannot be read ({error}); the file is "
                "damaged or was changed while it was read"
            ) from error

    def _totals(self, csr: scipy.sparse.csr_matrix, obs: pd.DataFrame) -> np.ndarray:
        """Return the cells' totals; a column that is smaller than the counts is refused."""
        sums = np.asarray(csr.sum(axis=1), dtype=np.float64).ravel()
        column = self.options.total_column
        if column is None:
            return sums
        totals = pd.to_numeric(obs[column], errors="coerce").to_numpy(dtype=np.float64)
        wrong = np.flatnonzero(~(totals >= sums - 0.5))
        if wrong.size:
            raise ValueError(
                f"{self.path}: obs['{column}'] is no number or below the counts of {wrong.size} "
                f"cells, e.g. {totals[wrong[0]]:g} against {sums[wrong[0]]:g} in "
                f"{obs.index[wrong[0]]}; it is no total of these counts"
            )
        return totals


def _as_text(values: pd.Series) -> list[str]:
    """Return a column as strings; '' where a value is missing."""
    missing = values.isna().to_numpy()
    text = values.astype(str).to_numpy(dtype=object)
    text[missing] = ""
    return text.tolist()


def _filter_passes(obs: pd.DataFrame) -> np.ndarray:
    """Return bool [cells]: ``filter_pass`` is 1 or true, or there is no such column."""
    if "filter_pass" not in obs:
        return np.ones(len(obs), dtype=bool)
    text = obs["filter_pass"].astype(str).str.lower()
    return text.isin(["1", "1.0", "true"]).to_numpy()


def check_counts(path: Path, data: np.ndarray, counts: str, has_raw: bool) -> None:
    """Raise ValueError unless all values are finite non-negative integers (raw counts)."""
    if data.size == 0 or np.issubdtype(data.dtype, np.unsignedinteger):
        return
    advice = (
        "raw counts are needed (rank value encoding divides by the cell's total)"
        + ("; this file has a 'raw' matrix: try --counts raw" if has_raw and counts == "X" else "")
        + "; layers are given as --counts layers/NAME"
    )
    if np.issubdtype(data.dtype, np.floating) and not np.isfinite(data).all():
        raise ValueError(f"{path}: '{counts}' holds NaN or infinite values; {advice}")
    if data.min() < 0:
        share = float((data < 0).mean())
        raise ValueError(
            f"{path}: {share:.1%} of the stored values in '{counts}' are negative "
            f"(smallest {data.min():.3g}): scaled data; {advice}"
        )
    fractional = np.abs(data - np.rint(data)) > _INTEGER_TOLERANCE
    if fractional.any():
        looks = "log-transformed" if data.max() < 30 else "normalised"
        raise ValueError(
            f"{path}: {fractional.mean():.1%} of the stored values in '{counts}' are no integers "
            f"(e.g. {data[fractional][0]:.4g}, largest {data.max():.4g}): looks {looks}; {advice}"
        )


class TokenSource:
    """A corpus of ranked token ids with columns ``input_ids`` and ``length``, as Genecorpus-30M."""

    kind = "tokens"

    def __init__(self, path: Path, options: SourceOptions) -> None:
        self.path = path
        self.name = path.stem
        self.options = options
        self._is_folder = path.is_dir()
        self._files = self._list_files()
        self.num_cells = 0
        for file in self._files:
            schema, rows = self._schema_and_rows(file)
            missing = [
                c for c in ("input_ids", "length", *options.columns) if c not in schema.names
            ]
            if missing:
                raise ValueError(f"{file}: has no column {missing}; it has {schema.names}")
            kind = schema.field("input_ids").type
            if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
                raise ValueError(f"{file}: 'input_ids' is {kind}, expected lists of integers")
            if not pa.types.is_integer(kind.value_type):
                raise ValueError(f"{file}: 'input_ids' holds {kind.value_type}, expected integers")
            if not pa.types.is_integer(schema.field("length").type):
                raise ValueError(f"{file}: 'length' must be an integer column")
            self.num_cells += rows
        if self.num_cells == 0:
            raise ValueError(f"{path}: holds no cells")

    def _list_files(self) -> list[Path]:
        if not self._is_folder:
            return [self.path]
        state = self.path / "state.json"
        if state.exists():
            # The folder may also hold cache-*.arrow, results of a user's map() and filter().
            names = [f["filename"] for f in json.loads(state.read_text())["_data_files"]]
            files = [self.path / name for name in names]
            missing = [f.name for f in files if not f.exists()]
            if missing:
                raise ValueError(f"{self.path}: state.json names {missing}, which do not exist")
            return files
        files = sorted(self.path.glob("*.arrow")) or sorted(self.path.glob("*.parquet"))
        if not files:
            raise ValueError(
                f"{self.path}: is a folder without *.arrow or *.parquet files; expected a Hugging "
                "Face dataset folder (save_to_disk) of token ids"
            )
        return files

    def _schema_and_rows(self, file: Path) -> tuple[pa.Schema, int]:
        try:
            if file.suffix == ".parquet":
                metadata = pq.ParquetFile(file)
                return metadata.schema_arrow, metadata.metadata.num_rows
            with pa.memory_map(str(file)) as mapped:
                stream = pa.ipc.open_stream(mapped)
                return stream.schema, sum(batch.num_rows for batch in stream)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{file}: cannot be read as Arrow or parquet ({error})") from error

    def group_sizes(self, column: str) -> Counter[str]:
        """Return how many cells each value of an asked-for column has."""
        sizes: Counter[str] = Counter()
        for batch in self._batches(_GROUP_BATCH_CELLS, [column]):
            values = batch.column(column).to_pylist()
            sizes.update("" if v is None else str(v) for v in values)
        return sizes

    def _batches(self, max_cells: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        for file in self._files:
            try:
                if file.suffix == ".parquet":
                    yield from pq.ParquetFile(file).iter_batches(max_cells, columns=columns)
                    continue
                with pa.memory_map(str(file)) as mapped:
                    for batch in pa.ipc.open_stream(mapped):
                        for start in range(0, batch.num_rows, max_cells):
                            yield batch.select(columns).slice(start, max_cells)
            except (pa.ArrowInvalid, OSError) as error:
                raise ValueError(f"{file}: is damaged ({error})") from error

    def blocks(self, max_cells: int) -> Iterator[TokenBlock]:
        """Yield consecutive blocks of at most `max_cells` cells."""
        row = 0
        for batch in self._batches(max_cells, ["input_ids", "length", *self.options.columns]):
            lists = batch.column("input_ids")
            if lists.null_count or lists.values.null_count:
                raise ValueError(f"{self.path}: 'input_ids' has missing values after row {row}")
            offsets = np.asarray(lists.offsets, dtype=np.int64)
            tokens = np.asarray(lists.values, dtype=np.int64)[offsets[0] : offsets[-1]]
            lengths = np.asarray(batch.column("length"), dtype=np.int64)
            wrong = np.flatnonzero(np.diff(offsets) != lengths)
            if wrong.size:
                raise ValueError(
                    f"{self.path}: row {row + int(wrong[0])}: 'length' is {lengths[wrong[0]]} but "
                    f"'input_ids' holds {np.diff(offsets)[wrong[0]]} tokens"
                )
            metadata = {
                c: ["" if v is None else str(v) for v in batch.column(c).to_pylist()]
                for c in self.options.columns
            }
            ids = [f"{self.name}:{row + i}" for i in range(batch.num_rows)]
            yield TokenBlock(tokens, offsets - offsets[0], ids, metadata)
            row += batch.num_rows

    def check_tokens(self, block: TokenBlock, vocabulary: Vocabulary) -> None:
        """Raise ValueError unless the block's tokens are genes of the vocabulary, framed alike."""
        tokens, offsets = block.tokens, block.offsets
        if tokens.size == 0:
            return
        if tokens.min() < 0 or tokens.max() >= vocabulary.num_tokens:
            raise ValueError(
                f"{self.path}: token {tokens.max()} does not exist in the vocabulary of "
                f"{vocabulary.num_tokens} tokens; these cells were made with another one"
            )
        longest = int(np.diff(offsets).max())
        if longest > vocabulary.max_length:
            raise ValueError(
                f"{self.path}: a cell of {longest} tokens, but the vocabulary's maximum length is "
                f"{vocabulary.max_length}"
            )
        special = tokens < vocabulary.first_gene_token
        if vocabulary.has_cls:
            filled = np.flatnonzero(np.diff(offsets) >= 2)
            first, last = offsets[filled], offsets[filled + 1] - 1
            framed = (tokens[first] == vocabulary.special_tokens["<cls>"]) & (
                tokens[last] == vocabulary.special_tokens["<eos>"]
            )
            if not framed.all() or len(filled) != len(offsets) - 1:
                raise ValueError(f"{self.path}: cells without <cls> ... <eos>, which this needs")
            special[first] = special[last] = False
        elif len(offsets) > _FRAME_CELLS and np.diff(offsets).min() > 1:
            first, last = tokens[offsets[:-1]], tokens[offsets[1:] - 1]
            if (first == first[0]).all() and (last == last[0]).all():
                raise ValueError(
                    f"{self.path}: every cell starts with token {first[0]} and ends with "
                    f"{last[0]}: <cls> and <eos> of another version? This vocabulary has none"
                )
        if special.any():
            raise ValueError(
                f"{self.path}: special tokens stand between genes (share {special.mean():.2%}); "
                "tokens and vocabulary belong to different versions"
            )


Source = H5adSource | TokenSource


def open_source(path: Path, options: SourceOptions) -> Source:
    """Return the source at a path; its kind is told by suffix and content.

    Raises
    ------
    ValueError
        The path does not exist or is of no known kind.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if path.is_dir() or path.suffix in (".parquet", ".arrow"):
        return TokenSource(path, options)
    if path.suffix in (".h5ad", ".h5"):
        return H5adSource(path, options)
    raise ValueError(
        f"{path}: unknown kind of source; accepted: .h5ad, .parquet, .arrow, Hugging Face folders"
    )
