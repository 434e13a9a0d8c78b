"""`geneloom check` says all that is wrong at once, and before what `prepare` would say after."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse
from typer.testing import CliRunner

from data_prep.genes.vocabulary import Vocabulary, from_dictionaries
from data_prep.prepare.check import check_sources
from data_prep.prepare.options import PrepareOptions
from data_prep.prepare.run import SERIAL, prepare
from data_prep.running.workers import open_workers
from data_prep.sources.corpus_list import expand_corpus
from data_prep.sources.source_spec import SourceOptions
from launch.cli import build_app
from tests.synthetic import make_cells, write_cells
from tests.test_cli import geneloom

if TYPE_CHECKING:
    import anndata

GENES = [f"ENSG{i:011d}" for i in range(200)]
READING = SourceOptions(columns=("donor",))


@pytest.fixture
def vocabulary(tmp_path) -> Vocabulary:
    tokens = {"<pad>": 0, "<mask>": 1} | {g: i + 2 for i, g in enumerate(GENES)}
    found = from_dictionaries(tokens, dict.fromkeys(GENES, 1.0), max_length=100)
    found.save(tmp_path / "vocabulary.json")
    return found


def check(*arguments: object):
    return CliRunner().invoke(build_app("check"), ["check", *map(str, arguments)])


def bad_cells(change) -> anndata.AnnData:
    cells = make_cells(40)
    change(cells)
    return cells


def log(cells):
    cells.X = np.log1p(cells.X.toarray())


def negative(cells):
    cells.X = cells.X.toarray() - 3


def late(cells):
    """The last cell only: everything is read."""
    cells.X = np.r_[cells.X.toarray()[:-1], np.full((1, 200), 0.5)]


def rename(change):
    def apply(cells):
        cells.var_names = [change(name) for name in cells.var_names]

    return apply


def without_donor(cells):
    del cells.obs["donor"]


def damaged(cells):
    """A gene number that does not exist: only reading the cells shows it."""
    cells.X = scipy.sparse.csr_matrix(cells.X)
    cells.X.indices[-1] = 9999


BAD = {
    "log": (log, "looks log-transformed"),
    "negative": (negative, "are negative"),
    "late": (late, "no integers"),
    "symbols": (rename(lambda n: f"G{n[-3:]}"), "--gene-mapping"),
    "mouse": (rename(lambda n: n.replace("ENSG", "ENSMUSG")), "These are ids of mouse"),
    "column": (without_donor, r"obs has no column ['donor']"),
    "damaged": (damaged, "name gene 9999 of 200"),
}


def write_bad(folder: Path) -> dict[str, str]:
    """Write one file per mistake; return file name -> what must be said."""
    expected = {}
    for name, (change, message) in BAD.items():
        bad_cells(change).write_h5ad(folder / f"{name}.h5ad")
        expected[f"{name}.h5ad"] = message
    whole = (folder / "log.h5ad").read_bytes()
    (folder / "cut.h5ad").write_bytes(whole[: len(whole) // 2])
    (folder / "text.h5ad").write_text("nothing")
    tokens = {"input_ids": [[2, 3], [999, 3]], "length": [2, 2], "donor": ["a", "b"]}
    pq.write_table(pa.table(tokens), folder / "tokens.parquet")
    return expected | {
        "cut.h5ad": "", "text.h5ad": "not an HDF5 file", "tokens.parquet": "token 999 does not",
        "absent.loom": "no such file",
    }  # fmt: skip


def test_all_bad_files_are_named_at_once(tmp_path, vocabulary):
    expected = write_bad(tmp_path)
    for name in ("good", "well"):
        write_cells(tmp_path / f"{name}.h5ad", num_cells=40)
    paths = [tmp_path / n for n in (*expected, "good.h5ad", "well.h5ad")]
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    done = check(*paths, "--vocab", tmp_path / "vocabulary.json", "--obs", "donor")
    assert done.exit_code == 2, done.output
    problems = [x for x in done.output.splitlines() if x.startswith("problem: ")]
    assert len(problems) == len(expected)
    for name, message in expected.items():
        (mine,) = [p for p in problems if name in p]
        assert message in mine
    assert "cells read 80, would be kept 80, rejected 0" in done.output
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == before


def damage_chunk(path: Path) -> None:
    """Overwrite bytes of the compressed counts."""
    make_cells(40).write_h5ad(path, compression="gzip")
    with h5py.File(path) as file:
        at = file["X/data"].id.get_chunk_info(0).byte_offset + 50
    whole = bytearray(path.read_bytes())
    whole[at : at + 40] = b"\xff" * 40
    path.write_bytes(whole)


def damage_pointer(path: Path) -> None:
    """Make the pointer of a matrix stored by gene jump ahead and back."""
    cells = make_cells(40)
    cells.X = cells.X.tocsc()
    cells.write_h5ad(path)
    with h5py.File(path, "a") as file:
        file["X/indptr"][3] = 10**8


def huge_count(path: Path) -> None:
    cells = make_cells(40)
    cells.X = cells.X.toarray().astype(np.float64)
    cells.X[0, 0] = 1e300
    cells.write_h5ad(path)


def state(text: str):
    def write(path: Path) -> None:
        path.mkdir()
        (path / "state.json").write_text(text)

    return write


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("chunk.h5ad", damage_chunk),
        ("pointer.h5ad", damage_pointer),
        ("huge.h5ad", huge_count),
        ("keys.dataset", state("{}")),
        ("text.dataset", state("no JSON")),
    ],
)
def test_damage_is_named_beside_a_good_file(name, write, tmp_path, vocabulary):
    write(tmp_path / name)
    good = write_cells(tmp_path / "good.h5ad", num_cells=40)
    done = check(tmp_path / name, good, "--vocab", tmp_path / "vocabulary.json")
    assert done.exit_code == 2, done.exception
    assert f"problem: {tmp_path / name}: " in done.output.replace("/state.json: ", ": ")
    assert "cells read 40, would be kept 40" in done.output


def test_processes_find_the_same(tmp_path, vocabulary):
    expected = write_bad(tmp_path)
    write_cells(tmp_path / "good.h5ad", num_cells=40)
    specs = expand_corpus([str(tmp_path / n) for n in (*expected, "good.h5ad")], READING)
    results = []
    with open_workers(2) as two:
        for n, workers in enumerate((SERIAL, two)):
            work = tmp_path / f"work{n}"
            work.mkdir()
            results.append(
                check_sources(
                    specs, work, vocabulary, PrepareOptions(), workers, lambda *state: None
                )
            )  # fmt: skip
    assert results[0] == results[1]
    assert len(results[0].problems) == len(expected)


def varied_cells(folder: Path) -> list[Path]:
    """Return sources in which every filter finds cells."""
    rng = np.random.default_rng(0)
    for n, name in enumerate("ab"):
        cells = make_cells(90, seed=n)
        counts = cells.X.toarray()
        counts[:2], counts[2, 5:], counts[3] = 0, 0, counts[3] * 40
        counts[10:12] = counts[20]
        cells.X = scipy.sparse.csr_matrix(counts)
        cells.var_names = [*cells.var_names[:-3], cells.var_names[0], "x", "y"]
        cells.obs["filter_pass"] = (rng.random(90) < 0.9).astype(int)
        cells.obs["study"] = rng.choice(["p", "q"], 90)
        cells.write_h5ad(folder / f"{name}.h5ad")
    lists = [rng.permutation(150)[: rng.integers(1, 60)] + 2 for _ in range(30)]
    table = {"input_ids": lists, "length": [len(x) for x in lists], "donor": ["t"] * 30}
    table["study"] = rng.choice(["p", "t"], 30).tolist()
    pq.write_table(pa.table(table), folder / "t.parquet")
    return [folder / n for n in ("a.h5ad", "t.parquet", "b.h5ad")]


def test_numbers_are_those_that_prepare_records(tmp_path, vocabulary, monkeypatch):
    monkeypatch.setattr("data_prep.prepare.work_list.CHUNK_CELLS", 32)
    options = PrepareOptions(dedup=True, heldout_share=0.2, max_sd_counts=2)
    reading = SourceOptions(columns=("donor",), dataset_column="study")
    specs = expand_corpus([str(p) for p in varied_cells(tmp_path)], reading)
    (tmp_path / "work").mkdir()
    arguments = (vocabulary, options, SERIAL, lambda *state: None)
    result = check_sources(specs, tmp_path / "work", *arguments)
    manifest = prepare(specs, tmp_path / "out", *arguments[:2])
    assert result.problems == []
    as_text = [{**s, "options": {**s["options"], "columns": ["donor"]}} for s in result.sources]
    assert as_text == manifest["sources"]
    assert result.datasets == manifest["datasets"]
    assert {r for d in result.datasets for r in d["rejected"]} == {
        "filter_pass is not 1",
        "no counts at all",
        "too few genes of the vocabulary",
        "total counts far from the data set's mean",
        "the same cell stood before",
    }
    assert sum(s["truncated"] for s in result.sources) > 0
    tokens = sum(b["tokens"] for b in manifest["buckets"])
    assert sum(s["tokens"] for s in result.sources) == tokens


def test_a_bad_file_does_not_count_for_the_others(tmp_path, vocabulary):
    """Its cells would move the mean of the data set that it shares with a good file."""
    write_cells(tmp_path / "good.h5ad", num_cells=60)
    cells = bad_cells(late)
    cells.X[:-1] *= 1000
    cells.write_h5ad(tmp_path / "bad.h5ad")
    (tmp_path / "c.yaml").write_text("sources: [{path: '*.h5ad', dataset: heart}]")
    done = []
    for n, arguments in enumerate((["c.yaml"], ["good.h5ad"])):
        specs = expand_corpus([str(tmp_path / a) for a in arguments], SourceOptions())
        (tmp_path / f"work{n}").mkdir()
        done.append(
            check_sources(
                specs, tmp_path / f"work{n}", vocabulary, PrepareOptions(max_sd_counts=2), SERIAL,
                lambda *state: None,
            )
        )  # fmt: skip
    assert len(done[0].problems) == 1 and done[1].problems == []
    assert [s["rejected"] for s in done[0].sources] == [s["rejected"] for s in done[1].sources]
    assert done[0].datasets[0]["counts_interval"] == done[1].datasets[0]["counts_interval"]


def test_nothing_is_left_behind(tmp_path, vocabulary, monkeypatch):
    """Also no row-wise copy of a matrix that is stored by gene."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    cells = make_cells(40)
    cells.X = cells.X.tocsc()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    for arguments, code in ((["cells.h5ad"], 0), (["cells.h5ad", "absent.h5ad"], 2)):
        sources = [tmp_path / a for a in arguments]
        done = check(*sources, "--vocab", tmp_path / "vocabulary.json")
        assert done.exit_code == code, done.output
        assert list((tmp_path / "temporary").iterdir()) == []


def test_exit_codes_of_the_command(tmp_path, vocabulary):
    write_cells(tmp_path / "good.h5ad", num_cells=40)
    bad_cells(log).write_h5ad(tmp_path / "log.h5ad")
    good = geneloom("check", "good.h5ad", "--vocab", "vocabulary.json", cwd=tmp_path)
    assert (good.returncode, good.stderr) == (0, ""), good.stderr
    assert "no problem found" in good.stdout
    bad = geneloom("check", "*.h5ad", "--vocab", "vocabulary.json", cwd=tmp_path)
    assert (bad.returncode, bad.stderr) == (2, "")
    assert bad.stdout.count("problem: ") == 1 and "log.h5ad" in bad.stdout
    absent = geneloom("check", "good.h5ad", "--vocab", "absent.json", cwd=tmp_path)
    assert absent.returncode == 2 and absent.stderr.startswith("error: absent.json")
    assert {p.name for p in tmp_path.iterdir()} == {"good.h5ad", "log.h5ad", "vocabulary.json"}
