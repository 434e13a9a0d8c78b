"""Functions that derive species, biotypes and mitochondrial genes from gene ids and annotations.

`species_of` needs gene ids only. `mitochondrial_columns` knows the human mitochondrial genes and
adds those of an annotation table, which `read_annotation` reads.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from data_prep.genes.gene_names import ENSEMBL, plain_id, strip_version

# Ensembl's species prefixes (https://www.ensembl.org/info/genome/stable_ids/prefixes.html).
SPECIES = {
    "": "human", "MUS": "mouse", "RNO": "rat", "DAR": "zebrafish", "MMU": "macaque",
    "PTR": "chimpanzee", "SSC": "pig", "GAL": "chicken", "BTA": "cow", "CAF": "dog",
    "OCU": "rabbit", "CJA": "marmoset",
}  # fmt: skip
ORGANISMS = {
    "homo sapiens": "human", "homo_sapiens": "human", "mus musculus": "mouse",
    "mus_musculus": "mouse", "rattus norvegicus": "rat", "danio rerio": "zebrafish",
    "macaca mulatta": "macaque",
}  # fmt: skip
_SOME_NUMBER = "0" * 11  # as many digits as an Ensembl id has
# The 37 genes of the human mitochondrial chromosome (GENCODE 49), without the prefix ENSG00000.
_HUMAN_NUMBERS = """
198695 198712 198727 198763 198786 198804 198840 198886 198888 198899 198938 209082 210049 210077
210082 210100 210107 210112 210117 210127 210135 210140 210144 210151 210154 210156 210164 210174
210176 210184 210191 210194 210195 210196 211459 212907 228253
"""
_HUMAN_MITOCHONDRIAL = frozenset(f"ENSG00000{n}" for n in _HUMAN_NUMBERS.split())
_ID_COLUMNS = ("ensembl_id", "gene_id", "feature_id")
_BIOTYPE_COLUMNS = ("gene_type", "biotype", "gene_biotype", "feature_biotype")
_CHROMOSOME_COLUMNS = ("chromosome", "chrom", "seqname", "chr")
_NAME_COLUMNS = ("gene_name", "symbol", "feature_name", "gene_symbol", "gene_symbols")
SYMBOL_COLUMNS = (*_NAME_COLUMNS, "gene_short_name", "name", "Gene")
_MITOCHONDRIAL_CHROMOSOMES = {"mt", "m", "chrm", "chrmt"}
# The paper keeps protein-coding and miRNA genes (Geneformer, Nature 2023, Methods).
BIOTYPES = ("protein_coding", "miRNA")


def organism_name(name: str) -> str:
    """Return the short name of an organism: ``Homo sapiens`` -> ``human``."""
    short = ORGANISMS.get(name.strip().lower(), name.strip().lower())
    if short not in SPECIES.values():
        raise ValueError(f"organism {name!r}: unknown; known are {sorted(SPECIES.values())}")
    return short


@dataclass(frozen=True)
class Annotation:
    """Gene ids from an annotation table: genes of the chosen biotypes, and mitochondrial genes."""

    chosen: frozenset[str]
    mitochondrial: frozenset[str]


def read_annotation(path: Path, biotypes: tuple[str, ...] = BIOTYPES) -> Annotation:
    """Return the annotation that a csv, tsv (also .gz) or parquet table holds.

    The table must have a column of gene ids (``ensembl_id``, ``gene_id``) and one of biotypes
    (``gene_type``, ``biotype``). Where it also has chromosomes or gene names, they tell which genes
    are mitochondrial: the chromosome is, or the name begins with ``MT-``.

    Raises
    ------
    ValueError
        The file does not exist, a column is missing, or no gene has one of the biotypes.
    """
    try:
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
        else:
            separator = "\t" if ".tsv" in path.suffixes else ","
            table = pd.read_csv(path, sep=separator, dtype=str)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: not readable as a csv, tsv or parquet table ({error})"
        ) from error
    ids = table[_column(path, table, _ID_COLUMNS, "gene ids")].astype(str).map(strip_version)
    kinds = table[_column(path, table, _BIOTYPE_COLUMNS, "biotypes")].astype(str)
    chosen = frozenset(ids[kinds.isin(biotypes)])
    if not chosen:
        raise ValueError(
            f"{path}: no gene is one of {list(biotypes)}; it has {sorted(kinds.unique())[:12]}"
        )
    is_mitochondrial = np.zeros(len(table), dtype=bool)
    for name in _CHROMOSOME_COLUMNS:
        if name in table:
            lowered = table[name].astype(str).str.lower()
            is_mitochondrial |= lowered.isin(_MITOCHONDRIAL_CHROMOSOMES).to_numpy()
    for name in _NAME_COLUMNS:
        if name in table:
            is_mitochondrial |= table[name].astype(str).str.upper().str.startswith("MT-").to_numpy()
    return Annotation(chosen, frozenset(ids[is_mitochondrial]))


def _column(path: Path, table: pd.DataFrame, names: tuple[str, ...], what: str) -> str:
    found = [n for n in names if n in table]
    if not found:
        raise ValueError(
            f"{path}: no column with {what}; expected one of {list(names)}, it has "
            f"{list(table.columns)}"
        )
    return found[0]


def mitochondrial_columns(
    ids: list[str], symbols: list[str] | None, annotation: Annotation | None
) -> np.ndarray:
    """Return bool [genes], True for mitochondrial genes.

    A gene is mitochondrial if its id is a human mitochondrial gene's, if the annotation table says
    so, or if its name (its id where no symbols are given) begins with ``MT-``.
    """
    known = _HUMAN_MITOCHONDRIAL | (annotation.mitochondrial if annotation else frozenset())
    names = symbols or ids
    return np.array(
        [i in known or n[:3].upper() == "MT-" for i, n in zip(ids, names, strict=True)], dtype=bool
    )


def species_of(ids: list[str] | tuple[str, ...]) -> str | None:
    """Return the species that most Ensembl ids belong to.

    Where the prefix is not in `SPECIES`, the prefix itself is returned (``ENSXYZG``); None if no id
    is an Ensembl id.
    """
    # Most ids differ in their number only, so the pattern is tried once for each prefix.
    heads = Counter(i[:-11] for i in map(plain_id, ids) if i[-11:].isdecimal())
    prefixes: Counter[str] = Counter()
    for head, number in heads.items():
        if m := ENSEMBL.match(head + _SOME_NUMBER):
            prefixes[m[1]] += number
    if not prefixes:
        return None
    prefix = prefixes.most_common(1)[0][0]
    return SPECIES.get(prefix, f"ENS{prefix}G")
