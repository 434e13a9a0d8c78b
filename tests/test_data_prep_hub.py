"""datasets and webdataset: their data is read, and ours by them."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_prep.genes.vocabulary import Vocabulary
from data_prep.prepare.options import PrepareOptions
from data_prep.prepare.run import prepare
from data_prep.shards.convert import convert
from data_prep.shards.decode import decode
from data_prep.shards.reader import ShardSet
from data_prep.sources.corpus_list import expand_corpus
from data_prep.sources.open_source import open_path
from data_prep.sources.source_spec import SourceOptions, source_at
from tests.synthetic import make_cells

GENES = tuple(make_cells(2).var_names)
VOCABULARY = Vocabulary(GENES, np.linspace(0.5, 2, 200), {"<pad>": 0, "<mask>": 1}, 256)
OPTIONS = PrepareOptions(heldout_share=0.2, block_cells=8)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Shards of 90 cells with a column, several tars."""
    folder = tmp_path_factory.mktemp("corpus")
    make_cells(90).write_h5ad(folder / "cells.h5ad")
    spec = source_at(folder / "cells.h5ad", SourceOptions(columns=("donor",)))
    prepare([spec], folder / "shards", VOCABULARY, OPTIONS)
    return folder / "shards"


def cells_of(folder: Path, splits=("train", "heldout")) -> dict[str, list[int]]:
    return {
        cell: block.tokens[block.offsets[i] : block.offsets[i + 1]].tolist()
        for split in splits
        for block in ShardSet(folder).iter_blocks(split)
        for i, cell in enumerate(block.batch.column("cell_id").to_pylist())
    }


# --- out ------------------------------------------------------------------------------------------


def test_a_dataset_folder_holds_the_tokens(corpus, tmp_path):
    import datasets

    out = tmp_path / "tokens.dataset"
    assert convert(ShardSet(corpus), out, "train") == len(cells_of(corpus, ["train"]))
    found = datasets.load_from_disk(str(out))
    assert isinstance(found, datasets.Dataset)
    assert dict(zip(found["cell_id"], found["input_ids"], strict=True)) == cells_of(
        corpus, ["train"]
    )
    # What Geneformer's pretrainer takes beside the folder: a list of lengths, row for row.
    lengths = pickle.loads((out / "lengths.pkl").read_bytes())
    assert lengths == found["length"][:] == [len(ids) for ids in found["input_ids"]]
    assert set(found["donor"]) == {f"donor{i}" for i in range(4)}
    assert found.sort("length")[0]["length"] == min(lengths)
    # And back: the same cells.
    (spec,) = expand_corpus([str(out)], SourceOptions(columns=("donor",)))
    prepare([spec], tmp_path / "again", VOCABULARY, OPTIONS)
    again = sorted(cells_of(tmp_path / "again").values())
    assert again == sorted(cells_of(corpus, ["train"]).values())


def test_all_splits_and_parquet(corpus, tmp_path):
    import datasets

    convert(ShardSet(corpus), tmp_path / "all", "all")
    found = datasets.load_from_disk(str(tmp_path / "all"))
    assert {n: len(found[n]) for n in found} == {
        "train": len(cells_of(corpus, ["train"])), "test": len(cells_of(corpus, ["heldout"])),
    }  # fmt: skip
    convert(ShardSet(corpus), tmp_path / "cells.parquet", "heldout")
    table = pq.read_table(tmp_path / "cells.parquet")
    ids = dict(zip(*(table.column(n).to_pylist() for n in ("cell_id", "input_ids")), strict=True))
    assert ids == cells_of(corpus, ["heldout"])
    with pytest.raises(ValueError, match="--split test"):
        convert(ShardSet(corpus), tmp_path / "x", "test")
    with pytest.raises(ValueError, match="exists"):
        convert(ShardSet(corpus), tmp_path / "all", "train")


# --- in -------------------------------------------------------------------------------------------


def hub_folder(folder: Path) -> Path:
    """As a dataset of the Hub is laid out: files named by split; a ClassLabel, no length."""
    import datasets

    features = datasets.Features({
        "input_ids": datasets.Sequence(datasets.Value("int32")),
        "kind": datasets.ClassLabel(names=["B", "T"]),
    })  # fmt: skip
    for at, name in enumerate(("train", "test")):
        rows = {
            "input_ids": [[2 + 7 * at, *range(30, 60 + i)] for i in range(12)],
            "kind": [i % 2 for i in range(12)],
        }
        made = datasets.Dataset.from_dict(rows, features=features)
        made.to_parquet(str(folder / "data" / f"{name}-00000-of-00001.parquet"))
    return folder


@pytest.fixture
def quiet_hub(tmp_path, monkeypatch):
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_datasets_are_streamed_by_name(tmp_path, quiet_hub):
    folder = hub_folder(tmp_path / "corpus")
    specs = expand_corpus([f"hf:{folder}"], SourceOptions(columns=("kind",)))
    assert [s.split for s in specs] == ["train", "heldout"]
    manifest = prepare(specs, tmp_path / "out", VOCABULARY, OPTIONS)
    assert [s["cells_kept"] for s in manifest["sources"]] == [12, 12]
    assert {ids[0] for ids in cells_of(tmp_path / "out", ["train"]).values()} == {2}
    assert {ids[0] for ids in cells_of(tmp_path / "out", ["heldout"]).values()} == {9}
    (block, *_) = ShardSet(tmp_path / "out").iter_blocks("train")
    assert set(block.batch.column("kind").to_pylist()) <= {"B", "T"}
    (spec,) = expand_corpus([f"hf:{folder}#test"], SourceOptions())
    assert spec.split is None and open_path(spec.path, SourceOptions()).num_cells == 12


@pytest.mark.parametrize(
    ("path", "message"),
    [("hf:{}/nothing", "datasets cannot open it"), ("hf:{}#valid", "datasets cannot read it")],
)
def test_what_datasets_cannot_open_is_said(path, message, tmp_path, quiet_hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = hub_folder(tmp_path / "corpus")
    with pytest.raises(ValueError, match=message):
        for spec in expand_corpus([path.format(folder)], SourceOptions()):
            open_path(spec.path, SourceOptions())


# --- webdataset -----------------------------------------------------------------------------------


def test_decoder_gives_the_cells(corpus):
    webdataset = pytest.importorskip("webdataset")
    paths = sorted(map(str, corpus.glob("*.tar")))
    found = {}
    for sample in webdataset.WebDataset(paths, shardshuffle=False).decode(decode):
        for cell in sample["arrow"]:
            assert set(cell) == {"input_ids", "cell_id", "dataset", "donor"}
            found[cell["cell_id"]] = cell["input_ids"].tolist()
    assert found == cells_of(corpus)
    assert decode("x.json", json.dumps({}).encode()) is None


def of_samples(samples):
    """Yield the cells of decoded blocks."""
    for sample in samples:
        yield from sample["arrow"]


def first(batch):
    return batch


@pytest.mark.parametrize(("ranks", "workers"), [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)])
def test_every_cell_once_with_any_ranks_and_workers(ranks, workers, corpus, monkeypatch):
    webdataset = pytest.importorskip("webdataset")
    # Three tars for up to six workers: some have none.
    paths = sorted(map(str, corpus.glob("train-*.tar")), key=lambda p: -Path(p).stat().st_size)[:3]
    expected = sorted(
        cell["cell_id"]
        for sample in webdataset.WebDataset(paths, shardshuffle=False).decode(decode)
        for cell in sample["arrow"]
    )
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    found = []
    for rank in range(ranks):
        monkeypatch.setenv("RANK", str(rank))
        cells = webdataset.WebDataset(
            paths, shardshuffle=False, nodesplitter=webdataset.split_by_node, empty_check=False
        )
        cells = cells.decode(decode).compose(of_samples)
        loader = webdataset.WebLoader(cells, batch_size=None, num_workers=workers)
        found += [cell["cell_id"] for cell in loader]
    assert sorted(found) == expected and len(expected) > 12


def test_the_documented_lines_read_every_cell(corpus):
    pytest.importorskip("webdataset")
    root = Path(__file__).resolve().parent.parent
    page = (root / "docs" / "data.md").read_text()
    (block,) = [b for b in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S) if "decode" in b]
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=corpus.parent, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{len(cells_of(corpus, ['train']))} training cells;")
