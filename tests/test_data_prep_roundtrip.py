"""Any matrix, however it is stored and however the work is cut: all cells, all tokens, once."""

import json
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

from data_prep.genes.vocabulary import Vocabulary, from_dictionaries
from data_prep.prepare.options import PrepareOptions
from data_prep.prepare.run import prepare
from data_prep.shards.reader import ShardSet
from data_prep.sources.source_spec import SourceOptions, SourceSpec, source_at
from tests.synthetic import write_cells
from tests.test_data_prep_rank import reference

OPTIONS = PrepareOptions(heldout_share=0.3, max_sd_counts=0, max_sd_mito=0)
READING = SourceOptions(columns=("donor",))


def make_vocabulary(num_genes: int, has_cls: bool = False, max_length: int = 40) -> Vocabulary:
    special = ["<pad>", "<mask>", *(["<cls>", "<eos>"] if has_cls else [])]
    genes = [f"g{i}" for i in range(num_genes)]
    tokens = {name: i for i, name in enumerate([*special, *genes])}
    rng = np.random.default_rng(1)
    # A few medians only, so that exact ties happen.
    medians = rng.choice([0.5, 1.0, 3.0], num_genes)
    return from_dictionaries(
        tokens, dict(zip(genes, medians.tolist(), strict=True)), max_length=max_length
    )


def write_matrix(path: Path, counts: np.ndarray, genes: list[str], stored: dict) -> None:
    """Write counts in a dtype, a layout, with an index width and a compression."""
    import anndata

    matrix = counts.astype(stored["dtype"])
    if stored["layout"] != "dense":
        kind = {"csr": scipy.sparse.csr_matrix, "csc": scipy.sparse.csc_matrix}[stored["layout"]]
        matrix = kind(matrix)
        matrix.indices = matrix.indices.astype(stored["index"])
        matrix.indptr = matrix.indptr.astype(stored["index"])
    names = [f"cell{i}" for i in range(len(counts))]
    obs = pd.DataFrame({"donor": [f"d{i % 7}" for i in range(len(counts))]}, index=names)
    data = anndata.AnnData(matrix, obs=obs)
    data.var["ensembl_id"] = genes
    data.write_h5ad(path, compression=stored["compression"])


def read_back(folder: Path) -> dict[str, tuple[list[int], str]]:
    """Return cell -> (tokens, donor); check the structure of the folder on the way."""
    import webdataset

    shards = ShardSet(folder)
    lengths = sorted({b["length"] for b in shards.manifest["buckets"]})
    block_cells = shards.manifest["settings"]["block_cells"]
    cells: dict[str, tuple[list[int], str]] = {}
    order: list[str] = []
    for split in ("train", "heldout"):
        for length in shards.bucket_lengths(split):
            numbers = shards.block_numbers(split, length)
            sizes = shards.index["cells"][numbers]
            assert (sizes[:-1] == block_cells).all() and 0 < sizes[-1] <= block_cells
            shortest = max([n for n in lengths if n < length], default=0) + 1
            for number in numbers:
                assert shards.index["first_cell"][number] == len(order)
                block = shards.read_block(int(number))
                tokens = np.split(block.tokens, block.offsets[1:-1])
                assert all(shortest <= len(t) <= length for t in tokens)
                ids = block.batch.column("cell_id").to_pylist()
                donors = block.batch.column("donor").to_pylist()
                assert not cells.keys() & set(ids) and len(set(ids)) == len(ids)
                new = zip((t.tolist() for t in tokens), donors, strict=True)
                cells |= dict(zip(ids, new, strict=True))
                order += ids
    urls = [str(folder / s["name"]) for s in shards.manifest["shards"]]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    batches = [pa.ipc.open_stream(s["arrow"]).read_next_batch() for s in samples]
    assert [i for b in batches for i in b.column("cell_id").to_pylist()] == order
    check_statistics(folder, shards, [tokens for tokens, _ in cells.values()])
    return cells


def check_statistics(folder: Path, shards: ShardSet, cells: list[list[int]]) -> None:
    found = json.loads((folder / "statistics.json").read_text())
    by_token = np.bincount(np.concatenate(cells), minlength=shards.vocabulary.num_tokens)
    assert found["cells_by_token"] == by_token.tolist()
    size = shards.vocabulary.max_length + 1
    by_length = np.bincount([len(c) for c in cells], minlength=size)
    assert np.sum(found["cells_by_length"], axis=0).tolist() == by_length.tolist()


STORED = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["int32", "int64", "float32", "float64", "uint16"]),
        "layout": st.sampled_from(["csr", "csc", "dense"]),
        "index": st.sampled_from(["int32", "int64"]),
        "compression": st.sampled_from([None, "gzip"]),
    }
)
CUT = st.fixed_dictionaries(
    {
        "block_cells": st.integers(1, 20),
        "shard_mib": st.sampled_from([64, 0.003, 0.001]),
        "memory_gib": st.sampled_from([2.0, 1e-5, 1e-9]),
        "min_genes": st.integers(1, 9),
        "seed": st.integers(0, 3),
    }
)


@settings(deadline=None, max_examples=15)
@given(STORED, CUT, st.integers(0, 10_000), st.booleans(), st.integers(5, 200), st.integers(9, 70))
def test_every_kept_cell_arrives_as_the_reference_encodes_it(
    tmp_path_factory, stored, cut, seed, has_cls, read_cells, chunk_cells
):
    rng = np.random.default_rng(seed)
    folder = tmp_path_factory.mktemp("roundtrip")
    vocabulary = make_vocabulary(60, has_cls)
    genes = [f"g{i}" for i in rng.integers(0, 80, 70)]  # some twice, some unknown
    num_cells = int(rng.integers(60, 250))
    counts = rng.poisson(rng.gamma(0.4, 1.0, (num_cells, 1)), (num_cells, 70))
    counts *= rng.integers(1, 300, counts.shape)
    counts[rng.integers(0, num_cells, 3)] = 0
    write_matrix(folder / "cells.h5ad", counts, genes, stored)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_prep.sources.count_source._READ_CELLS", read_cells)
        patch.setattr("data_prep.prepare.work_list.CHUNK_CELLS", chunk_cells)
        spec = source_at(folder / "cells.h5ad", READING)
        manifest = prepare([spec], folder / "out", vocabulary, replace(OPTIONS, **cut))

    tokens = vocabulary.tokens_of(genes)
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = reference(counts.astype(np.float64), tokens, vocabulary)
    known = pd.DataFrame(counts.T[tokens >= 0], index=tokens[tokens >= 0]).groupby(level=0).sum()
    kept = np.flatnonzero((known > 0).sum(axis=0) >= cut["min_genes"])
    assert read_back(folder / "out") == {
        f"cell{i}": (expected[i].tolist(), f"d{i % 7}") for i in kept
    }
    assert manifest["sources"][0]["cells_kept"] == len(kept)
    assert sum(manifest["sources"][0]["rejected"].values()) == num_cells - len(kept)


def write_tokens(path: Path, cells: list[list[int]], kind: str, rows: int, wide: bool) -> None:
    lists = pa.large_list(pa.int64()) if wide else pa.list_(pa.int32())
    table = pa.table(
        {
            "input_ids": pa.array(cells, lists),
            "length": pa.array([len(c) for c in cells]),
            "donor": [f"d{i % 7}" for i in range(len(cells))],
        }
    )
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=rows)
        return
    new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with new(str(path), table.schema) as writer:
        writer.write_table(table, rows)


@settings(deadline=None, max_examples=10)
@given(
    st.sampled_from(["parquet", "file", "stream"]), CUT, st.integers(0, 10_000), st.booleans(),
    st.integers(1, 90), st.booleans(), st.integers(2, 40),
)  # fmt: skip
def test_token_corpora_arrive_as_they_are(
    tmp_path_factory, kind, cut, seed, has_cls, rows, wide, chunk_cells
):
    rng = np.random.default_rng(seed)
    folder = tmp_path_factory.mktemp("tokens")
    vocabulary = make_vocabulary(60, has_cls)
    first, frame = vocabulary.first_gene_token, 2 if has_cls else 0
    genes = [(rng.permutation(60)[:n] + first).tolist() for n in rng.integers(0, 39, 150)]
    cells = [[2, *g, 3] for g in genes] if has_cls else genes
    path = folder / ("cells.parquet" if kind == "parquet" else "cells.arrow")
    write_tokens(path, cells, kind, rows, wide)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_prep.sources.token_corpus._READ_CELLS", rows // 2 + 1)
        patch.setattr("data_prep.prepare.work_list.CHUNK_CELLS", chunk_cells)
        prepare([source_at(path, READING)], folder / "out", vocabulary, replace(OPTIONS, **cut))
    assert read_back(folder / "out") == {
        f"cells:{i}": (cell, f"d{i % 7}")
        for i, cell in enumerate(cells)
        if len(cell) - frame >= cut["min_genes"]
    }


def specs_of_both_kinds(folder: Path) -> list[SourceSpec]:
    rng = np.random.default_rng(0)
    counts = rng.poisson(0.9, (200, 60))
    stored = {"dtype": "float32", "layout": "csr", "index": "int32", "compression": None}
    write_matrix(folder / "a.h5ad", counts, [f"g{i}" for i in range(60)], stored)
    cells = [(rng.permutation(60)[:n] + 2).tolist() for n in rng.integers(9, 39, 150)]
    write_tokens(folder / "b.parquet", cells, "parquet", 20, wide=False)
    return [source_at(folder / n, READING) for n in ("a.h5ad", "b.parquet")]


def test_sizes_of_tars_and_blocks_do_not_move_a_cell(tmp_path):
    specs, orders = specs_of_both_kinds(tmp_path), []
    for n, (shard_mib, block_cells) in enumerate([(64, 256), (0.001, 7), (0.002, 1)]):
        options = replace(OPTIONS, shard_mib=shard_mib, block_cells=block_cells)
        manifest = prepare(specs, tmp_path / f"out{n}", make_vocabulary(60), options)
        several = len(manifest["shards"]) > len(manifest["buckets"])
        assert several == (shard_mib < 1)
        orders.append(list(read_back(tmp_path / f"out{n}")))
    assert orders[0] == orders[1] == orders[2]


def test_how_the_work_is_cut_changes_no_byte(tmp_path, monkeypatch):
    """Neither in the tars nor in the manifest, with several data sets in a file."""
    for name, seed in (("a", 0), ("b", 1)):
        write_cells(tmp_path / f"{name}.h5ad", num_cells=150, seed=seed)
    reading = SourceOptions(columns=("cell_type",), dataset_column="donor")
    specs = [source_at(tmp_path / f"{name}.h5ad", reading) for name in "ab"]
    options = replace(OPTIONS, block_cells=5, shard_mib=0.003, vocabulary_min_cells=1)
    results = []
    for chunk_cells, read_cells, memory_gib in ((1000, 1000, 2), (40, 9, 1e-5), (7, 3, 1e-9)):
        monkeypatch.setattr("data_prep.prepare.work_list.CHUNK_CELLS", chunk_cells)
        monkeypatch.setattr("data_prep.sources.count_source._READ_CELLS", read_cells)
        out = tmp_path / f"out{chunk_cells}"
        prepare(specs, out, None, replace(options, memory_gib=memory_gib))
        results.append({p.name: p.read_bytes() for p in out.iterdir()})
    tars = [{n: b for n, b in r.items() if n.endswith(".tar")} for r in results]
    assert tars[0] == tars[1] == tars[2]
    assert results[0] == results[1] == results[2]


def test_a_rejected_cell_may_be_longer_than_all_others(tmp_path):
    """No bucket holds it."""
    counts = np.random.default_rng(0).integers(0, 9, (60, 200))
    counts[:, 100:] = 0
    counts[17] = 50
    stored = {"dtype": "float32", "layout": "csr", "index": "int32", "compression": None}
    write_matrix(tmp_path / "cells.h5ad", counts, [f"g{i}" for i in range(200)], stored)
    spec, vocabulary = source_at(tmp_path / "cells.h5ad", READING), make_vocabulary(200, False, 200)
    prepare([spec], tmp_path / "out", vocabulary, replace(OPTIONS, max_sd_counts=3))
    assert read_back(tmp_path / "out").keys() == {f"cell{i}" for i in range(60) if i != 17}


def test_more_tokens_than_16_bits_hold(tmp_path):
    """Genes at both ends of a vocabulary of 70,000."""
    rng = np.random.default_rng(0)
    vocabulary = make_vocabulary(70_000)
    numbers = np.r_[np.arange(20), np.arange(65_520, 65_550), np.arange(69_980, 70_000)]
    counts = rng.poisson(1.0, (60, 70)) * rng.integers(1, 9, (60, 70))
    stored = {"dtype": "int32", "layout": "csr", "index": "int32", "compression": None}
    genes = [f"g{i}" for i in numbers]
    write_matrix(tmp_path / "cells.h5ad", counts, genes, stored)
    prepare([source_at(tmp_path / "cells.h5ad", READING)], tmp_path / "out", vocabulary, OPTIONS)
    found = read_back(tmp_path / "out")
    expected = reference(counts.astype(np.float64), vocabulary.tokens_of(genes), vocabulary)
    assert {k: v[0] for k, v in found.items()} == {
        f"cell{i}": e.tolist() for i, e in enumerate(expected)
    }
    batch = ShardSet(tmp_path / "out").read_block(0).batch
    assert batch.schema.field("input_ids").type.value_type == pa.uint32()
