"""Files with flipped, lost and doubled bytes: one clear error that names them, or cells."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.genes.vocabulary import Vocabulary
from data_prep.sources.corpus_list import expand_corpus
from data_prep.sources.count_source import CountSource
from data_prep.sources.open_source import open_path, open_source
from data_prep.sources.source_spec import SourceOptions
from data_prep.sources.token_corpus import TokenBlock
from tests.data_files import (
    write_h5ad,
    write_loom,
    write_mtx,
    write_mudata,
    write_tenx,
    write_zarr,
)
from tests.synthetic import make_cells

CELLS = 30
VOCABULARY = Vocabulary(
    tuple(make_cells(2).var_names), np.ones(200), {"<pad>": 0, "<mask>": 1}, 256
)


def write_packed_mtx(cells, folder: Path) -> Path:
    """A matrix in gzip, whose checksum tells every change."""
    write_mtx(cells, folder)
    plain = folder / "matrix.mtx"
    (folder / "matrix.mtx.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    return folder


def _table() -> pa.Table:
    cells = [list(range(2, 20 + i)) for i in range(CELLS)]
    return pa.table({"input_ids": cells, "length": [len(c) for c in cells]})


def write_parquet(cells, folder: Path) -> Path:
    pq.write_table(_table(), folder / "cells.parquet", write_page_checksum=True)
    return folder / "cells.parquet"


def write_arrow(cells, folder: Path) -> Path:
    table = _table()
    with pa.ipc.new_file(str(folder / "cells.arrow"), table.schema) as file:
        file.write_table(table)
    return folder / "cells.arrow"


def write_dataset(cells, folder: Path) -> Path:
    """As `save_to_disk` of datasets does: a stream, its schema, and which files there are."""
    (folder / "tokens.dataset").mkdir()
    table = _table()
    name = "data-00000-of-00001.arrow"
    with pa.ipc.new_stream(str(folder / "tokens.dataset" / name), table.schema) as file:
        file.write_table(table)
    state = {"_data_files": [{"filename": name}], "_split": "train"}
    (folder / "tokens.dataset" / "state.json").write_text(json.dumps(state))
    return folder / "tokens.dataset"


def write_splits(cells, folder: Path) -> Path:
    """A DatasetDict of one split."""
    whole = write_dataset(cells, folder)
    (folder / "splits").mkdir()
    whole.rename(folder / "splits" / "train")
    (folder / "splits" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    return folder / "splits"


def write_soma(cells, folder: Path) -> Path:
    """An experiment of SOMA, as a Census is one: many small files of TileDB."""
    import tiledbsoma.io

    path = folder / "experiment"
    tiledbsoma.io.from_anndata(str(path), cells, measurement_name="RNA", X_layer_name="raw")
    return path


WRITERS: tuple[Callable, ...] = (
    write_h5ad, write_zarr, write_mudata, write_loom, write_tenx, write_mtx, write_packed_mtx,
    write_parquet, write_arrow, write_dataset, write_splits, write_soma,
)  # fmt: skip


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """Return bytes with a few of them changed, cut out, doubled, or with the end lost."""
    found = bytearray(data)
    kind = rng.integers(4)
    at = int(rng.integers(len(found)))
    if kind == 0:
        return bytes(found[:at])
    if kind == 1:
        del found[at : at + int(rng.integers(1, 64))]
    elif kind == 2:
        found[at:at] = found[at : at + int(rng.integers(1, 64))]
    else:
        for place in rng.integers(0, len(found), int(rng.integers(1, 16))):
            found[place] = int(rng.integers(256))
    return bytes(found)


def read(path: Path) -> str:
    """Return what became of a file: 'cells', or the error; anything but ValueError is raised."""
    try:
        for spec in expand_corpus([str(path)], SourceOptions()):
            source = open_source(spec)
            if isinstance(source, CountSource):
                source.column_tokens(VOCABULARY, 0.0)
            for block in source.blocks():
                if isinstance(block, TokenBlock):
                    source.checked_tokens(block, VOCABULARY)  # type: ignore[union-attr]
                else:
                    assert np.isfinite(block.totals).all() and (block.totals >= 0).all()
        return "cells"
    except ValueError as error:
        return str(error)


def _fuzz(write: Callable, folder: Path, number: int, seed: int, queue) -> None:
    rng = np.random.default_rng(seed)
    whole = folder / "whole"
    whole.mkdir(parents=True)
    path = write(make_cells(CELLS), whole)
    files = [p for p in whole.rglob("*") if p.is_file() and p.stat().st_size]
    outcomes = []
    for _ in range(number):
        chosen = files[int(rng.integers(len(files)))]
        work = folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(whole, work)
        (work / chosen.relative_to(whole)).write_bytes(mutated(chosen.read_bytes(), rng))
        try:
            outcomes.append(read(work / path.relative_to(whole) if path != whole else work))
        except BaseException as error:  # noqa: BLE001  what the test is about
            outcomes.append(f"RAISED {error!r}")
    queue.put(outcomes)


def outcomes_of(write: Callable, folder: Path, number: int, seed: int) -> list[str]:
    """Return what became of mutated files, read in a process that may crash."""
    # A process in which TileDB has started its threads must not be forked.
    context = multiprocessing.get_context("spawn" if write is write_soma else "fork")
    queue = context.SimpleQueue()
    process = context.Process(target=_fuzz, args=(write, folder, number, seed, queue))
    process.start()
    process.join(300)
    assert process.exitcode == 0, f"{write.__name__}: ended with {process.exitcode}"
    return queue.get()


def check(outcomes: list[str], folder: Path) -> None:
    raised = [o for o in outcomes if o.startswith("RAISED")]
    assert not raised, (len(raised), sorted(set(raised))[:5])
    unnamed = [o for o in outcomes if o != "cells" and str(folder) not in o]
    assert not unnamed, unnamed[:3]


@pytest.mark.parametrize("write", WRITERS)
def test_few_mutated_files(write, tmp_path):
    check(outcomes_of(write, tmp_path, 3, seed=0), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("write", WRITERS)
def test_many_mutated_files(write, tmp_path):
    check(outcomes_of(write, tmp_path, 100, seed=1), tmp_path)


def test_gzip_tells_every_change(tmp_path):
    whole = write_packed_mtx(make_cells(CELLS), tmp_path)
    expected = make_cells(CELLS).X.toarray().sum(1)
    data, rng = (whole / "matrix.mtx.gz").read_bytes(), np.random.default_rng(2)
    for _ in range(5):
        (whole / "matrix.mtx.gz").write_bytes(mutated(data, rng))
        if read(whole) == "cells":
            source = open_path(whole, SourceOptions())
            assert isinstance(source, CountSource)
            np.testing.assert_array_equal(
                np.concatenate([b.totals for b in source.blocks()]), expected
            )
