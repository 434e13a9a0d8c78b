"""Antibodies, guides, peaks and other genomes are no genes, in every format that can hold them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np
import pytest
import scipy.sparse

from data_prep.genes.gene_names import without_genome
from data_prep.genes.vocabulary import open_vocabulary
from data_prep.matrices.feature_kinds import genes_among
from data_prep.prepare.medians import gene_medians
from data_prep.running.workers import SERIAL
from data_prep.sources.corpus_list import expand_path
from data_prep.sources.open_source import open_path
from data_prep.sources.source_spec import SourceOptions, source_at
from tests.data_files import WRITERS, read_counts, write_h5ad
from tests.synthetic import make_cells

if TYPE_CHECKING:
    import anndata

GENES, PROTEINS = 200, 30


def multimodal(names: str = "feature_types") -> anndata.AnnData:
    """Return genes, and proteins under ids of genes, each with 400 counts in every cell."""

    import anndata

    genes = make_cells(40)
    proteins = anndata.AnnData(
        scipy.sparse.csr_matrix(np.full((40, PROTEINS), 400, np.float32)), obs=genes.obs
    )
    proteins.var_names = list(genes.var_names[:PROTEINS])
    proteins.var[names], genes.var[names] = "Antibody Capture", "Gene Expression"
    both = anndata.concat([genes, proteins], axis=1, merge="first")
    both.obs = genes.obs
    return both


# Counts are read in two stretches.
read = partial(read_counts, stretches=((0, 17), (17, 40)))


@pytest.mark.parametrize("write", WRITERS)
def test_proteins_are_no_genes_in_any_format(write, tmp_path):
    path = write(multimodal(), tmp_path)
    (found,) = expand_path(str(tmp_path))
    source, counts = read(Path(found))
    assert Path(found) == path
    plain = make_cells(40)
    np.testing.assert_array_equal(counts, plain.X.toarray())
    assert source.gene_ids == list(plain.var_names)
    assert source.left_out == {
        "modality prot" if path.suffix == ".h5mu" else "Antibody Capture": PROTEINS
    }
    totals = np.concatenate([b.totals for b in source.blocks()])
    np.testing.assert_array_equal(totals, plain.X.toarray().sum(1))


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (["Gene Expression", "Antibody Capture", "Peaks", "Something New"], [1, 0, 0, 0]),
        (["GEX", "ADT", "GEX", ""], [1, 0, 1, 0]),
        (["rna", "protein"], [1, 0]),
        (["gene", "spike-in"], [1, 0]),
        # Biotypes, with or without antibodies among them.
        (["protein_coding", "lncRNA", ""], None),
        (["protein_coding", "lncRNA", "Antibody Capture"], [1, 1, 0]),
        (["", "CRISPR Guide Capture"], [1, 0]),
        (["", ""], None),
    ],
)
def test_words_for_kinds(kinds, expected):
    found = genes_among(kinds)
    assert (None if found is None else found.tolist()) == expected


@pytest.mark.parametrize("column", ["feature_types", "feature_type", "modality", "gene_type"])
def test_columns_that_hold_kinds(column, tmp_path):
    source, _ = read(write_h5ad(multimodal(column), tmp_path))
    assert source.num_genes == GENES


def test_matrices_without_any_gene_are_refused(tmp_path):
    cells = make_cells(40)
    cells.var["feature_types"] = "Peaks"
    path = write_h5ad(cells, tmp_path)
    with pytest.raises(ValueError, match=r"no features of type 'Gene Expression', only \['Peaks'"):
        read(path)


def test_mudata_whose_genes_are_not_told_is_refused(tmp_path):
    import anndata

    with h5py.File(tmp_path / "cells.h5mu", "w") as file:
        for name in ("one", "two"):
            anndata.io.write_elem(file, f"mod/{name}", make_cells(5))
    with pytest.raises(ValueError, match=r"modalities \['one', 'two'\]"):
        open_path(tmp_path / "cells.h5mu", SourceOptions())


def test_medians_do_not_see_proteins(tmp_path):
    medians = {}
    for name, cells in (("both", multimodal()), ("genes", make_cells(40))):
        (tmp_path / name).mkdir()
        spec = source_at(write_h5ad(cells, tmp_path / name), SourceOptions())
        found = gene_medians([spec], tmp_path / name, SERIAL, lambda *_: None)
        medians[name] = (found.sketch.genes, found.medians.tolist())
    assert medians["both"] == medians["genes"]


def test_barnyard_files_are_read_by_genome(tmp_path):
    human, cells = make_cells(40), make_cells(40, num_genes=260)
    cells.var_names = [
        *(f"GRCh38_{i}" for i in human.var_names),
        *(f"mm10___ENSMUSG{i:011d}" for i in range(60)),
    ]
    path = write_h5ad(cells, tmp_path)
    with pytest.raises(ValueError, match=r"2 genomes.*'GRCh38': 200.*--genome GRCh38"):
        read(path)
    with pytest.raises(ValueError, match="--genome hg19"):
        read(path, genome="hg19")
    source, counts = read(path, genome="GRCh38")
    np.testing.assert_array_equal(counts, cells.X.toarray()[:, :200])
    assert source.left_out == {"genome mm10": 60}


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("GRCh38_ENSG00000000003", "ENSG00000000003"),
        ("hg19_TP53", "TP53"),
        ("mm10___Xkr4", "Xkr4"),
        ("GRCh38", "GRCh38"),
        ("mmp_9", "mmp_9"),
        ("HG19_TP53", "HG19_TP53"),
    ],
)
def test_genomes_in_front_of_ids(name, plain):
    assert without_genome(name) == plain


@pytest.mark.long  # real cells; the cases beside it are synthetic
def test_real_antibodies_change_no_token(case, real_data):
    from eval.cells.read_cells import encode_file

    vocabulary = open_vocabulary(real_data / "geneformer_v2_dicts")
    found = [
        encode_file(case("antibodies") / f"{name}.h5ad", vocabulary)
        for name in ("multimodal", "genes_only")
    ]
    assert len(found[0].tokens) == 200
    for one, other in zip(found[0].tokens, found[1].tokens, strict=True):
        np.testing.assert_array_equal(one, other)
