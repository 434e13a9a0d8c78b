"""``geneloom predict``: classes and probabilities of a trained head, of cells or of genes."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd

from data_prep.files import complete_file, require_new_file
from data_prep.genes.vocabulary import Vocabulary
from data_prep.sources.source_spec import SourceOptions
from data_prep.version import VERSION
from eval.cells.annotated import (
    on_all_cells,
    on_all_features,
    read_annotated,
    require_annotated,
)
from eval.cells.read_cells import CellSet, encode_source, open_counts
from eval.finetune.classifier import Classifier, Head, load_classifier

_PREFIX = "geneloom"
_SEPARATORS = {".csv": ",", ".tsv": "\t"}


def predict_file(
    cells: Path,
    head: Path,
    out: Path,
    options: SourceOptions = SourceOptions(),  # noqa: B008  frozen
    device: str = "cpu",
) -> str:
    """Write the predictions of every head, and return a summary sentence.

    An `out` that ends in ``.csv`` or ``.tsv`` is a table of genes (`gene_table`), of a head of
    genes; any other is the input file with what follows.

    Cells stay in their order. A head of cells named H adds ``obs["geneloom_H"]`` (class; '' for a
    cell without a gene of the vocabulary), ``obs["geneloom_H_probability"]`` (of that class) and
    ``obsm["geneloom_H"]`` (float32, all classes; NaN without genes). A head of genes adds
    ``var["geneloom_H_CLASS"]`` (the mean over cells that express the gene) and
    ``var["geneloom_H_cells"]``, their number. ``uns["geneloom_predict"]`` describes the classifier.

    Raises
    ------
    ValueError
        `head` contains no classifier, the cells cannot be encoded with its vocabulary, `out`
        exists, or is a table and there is no head of genes.
    """
    require_new_file(out)
    classifier = load_classifier(head, device)
    of_genes = [h for h in classifier.heads if h.kind == "genes"]
    if out.suffix in _SEPARATORS and len(of_genes) != 1:
        known = ", ".join(f"{h.name} (of {h.kind})" for h in classifier.heads)
        raise ValueError(
            f"--out {out}: a table is of genes, by one head of genes; {head} has only {known}: "
            "give an .h5ad"
        )
    if out.suffix not in _SEPARATORS:
        require_annotated(cells, out, "an .h5ad of cells that were saved as AnnData before")
    source = open_counts(cells, options)
    found = encode_source(source, classifier.vocabulary)
    if out.suffix in _SEPARATORS:
        return _write_table(gene_table(classifier, found, of_genes[0]), out, classifier, found)
    data = read_annotated(cells)
    for each in classifier.heads:
        if each.kind == "cells":
            probabilities = classifier.predict_cells(found.tokens, each.name)
            probabilities = on_all_cells(probabilities, source, np.nan)
            _add_cells(data, each.name, each.classes, probabilities)
        else:
            table = gene_probabilities(classifier, found, each.name)
            for column in table.columns:
                values = table[column].to_numpy()
                fill = 0 if column == "cells" else np.nan
                column_name = f"{_PREFIX}_{each.name}_{column}"
                data.var[column_name] = on_all_features(values, source, fill)
    data.uns["geneloom_predict"] = {
        "version": VERSION,
        "head": head.resolve().name,
        "vocabulary_sha256": classifier.vocabulary.sha256,
        "classes": {h.name: list(h.classes) for h in classifier.heads},
    }
    with complete_file(out) as aside:
        data.write_h5ad(aside)
    empty = int((~found.has_genes).sum())
    note = f"; {empty} cells without any gene of the vocabulary have none" if empty else ""
    names = ", ".join(f"{h.name} (of {h.kind})" for h in classifier.heads)
    said = f"{out}: {data.n_obs:,} cells with predictions of {names}{note}"
    return f"{said}\n{overlap_sentence(found, classifier.vocabulary)}"


def gene_table(classifier: Classifier, cells: CellSet, head: Head) -> pd.DataFrame:
    """Return one row for each gene that is read in a cell, most probable of the last class first.

    Columns: ``gene`` (id in the file), one for each class (the mean of its probability over the
    cells that express the gene), ``class`` (the most probable) and ``cells``, their number.
    """
    found = gene_probabilities(classifier, cells, head.name)
    found.insert(0, "gene", cells.genes)
    found = found[found["cells"] > 0].drop_duplicates("gene")
    classes = list(head.classes)
    best = found[classes].to_numpy().argmax(axis=1)
    found.insert(len(classes) + 1, "class", np.array(classes, dtype=object)[best])
    return found.sort_values(classes[-1], ascending=False, kind="stable", ignore_index=True)


def _write_table(table: pd.DataFrame, out: Path, classifier: Classifier, cells: CellSet) -> str:
    with complete_file(out) as aside:
        table.to_csv(aside, sep=_SEPARATORS[out.suffix], index=False, float_format="%.6g")
    said = f"{out}: {len(table):,} genes, means over {len(cells.tokens):,} cells"
    return f"{said}\n{overlap_sentence(cells, classifier.vocabulary)}"


def overlap_sentence(cells: CellSet, vocabulary: Vocabulary) -> str:
    """Return a sentence about the overlap of genes between a file of cells and a vocabulary."""
    known = vocabulary.tokens_of(cells.genes) >= 0
    genes, total = int(known.sum()), float(cells.counts.sum())
    counts = float(cells.counts[:, np.flatnonzero(known)].sum()) / total if total else 0.0
    return (
        f"{counts:.1%} of the counts are in the {genes:,} of the file's {len(known):,} genes that "
        f"the head's vocabulary knows; it has {len(vocabulary.genes):,}, so "
        f"{1 - min(1.0, genes / len(vocabulary.genes)):.0%} of its genes are not in this file"
    )


def gene_probabilities(classifier: Classifier, cells: CellSet, head_name: str) -> pd.DataFrame:
    """Return each class's probability for the genes of a file, as means over its cells.

    There is one row for each column of the counts, in their order, with one column per class
    (float32, NaN for a gene that is in no cell's tokens) and ``cells`` (int64), the number of cells
    with the gene.
    """
    vocabulary = classifier.vocabulary
    wanted = np.zeros(vocabulary.num_tokens, dtype=bool)
    wanted[vocabulary.first_gene_token :] = True
    found = classifier.predict_genes(cells.tokens, head_name, wanted)
    (classes,) = (h.classes for h in classifier.heads if h.name == head_name)
    num_cells = np.bincount(found.token, minlength=vocabulary.num_tokens)
    token_of_column = vocabulary.tokens_of(cells.genes)
    known = token_of_column >= 0
    of_column = np.where(known, num_cells[token_of_column], 0)
    table = {}
    for position, name in enumerate(classes):
        total = np.bincount(
            found.token, found.probabilities[:, position], minlength=vocabulary.num_tokens
        )
        mean = np.full(len(known), np.nan, dtype=np.float32)
        seen = of_column > 0
        mean[seen] = (total / np.maximum(num_cells, 1))[token_of_column[seen]]
        table[name] = mean
    return pd.DataFrame({**table, "cells": of_column})


def _add_cells(
    data: anndata.AnnData, name: str, classes: tuple[str, ...], probabilities: np.ndarray
) -> None:
    has_any = ~np.isnan(probabilities).any(axis=1)
    best = np.nan_to_num(probabilities).argmax(axis=1)
    labels = np.where(has_any, np.array(classes, dtype=object)[best], "")
    data.obs[f"{_PREFIX}_{name}"] = pd.Categorical(labels)
    data.obs[f"{_PREFIX}_{name}_probability"] = probabilities.max(axis=1)
    data.obsm[f"{_PREFIX}_{name}"] = probabilities
