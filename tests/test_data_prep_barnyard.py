"""Files of two species: with --genome the genes and the cells of one of them, in every format."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import scipy.sparse

from data_prep.genes.vocabulary import Vocabulary
from data_prep.prepare.options import PrepareOptions
from data_prep.prepare.run import prepare
from data_prep.sources.open_source import open_path
from data_prep.sources.source_spec import SourceOptions, source_at
from tests.data_files import WRITERS, read_counts, write_h5ad, write_tenx
from tests.synthetic import make_cells

if TYPE_CHECKING:
    import anndata

HUMAN, MOUSE = 200, 60
GENES = tuple(make_cells(2).var_names)
VOCABULARY = Vocabulary(GENES, np.ones(200), {"<pad>": 0, "<mask>": 1}, 256)


def barnyard() -> tuple[anndata.AnnData, np.ndarray]:
    """Return 40 cells of two species, every third of the mouse, and which are human."""
    cells = make_cells(40, num_genes=HUMAN + MOUSE)
    is_human = np.arange(40) % 3 != 1
    counts = cells.X.toarray()
    # Stray molecules of the other species are in every cell.
    counts[is_human, HUMAN:] = np.minimum(counts[is_human, HUMAN:], 1)
    counts[~is_human, :HUMAN] = 0
    counts[~is_human, :20] = 1
    counts[~is_human, HUMAN:] += 1
    counts[0] = 0  # an empty cell is of no species
    cells.X = scipy.sparse.csr_matrix(counts)
    cells.var_names = [
        *(f"GRCh38_{i}" for i in GENES),
        *(f"mm10___ENSMUSG{i:011d}" for i in range(MOUSE)),
    ]
    return cells, is_human


@pytest.mark.filterwarnings("ignore::UserWarning")  # zarr's, about its next release
@pytest.mark.parametrize("write", WRITERS)
def test_cells_of_the_other_species_are_left_out(write, tmp_path):
    cells, is_human = barnyard()
    whole = cells.X.toarray()
    path = write(cells, tmp_path)
    for _ in range(2):  # the second time what was found is known
        source, found = read_counts(path, genome="GRCh38")
        np.testing.assert_array_equal(found, whole[is_human][:, :HUMAN])
        assert source.num_filtered_out == (~is_human).sum()
        assert source.left_out == {"genome mm10": MOUSE}
        (said,) = source.warnings()
        assert f"{(~is_human).sum()} of 40 cells are left out" in said and "GRCh38" in said
    _, found = read_counts(path, genome="mm10")
    is_mouse = ~is_human | (np.arange(40) == 0)
    np.testing.assert_array_equal(found, whole[is_mouse][:, HUMAN:])


def test_a_query_and_a_species_together(tmp_path):
    cells, is_human = barnyard()
    path = write_h5ad(cells, tmp_path)
    chosen = (cells.obs["donor"] == "donor1").to_numpy()
    source, found = read_counts(path, genome="GRCh38", obs_filter="donor == 'donor1'")
    np.testing.assert_array_equal(found, cells.X.toarray()[chosen & is_human][:, :HUMAN])
    assert source.num_filtered_out == 40 - (chosen & is_human).sum()
    assert f"of {chosen.sum()} cells are left out" in source.warnings()[0]


def test_the_column_genome_says_it_too(tmp_path):
    cells, is_human = barnyard()
    cells.var_names = [f"G{i}" for i in range(HUMAN + MOUSE)]
    path = write_tenx(cells, tmp_path, ["GRCh38"] * HUMAN + ["mm10"] * MOUSE)
    _, found = read_counts(path, genome="GRCh38")
    np.testing.assert_array_equal(found, cells.X.toarray()[is_human][:, :HUMAN])


def test_what_is_left_out_is_in_the_manifest(tmp_path):
    cells, is_human = barnyard()
    spec = source_at(write_h5ad(cells, tmp_path), SourceOptions(genome="GRCh38"))
    options = PrepareOptions(heldout_share=0.3, max_sd_counts=0)
    manifest = prepare([spec], tmp_path / "out", VOCABULARY, options)
    (source,) = manifest["sources"]
    assert (source["cells_read"], source["filtered_out"]) == (is_human.sum(), (~is_human).sum())
    assert source["rejected"] == {"no counts at all": 1}
    assert "cells are left out" in manifest["warnings"][0]


def test_no_cell_of_the_chosen_species(tmp_path):
    cells, is_human = barnyard()
    path = write_h5ad(cells[~is_human].copy(), tmp_path)
    with pytest.raises(ValueError, match="no cell has half of its counts in the genome"):
        open_path(path, SourceOptions(genome="GRCh38"))
