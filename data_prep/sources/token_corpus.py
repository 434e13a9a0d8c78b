"""Reads corpora of ranked token ids such as Genecorpus-30M: parquet, Arrow, Hugging Face folders.

`split_names` lists the splits of a folder. `TokenSource` opens the files of one split; its
`stretches` are ranges that can be read on their own, `blocks` yields the cells of a range, and
`checked_tokens` checks the tokens of a block against the vocabulary.
"""

from __future__ import annotations

import json
import mmap
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numba
import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from data_prep.genes.rank_genes import token_dtype
from data_prep.genes.vocabulary import Vocabulary
from data_prep.sources.source_spec import SourceSpec, split_path

# More cells than this do not all share their first and their last gene by chance.
_FRAME_CELLS = 20
_READ_CELLS = 4096
# File names of `datasets` and the Hub, such as train-00000-of-00002.parquet or test.arrow.
_SPLIT_FILE = re.compile(
    r"(train|training|test|validation|valid|val|dev|eval)(?:[-_.].*)?\.(?:arrow|parquet)$"
)
_ARROW_FILE_MAGIC = b"ARROW1"


@dataclass(frozen=True)
class TokenBlock:
    """Consecutive cells of a tokenised corpus.

    `tokens` holds the tokens of all cells one after the other, in the integer type of the file;
    `offsets`, int64 [cells + 1], says where each cell begins. `metadata` has one string per cell
    for each carried column.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    cell_ids: list[str]
    datasets: list[str]
    metadata: dict[str, list[str]]


@dataclass(frozen=True)
class _Unit:
    """The smallest range of rows that can be read alone: an Arrow batch or a parquet row group."""

    file: int
    number: int
    start: int
    stop: int


class TokenSource:
    """An opened corpus: files with the columns ``input_ids`` (lists of integers) and ``length``."""

    kind = "tokens"

    def __init__(self, spec: SourceSpec) -> None:
        self.spec, self.path, self.name, self.options = spec, spec.path, spec.name, spec.options
        self._files = _list_files(*split_path(spec.path))
        self._batch_lists: dict[int, list[pa.RecordBatch]] = {}
        self._parquets: dict[int, pq.ParquetFile] = {}
        self._mappings: list[mmap.mmap] = []
        self._units: list[_Unit] = []
        # Names of the class labels of each column, where Hugging Face's datasets stored them.
        self._labels: dict[str, list[str]] = {}
        self.num_cells = 0
        for number, file in enumerate(self._files):
            schema, sizes = self._open(number)
            self._check_schema(file, schema)
            self._labels |= _class_labels(schema)
            for i, size in enumerate(sizes):
                self._units.append(_Unit(number, i, self.num_cells, self.num_cells + size))
                self.num_cells += size
        if self.num_cells == 0:
            raise ValueError(f"{self.path}: holds no cells")

    def _open(self, number: int) -> tuple[pa.Schema, list[int]]:
        """Open a file and return its schema and the number of cells in each unit."""
        file = self._files[number]
        try:
            if file.suffix == ".parquet":
                # Without pre-buffering, even a large row group is read page by page.
                opened = pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
                self._parquets[number] = opened
                groups = range(opened.metadata.num_row_groups)
                return opened.schema_arrow, [opened.metadata.row_group(i).num_rows for i in groups]
            with file.open("rb") as opened:
                mapping = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
            self._mappings.append(mapping)
            content = pa.py_buffer(mapping)
            if mapping[: len(_ARROW_FILE_MAGIC)] == _ARROW_FILE_MAGIC:
                reader = pa.ipc.open_file(content)
                batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
            else:
                reader = pa.ipc.open_stream(content)
                batches = list(reader)
            self._batch_lists[number] = batches
            return reader.schema, [b.num_rows for b in batches]
        except (pa.ArrowException, OSError, ValueError, MemoryError) as error:  # e.g. an empty file
            raise ValueError(f"{file}: cannot be read as Arrow or parquet ({error})") from error

    def _check_schema(self, file: Path, schema: pa.Schema) -> None:
        wanted = ["input_ids", "length", *self._columns()]
        missing = [c for c in wanted if c not in schema.names]
        if missing:
            raise ValueError(f"{file}: has no column {missing}; it has {schema.names}")
        kind = schema.field("input_ids").type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            raise ValueError(f"{file}: 'input_ids' is {kind}, expected lists of integers")
        if not pa.types.is_integer(kind.value_type):
            raise ValueError(f"{file}: 'input_ids' holds {kind.value_type}, expected integers")
        if not pa.types.is_integer(schema.field("length").type):
            raise ValueError(f"{file}: 'length' must be an integer column")

    def _columns(self) -> list[str]:
        """Return the names of the columns that are read beside the tokens, each name once."""
        dataset = self.options.dataset_column
        return list(
            dict.fromkeys([*self.options.column_sources.values(), *([dataset] if dataset else [])])
        )

    def group_sizes(self, column: str) -> Counter[str]:
        """Return how many cells each value of a carried column (or ``dataset``) has."""
        is_dataset = column == "dataset"
        options = self.options
        name = options.dataset_column if is_dataset else options.column_sources.get(column)
        if name is None:
            return Counter({self.spec.dataset if is_dataset else "": self.num_cells})
        sizes: Counter[str] = Counter()
        for _, batch in self._batches(0, self.num_cells, [name]):
            sizes.update(self._texts(batch, name))
        return sizes

    def stretches(self, chunk_cells: int) -> list[tuple[int, int]]:
        """Return ranges of at least `chunk_cells` cells that can be read independently."""
        stretches, start = [], 0
        for unit in self._units:
            if unit.stop - start >= chunk_cells or unit is self._units[-1]:
                stretches.append((start, unit.stop))
                start = unit.stop
        return [s for s in stretches if s[1] > s[0]]

    def _texts(self, batch: pa.RecordBatch, column: str) -> list[str]:
        """Return a column as text; numbers of class labels become the labels' names."""
        values, names = batch.column(column).to_pylist(), self._labels.get(column)
        if names is None:
            return ["" if v is None else str(v) for v in values]
        wrong = [v for v in values if v is not None and not -1 <= v < len(names)]
        if wrong:
            raise ValueError(
                f"{self.path}: column '{column}' holds class {wrong[0]} of {len(names)}, "
                f"{names[:5]}"
            )
        return ["" if v is None or v == -1 else names[v] for v in values]

    def _batches(
        self, start: int, stop: int, columns: list[str]
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Yield (first row, batch) for the rows start..stop-1; both ends are at unit boundaries."""
        for unit in self._units:
            if unit.start < start or unit.stop > stop or unit.start == unit.stop:
                continue
            row = unit.start
            try:
                if unit.file in self._parquets:
                    parquet = self._parquets[unit.file]
                    parts = parquet.iter_batches(_READ_CELLS, [unit.number], columns)
                else:
                    whole = self._batch_lists[unit.file][unit.number].select(columns)
                    cuts = range(0, whole.num_rows, _READ_CELLS)
                    parts = (whole.slice(at, _READ_CELLS) for at in cuts)
                for part in parts:
                    yield row, part
                    row += part.num_rows
            except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
                raise ValueError(
                    f"{self._files[unit.file]}: is damaged at rows {unit.start}-{unit.stop} "
                    f"({error})"
                ) from error

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[TokenBlock]:
        """Yield the cells start..stop-1, a stretch of `stretches`, in blocks of bounded size."""
        stop = self.num_cells if stop is None else stop
        columns = ["input_ids", "length", *self._columns()]
        dataset = self.options.dataset_column
        for row, batch in self._batches(start, stop, columns):
            lists = batch.column("input_ids")
            if lists.null_count or lists.values.null_count:
                raise ValueError(f"{self.path}: 'input_ids' has missing values after row {row}")
            offsets = np.asarray(lists.offsets, dtype=np.int64)
            tokens = np.asarray(lists.values)[offsets[0] : offsets[-1]]
            lengths = np.asarray(batch.column("length"), dtype=np.int64)
            wrong = np.flatnonzero(np.diff(offsets) != lengths)
            if wrong.size:
                raise ValueError(
                    f"{self.path}: row {row + int(wrong[0])}: 'length' is {lengths[wrong[0]]} but "
                    f"'input_ids' holds {np.diff(offsets)[wrong[0]]} tokens"
                )
            metadata = {
                name: self._texts(batch, column)
                for name, column in self.options.column_sources.items()
            }
            ids = [f"{self.name}:{i}" for i in range(row, row + batch.num_rows)]
            datasets = [self.spec.dataset] * batch.num_rows
            if dataset:
                datasets = self._texts(batch, dataset)
            yield TokenBlock(tokens, offsets - offsets[0], ids, datasets, metadata)
        for mapping in self._mappings:
            # Otherwise the pages that were read would count as this process's memory for ever.
            mapping.madvise(mmap.MADV_DONTNEED)

    def checked_tokens(self, block: TokenBlock, vocabulary: Vocabulary) -> np.ndarray:
        """Return the block's tokens in the vocabulary's dtype, after checking them.

        Raises
        ------
        ValueError
            A token is not in the vocabulary, a cell is longer than the vocabulary's maximum, or
            the special tokens are not those of the vocabulary.
        """
        offsets, lengths = block.offsets, np.diff(block.offsets)
        tokens = np.empty(len(block.tokens), dtype=token_dtype(vocabulary.num_tokens))
        if not len(tokens):
            return tokens
        low, high, inner = _narrow(block.tokens, vocabulary.first_gene_token, tokens)
        if low < 0 or high >= vocabulary.num_tokens:
            raise ValueError(
                f"{self.path}: token {high if low >= 0 else low} does not exist in the vocabulary "
                f"of {vocabulary.num_tokens} tokens; these cells were made with another one"
            )
        if lengths.max() > vocabulary.max_length:
            raise ValueError(
                f"{self.path}: a cell of {lengths.max()} tokens, but the vocabulary's maximum "
                f"length is {vocabulary.max_length}"
            )
        if vocabulary.has_cls:
            filled = np.flatnonzero(lengths >= 2)
            first, last = offsets[filled], offsets[filled + 1] - 1
            framed = (tokens[first] == vocabulary.special_tokens["<cls>"]) & (
                tokens[last] == vocabulary.special_tokens["<eos>"]
            )
            if not framed.all() or len(filled) != len(lengths):
                raise ValueError(f"{self.path}: cells without <cls> ... <eos>, which this needs")
            inner -= 2 * len(filled)
        elif len(lengths) > _FRAME_CELLS and lengths.min() > 1:
            first, last = tokens[offsets[:-1]], tokens[offsets[1:] - 1]
            if (first == first[0]).all() and (last == last[0]).all():
                raise ValueError(
                    f"{self.path}: every cell starts with token {first[0]} and ends with "
                    f"{last[0]}: <cls> and <eos> of another version? This vocabulary has none"
                )
        if inner:
            raise ValueError(
                f"{self.path}: special tokens stand between genes (share {inner / len(tokens):.2%})"
                "; tokens and vocabulary belong to different versions"
            )
        return tokens


@numba.njit(cache=True, nogil=True)
def _narrow(tokens, first_gene, out):
    """Copy `tokens` to `out`, which has a narrower dtype.

    Returns (smallest token, largest token, number of tokens below the first gene token).
    """
    low, high, special = tokens[0], tokens[0], 0
    for i in range(len(tokens)):
        token = tokens[i]
        low, high = min(low, token), max(high, token)
        special += token < first_gene
        out[i] = token
    return low, high, special


def _class_labels(schema: pa.Schema) -> dict[str, list[str]]:
    """Return the names of class labels by column, as Hugging Face's datasets stores them."""
    try:
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = info.get("info", {}).get("features", {})
        found = {
            name: [str(n) for n in feature["names"]]
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}  # another program stored other metadata under this key
    return {name: names for name, names in found.items() if name in schema.names}


def split_names(path: Path) -> list[str]:
    """Return the names of the splits of a Hugging Face DatasetDict; [] for anything else.

    A saved DatasetDict lists its splits. Otherwise the names of the files tell the splits
    (``test-00000-of-00001.parquet``), if there are two splits or more.
    """
    record = path / "dataset_dict.json"
    if record.is_file():
        try:
            names = json.loads(record.read_text())["splits"]
            return [str(n) for n in names]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{record}: does not list splits ({error!r})") from error
    if not path.is_dir() or (path / "state.json").exists():
        return []
    files = sorted(path.glob("*.arrow")) or sorted(path.glob("*.parquet"))
    found = [_SPLIT_FILE.match(f.name) for f in files]
    names = sorted({m[1] for m in found if m}, key=lambda n: (not n.startswith("train"), n))
    return names if len(names) > 1 else []


def _list_files(path: Path, split: str | None = None) -> list[Path]:
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if not path.is_dir():
        return [path]
    names = split_names(path)
    if names and split is None:
        raise ValueError(f"{path}: holds splits {names}; choose one: {path}#{names[0]}")
    if split is not None:
        if split not in names:
            raise ValueError(f"{path}#{split}: there is no such split, only {names}")
        if (path / split).is_dir():
            return _files_of(path / split)
        files = sorted(path.glob("*.arrow")) or sorted(path.glob("*.parquet"))
        return [f for f in files if (m := _SPLIT_FILE.match(f.name)) and m[1] == split]
    return _files_of(path)


def _files_of(path: Path) -> list[Path]:
    state = path / "state.json"
    if state.exists():
        # The folder may also hold cache-*.arrow, which are results of a user's map() and filter().
        try:
            names = [f["filename"] for f in json.loads(state.read_text())["_data_files"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{state}: does not list data files ({error!r})") from error
        files = [path / name for name in names]
        missing = [f.name for f in files if not f.exists()]
        if missing:
            raise ValueError(f"{path}: state.json names {missing}, which do not exist")
        return files
    files = sorted(path.glob("*.arrow")) or sorted(path.glob("*.parquet"))
    if not files:
        raise ValueError(
            f"{path}: is a folder without *.arrow or *.parquet files; expected a Hugging Face "
            "dataset folder (save_to_disk) of token ids"
        )
    return files
