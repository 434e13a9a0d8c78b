"""No cell is held out here and trained on there: copies go to one side, across files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.genes.vocabulary import Vocabulary, open_vocabulary
from data_prep.prepare.options import PrepareOptions
from data_prep.prepare.run import prepare
from data_prep.running.workers import open_workers
from data_prep.shards.reader import ShardSet
from data_prep.sources.corpus_list import expand_corpus, expand_path
from data_prep.sources.open_source import open_path
from data_prep.sources.source_spec import SourceOptions, source_at
from data_prep.sources.token_corpus import TokenBlock
from tests.data_files import write_loom
from tests.synthetic import make_cells

if TYPE_CHECKING:
    import anndata

GENES = tuple(make_cells(2).var_names)
VOCABULARY = Vocabulary(GENES, np.linspace(0.5, 2, len(GENES)), {"<pad>": 0, "<mask>": 1}, 256)


def two_studies(folder: Path) -> tuple[anndata.AnnData, anndata.AnnData]:
    """Return 90 and 90 cells, of which 60 are the same under other names, genes in other order."""
    cells = make_cells(120)
    first, second = cells[:90].copy(), cells[30:].copy()
    second = second[:, np.random.default_rng(0).permutation(200)].copy()
    first.obs_names = [f"a{i}" for i in range(90)]
    second.obs_names = [f"b{i + 30}" for i in range(90)]
    first.write_h5ad(folder / "one.h5ad")
    second.write_h5ad(folder / "two.h5ad")
    return first, second


def options(**more) -> PrepareOptions:
    given = {"heldout_share": 0.4, "block_cells": 8, "max_sd_counts": 0, "max_sd_mito": 0}
    return PrepareOptions(**(given | more))


def sides(folder: Path) -> dict[str, set[str]]:
    """Return the cell ids of each split, and check the number of cells."""
    shards = ShardSet(folder)
    found = {
        split: [i for b in shards.iter_blocks(split) for i in b.batch.column("cell_id").to_pylist()]
        for split in ("train", "heldout")
    }
    assert sum(map(len, found.values())) == shards.num_cells
    return {split: set(ids) for split, ids in found.items()}


def tokens_of(folder: Path) -> dict[str, tuple[int, ...]]:
    return {
        cell: tuple(block.tokens[block.offsets[i] : block.offsets[i + 1]].tolist())
        for split in ("train", "heldout")
        for block in ShardSet(folder).iter_blocks(split)
        for i, cell in enumerate(block.batch.column("cell_id").to_pylist())
    }


def test_copies_go_to_the_side_of_the_first(tmp_path):
    first, second = two_studies(tmp_path)
    specs = expand_corpus([str(tmp_path / "*.h5ad")], SourceOptions())
    before = prepare(specs, tmp_path / "before", VOCABULARY, options(same_side=False))
    after = prepare(specs, tmp_path / "after", VOCABULARY, options())
    was, now = sides(tmp_path / "before"), sides(tmp_path / "after")
    assert tokens_of(tmp_path / "before") == tokens_of(tmp_path / "after")
    moved = 0
    for name in [*first.obs_names, *second.obs_names]:
        number = int(name[1:])
        leader = f"a{number}" if number < 90 else name
        side = "heldout" if leader in was["heldout"] else "train"
        assert name in now[side]
        moved += name not in was[side]
    assert moved > 10
    assert after["same_cells"] == {
        "cells": 60, "moved": moved, "divided": 0, "num_pairs": 1,
        "pairs": [{"first": "one", "copy": "two", "cells": 60, "divided": 0}],
    }  # fmt: skip
    assert before["same_cells"]["cells"] == 0


def test_same_bytes_for_any_number_of_processes_and_any_memory(tmp_path):
    two_studies(tmp_path)
    specs = expand_corpus([str(tmp_path / "*.h5ad")], SourceOptions())
    found = [prepare(specs, tmp_path / "alone", VOCABULARY, options())]
    # So little that hashes are looked at in many parts.
    found.append(prepare(specs, tmp_path / "small", VOCABULARY, options(memory_gib=1e-6)))
    with open_workers(2) as workers:
        assert workers is not None
        found.append(prepare(specs, tmp_path / "two", VOCABULARY, options(), workers))
    assert found[0] == found[1] == found[2]


def test_loom_and_a_tokenised_corpus_hold_copies_too(tmp_path):
    cells = make_cells(60)
    path = tmp_path / "cells.h5ad"
    cells.write_h5ad(path)
    prepare([source_at(path, SourceOptions())], tmp_path / "first", VOCABULARY, options())
    tokens = list(tokens_of(tmp_path / "first").values())
    table = {"input_ids": [list(t) for t in tokens], "length": [len(t) for t in tokens]}
    pq.write_table(pa.table(table), tmp_path / "tokens.parquet")
    cells.obs_names = [f"loom{i}" for i in range(60)]
    loom = write_loom(cells, tmp_path)
    specs = expand_corpus([str(path), str(loom), str(tmp_path / "tokens.parquet")], SourceOptions())
    manifest = prepare(specs, tmp_path / "all", VOCABULARY, options())
    assert (manifest["same_cells"]["cells"], manifest["same_cells"]["divided"]) == (120, 0)
    held = sides(tmp_path / "all")["heldout"]
    encoded = tokens_of(tmp_path / "all")
    assert not {encoded[c] for c in held} & {t for c, t in encoded.items() if c not in held}


def test_copies_across_groups_are_reported_with_both(tmp_path):
    two_studies(tmp_path)
    specs = expand_corpus([str(tmp_path / "*.h5ad")], SourceOptions())
    manifest = prepare(specs, tmp_path / "out", VOCABULARY, options(heldout_by="dataset"))
    found = manifest["same_cells"]
    assert (found["cells"], found["moved"], found["divided"]) == (60, 0, 60)
    assert found["pairs"] == [{"first": "one", "copy": "two", "cells": 60, "divided": 60}]
    (warning,) = manifest["warnings"]
    assert "60 cells are held out and trained on" in warning and "'one' and 'two'" in warning
    specs = expand_corpus([str(tmp_path / "*.h5ad")], SourceOptions(columns=("donor",)))
    found = prepare(specs, tmp_path / "by", VOCABULARY, options(heldout_by="donor"))["same_cells"]
    assert found["cells"] == 60 and found["divided"] == 0
    assert {p["first"] for p in found["pairs"]} == {f"donor{i}" for i in range(4)}


# --- Hugging Face DatasetDict ---------------------------------------------------------------------


def dataset_dict(folder: Path, names: tuple[str, ...] = ("train", "test")) -> Path:
    """As `DatasetDict.save_to_disk`: a folder for each split. The second split begins with 9s."""
    import datasets

    rows = {
        name: {
            "input_ids": [[2 + 7 * at, *range(30, 60 + i)] for i in range(12)],
            "length": [31 + i for i in range(12)],
        }
        for at, name in enumerate(names)
    }
    whole = datasets.DatasetDict({n: datasets.Dataset.from_dict(r) for n, r in rows.items()})
    whole.save_to_disk(str(folder / "tokens.dataset"))
    return folder / "tokens.dataset"


def split_files(folder: Path) -> Path:
    """As on the Hub: files named by their splits."""
    saved = dataset_dict(folder)
    out = folder / "files"
    out.mkdir()
    for name in ("train", "test"):
        (block,) = open_path(f"{saved}#{name}", SourceOptions()).blocks()
        assert isinstance(block, TokenBlock)
        lists = [t.tolist() for t in np.split(block.tokens, block.offsets[1:-1])]
        table = pa.table({"input_ids": lists, "length": [len(t) for t in lists]})
        pq.write_table(table, out / f"{name}-00000-of-00001.parquet")
    return out


@pytest.mark.parametrize("write", [dataset_dict, split_files])
def test_splits_are_taken_as_splits(write, tmp_path):
    folder = write(tmp_path)
    assert expand_path(str(folder)) == [str(folder)]
    specs = expand_corpus([str(folder)], SourceOptions())
    assert [(s.name, s.split) for s in specs] == [
        (f"{specs[0].dataset}#train".replace(".dataset", ""), "train"),
        (f"{specs[0].dataset}#test".replace(".dataset", ""), "heldout"),
    ]
    manifest = prepare(specs, tmp_path / "out", VOCABULARY, options())
    first = {
        split: {t[0] for c, t in tokens_of(tmp_path / "out").items() if c in ids}
        for split, ids in sides(tmp_path / "out").items()
    }
    assert first == {"train": {2}, "heldout": {9}}
    assert [s["split"] for s in manifest["sources"]] == ["train", "heldout"]


@pytest.mark.parametrize("write", [dataset_dict, split_files])
def test_one_split_is_chosen_and_none_is_merged(write, tmp_path):
    folder = write(tmp_path)
    (spec,) = expand_corpus([f"{folder}#test"], SourceOptions())
    assert spec.split is None
    prepare([spec], tmp_path / "out", VOCABULARY, options())
    assert {t[0] for t in tokens_of(tmp_path / "out").values()} == {9}
    with pytest.raises(ValueError, match=r"holds splits \['train', 'test'\]; choose one"):
        open_path(folder, SourceOptions())
    with pytest.raises(ValueError, match="no such split"):
        open_path(f"{folder}#valid", SourceOptions())


def test_splits_of_other_names_are_not_guessed(tmp_path):
    folder = dataset_dict(tmp_path, ("train", "unsupervised"))
    with pytest.raises(ValueError, match=r"\['unsupervised'\] are neither.*#unsupervised"):
        expand_corpus([str(folder)], SourceOptions())


def test_copies_in_given_splits_are_named_not_moved(tmp_path):
    folder = dataset_dict(tmp_path)
    rows = {"input_ids": [[2, *range(30, 60)]], "length": [31]}
    pq.write_table(pa.table(rows), tmp_path / "more.parquet")
    paths = [str(tmp_path / "more.parquet"), str(folder)]
    manifest = prepare(
        expand_corpus(paths, SourceOptions()), tmp_path / "out", VOCABULARY,
        options(heldout_share=0.999999),
    )  # fmt: skip
    # What has no given split follows what has one.
    assert manifest["same_cells"]["cells"] == manifest["same_cells"]["moved"] == 1
    assert "more:0" in sides(tmp_path / "out")["train"]


@pytest.mark.long  # real cells; the cases beside it are synthetic
def test_real_studies_that_share_cells(case, real_data, tmp_path):
    vocabulary = open_vocabulary(real_data / "geneformer_v2_dicts")
    specs = expand_corpus([str(case("leakage") / "*.h5ad")], SourceOptions())
    manifest = prepare(specs, tmp_path / "out", vocabulary, PrepareOptions(heldout_share=0.3))
    found = sides(tmp_path / "out")
    number = {f"studyA-{i + 200}": f"studyB-{i}" for i in range(200)}
    both = [(a, b) for a, b in number.items() if {a, b} <= found["train"] | found["heldout"]]
    assert len(both) == manifest["same_cells"]["cells"] > 180
    assert all((a in found["heldout"]) == (b in found["heldout"]) for a, b in both)
    assert manifest["same_cells"]["divided"] == 0 < manifest["same_cells"]["moved"]
