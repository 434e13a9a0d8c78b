"""Damage is found and named; what can be rebuilt from the sources is, to the same bytes."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from data_prep.genes.vocabulary import from_dictionaries
from data_prep.prepare.options import PrepareOptions
from data_prep.prepare.run import SERIAL, prepare
from data_prep.prepare.verify_and_repair import Problem, repair, verify
from data_prep.running.workers import open_workers
from data_prep.shards.reader import ShardSet
from data_prep.sources.corpus_list import expand_corpus
from data_prep.sources.source_spec import SourceOptions
from launch.cli import build_app
from tests.synthetic import make_cells, write_cells

if TYPE_CHECKING:
    import anndata

GOLDEN = Path(__file__).parent / "golden" / "shards-1"
GENES = [f"ENSG{i:011d}" for i in range(200)]
READING = SourceOptions(columns=("donor",))
OPTIONS = PrepareOptions(
    heldout_share=0.3, heldout_by="donor", block_cells=4, shard_mib=0.0005, dedup=True
)


def silent(what: str, done: int, total: int) -> None:
    assert 0 <= done <= total


def write_tokens(path: Path) -> Path:
    rng = np.random.default_rng(0)
    cells = [(rng.permutation(200)[: rng.integers(57, 65)] + 2).tolist() for _ in range(60)]
    donors = [f"donor{i % 5}" for i in range(60)]
    table = {"input_ids": cells, "length": [len(c) for c in cells], "donor": donors}
    pq.write_table(pa.table(table), path, row_group_size=13)
    return path


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A folder with sources and their shards: two files of one name, counts and tokens."""
    folder = tmp_path_factory.mktemp("verify")
    tokens = {"<pad>": 0, "<mask>": 1} | {g: i + 2 for i, g in enumerate(GENES)}
    vocabulary = from_dictionaries(tokens, dict.fromkeys(GENES, 1.0))
    for seed, name in enumerate("xy"):
        (folder / "sources" / name).mkdir(parents=True)
        write_cells(folder / "sources" / name / "cells.h5ad", num_cells=90, seed=seed)
    write_tokens(folder / "sources" / "tokens.parquet")
    sources = expand_corpus(given(folder), READING)
    manifest = prepare(sources, folder / "shards", vocabulary, OPTIONS)
    assert len(manifest["shards"]) > len(manifest["buckets"]), "several tars in a bucket"
    return folder


def given(folder: Path) -> list[str]:
    return [str(folder / "sources" / n) for n in ("x/cells.h5ad", "tokens.parquet", "y")]


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """A copy to damage; sources lie elsewhere than when they were prepared."""
    return Path(shutil.copytree(original, tmp_path / "copy"))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def found(folder: Path, workers=SERIAL) -> list[Problem]:
    return verify(folder / "shards", workers, silent)


def repaired(folder: Path, sources: list[str] | None = None, workers=SERIAL, **options):
    arguments = {"annotation": None, "memory_gib": 2.0} | options
    sources = given(folder) if sources is None else sources
    return repair(
        folder / "shards", found(folder), sources, workers=workers, progress=silent, **arguments
    )


def flip(path: Path, at: int, mask: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= mask
    path.write_bytes(data)


# --- what is wrong --------------------------------------------------------------------------------


def test_intact_folders_are_clean(original):
    assert found(original) == []
    assert verify(GOLDEN, SERIAL, silent) == []


def payload(path, row):
    flip(path, row["offset"] + 100)
    return rf"member at byte {row['offset'] - 512:,} \({row['name']}\).*checksum"


def header(path, row):
    flip(path, row["offset"] - 512 + 3)
    return rf"member at byte {row['offset'] - 512:,} has a damaged tar header"


def padding(path, row):
    assert row["bytes"] % 512, "there is padding behind this member"
    flip(path, row["offset"] + row["bytes"])
    return "SHA-256 is wrong, though its .* members are right"


def end(path, row):
    flip(path, path.stat().st_size - 1)
    return "SHA-256"


def cut(path, row):
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size - 512])
    return f"has {size - 512:,} bytes, the manifest says {size:,}"


def missing(path, row):
    path.unlink()
    return "is missing"


@pytest.mark.parametrize("damage", [payload, header, padding, end, cut, missing])
def test_damage_of_a_tar_is_named(damage, folder):
    shards = ShardSet(folder / "shards")
    number = next(n for n, s in enumerate(shards.manifest["shards"]) if s["cells"] > 8)
    path = folder / "shards" / shards.manifest["shards"][number]["name"]
    row = {k: int(v[np.flatnonzero(shards.index["shard"] == number)[1]]) for k, v in
           shards.index.items()}  # fmt: skip
    with tarfile.open(path) as tar:
        row["name"] = tar.getnames()[1]
    message = damage(path, row)
    (problem,) = found(folder)
    assert problem.shard == path.name and problem.message.startswith(f"{path}: ")
    with pytest.raises(ValueError, match=message):
        raise ValueError(problem.message)


def test_no_byte_of_a_tar_is_left_out(tmp_path):
    copy = Path(shutil.copytree(GOLDEN, tmp_path / "shards"))
    rng = np.random.default_rng(0)
    for path in sorted(copy.glob("*.tar")):
        whole = path.read_bytes()
        for at in [*range(0, 512, 50), *rng.integers(0, len(whole), 4).tolist()]:
            flip(path, at, 1 << int(rng.integers(8)))
            assert [p.shard for p in verify(copy, SERIAL, silent)] == [path.name], at
            path.write_bytes(whole)


def test_all_damage_is_found_by_two_processes(folder):
    names = [s["name"] for s in ShardSet(folder / "shards").manifest["shards"]]
    (folder / "shards" / names[0]).unlink()
    flip(folder / "shards" / names[3], 700)
    flip(folder / "shards" / names[-1], 700)
    with open_workers(2) as workers:
        problems = found(folder, workers)
    assert problems == found(folder)
    assert [p.shard for p in problems] == [names[0], names[3], names[-1]]


def edit(folder: Path, *keys: str | int, value: object = None) -> None:
    path = folder / "shards" / "manifest.json"
    manifest = json.loads(path.read_text())
    place = manifest
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = place[keys[-1]] + 1 if value is None else value
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "keys",
    [
        ("shards", 0, "cells"),
        ("shards", 0, "tokens"),
        ("buckets", 1, "tokens"),
        ("sources", 0, "cells_kept"),
        ("sources", 2, "cells_read"),
        ("datasets", 0, "cells_kept"),
        ("num_tokens",),
        ("max_length",),
    ],
)
def test_an_edited_number_of_the_manifest(keys, folder):
    edit(folder, *keys)
    problems = found(folder)
    assert problems, "the edited manifest passes as intact"
    assert all(str(folder / "shards") in p.message for p in problems)
    assert "manifest.json" in problems[0].message


def test_edited_text_of_the_manifest(folder):
    edit(folder, "shards", 2, "sha256", value="0" * 64)
    messages = [p.message for p in found(folder)]
    assert any("fingerprint" in m for m in messages)
    assert any("SHA-256 is wrong" in m for m in messages)


@pytest.mark.parametrize("change", [lambda p: flip(p, 40), Path.unlink])
def test_damaged_statistics(change, folder):
    change(folder / "shards" / "statistics.json")
    (problem,) = found(folder)
    assert problem.shard == "" and "statistics.json is missing or damaged" in problem.message


def overwrite(data: bytes):
    return lambda path: path.write_bytes(data)


@pytest.mark.parametrize("name", ["manifest.json", "index.parquet", "vocabulary.json"])
@pytest.mark.parametrize(
    "change",
    [Path.unlink, overwrite(b""), overwrite(b"\xff\xfe{"), overwrite(b"[]"),
     overwrite(b'{"format": "geneloom-shards/2"}')],
)  # fmt: skip
def test_what_nothing_can_be_checked_without(name, change, folder):
    change(folder / "shards" / name)
    with pytest.raises(ValueError, match=name):
        found(folder)


# --- repair ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2])
def test_damaged_and_missing_tars_are_rebuilt(processes, folder, original):
    shards = folder / "shards"
    names = [s["name"] for s in ShardSet(shards).manifest["shards"]]
    heldout = [n for n in names if n.startswith("heldout")]
    (shards / names[0]).unlink()
    flip(shards / names[5], 600)
    (shards / heldout[-1]).write_bytes(b"")
    with open_workers(processes) as workers:
        assert repaired(folder, given(folder)[::-1], workers, memory_gib=1e-5) == []
    assert contents(shards) == contents(original / "shards")


def test_every_tar_can_be_rebuilt(folder, original):
    for path in (folder / "shards").glob("*.tar"):
        path.unlink()
    assert repaired(folder, [str(folder / "sources" / "**" / "*.[hp]*")]) == []
    assert contents(folder / "shards") == contents(original / "shards")


def test_sources_are_read_as_they_were(tmp_path):
    """Options and data sets stand in the manifest, not in the command that repairs."""
    cells = make_cells(80)
    cells.layers["raw"], cells.X = cells.X.tocsc(), np.log1p(cells.X.toarray())
    cells.var_names = [f"{n}.1" for n in cells.var_names]
    cells.write_h5ad(tmp_path / "a.h5ad")
    table = pd.DataFrame({"gene_id": GENES, "gene_type": "miRNA", "chromosome": "MT"})
    table.to_csv(tmp_path / "genes.csv", index=False)
    (tmp_path / "corpus.yaml").write_text(
        "sources: [{path: a.h5ad, dataset: heart, counts: layers/raw, strip_versions: true, "
        "columns: {who: donor}, organism: human}]"
    )
    specs = expand_corpus([str(tmp_path / "corpus.yaml")], SourceOptions())
    options = PrepareOptions(heldout_share=0.3, annotation=tmp_path / "genes.csv")
    prepare(specs, tmp_path / "shards", None, options)
    before = contents(tmp_path / "shards")
    victim = next((tmp_path / "shards").glob("train*.tar"))
    for sources in ([str(tmp_path / "a.h5ad")], [str(tmp_path / "corpus.yaml")]):
        victim.unlink()
        with pytest.raises(ValueError, match="another --annotation table"):
            repaired(tmp_path, sources)
        assert repaired(tmp_path, sources, annotation=tmp_path / "genes.csv") == []
        assert contents(tmp_path / "shards") == before


def replace_cells(path: Path, cells: anndata.AnnData) -> None:
    """Put another file in the place of one that may be open."""
    path.unlink()
    cells.write_h5ad(path)


def test_tars_of_a_changed_source_are_not_rebuilt(folder, original):
    """A tar that holds none of its cells comes out as it was."""
    shards = ShardSet(folder / "shards")
    changed = set()
    for number in np.flatnonzero(shards.index["split"] == 0):
        if "x/cells" in shards.read_block(int(number)).batch.column("dataset").to_pylist():
            changed.add(shards.manifest["shards"][int(shards.index["shard"][number])]["name"])
    before = contents(folder / "shards")
    trains = {n for n in before if n.startswith("train")}
    assert changed and trains - changed
    for name in trains:
        flip(folder / "shards" / name, 600)
    damaged = contents(folder / "shards")
    cells = make_cells(90)
    for values in np.split(cells.X.data, cells.X.indptr[1:-1]):
        values[:] = values[::-1].copy()  # the same genes in another order
    replace_cells(folder / "sources" / "x" / "cells.h5ad", cells)
    problems = repaired(folder)
    failed = {p.shard for p in problems}
    assert failed and failed <= changed
    assert all("not repaired" in p.message for p in problems)
    assert contents(folder / "shards") == before | {n: damaged[n] for n in failed}


def test_sources_that_shrank_repair_nothing(folder):
    """There are fewer tars to write then."""
    shards = folder / "shards"
    victim = max(ShardSet(shards).manifest["shards"], key=lambda s: s["name"][-9:])["name"]
    (shards / victim).unlink()
    before = contents(shards)
    for name in "xy":
        replace_cells(folder / "sources" / name / "cells.h5ad", make_cells(90)[:12].copy())
    (problem,) = repaired(folder)
    assert problem.shard == victim and "not repaired" in problem.message
    assert contents(shards) == before


@pytest.mark.parametrize("wrong", ["missing", "renamed", "damaged", "without column"])
def test_wrong_sources_leave_the_folder_as_it_is(wrong, folder):
    (folder / "shards" / ShardSet(folder / "shards").manifest["shards"][0]["name"]).unlink()
    before, sources, message = contents(folder / "shards"), given(folder), "y/cells"
    path = folder / "sources" / "y" / "cells.h5ad"
    if wrong == "missing":
        sources, message = sources[1:], "x/cells.*are missing"
    elif wrong == "renamed":
        path.rename(path.with_name("other.h5ad"))
        message = "x/cells.*are missing.*other"
    elif wrong == "damaged":
        path.write_bytes(path.read_bytes()[:4000])
    else:
        cells = make_cells(90, seed=1)
        del cells.obs["donor"]
        replace_cells(path, cells)
        message = r"y/cells.*obs has no column \['donor'\]"
    with pytest.raises(ValueError, match=message):
        repaired(folder, sources)
    assert contents(folder / "shards") == before


def test_what_is_no_tar_stays_a_problem(folder):
    (folder / "shards" / "statistics.json").unlink()
    (problem,) = repaired(folder)
    assert "statistics.json" in problem.message


def test_shards_of_the_first_format_are_not_rebuilt(tmp_path):
    """Their manifest does not say how the sources were read."""
    shutil.copytree(GOLDEN, tmp_path / "shards")
    next((tmp_path / "shards").glob("*.tar")).unlink()
    source = write_cells(tmp_path / "cells.h5ad", num_cells=40, num_genes=60)
    before = contents(tmp_path / "shards")
    with pytest.raises(ValueError, match="geneloom-shards/1"):
        repaired(tmp_path, [str(source)])
    assert contents(tmp_path / "shards") == before


def test_command(folder, original):
    def call(*arguments: object) -> tuple[int, str]:
        arguments = ("verify", folder / "shards", *arguments)
        done = CliRunner().invoke(build_app("verify"), list(map(str, arguments)))
        return done.exit_code, done.output

    assert call() == (0, "every checksum, count and bound is as recorded\n")
    victim = ShardSet(folder / "shards").manifest["shards"][2]["name"]
    flip(folder / "shards" / victim, 600)
    code, output = call()
    assert code == 2 and output.startswith("damaged: ") and victim in output
    repairs = [x for source in given(folder) for x in ("--repair", source)]
    code, output = call(*repairs)
    assert code == 0 and victim in output and output.endswith("is as recorded\n")
    assert contents(folder / "shards") == contents(original / "shards")
