"""Read gene lists from files: a table with a column of ids, or one id per line."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

GENE_COLUMNS = ("ensembl_id", "gene")


def read_genes(path: Path, keep: dict[str, tuple[str, ...]] = {}) -> dict[str, str]:  # noqa: B006  read only
    """Return gene id -> symbol ('' if the file has none), each id once, in the order of the file.

    Parameters
    ----------
    path
        ``.tsv`` or ``.csv`` (optionally ``.gz``) with the column ``ensembl_id`` or ``gene``, and
        optionally ``symbol``. Any other file has one id per line, and ``#`` starts a comment. Rows
        without an id are left out.
    keep
        Column -> values of the rows to use; a row must match all columns.

    Raises
    ------
    ValueError
        The file is not readable, a column is missing, or no gene is left.
    """
    try:
        table = _read(path)
    except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise ValueError(f"{path}: cannot be read as a list of genes ({error})") from error
    column = next((c for c in GENE_COLUMNS if c in table), None)
    absent = [c for c in keep if c not in table]
    if column is None or absent:
        needed = " and ".join(["ensembl_id (or gene)", *absent])
        raise ValueError(f"{path}: has the columns {list(table)}; needed are {needed}")
    table = table.apply(lambda values: values.str.strip())
    chosen = table[column] != ""
    for name, values in keep.items():
        chosen &= table[name].isin(values)
    rows = table[chosen].drop_duplicates(column)
    if rows.empty:
        asked = f" with {keep}" if keep else ""
        raise ValueError(f"{path}: no gene{asked}; a list needs one at least")
    symbols = rows["symbol"] if "symbol" in rows else [""] * len(rows)
    return dict(zip(rows[column], symbols, strict=True))


def _read(path: Path) -> pd.DataFrame:
    name = path.name.removesuffix(".gz")
    if name.endswith((".tsv", ".csv")):
        separator = "," if name.endswith(".csv") else "\t"
        return pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False)
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return pd.DataFrame({"gene": [line for line in lines if line]}, dtype=str)
