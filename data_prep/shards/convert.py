"""Converts shards to files that Hugging Face's datasets and Geneformer's pretrainer can read."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from data_prep.files import complete_file, complete_folder, require_new, require_new_file
from data_prep.shards.format import SPLITS
from data_prep.shards.reader import ShardSet

# Geneformer's pretrainer expects a pickled list with the length of each row.
LENGTHS_NAME = "lengths.pkl"
# The names of the splits in `datasets`.
_NAMES = {"train": "train", "heldout": "test"}


def convert(shards: ShardSet, out: Path, split: str) -> int:
    """Write the cells of one split, or of all splits as a DatasetDict; return how many cells.

    Parameters
    ----------
    out
        ``NAME.parquet`` for one file; any other name becomes a folder for ``load_from_disk``, with
        the lengths of its cells in ``lengths.pkl`` beside the Arrow file.
    split
        ``train``, ``heldout`` or ``all``.

    Raises
    ------
    ValueError
        `out` exists, or the split has no cells.
    """
    chosen = [s for s in SPLITS if split in (s, "all") and shards.bucket_lengths(s)]
    if split not in (*SPLITS, "all") or not chosen:
        raise ValueError(f"--split {split}: must be train, heldout or all, and have cells")
    if out.suffix == ".parquet":
        require_new_file(out)
        with complete_file(out) as aside, pq.ParquetWriter(aside, _schema(shards)) as writer:
            return sum(_put(writer, t) for s in chosen for t in _tables(shards, s))
    require_new(out)
    with complete_folder(out, "state.json" if split != "all" else "dataset_dict.json") as aside:
        if split != "all":
            return _write_folder(shards, split, aside)
        names = [_NAMES[s] for s in chosen]
        (aside / "dataset_dict.json").write_text(json.dumps({"splits": names}))
        cells = 0
        for name, part in zip(names, chosen, strict=True):
            (aside / name).mkdir()
            cells += _write_folder(shards, part, aside / name)
        return cells


def _put(writer: pq.ParquetWriter, table: pa.Table) -> int:
    writer.write_table(table)
    return table.num_rows


def _schema(shards: ShardSet) -> pa.Schema:
    columns = ["cell_id", "dataset", *shards.manifest["columns"]]
    text = {"dtype": "string", "_type": "Value"}
    number = {"dtype": "int64", "_type": "Value"}
    features: dict[str, Any] = {
        # The older name of the type `List`, which every version of `datasets` reads.
        "input_ids": {"feature": number, "_type": "Sequence"},
        "length": number,
    } | dict.fromkeys(columns, text)
    schema = pa.schema(
        [("input_ids", pa.list_(pa.int64())), ("length", pa.int64())]
        + [(name, pa.string()) for name in columns]
    )
    return schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def _tables(shards: ShardSet, split: str) -> Iterator[pa.Table]:
    schema = _schema(shards)
    for block in shards.iter_blocks(split):
        lists = pa.ListArray.from_arrays(
            pa.array(block.offsets.astype(np.int32)), pa.array(block.tokens.astype(np.int64))
        )
        columns = [lists, pa.array(np.diff(block.offsets))]
        columns += [block.batch.column(name).cast(pa.string()) for name in schema.names[2:]]
        yield pa.table(columns, schema=schema)


def _write_folder(shards: ShardSet, split: str, folder: Path) -> int:
    """Write the files of ``Dataset.save_to_disk`` and the lengths; return the number of cells."""
    schema, name = _schema(shards), "data-00000-of-00001.arrow"
    lengths: list[int] = []
    with pa.ipc.new_stream(str(folder / name), schema) as writer:
        for table in _tables(shards, split):
            writer.write_table(table)
            lengths += table.column("length").to_pylist()
    (folder / LENGTHS_NAME).write_bytes(pickle.dumps(lengths))
    info = json.loads((schema.metadata or {})[b"huggingface"])["info"]
    (folder / "dataset_info.json").write_text(json.dumps(info | {"citation": "", "license": ""}))
    state = {
        "_data_files": [{"filename": name}],
        "_fingerprint": shards.fingerprint[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / "state.json").write_text(json.dumps(state))
    return len(lengths)
