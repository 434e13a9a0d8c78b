"""From sources to shards: nothing lost, nothing silent, the same bytes every time."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse

from data_prep.genes.rank_genes import encode_cells
from data_prep.inspection.tables import padding_share
from data_prep.prepare.options import PrepareOptions
from data_prep.prepare.run import prepare
from data_prep.shards.buckets import bucket_of, choose_buckets
from data_prep.shards.reader import ShardSet
from data_prep.sources.source_spec import SourceOptions, SourceSpec, source_at
from tests.synthetic import make_cells, write_cells

OPTIONS = PrepareOptions(heldout_share=0.2, block_cells=16, vocabulary_min_cells=1)
READING = SourceOptions(columns=("donor", "cell_type"))


def specs(*paths: Path, reading: SourceOptions = READING) -> list[SourceSpec]:
    return [source_at(p, reading) for p in paths]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_every_cell_arrives_once_with_its_tokens(tmp_path):
    source = write_cells(tmp_path / "cells.h5ad", num_cells=150)
    prepare(specs(source), tmp_path / "out", None, OPTIONS)
    shards = ShardSet(tmp_path / "out")
    vocabulary = shards.vocabulary
    cells = make_cells(150)
    csr = scipy.sparse.csr_matrix(cells.X)
    totals = np.asarray(csr.sum(axis=1), dtype=np.float64).ravel()
    encoded = encode_cells(
        csr.data, csr.indices, csr.indptr, totals, vocabulary.tokens_of(list(cells.var_names)),
        vocabulary,
    )  # fmt: skip
    expected = np.split(encoded.tokens, encoded.offsets[1:-1])
    seen = []
    for split in ("train", "heldout"):
        for block in shards.iter_blocks(split):
            ids = block.batch.column("cell_id").to_pylist()
            donors = block.batch.column("donor").to_pylist()
            for i, (name, donor) in enumerate(zip(ids, donors, strict=True)):
                row = int(name.removeprefix("cell"))
                cell = block.tokens[block.offsets[i] : block.offsets[i + 1]]
                np.testing.assert_array_equal(cell, expected[row])
                assert donor == f"donor{row % 4}"
            seen += ids
    assert sorted(seen) == sorted(cells.obs_names)
    assert seen != sorted(seen), "cells must be shuffled"


def test_bytes_do_not_depend_on_memory_or_reading(tmp_path, monkeypatch):
    source = write_cells(tmp_path / "cells.h5ad", num_cells=150)
    prepare(specs(source), tmp_path / "a", None, OPTIONS)
    monkeypatch.setattr("data_prep.sources.count_source._READ_CELLS", 17)
    monkeypatch.setattr("data_prep.prepare.work_list.CHUNK_CELLS", 50)
    prepare(specs(source), tmp_path / "b", None, replace(OPTIONS, memory_gib=1e-5))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_tars_are_webdataset_shards(tmp_path):
    import webdataset

    source = write_cells(tmp_path / "cells.h5ad", num_cells=150)
    manifest = prepare(specs(source), tmp_path / "out", None, OPTIONS)
    urls = [str(tmp_path / "out" / s["name"]) for s in manifest["shards"]]
    ids = []
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        batch = pa.ipc.open_stream(sample["arrow"]).read_next_batch()
        ids += batch.column("cell_id").to_pylist()
    assert sorted(ids) == sorted(make_cells(150).obs_names)


def test_rejections_are_counted_by_reason(tmp_path):
    cells = make_cells(60)
    matrix = cells.X.tolil()
    matrix[3] = 0
    matrix[4] = 0
    matrix[4, :5] = 1
    cells.X = matrix.tocsr()
    cells.obs["filter_pass"] = [0, 0, 0] + [1] * 57
    cells.write_h5ad(tmp_path / "cells.h5ad")
    manifest = prepare(
        specs(tmp_path / "cells.h5ad", reading=SourceOptions()), tmp_path / "out", None, OPTIONS
    )
    (report,) = manifest["sources"]
    assert report["cells_read"] == 60
    assert report["rejected"] == {
        "filter_pass is not 1": 3,
        "no counts at all": 1,
        "too few genes of the vocabulary": 1,
    }
    assert report["cells_kept"] == 55 == ShardSet(tmp_path / "out").num_cells


def test_heldout_groups_are_never_split(tmp_path):
    source = write_cells(tmp_path / "cells.h5ad", num_cells=150)
    options = replace(OPTIONS, heldout_by="donor", heldout_share=0.3)
    prepare(specs(source), tmp_path / "out", None, options)
    shards = ShardSet(tmp_path / "out")
    donors = {
        split: {d for b in shards.iter_blocks(split) for d in b.batch.column("donor").to_pylist()}
        for split in ("train", "heldout")
    }
    assert donors["train"]
    assert donors["heldout"]
    assert not donors["train"] & donors["heldout"]
    assert len(donors["heldout"]) == 2


def test_nothing_is_left_behind_after_an_error(tmp_path):
    bad = make_cells(30)
    bad.X = bad.X.toarray() / 3
    bad.write_h5ad(tmp_path / "b.h5ad")
    before = set(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"b\.h5ad.*no integers"):
        prepare(specs(tmp_path / "b.h5ad"), tmp_path / "out", None, OPTIONS)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heldout_by": "stage"}, "--heldout-by stage"),
        ({"heldout_share": 1.0}, "--heldout 1.0"),
        ({"heldout_by": "dataset", "heldout_share": 0.01}, "only one"),
    ],
)
def test_wrong_settings(change, message, tmp_path):
    source = write_cells(tmp_path / "cells.h5ad")
    with pytest.raises(ValueError, match=message):
        prepare(specs(source), tmp_path / "out", None, replace(OPTIONS, **change))
    assert not (tmp_path / "out").exists()


def test_folder_that_is_not_empty_is_kept(tmp_path):
    source = write_cells(tmp_path / "cells.h5ad")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="not an empty folder"):
        prepare(specs(source), tmp_path / "out", None, OPTIONS)
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_damaged_shards_are_named(tmp_path):
    source = write_cells(tmp_path / "cells.h5ad")
    prepare(specs(source), tmp_path / "out", None, OPTIONS)
    shards = ShardSet(tmp_path / "out")
    victim = tmp_path / "out" / shards.manifest["shards"][0]["name"]
    data = bytearray(victim.read_bytes())
    data[int(shards.index["offset"][0]) + 200] ^= 1
    victim.write_bytes(data)
    with pytest.raises(ValueError, match=f"{victim.name}.*checksum"):
        shards.read_block(0)
    victim.unlink()
    with pytest.raises(ValueError, match="is missing"):
        ShardSet(tmp_path / "out").read_block(0)
    (tmp_path / "out" / "vocabulary.json").write_text(
        shards.vocabulary.to_json().replace('"max_length":2048', '"max_length":1024')
    )
    with pytest.raises(ValueError, match="were made with"):
        ShardSet(tmp_path / "out")


@pytest.mark.parametrize("mean", [120, 500, 1200, 3000])
def test_buckets_keep_padding_low(mean):
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(mean), 0.5, 20_000), 20, 2048).astype(int)
    buckets = choose_buckets(np.bincount(lengths), 2048)
    padded = np.asarray(buckets)[bucket_of(lengths, buckets)]
    assert (padded >= lengths).all()
    assert 1 - lengths.sum() / padded.sum() <= 0.03
    assert buckets == sorted(set(buckets))
    # One bucket fewer, wherever it is taken away, pads more than allowed.
    for left_out in buckets[:-1]:
        fewer = [b for b in buckets if b != left_out]
        worse = np.asarray(fewer)[bucket_of(lengths, fewer)]
        assert 1 - lengths.sum() / worse.sum() > 0.03


@pytest.mark.parametrize("max_length", [50, 100, 1000])
def test_no_bucket_is_longer_than_the_model(max_length):
    lengths = np.random.default_rng(0).integers(10, max_length + 1, 500)
    assert choose_buckets(np.bincount(lengths), max_length)[-1] <= max_length


def test_folder_may_be_the_current_one_or_a_link(tmp_path, monkeypatch):
    source = write_cells(tmp_path / "cells.h5ad")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    prepare(specs(source), tmp_path / "link", None, OPTIONS)
    assert ShardSet(tmp_path / "real").num_cells == 120
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    prepare(specs(source), Path(), None, OPTIONS)
    assert ShardSet(tmp_path / "here").num_cells == 120


def test_folders_made_for_nothing_are_removed(tmp_path):
    source = write_cells(tmp_path / "cells.h5ad")
    with pytest.raises(ValueError, match="only one"):
        prepare(specs(source), tmp_path / "a" / "b", None, replace(OPTIONS, heldout_by="dataset"))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory_gib": 0}, "--memory 0"),
        ({"block_cells": 0}, "--block-cells 0"),
        ({"min_genes": 0}, "--min-genes 0"),
        ({"max_length": 4}, "--max-length 4"),
        ({"max_sd_counts": -1}, "--max-sd-counts -1"),
    ],
)
def test_numbers_are_checked(change, message, tmp_path):
    source = write_cells(tmp_path / "cells.h5ad")
    with pytest.raises(ValueError, match=message):
        prepare(specs(source), tmp_path / "out", None, replace(OPTIONS, **change))


def test_names_of_the_shards_are_refused(tmp_path):
    source = write_cells(tmp_path / "cells.h5ad")
    with pytest.raises(ValueError, match="used by the shards"):
        prepare(
            specs(source, reading=SourceOptions(columns=("dataset=donor",))), tmp_path / "out",
            None, OPTIONS,
        )  # fmt: skip


def test_columns_called_key_and_split_arrive(tmp_path):
    cells = make_cells(60)
    cells.obs["split"], cells.obs["key"] = "mine", [str(i) for i in range(60)]
    cells.write_h5ad(tmp_path / "cells.h5ad")
    reading = SourceOptions(columns=("split", "key"))
    prepare(specs(tmp_path / "cells.h5ad", reading=reading), tmp_path / "out", None, OPTIONS)
    for block in ShardSet(tmp_path / "out").iter_blocks("train"):
        names = block.batch.column("cell_id").to_pylist()
        assert [f"cell{k}" for k in block.batch.column("key").to_pylist()] == names


def test_real_cells_pad_little(real_data, tmp_path):
    from data_prep.genes.vocabulary import open_vocabulary

    names = ["pbmc3k/pbmc3k.h5ad", "sc_mixology/sc_mixology.h5ad"]
    vocabulary = open_vocabulary(real_data / "geneformer_v1_dicts")
    sources = specs(*[real_data / n for n in names], reading=SourceOptions())
    options = PrepareOptions(heldout_share=0.1, max_sd_counts=0, max_sd_mito=0)
    manifest = prepare(sources, tmp_path / "out", vocabulary, options)
    assert padding_share(manifest["buckets"]) <= 0.03
    assert [s["cells_kept"] for s in manifest["sources"]] == [2638, 992]
    size = sum(
        p.stat().st_size for p in (tmp_path / "out").iterdir() if p.name != "vocabulary.json"
    )
    assert size / sum(b["tokens"] for b in manifest["buckets"]) < 2.3
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest


def test_heldout_groups_do_not_overshoot(tmp_path):
    cells = make_cells(200)
    cells.obs["donor"] = ["big"] * 120 + [""] * 40 + ["a"] * 20 + ["b"] * 20
    cells.write_h5ad(tmp_path / "cells.h5ad")
    for seed in range(8):
        options = replace(OPTIONS, heldout_by="donor", heldout_share=0.1, seed=seed)
        prepare(specs(tmp_path / "cells.h5ad"), tmp_path / f"out{seed}", None, options)
        heldout = ShardSet(tmp_path / f"out{seed}").iter_blocks("heldout")
        found = {d for b in heldout for d in b.batch.column("donor").to_pylist()}
        assert found in ({"a"}, {"b"})


def test_heldout_groups_that_are_most_of_the_cells(tmp_path):
    cells = make_cells(100)
    cells.obs["donor"] = ["big"] * 90 + [""] * 10
    cells.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(ValueError, match="90 of 100 cells"):
        prepare(
            specs(tmp_path / "cells.h5ad"), tmp_path / "out", None,
            replace(OPTIONS, heldout_by="donor"),
        )  # fmt: skip


def test_mitochondrial_genes_named_in_the_index(tmp_path):
    """As scanpy has mouse data: symbols in the index, ids in a column."""
    cells = make_cells(60)
    cells.var["gene_ids"] = list(cells.var_names)
    cells.var_names = ["mt-Nd1", *[f"Gene{i}" for i in range(1, 200)]]
    del cells.var["symbol"]
    matrix = cells.X.tolil()
    matrix[:, 0] = 1
    matrix[7, 0] = 900
    cells.X = matrix.tocsr()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    reading = SourceOptions(gene_column="gene_ids")
    options = replace(OPTIONS, max_sd_counts=0)
    source = specs(tmp_path / "cells.h5ad", reading=reading)
    manifest = prepare(source, tmp_path / "out", None, options)
    assert manifest["datasets"][0]["rejected"] == {
        "mitochondrial share far from the data set's mean": 1
    }


def test_names_with_brackets_are_printed(tmp_path, capsys):
    from data_prep.inspection.tables import print_manifest

    cells = make_cells(60)
    cells.obs["study"] = "a[/b] [old] x"
    matrix = cells.X.tolil()
    matrix[3] = 0
    cells.X = matrix.tocsr()
    cells.write_h5ad(tmp_path / "cells[1].h5ad")
    reading = SourceOptions(dataset_column="study")
    source = specs(tmp_path / "cells[1].h5ad", reading=reading)
    print_manifest(prepare(source, tmp_path / "out", None, OPTIONS), "folder [x]")
    printed = capsys.readouterr().out
    for name in ("a[/b] [old] x", "cells[1]", "folder [x]"):
        assert name in printed
