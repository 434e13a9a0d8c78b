"""The column Census of the table of situations (docs/data.md), on a SOMA experiment on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse

from data_prep.genes.vocabulary import Vocabulary
from data_prep.prepare.check import check_sources
from data_prep.prepare.options import PrepareOptions
from data_prep.prepare.run import prepare
from data_prep.running.workers import SERIAL
from data_prep.sources.count_source import CountSource
from data_prep.sources.open_source import open_path
from data_prep.sources.source_spec import SourceOptions, source_at
from tests.synthetic import make_cells

CELLS, GENES, PROTEINS, MOUSE = 40, 200, 30, 30
IDS = tuple(make_cells(2).var_names)
VOCABULARY = Vocabulary(
    IDS,
    np.ones(GENES),
    {"<pad>": 0, "<mask>": 1},
    256,
    names={f"SYMBOL{i}": gene for i, gene in enumerate(IDS)},
)
OPTIONS = PrepareOptions(heldout_share=0.3, max_sd_counts=0, max_sd_mito=0)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Path:
    """Write an experiment in which all situations of the table stand."""
    import tiledbsoma
    import tiledbsoma.io

    cells = make_cells(CELLS, num_genes=GENES + PROTEINS + MOUSE)
    counts = cells.X.toarray()
    counts[:, GENES:] = np.minimum(counts[:, GENES:], 1)
    counts[-1] = counts[0]  # the same cell twice
    counts[20, :GENES] = 0  # a cell of the other species
    counts[20, -MOUSE:] = 9
    rng = np.random.default_rng(0)
    sums = counts[:, :GENES].sum(1, keepdims=True)
    layers = {
        "fractional": counts + (counts > 0) * rng.choice([0.0, 0.37], counts.shape),
        "logarithms": np.log1p(counts / np.maximum(sums, 1) * 1e4),
        "binarised": (counts > 0).astype(float),
        "cpm": np.rint(counts / np.maximum(sums, 1) * 1e6),
    }
    cells.X = scipy.sparse.csr_matrix(counts)
    for name, values in layers.items():
        cells.layers[name] = scipy.sparse.csr_matrix(values.astype(np.float32))
    names = [f"{IDS[0]}.7", "SYMBOL1", "symbol2", "nan", *IDS[4:]]
    cells.var["feature_id"] = [
        *(f"GRCh38_{n}" if n == IDS[9] else n for n in names),
        *(f"protein{i}" for i in range(PROTEINS)),
        *(f"mm10_ENSMUSG{i:011d}" for i in range(MOUSE)),
    ]
    cells.var["feature_types"] = [
        *["Gene Expression"] * GENES, *["Antibody Capture"] * PROTEINS,
        *["Gene Expression"] * MOUSE,
    ]  # fmt: skip
    cells.var["genome"] = ["GRCh38"] * (GENES + PROTEINS) + ["mm10"] * MOUSE
    cells.obs["is_primary_data"] = np.arange(CELLS) % 4 != 0
    cells.obs["filter_pass"] = ["FAIL" if i == 5 else "PASS" for i in range(CELLS)]
    cells.obs["total"] = counts.sum(1) + 10.0
    cells.obs["wrong_total"] = np.where(np.arange(CELLS) == 3, np.inf, cells.obs["total"])
    uri = tmp_path_factory.mktemp("soma") / "experiment"
    tiledbsoma.io.from_anndata(str(uri), cells, measurement_name="RNA", X_layer_name="raw")
    return uri


def source_of(uri: Path, **options: Any) -> CountSource:
    source = open_path(uri, SourceOptions(genome="GRCh38", **options))
    assert isinstance(source, CountSource)
    return source


def test_what_soma_compresses_is_read(experiment):
    import tiledbsoma

    with tiledbsoma.Experiment.open(str(experiment)) as opened:
        options = opened.ms["RNA"].X["raw"].schema_config_options()
    assert "ZSTD" in str(options.attrs).upper()
    (block,) = source_of(experiment).blocks()
    assert len(block.cell_ids) == CELLS - 1


def test_features_that_are_no_genes_and_another_genome(experiment):
    source = source_of(experiment)
    assert source.left_out == {"Antibody Capture": PROTEINS, "genome mm10": MOUSE}
    assert (source.num_genes, source.num_cells) == (GENES, CELLS - 1)
    assert "1 of 40 cells are left out" in source.warnings()[0]
    with pytest.raises(ValueError, match="2 genomes.*--genome GRCh38"):
        open_path(experiment, SourceOptions())


def test_genes_by_any_name(experiment):
    report = source_of(experiment).gene_report(VOCABULARY)
    assert report.found_as == {
        "id": GENES - 5, "id without version or genome": 2, "symbol": 2, "not found": 1,
    }  # fmt: skip
    assert (report.upper_cased, report.nameless) == (1, 1)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("fractional", "fractional counts"),
        ("logarithms", "log-transformed"),
        ("binarised", "binarised"),
        ("cpm", "same total"),
    ],
)
def test_what_are_no_counts(layer, message, experiment):
    with pytest.raises(ValueError, match=message):
        list(source_of(experiment, counts=f"layers/{layer}").blocks())
    if layer == "fractional":
        kept = next(source_of(experiment, counts=f"layers/{layer}", fractional="keep").blocks())
        assert kept.fractional and (kept.data != np.rint(kept.data)).any()
    if layer in ("binarised", "cpm"):
        assert list(source_of(experiment, counts=f"layers/{layer}", force_counts=True).blocks())


def test_primary_data_and_the_censuss_own_filter(experiment):
    assert "9 of 39 cells are not primary data" in source_of(experiment).warnings()[1]
    source = source_of(experiment, obs_filter="is_primary_data == True")
    # A Census does not tell how many cells its filter leaves out.
    assert source.num_filtered_out is None
    assert source.num_cells == 30 and len(source.warnings()) == 0


def test_totals(experiment):
    (block,) = source_of(experiment, total_column="total").blocks()
    whole = np.delete(make_cells(CELLS, num_genes=GENES + PROTEINS + MOUSE).X.toarray(), 20, 0)
    assert (block.totals[1:-1] > whole[1:-1, :GENES].sum(1)).all()
    with pytest.raises(ValueError, match="'wrong_total'.* is infinite"):
        list(source_of(experiment, total_column="wrong_total").blocks())


def test_through_prepare_and_check(experiment, tmp_path):
    spec = source_at(experiment, SourceOptions(genome="GRCh38", columns=("donor",)))
    manifest = prepare([spec], tmp_path / "out", VOCABULARY, OPTIONS)
    (source,) = manifest["sources"]
    assert source["rejected"] == {"filter_pass is not 1": 1}
    assert manifest["same_cells"]["cells"] == 1 and manifest["same_cells"]["divided"] == 0
    assert 0.9 < source["counts_in_vocabulary"] < 1
    assert source["costliest_unknown"][0]["gene"] == "(without an id)"
    (tmp_path / "work").mkdir()
    few = Vocabulary(IDS[150:], np.ones(50), {"<pad>": 0, "<mask>": 1}, 256)
    result = check_sources([spec], tmp_path / "work", few, OPTIONS, SERIAL, lambda *_: None)
    assert "less than --min-overlap 0.5; the costliest unknown genes" in result.problems[0]
