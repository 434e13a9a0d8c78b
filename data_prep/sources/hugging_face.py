"""Copies Hugging Face datasets, named ``hf:OWNER/NAME#SPLIT`` or ``hf:FOLDER#SPLIT``, to parquet.

`hub_splits` lists the splits of a dataset. `stage_dataset` reads one split as a stream through the
package `datasets` and copies the wanted columns once to a parquet file in the working folder, which
is then read like any other parquet file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from data_prep.matrices.row_copy import staged_folder

PREFIX = "hf:"
_BATCH_CELLS = 1024
_GROUP_BATCHES = 16


def _datasets(path: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{path}: is read through the package `datasets`: pip install datasets"
        ) from error
    return datasets


def hub_splits(path: str) -> list[str]:
    """Return the names of the splits of a dataset; [] if the path already names a split."""
    location, mark, _ = path.removeprefix(PREFIX).partition("#")
    if mark:
        return []
    try:
        return [str(n) for n in _datasets(path).get_dataset_split_names(location)]
    except Exception as error:  # noqa: BLE001  the network, the hub's and the package's own errors
        raise ValueError(f"{path}: datasets cannot open it ({error})") from error


def stage_dataset(path: str, columns: list[str], folder: Path) -> Path:
    """Return the path of a parquet file with the cells of one split.

    The split is copied unless an earlier call has copied it.

    Parameters
    ----------
    columns
        Columns to keep beside ``input_ids`` and ``length``. If the dataset has no ``length``, it is
        counted.
    folder
        Folder for the copy.

    Raises
    ------
    ValueError
        The dataset, the split or a column does not exist, or the network fails.
    """
    name = "cells.parquet"
    staged_folder(folder, lambda aside: {"cells": _copy(path, columns, aside / name)})
    return folder / name


def _copy(path: str, columns: list[str], out: Path) -> int:
    writer: pq.ParquetWriter | None = None
    cells, waiting = 0, []
    try:
        for table in _tables(path, columns):
            waiting.append(table)
            cells += table.num_rows
            if writer is None:
                writer = pq.ParquetWriter(out, table.schema, compression="zstd")
            if len(waiting) == _GROUP_BATCHES and writer is not None:
                writer.write_table(pa.concat_tables(waiting))
                waiting.clear()
        if writer is None:
            raise ValueError(f"{path}: holds no cells")
        if waiting:
            writer.write_table(pa.concat_tables(waiting))
    finally:
        if writer is not None:
            writer.close()
    return cells


def _tables(path: str, columns: list[str]) -> Iterator[pa.Table]:
    """Yield the wanted columns in batches; the schema holds the names of class labels."""
    location, _, split = path.removeprefix(PREFIX).partition("#")
    if not split:
        raise ValueError(f"{path}: name a split: {path}#{(hub_splits(path) or ['train'])[0]}")
    datasets = _datasets(path)
    # `datasets` looks for access tokens of the Hub itself; this code never sees them.
    offline = {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    os.environ.update({k: v for k, v in offline.items() if k not in os.environ})
    try:
        stream = datasets.load_dataset(location, split=split, streaming=True)
        for table in stream.with_format("arrow").iter(batch_size=_BATCH_CELLS):
            missing = [c for c in ["input_ids", *columns] if c not in table.column_names]
            if missing:
                raise ValueError(f"has no column {missing}; it has {table.column_names}")
            if "length" not in table.column_names:
                counted = pyarrow.compute.list_value_length(table["input_ids"]).cast(pa.int64())
                table = table.append_column("length", counted)
            chosen = table.select(["input_ids", "length", *columns])
            features = stream.features
            if features is not None:
                kept = {n: f for n, f in features.items() if n in chosen.column_names}
                schema = datasets.Features(kept).arrow_schema.metadata
                chosen = chosen.replace_schema_metadata(schema)
            yield chosen
    except Exception as error:  # noqa: BLE001  the network, the hub's and the package's own errors
        raise ValueError(f"{path}: datasets cannot read it ({error})") from error
