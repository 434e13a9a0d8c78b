"""Pairs of genes from a table: regulators and targets, or perturbed genes and what follows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from data_prep.files import file_sha256
from eval.benchmark.task_file import Edges


@dataclass(frozen=True)
class GenePairs:
    """Pairs of gene ids, each once, none of a gene with itself.

    Attributes
    ----------
    source, target
        str [pairs].
    others
        Source -> genes that other rows of the table list for it, and that are no targets.
    looked_at
        str, sorted: targets of all rows of the table, pairs or not.
    digest
        Hash of the file's bytes.
    """

    source: np.ndarray
    target: np.ndarray
    others: dict[str, list[str]]
    looked_at: np.ndarray
    digest: str

    def targets_of(self, source: str) -> np.ndarray:
        """Return the targets of one gene."""
        return self.target[self.source == source]


def read_edges(edges: Edges, data: Path | None) -> GenePairs:
    """Return the pairs of a task's table; rows without an id on one side are left out.

    Raises
    ------
    ValueError
        No such file, it cannot be read, a column is missing, or no row passes `keep`.
    """
    if data is None:
        raise ValueError(f"--data: this task needs {edges.file}; give the folder it is in")
    path = data / edges.file
    if not path.exists():
        raise ValueError(f"{path}: no such file. {edges.recipe}")
    table = _read(path)
    missing = [c for c in (edges.source, edges.target, *edges.keep) if c not in table]
    if missing:
        raise ValueError(f"{path}: no column {', '.join(missing)}; it has {', '.join(table)}")
    table = table[list(dict.fromkeys([edges.source, edges.target, *edges.keep]))]
    table = table.astype(str).apply(lambda column: column.str.strip())
    named = ~table[[edges.source, edges.target]].isin(["", "nan", "None", "<NA>"]).any(axis=1)
    table = table[named]
    looked_at = np.unique(table[edges.target].to_numpy(dtype=str))
    kept = table[edges.source] != table[edges.target]
    for column, values in edges.keep.items():
        kept &= table[column].isin(values)
    pairs = table.loc[kept, [edges.source, edges.target]].drop_duplicates()
    if pairs.empty:
        raise ValueError(f"{path}: no row has {edges.keep}; change `keep` or the file")
    # A target may be listed in several rows: one that is a pair is enough.
    rest = table.loc[~kept & (table[edges.source] != table[edges.target])]
    known = pd.MultiIndex.from_frame(pairs)
    rest = rest[~pd.MultiIndex.from_frame(rest[[edges.source, edges.target]]).isin(known)]
    others = rest.groupby(edges.source)[edges.target].agg(lambda t: sorted(set(t))).to_dict()
    return GenePairs(
        pairs[edges.source].to_numpy(dtype=str),
        pairs[edges.target].to_numpy(dtype=str),
        others,
        looked_at,
        file_sha256(path),
    )


def _read(path: Path) -> pd.DataFrame:
    try:
        if path.suffix == ".parquet":
            return pd.read_parquet(path)
        separator = "," if ".csv" in path.suffixes else "\t"
        return pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False)
    except (OSError, ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as a table ({error})") from error
