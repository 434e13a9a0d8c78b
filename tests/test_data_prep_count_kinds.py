"""Counts, fractional counts and what is made of counts are told apart, in every format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import scipy.sparse

from data_prep.genes.vocabulary import from_dictionaries
from data_prep.prepare.check import check_sources
from data_prep.prepare.options import PrepareOptions
from data_prep.prepare.run import prepare
from data_prep.running.workers import SERIAL
from data_prep.sources.count_kinds import Place, check_integers, fractional_values
from data_prep.sources.count_source import CountSource
from data_prep.sources.open_source import open_path
from data_prep.sources.source_spec import SourceOptions, source_at
from tests.data_files import WRITERS, write_h5ad
from tests.synthetic import make_cells

if TYPE_CHECKING:
    import anndata

PLACE = Place("cells.h5ad", "X", ["X"])


def counts(num_cells: int = 60) -> np.ndarray:
    """Return counts of cells of different depth, float64 [cells, 400]."""
    return make_cells(num_cells, num_genes=400).X.toarray().astype(np.float64)


def csr(values: np.ndarray) -> scipy.sparse.csr_matrix:
    return scipy.sparse.csr_matrix(values)


def of_total(values: np.ndarray, total: float) -> np.ndarray:
    return values / values.sum(1, keepdims=True) * total


def size_factors(values: np.ndarray) -> np.ndarray:
    return values * np.random.default_rng(0).uniform(0.3, 0.9, (len(values), 1))


def estimated(values: np.ndarray) -> np.ndarray:
    """As an EM algorithm gives them: reads of one gene are whole, others are divided."""
    rng = np.random.default_rng(0)
    shared = (rng.random(values.shape) < 0.4) & (values > 0)
    values = values * 7.0
    return np.where(shared, values + rng.uniform(0.05, 0.95, values.shape), values)


def corrected(values: np.ndarray) -> np.ndarray:
    """As ambient RNA is taken off: a little less of everything."""
    profile = values.sum(0) / values.sum()
    return np.maximum(values * 7 - 0.3 * values.sum(1, keepdims=True) * profile, 0)


REFUSED = {
    "log1p of 10,000": (lambda v: np.log1p(of_total(v, 1e4)), r"looks log-transformed \(base e"),
    "log2 of CPM": (lambda v: np.log2(of_total(v, 1e6) + 1), r"looks log-transformed \(base 2"),
    "log1p of some genes": (lambda v: np.log1p(of_total(v, 1e4)[:, ::3]), "looks log-transformed"),
    "log1p of counts": (np.log1p, "looks log-transformed"),
    "CPM": (lambda v: of_total(v, 1e6), "looks normalised.*total 1e\\+06"),
    "size factors": (size_factors, "looks normalised.*integers times one factor"),
    "some genes of CPM": (lambda v: of_total(v, 1e6)[:, ::3], "looks normalised"),
    "z-scores": (lambda v: (v - v.mean(0)) / (v.std(0) + 1e-9), "negative.*scaled"),
}
FRACTIONAL = {
    "estimated": (estimated, "estimated, as RSEM"),
    "corrected": (corrected, "estimated or corrected"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("allowed", [False, True])
def test_what_is_made_of_counts_is_named_and_never_taken(change, message, allowed):
    matrix = csr(change(counts()).astype(np.float32))
    with pytest.raises(ValueError, match=message):
        fractional_values(PLACE, matrix.data, matrix.indptr, allowed)


@pytest.mark.parametrize(("change", "message"), FRACTIONAL.values(), ids=FRACTIONAL)
def test_fractional_counts_are_named_and_taken_when_allowed(change, message):
    matrix = csr(change(counts()).astype(np.float32))
    with pytest.raises(ValueError, match=f"fractional counts .*{message}.*--fractional round"):
        fractional_values(PLACE, matrix.data, matrix.indptr, False)
    expected = (np.abs(matrix.data - np.rint(matrix.data)) > 1e-6).sum()
    assert fractional_values(PLACE, matrix.data, matrix.indptr, True) == expected > 0


def rounded_cpm(values: np.ndarray) -> np.ndarray:
    return np.rint(of_total(values, 1e6))


INTEGERS = {
    "counts": (lambda v: v, None),
    "binarised": (lambda v: (v > 0) * 1.0, "binarised"),
    "twos": (lambda v: (v > 0) * 2.0, "are 2: a binarised"),
    "rounded CPM": (rounded_cpm, "the same total, 1e\\+06"),
    "few cells of one total": (lambda v: rounded_cpm(v[:5]), None),
}


@pytest.mark.parametrize(("change", "message"), INTEGERS.values(), ids=INTEGERS)
@pytest.mark.parametrize("zeros", [False, True])
def test_integers_that_are_no_counts(change, message, zeros):
    values = change(counts())
    matrix = csr(values)
    if zeros:  # stored zeros hide nothing
        matrix = csr(values + 1)
        matrix.data -= 1
    totals = values.sum(1)
    if message is None:
        check_integers(PLACE, matrix.data, matrix.indptr, totals)
        return
    with pytest.raises(ValueError, match=f"{message}.*--force-counts"):
        check_integers(PLACE, matrix.data, matrix.indptr, totals)


def with_values(change) -> anndata.AnnData:
    cells = make_cells(60, num_genes=400)
    cells.X = csr(change(cells.X.toarray().astype(np.float64)).astype(np.float32))
    return cells


@pytest.mark.parametrize("write", WRITERS)
def test_every_format(write, tmp_path):
    fractional, binary = tmp_path / "fractional", tmp_path / "binary"
    for folder, change in ((fractional, estimated), (binary, lambda v: (v > 0) * 1.0)):
        folder.mkdir()
        path = write(with_values(change), folder)
        with pytest.raises(ValueError, match="fractional counts|binarised"):
            list(open_path(path, SourceOptions()).blocks())
    path = next(p for p in (fractional, *fractional.iterdir()) if _opens(p))
    read = {
        how: np.concatenate([b.totals for b in counts_at(path, how).blocks()])
        for how in ("round", "keep")
    }
    values = with_values(estimated).X.toarray().astype(np.float64)
    np.testing.assert_array_equal(read["round"], np.rint(values).sum(1))
    np.testing.assert_allclose(read["keep"], values.sum(1), rtol=1e-6)
    path = next(p for p in (binary, *binary.iterdir()) if _opens(p))
    assert list(open_path(path, SourceOptions(force_counts=True)).blocks())


def counts_at(path: Path, how) -> CountSource:
    source = open_path(path, SourceOptions(fractional=how))
    assert isinstance(source, CountSource)
    return source


def _opens(path: Path) -> bool:
    try:
        open_path(path, SourceOptions())
    except ValueError:
        return False
    return True


def test_the_manifest_says_what_became_of_fractions(tmp_path):
    path = write_h5ad(with_values(estimated), tmp_path)
    options = PrepareOptions(heldout_share=0.2, vocabulary_min_cells=1)
    spec = source_at(path, SourceOptions(fractional="round"))
    source = prepare([spec], tmp_path / "shards", None, options)["sources"][0]
    assert source["options"]["fractional"] == "round"
    assert 0.3 < source["fractional_values"] < 0.5


def test_check_names_them(tmp_path):
    path = write_h5ad(with_values(estimated), tmp_path)
    genes = list(make_cells(2, num_genes=400).var_names)
    tokens = {"<pad>": 0, "<mask>": 1} | {g: i + 2 for i, g in enumerate(genes)}
    vocabulary = from_dictionaries(tokens, dict.fromkeys(genes, 1.0))
    said = {}
    for how in (None, "keep"):
        work = tmp_path / f"work-{how}"
        work.mkdir()
        found = check_sources(
            [source_at(path, SourceOptions(fractional=how))], work, vocabulary, PrepareOptions(),
            SERIAL, lambda *_: None,
        )  # fmt: skip
        said[how] = found.problems
    assert "fractional counts" in said[None][0] and said["keep"] == []


@pytest.mark.long  # real cells; the cases beside it are synthetic
def test_real_cells_rounded_equal_those_rounded_before(case, real_data):
    from data_prep.genes.vocabulary import open_vocabulary
    from eval.cells.read_cells import encode_file

    vocabulary = open_vocabulary(real_data / "geneformer_v2_dicts")
    folder = case("fractional")
    found = encode_file(folder / "rsem.h5ad", vocabulary, SourceOptions(fractional="round"))
    expected = encode_file(folder / "rounded.h5ad", vocabulary)
    for one, other in zip(found.tokens, expected.tokens, strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(ValueError, match="fractional counts.*--fractional round"):
        encode_file(folder / "rsem.h5ad", vocabulary)
    folder = case("not_counts")
    for name, message in (("binarised", "binarised"), ("rounded_cpm", "the same total")):
        with pytest.raises(ValueError, match=message):
            encode_file(folder / f"{name}.h5ad", vocabulary)


def test_a_few_cells_at_the_end_are_judged_with_those_before(tmp_path, monkeypatch):
    """Two cells have the same total by chance: that says nothing of the file."""
    from data_prep.sources import count_source

    monkeypatch.setattr(count_source, "_READ_CELLS", 40)
    cells = make_cells(42)
    values = cells.X.toarray() * 9.0
    values[values > 0] += 0.37
    values[41] = values[40]
    cells.X = scipy.sparse.csr_matrix(values)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    source = open_path(tmp_path / "cells.h5ad", SourceOptions(fractional="keep"))
    assert sum(len(b.cell_ids) for b in source.blocks()) == 42
