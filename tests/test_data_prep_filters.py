"""Which cells stay: the paper's filters against numpy, duplicates, and every cell accounted for."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.encoding.filters import REASONS, DatasetMoments, Moments, merge_moments
from data_prep.genes.annotation import read_annotation
from data_prep.genes.vocabulary import from_dictionaries
from data_prep.prepare.options import PrepareOptions
from data_prep.prepare.run import prepare
from data_prep.shards.reader import ShardSet
from data_prep.sources.open_source import open_source
from data_prep.sources.source_spec import SourceOptions, source_at

pytestmark = pytest.mark.quick

PASSED, EMPTY, FEW, COUNTS, MITO, DUPLICATE = REASONS[1:]
MT_IDS = ["ENSG00000198695", "ENSG00000198712", "ENSG00000198727", "ENSG00000198763"]
GENES = [f"ENSG{i:011d}" for i in range(40)] + MT_IDS
TOKENS = {"<pad>": 0, "<mask>": 1} | {g: i + 2 for i, g in enumerate(GENES)}
VOCABULARY = from_dictionaries(TOKENS, dict.fromkeys(GENES, 1.0))
OPTIONS = PrepareOptions(heldout_share=0.3, block_cells=16)


def write(path: Path, counts: np.ndarray, genes: list[str] = GENES, **obs) -> Path:
    """Write counts as h5ad; cells are called after file and row."""
    import anndata

    index = [f"{path.stem}-{i}" for i in range(len(counts))]
    frame = pd.DataFrame(obs, index=index)
    matrix = scipy.sparse.csr_matrix(np.asarray(counts, dtype=np.float32))
    data = anndata.AnnData(matrix, obs=frame)
    data.var["ensembl_id"] = genes
    data.write_h5ad(path)
    return path


def run(out: Path, *paths: Path, options=OPTIONS, reading=SourceOptions()) -> tuple[dict, set[str]]:
    """Return the manifest and the ids of the cells that are in the shards."""
    manifest = prepare([source_at(p, reading) for p in paths], out, VOCABULARY, options)
    shards = ShardSet(out)
    blocks = [b for split in ("train", "heldout") for b in shards.iter_blocks(split)]
    ids = [i for b in blocks for i in b.batch.column("cell_id").to_pylist()]
    assert len(ids) == len(set(ids)) == shards.num_cells
    return manifest, set(ids)


def make_counts(seed: int, cells: int) -> np.ndarray:
    """Return counts with empty cells, cells of few genes, of many counts, of many mitochondria."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.gamma(2.0, 2.0, (cells, len(GENES))))
    few, many, mitochondrial, empty = rng.permutation(cells)[:12].reshape(4, 3)
    counts[few, 5:] = 0
    counts[few, :5] += 1
    counts[many] *= 30
    counts[mitochondrial, -len(MT_IDS) :] *= 60
    counts[empty] = 0
    return counts


def reference(counts, passes, datasets, sd_counts, sd_mito, has_mito=True) -> np.ndarray:
    """Return the reason of each cell, 'kept' or another, as the paper describes the filters."""
    totals = counts.sum(axis=1)
    with np.errstate(invalid="ignore"):
        share = counts[:, -len(MT_IDS) :].sum(axis=1) / totals
    result = np.full(len(counts), "kept", dtype=object)
    for name in set(datasets):
        here = np.asarray(datasets) == name
        counted = here & passes & (totals > 0)
        for reason, values, limit in (
            (MITO, share, sd_mito if has_mito else 0),
            (COUNTS, totals, sd_counts),
        ):
            distance = np.abs(values - values[counted].mean())
            if limit:
                result[here & (distance > limit * values[counted].std())] = reason
    result[(counts > 0).sum(axis=1) < OPTIONS.min_genes] = FEW
    result[totals == 0] = EMPTY
    result[~passes] = PASSED
    return result


def check_accounts(manifest: dict, out_ids: set[str], expected: dict[str, tuple]) -> None:
    """Compare with `expected`: source -> (reasons, data sets) of its cells in order."""
    kept, by_dataset = set(), {}
    for entry, (name, (reasons, datasets)) in zip(
        manifest["sources"], expected.items(), strict=True
    ):
        rejected = Counter(r for r in reasons if r != "kept")
        assert (entry["name"], entry["cells_read"]) == (name, len(reasons))
        assert entry["rejected"] == rejected
        assert entry["cells_kept"] == len(reasons) - rejected.total()
        kept |= {f"{name}-{i}" for i, reason in enumerate(reasons) if reason == "kept"}
        for reason, dataset in zip(reasons, datasets, strict=True):
            by_dataset.setdefault(dataset, Counter())[reason] += 1
    assert out_ids == kept
    assert {d["name"] for d in manifest["datasets"]} == by_dataset.keys()
    for entry in manifest["datasets"]:
        counts = by_dataset[entry["name"]]
        assert entry["cells_read"] == counts.total()
        assert entry["cells_kept"] == counts.pop("kept")
        assert entry["rejected"] == counts


# --- the paper's filters --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "sd_counts", "sd_mito"), [(0, 3, 3), (1, 3, 0), (2, 0, 3), (3, 0, 0), (4, 1, 0.7)]
)
def test_filters_equal_numpy_per_data_set(seed, sd_counts, sd_mito, tmp_path):
    """Two files share two of three data sets, which have different means."""
    rng = np.random.default_rng(seed)
    counts = [make_counts(seed, 120), make_counts(seed + 50, 90)]
    sets = [rng.choice(["x", "y"], 120), rng.choice(["y", "z"], 90)]
    counts = [c * np.where(s == "y", 7, 1)[:, None] for c, s in zip(counts, sets, strict=True)]
    passes = [rng.random(len(c)) < 0.9 for c in counts]
    paths = [
        write(tmp_path / f"{n}.h5ad", c, study=s, filter_pass=p.astype(int))
        for n, c, s, p in zip("ab", counts, sets, passes, strict=True)
    ]
    options = replace(OPTIONS, max_sd_counts=sd_counts, max_sd_mito=sd_mito)
    found = run(tmp_path / "out", *paths, options=options, reading=SourceOptions(
        dataset_column="study"))  # fmt: skip
    reasons = reference(*map(np.concatenate, (counts, passes, sets)), sd_counts, sd_mito)
    wanted = {EMPTY, FEW, PASSED} | {r for r, s in ((COUNTS, sd_counts), (MITO, sd_mito)) if s}
    assert wanted <= set(reasons), "the example shows every reason"
    check_accounts(*found, {"a": (reasons[:120], sets[0]), "b": (reasons[120:], sets[1])})


def test_recorded_limits_equal_numpy(tmp_path):
    counts = make_counts(7, 100)
    manifest, _ = run(tmp_path / "out", write(tmp_path / "a.h5ad", counts))
    totals = counts.sum(axis=1)[counts.any(axis=1)]
    shares = counts[:, -len(MT_IDS) :].sum(axis=1)[counts.any(axis=1)] / totals
    (entry,) = manifest["datasets"]
    for name, values in (("counts_interval", totals), ("mito_interval", shares)):
        spread = 3 * values.std()
        np.testing.assert_allclose(
            entry[name], [values.mean() - spread, values.mean() + spread], rtol=1e-5
        )
    options = replace(OPTIONS, max_sd_counts=0, max_sd_mito=0)
    manifest, _ = run(tmp_path / "off", tmp_path / "a.h5ad", options=options)
    assert manifest["datasets"][0]["counts_interval"] is None
    assert manifest["datasets"][0]["mito_interval"] is None


def test_data_set_without_mitochondrial_genes(tmp_path):
    counts = make_counts(5, 80)[:, : -len(MT_IDS)]
    found = run(tmp_path / "out", write(tmp_path / "a.h5ad", counts, GENES[: -len(MT_IDS)]))
    everything = np.ones(80, dtype=bool)
    reasons = reference(counts, everything, ["a"] * 80, 3, 3, has_mito=False)
    check_accounts(*found, {"a": (reasons, ["a"] * 80)})
    assert found[0]["datasets"][0]["mito_interval"] is None


@pytest.mark.parametrize("num_sets", [1, 30])
def test_cells_with_the_same_mitochondrial_share_stay(num_sets, tmp_path):
    """No cell is far from the mean where all are equal, or where it is the only one."""
    counts = np.zeros((30, len(GENES)))
    counts[:, :8] = np.arange(1, 9)
    counts[:, -1] = 3  # 3 of 39: no multiple of a power of two
    path = write(tmp_path / "a.h5ad", counts, study=[str(i % num_sets) for i in range(30)])
    # All are copies of one cell, which stay on one side: none can be held out.
    options = replace(OPTIONS, heldout_share=0.0)
    reading = SourceOptions(dataset_column="study", force_counts=True)
    _, ids = run(tmp_path / "out", path, options=options, reading=reading)
    assert len(ids) == 30


def test_totals_of_a_column_are_compared(tmp_path):
    rng = np.random.default_rng(0)
    counts = rng.poisson(3, (60, len(GENES)))
    totals = counts.sum(axis=1) + rng.integers(50, 60, 60) + 0.3
    totals[11] = 1e6
    path = write(tmp_path / "a.h5ad", counts, n_counts=totals)
    manifest, ids = run(tmp_path / "out", path, reading=SourceOptions(total_column="n_counts"))
    assert manifest["sources"][0]["rejected"] == {COUNTS: 1}
    assert "a-11" not in ids


# --- mitochondrial genes --------------------------------------------------------------------------


def mitochondrial(path: Path, annotation: Path | None = None) -> list[bool]:
    table = read_annotation(annotation) if annotation else None
    return open_source(source_at(path, SourceOptions()), None, table).mitochondrial.tolist()


EXPECTED = [False] * 6 + [True] * 2


def test_mitochondrial_genes_by_human_id(tmp_path):
    path = write(tmp_path / "a.h5ad", np.ones((3, 8)), GENES[:6] + MT_IDS[:2])
    assert mitochondrial(path) == EXPECTED


@pytest.mark.parametrize("column", ["symbol", "feature_name", "gene_name", "Gene"])
def test_mitochondrial_genes_by_symbol(column, tmp_path):
    import anndata

    data = anndata.read_h5ad(write(tmp_path / "a.h5ad", np.ones((3, 8)), GENES[:8]))
    data.var[column] = [*("Actb", "MTOR", "MT1A", "mt", "", "AMT-2"), "mt-Nd1", "MT-CO1"]
    data.write_h5ad(tmp_path / "b.h5ad")
    assert mitochondrial(tmp_path / "b.h5ad") == EXPECTED


@pytest.mark.parametrize("version", ["", ".5"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".tsv.gz", ".parquet"])
def test_mitochondrial_genes_by_annotation(suffix, version, tmp_path):
    """GENCODE's ids carry versions, those of most files do not."""
    path, table_path = tmp_path / "a.h5ad", tmp_path / f"genes{suffix}"
    write(path, np.ones((3, 8)), GENES[:8])
    table = pd.DataFrame(
        {
            "gene_id": [f"{g}{version}" for g in GENES[:8]],
            "gene_type": "protein_coding",
            "chromosome": ["chr1", "X", "chr2", "Y", "MT1", "mtx", "chrM", "MT"],
        }
    )
    if suffix == ".parquet":
        table.to_parquet(table_path)
    else:
        table.to_csv(table_path, sep="\t" if "tsv" in suffix else ",", index=False)
    assert mitochondrial(path, table_path) == EXPECTED


# --- duplicates -----------------------------------------------------------------------------------

DEDUP = replace(OPTIONS, dedup=True, max_sd_counts=0, max_sd_mito=0)


def random_counts(cells: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 9, (cells, len(GENES)))


@pytest.mark.parametrize("memory_gib", [2.0, 1e-6])
def test_the_first_of_equal_cells_stays(memory_gib, tmp_path):
    """Within a file and in a second one, whose genes stand in another order."""
    first = random_counts(100)
    first[[50, 70, 99]] = first[[10, 10, 98]]
    second = np.r_[first[[5, 10, 60]], random_counts(40, seed=1)]
    second[20] = second[21]
    order = np.random.default_rng(2).permutation(len(GENES))
    a = write(tmp_path / "a.h5ad", first)
    b = write(tmp_path / "b.h5ad", second[:, order], [GENES[i] for i in order])
    options = replace(DEDUP, memory_gib=memory_gib)
    manifest, ids = run(tmp_path / "out", a, b, options=options)
    assert [s["rejected"] for s in manifest["sources"]] == [{DUPLICATE: 3}, {DUPLICATE: 4}]
    everything = {f"a-{i}" for i in range(100)} | {f"b-{i}" for i in range(43)}
    gone = everything - ids
    assert gone == {"a-50", "a-70", "a-99", "b-0", "b-1", "b-2", "b-21"}
    # In the other order, the cells of the other file are the first.
    manifest, ids = run(tmp_path / "other", b, a, options=options)
    assert everything - ids == {"b-21", "a-5", "a-10", "a-50", "a-60", "a-70", "a-99"}


def test_memory_changes_nothing(tmp_path):
    counts = random_counts(150)
    counts[100:] = counts[:50]
    path = write(tmp_path / "a.h5ad", counts)
    for name, memory_gib in (("one", 2.0), ("two", 1e-6)):
        run(tmp_path / name, path, options=replace(DEDUP, memory_gib=memory_gib))
    one, two = (sorted((tmp_path / n).iterdir()) for n in ("one", "two"))
    assert [(p.name, p.read_bytes()) for p in one] == [(p.name, p.read_bytes()) for p in two]


def test_cells_that_differ_in_one_count_stay(tmp_path):
    counts = np.tile(random_counts(1) + 1, (len(GENES), 1))
    counts[np.arange(1, len(GENES)), np.arange(1, len(GENES))] += 1
    path = write(tmp_path / "a.h5ad", counts)
    # Their totals differ by one count, as those of rounded CPM do.
    reading = SourceOptions(force_counts=True)
    manifest, _ = run(tmp_path / "out", path, options=DEDUP, reading=reading)
    assert manifest["sources"][0]["rejected"] == {}


def test_rounding_noise_makes_no_duplicate(tmp_path):
    """2.9999998 is 3: equal to a cell with 3, not to one with 2."""
    counts = np.tile(random_counts(1) + 1, (3, 1)).astype(np.float32)
    counts[:, 4] = [2, np.nextafter(np.float32(3), np.float32(0)), 3]
    path = write(tmp_path / "a.h5ad", np.r_[counts, random_counts(20)])
    _, ids = run(tmp_path / "out", path, options=DEDUP)
    assert {"a-0", "a-1"} <= ids and "a-2" not in ids


def test_a_gene_in_two_columns_is_the_gene(tmp_path):
    counts = random_counts(30) * 2
    a = write(tmp_path / "a.h5ad", counts)
    halves = np.c_[counts[:, :1] // 2, counts[:, 1:], counts[:, :1] - counts[:, :1] // 2]
    b = write(tmp_path / "b.h5ad", halves, [*GENES, GENES[0]])
    manifest, ids = run(tmp_path / "out", a, b, options=DEDUP)
    assert ids == {f"a-{i}" for i in range(30)}


def test_duplicates_of_a_token_corpus(tmp_path):
    rng = np.random.default_rng(0)
    cells = [(rng.permutation(len(GENES))[:20] + 2).tolist() for _ in range(40)]
    cells[30], cells[31] = cells[3], cells[4][::-1]
    for name, chosen in (("a", cells), ("b", [*cells[:4], cells[5][:-1]])):
        table = {"input_ids": chosen, "length": [len(c) for c in chosen]}
        pq.write_table(pa.table(table), tmp_path / f"{name}.parquet", row_group_size=7)
    paths = tmp_path / "a.parquet", tmp_path / "b.parquet"
    manifest, ids = run(tmp_path / "out", *paths, options=DEDUP)
    assert [s["rejected"] for s in manifest["sources"]] == [{DUPLICATE: 1}, {DUPLICATE: 4}]
    assert ids == {f"a:{i}" for i in range(40) if i != 30} | {"b:4"}


# --- sums that add up exactly ---------------------------------------------------------------------

VALUES = st.lists(st.floats(0, 1e6), min_size=1, max_size=40)


@settings(deadline=None, max_examples=60)
@given(VALUES, st.lists(st.integers(0, 40), max_size=5), st.randoms(use_true_random=False))
def test_moments_of_parts_equal_numpy(values, cuts, random):
    parts = np.split(np.array([*values, np.nan]), sorted(min(c, len(values)) for c in cuts))
    random.shuffle(parts)
    merged = merge_moments({"x": DatasetMoments(Moments.of(p), Moments.of(p))} for p in parts)
    random.shuffle(values)
    assert merged["x"].totals == Moments.of(np.array(values)), "no rounding, in no order"
    low, high = merged["x"].mitochondrial.interval(2.0)
    mean, deviation = np.mean(values), np.std(values)
    np.testing.assert_allclose(
        [low, high], [mean - 2 * deviation, mean + 2 * deviation], rtol=1e-9, atol=4e-6
    )


def test_nothing_is_outside_without_a_limit_or_values():
    assert Moments.of(np.array([1.0, 5.0])).interval(0.0) == (-np.inf, np.inf)
    assert Moments.of(np.array([np.nan])).interval(3.0) == (-np.inf, np.inf)
