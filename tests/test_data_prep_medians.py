"""Medians per gene: numpy's, whatever the files, their order and the memory; sketches add up."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from data_prep.genes.median_sketch import RELATIVE_ERROR, MedianSketch
from data_prep.genes.vocabulary import load_vocabulary
from data_prep.prepare.medians import GeneMedians, gene_medians
from data_prep.prepare.medians import build_vocabulary as build
from data_prep.prepare.options import PrepareOptions
from data_prep.prepare.run import SERIAL, prepare
from data_prep.running.workers import open_workers
from data_prep.shards.reader import ShardSet
from data_prep.sources.corpus_list import expand_corpus
from data_prep.sources.source_spec import SourceOptions
from launch.cli import build_app
from tests.synthetic import make_cells, write_cells

IDS = [f"ENSG{i:011d}" for i in range(50)]


def write(path: Path, counts: np.ndarray, genes: list[str], **obs) -> Path:
    import anndata

    index = [str(i) for i in range(len(counts))]
    matrix = scipy.sparse.csr_matrix(np.asarray(counts, dtype=np.float32))
    data = anndata.AnnData(matrix, obs=pd.DataFrame(obs, index=index))
    data.var["ensembl_id"] = genes
    data.write_h5ad(path)
    return path


def silent(what: str, done: int, total: int) -> None:
    assert 0 <= done <= total


def compute(work: Path, *paths: Path, workers=SERIAL, reading=None, **options) -> GeneMedians:
    specs = expand_corpus([str(p) for p in paths], reading or SourceOptions())
    work.mkdir(exist_ok=True)
    return gene_medians(specs, work, workers, silent, **options)


def reference(parts: list[tuple]) -> dict[str, tuple[int, float]]:
    """Return gene -> (cells, median) of parts (counts, genes, totals or None, passes or None)."""
    values: dict[str, list[float]] = {g: [] for _, genes, *_ in parts for g in genes}
    for counts, genes, totals, passes in parts:
        summed = pd.DataFrame(counts.T.astype(np.float64), index=genes).groupby(level=0).sum().T
        totals = counts.sum(axis=1) if totals is None else totals
        used = (totals > 0) & (True if passes is None else passes)
        for gene in summed:
            cells = used & (summed[gene] > 0).to_numpy()
            found = summed[gene].to_numpy()[cells] / totals[cells].astype(np.float64) * 10_000
            values[gene] += found.tolist()
    return {g: (len(v), np.median(v) if v else np.nan) for g, v in values.items()}


def check_exact(found: GeneMedians, expected: dict[str, tuple[int, float]]) -> None:
    assert found.relative_error == 0.0
    assert list(found.sketch.genes) == sorted(expected)
    assert found.sketch.detected.tolist() == [expected[g][0] for g in found.sketch.genes]
    np.testing.assert_array_equal(found.medians, [expected[g][1] for g in found.sketch.genes])


def random_counts(seed: int, cells: int, genes: int) -> np.ndarray:
    """Return counts of very different genes and cells; some genes in no, one or two cells."""
    rng = np.random.default_rng(seed)
    rates = 10 ** rng.uniform(-2.5, 2.5, genes) * rng.gamma(1, 1, (cells, 1))
    counts = rng.poisson(rates)
    counts[:, 0], counts[1:, 1], counts[2:, 2] = 0, 0, 0
    counts[:2, 1:3] = [[4, 9], [0, 1]]
    return counts


# --- exact ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cells", [2, 61, 200])
def test_one_file(cells, tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.prepare.medians._CHUNK_CELLS", 37)
    monkeypatch.setattr("data_prep.sources.count_source._READ_CELLS", 20)
    counts = random_counts(cells, cells, 50)
    path = write(tmp_path / "a.h5ad", counts, IDS)
    check_exact(compute(tmp_path / "work", path), reference([(counts, IDS, None, None)]))


def test_two_middle_values_far_apart(tmp_path):
    counts = np.array([[1, 9999], [9999, 1], [0, 5]])
    found = compute(tmp_path / "work", write(tmp_path / "a.h5ad", counts, IDS[:2]))
    assert found.medians.tolist() == [(1.0 + 9999.0) / 2, 9999.0]


def test_columns_totals_filters_and_files_together(tmp_path):
    rng = np.random.default_rng(3)
    first, second = random_counts(1, 80, 40), random_counts(2, 61, 30)
    genes = [*IDS[:35], *IDS[:5]]  # five genes stand in two columns
    passes, totals = rng.random(80) < 0.7, first.sum(axis=1) + rng.integers(0, 900, 80) + 0.25
    first[7], totals[7] = 0, 0.0
    others = np.where(np.arange(30) < 20, IDS[20:], "other")
    a = write(tmp_path / "a.h5ad", first, genes, n=totals, filter_pass=passes)
    b = write(tmp_path / "b.h5ad", second, list(others), n=second.sum(axis=1))
    found = compute(tmp_path / "work", a, b, reading=SourceOptions(total_column="n"))
    check_exact(found, reference([(first, genes, totals, passes), (second, others, None, None)]))


# --- the sketch -----------------------------------------------------------------------------------

CELL = st.tuples(st.floats(-9.5, 13.0), st.integers(1, 5000), st.booleans())


def write_values(path: Path, cells: list[tuple[float, int, bool]]) -> tuple[Path, np.ndarray]:
    """Write cells whose first gene has the value 2**exponent, nearly; return the exact values."""
    exponents, counts, both = map(np.array, zip(*cells, strict=True))
    totals = np.maximum(counts / 2.0**exponents * 10_000, 2 * counts)
    matrix = np.c_[counts, np.where(both, counts, 0)]
    return write(path, matrix, IDS[:2], n=totals), counts / totals * 10_000


@settings(deadline=None, max_examples=25)
@given(st.lists(CELL, min_size=1, max_size=40), st.booleans())
def test_interpolated_medians_are_as_near_as_stated(tmp_path_factory, cells, is_odd):
    cells = cells[1:] if len(cells) > 1 and (len(cells) % 2 == 0) == is_odd else cells
    folder = tmp_path_factory.mktemp("values")
    path, values = write_values(folder / "a.h5ad", cells)
    reading = SourceOptions(total_column="n")
    found = compute(folder / "work", path, reading=reading, memory_gib=1e-12)
    assert found.relative_error == RELATIVE_ERROR
    exact = compute(folder / "work", path, reading=reading)
    assert exact.medians[0] == np.median(values)
    error = np.abs(found.medians / exact.medians - 1)
    assert np.nanmax(error) <= RELATIVE_ERROR


def test_odd_numbers_of_cells_are_interpolated_well(tmp_path):
    """25 genes over 23 octaves, 1 to 49 cells each."""
    rng = np.random.default_rng(0)
    values = 2.0 ** rng.uniform(-9.5, 13, (49, 25))
    present = np.arange(49)[:, None] < 2 * np.arange(25) + 1
    for gene in range(25):
        cells = [(e, 2000, False) for e in np.log2(values[present[:, gene], gene])]
        path, exact = write_values(tmp_path / f"{gene}.h5ad", cells)
        reading = SourceOptions(total_column="n")
        found = compute(tmp_path / "work", path, reading=reading, memory_gib=1e-12)
        assert abs(found.medians[0] / np.median(exact) - 1) <= RELATIVE_ERROR


def test_sketches_add_up(tmp_path):
    parts = [random_counts(n, 30 + n, 50) for n in range(3)]
    genes = [IDS[:50], IDS[:20] + [f"x{i}" for i in range(30)], IDS[:50][::-1]]
    paths = [write(tmp_path / f"{n}.h5ad", parts[n], genes[n]) for n in range(3)]
    whole = compute(tmp_path / "work", *paths).sketch
    sketches = []
    for n, path in enumerate(paths):
        compute(tmp_path / "work", path).sketch.save(tmp_path / f"{n}.sketch.parquet")
        sketches.append(MedianSketch.load(tmp_path / f"{n}.sketch.parquet"))
    seen = whole.detected > 0  # a saved sketch holds genes that some cell has
    for order in ([0, 1, 2], [2, 0, 1]):
        merged = sketches[order[0]].merge(sketches[order[1]]).merge(sketches[order[2]])
        assert merged.genes == tuple(np.array(whole.genes, dtype=object)[seen])
        np.testing.assert_array_equal(merged.counts, whole.counts[seen])


def test_what_is_no_sketch_is_named(tmp_path):
    (tmp_path / "a.sketch.parquet").write_text("no parquet")
    pq.write_table(pa.table({"gene": ["x"]}), tmp_path / "b.sketch.parquet")
    for name in ("a", "b", "absent"):
        with pytest.raises(ValueError, match=rf"{name}\.sketch\.parquet: not a sketch"):
            MedianSketch.load(tmp_path / f"{name}.sketch.parquet")


# --- the vocabulary -------------------------------------------------------------------------------


def test_neither_order_nor_processes_change_the_vocabulary(tmp_path, monkeypatch):
    paths = [write_cells(tmp_path / f"{n}.h5ad", num_cells=60, seed=n) for n in range(3)]

    def sha256(*order: Path, **options) -> str:
        return compute(tmp_path / "work", *order, **options).vocabulary(1, None, False).sha256

    expected = sha256(*paths)
    assert sha256(*paths[::-1]) == expected
    monkeypatch.setattr("data_prep.prepare.medians._CHUNK_CELLS", 25)
    with open_workers(2) as workers:
        assert sha256(*paths, workers=workers) == expected


def annotate(path: Path, genes: list[str]) -> Path:
    kinds = np.where(np.arange(len(genes)) % 3 == 0, "lncRNA", "protein_coding")
    pd.DataFrame({"gene_id": genes, "gene_type": kinds}).to_csv(path, index=False)
    return path


@pytest.mark.parametrize("version", ["", ".7"])
def test_an_annotation_chooses_genes(version, tmp_path):
    """GENCODE's tables have versions in their ids."""
    counts = random_counts(0, 40, 50)
    path = write(tmp_path / "a.h5ad", counts, IDS)
    table = annotate(tmp_path / "genes.csv", [f"{g}{version}" for g in IDS[:30]])
    found = compute(tmp_path / "work", path, annotation=table)
    expected = reference([(counts, IDS, None, None)])
    check_exact(found, {g: expected[g] for i, g in enumerate(IDS[:30]) if i % 3})
    other = annotate(tmp_path / "other.csv", ["ENSMUSG00000000001", "ENSMUSG00000000002"])
    with pytest.raises(ValueError, match="no gene of the sources is in the annotation"):
        compute(tmp_path / "work", path, annotation=other)


def test_a_changed_annotation_is_read_again(tmp_path):
    """As when a killed run of prepare is started again in its folder."""
    specs = expand_corpus([str(write_cells(tmp_path / "a.h5ad", num_genes=50))], SourceOptions())
    found = []
    for genes in (IDS[:30], IDS[:40]):
        table = annotate(tmp_path / "genes.csv", genes)
        found.append(build(specs, tmp_path, 1, None, table, SERIAL, silent))
    assert [len(v.genes) for v in found] == [20, 26]


def retired_corpus(folder: Path) -> tuple[list[Path], Path, dict]:
    """Return two files of which one has old ids, the mapping, and the medians by current ids."""
    counts = [random_counts(n, 45 + n, 50) for n in range(2)]
    old = [f"old{i}" if i % 5 == 0 else g for i, g in enumerate(IDS)]
    paths = [
        write(folder / f"{n}.h5ad", c, g)
        for n, c, g in zip("ab", counts, (IDS, old), strict=True)
    ]  # fmt: skip
    names = [f'"{o}": "{g}"' for o, g in zip(old, IDS, strict=True) if o != g]
    (folder / "mapping.json").write_text("{" + ", ".join(names) + "}")
    return paths, folder / "mapping.json", reference([(c, IDS, None, None) for c in counts])


def test_retired_ids_are_joined(tmp_path):
    paths, mapping, expected = retired_corpus(tmp_path)
    check_exact(compute(tmp_path / "work", *paths, gene_mapping=mapping), expected)


def test_retired_ids_are_known_to_the_vocabulary(tmp_path):
    """What counted for the medians is encoded too."""
    paths, mapping, _ = retired_corpus(tmp_path)
    found = compute(tmp_path / "work", *paths, gene_mapping=mapping).vocabulary(1, None, False)
    assert (found.tokens_of([f"old{i}" for i in range(5, 50, 5)]) >= 0).all()
    assert found.tokens_of(["old5"]) == found.tokens_of([IDS[5]])


@pytest.mark.parametrize(
    ("text", "message"),
    [("sources: [{path: cells.h5ad, organism: mouse}]", "given as mouse"),
     ("sources: [{path: tokens.parquet}]", "medians need count matrices"),
     ("sources: [{path: log.h5ad}]", "log-transformed")],
)  # fmt: skip
def test_wrong_sources(text, message, tmp_path):
    cells = make_cells(30, num_genes=50)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    write(tmp_path / "log.h5ad", np.log1p(cells.X.toarray()), IDS)
    pq.write_table(pa.table({"input_ids": [[2]], "length": [1]}), tmp_path / "tokens.parquet")
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        compute(tmp_path / "work", tmp_path / "c.yaml")


# --- the command ----------------------------------------------------------------------------------


def medians(*arguments: object):
    return CliRunner().invoke(build_app("medians"), ["medians", *map(str, arguments)])


def test_command_writes_a_vocabulary_that_prepare_takes(tmp_path):
    counts = random_counts(0, 90, 50)
    path = write(tmp_path / "a.h5ad", counts, IDS)
    out = tmp_path / "new" / "own.json"
    done = medians(path, "--out", out, "--with-cls", "--min-cells", 5, "--max-length", 40)
    assert done.exit_code == 0, done.output
    vocabulary = load_vocabulary(out)
    expected = {
        g: v for g, v in reference([(counts, IDS, None, None)]).items() if v[0] >= 5
    }  # fmt: skip
    assert list(vocabulary.genes) == sorted(expected)
    assert vocabulary.medians.tolist() == [expected[g][1] for g in vocabulary.genes]
    assert (vocabulary.has_cls, vocabulary.max_length) == (True, 40)
    assert {p.name for p in out.parent.iterdir()} == {
        "own.json", "own.sketch.parquet", "own.genes.tsv",
    }  # fmt: skip
    assert vocabulary.sha256[:12] in done.output and "exact" in done.output
    table = pd.read_csv(out.with_suffix(".genes.tsv"), sep="\t", index_col="gene")
    assert table.loc[vocabulary.genes[3]].tolist() == list(expected[vocabulary.genes[3]])
    specs = expand_corpus([str(path)], SourceOptions())
    options = PrepareOptions(heldout_share=0.2, max_sd_counts=0)
    manifest = prepare(specs, tmp_path / "out", vocabulary, options)
    assert manifest["vocabulary_sha256"] == vocabulary.sha256
    for block in ShardSet(tmp_path / "out").iter_blocks("train"):
        assert set(block.tokens[block.offsets[:-1]].tolist()) == {2}
        assert set(block.tokens[block.offsets[1:] - 1].tolist()) == {3}


def test_command_merges_sketches(tmp_path):
    paths = [write_cells(tmp_path / f"{n}.h5ad", num_cells=61, seed=n) for n in range(3)]
    for n in (0, 1):
        assert medians(paths[n], "--out", tmp_path / f"{n}.json").exit_code == 0
    sketches = [tmp_path / f"{n}.sketch.parquet" for n in (0, 1)]
    done = medians(*sketches, paths[2], "--out", tmp_path / "all.json", "--min-cells", 1)
    assert done.exit_code == 0 and "within 1.56%" in done.output
    merged, whole = load_vocabulary(tmp_path / "all.json"), compute(tmp_path / "work", *paths)
    exact = whole.vocabulary(1, None, False)
    assert merged.genes == exact.genes
    np.testing.assert_allclose(merged.medians, exact.medians, rtol=RELATIVE_ERROR)
    again = MedianSketch.load(tmp_path / "all.sketch.parquet")
    np.testing.assert_array_equal(again.counts, whole.sketch.counts[whole.sketch.detected > 0])


@pytest.mark.parametrize("name", ["own.json", "own.sketch.parquet", "own.genes.tsv"])
def test_command_keeps_what_is_there(name, tmp_path):
    path = write_cells(tmp_path / "a.h5ad", num_cells=20)
    (tmp_path / name).write_text("mine")
    done = medians(path, "--out", tmp_path / "own.json")
    assert isinstance(done.exception, ValueError) and name in str(done.exception)
    assert {p.name for p in tmp_path.iterdir()} == {"a.h5ad", name}
    assert (tmp_path / name).read_text() == "mine"


def test_command_ignores_no_argument(tmp_path):
    """A sketch given twice would count twice; one that is merged has no annotation to follow."""
    path = write_cells(tmp_path / "a.h5ad", num_cells=20, num_genes=50)
    assert medians(path, "--out", tmp_path / "a.json").exit_code == 0
    sketch, table = tmp_path / "a.sketch.parquet", annotate(tmp_path / "genes.csv", IDS)
    for wrong in ((sketch, sketch), (sketch, "--annotation", table), (path, "--max-length", 3)):
        done = medians(*wrong, "--out", tmp_path / "b.json")
        assert isinstance(done.exception, ValueError), wrong
        assert not list(tmp_path.glob("b.*"))
