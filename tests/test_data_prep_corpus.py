"""What a user names becomes sources: each once, under a name of its own, read as the list says."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.io

from data_prep.prepare.options import PrepareOptions
from data_prep.prepare.run import prepare
from data_prep.shards.reader import ShardSet
from data_prep.sources.corpus_list import expand_corpus, organism_name
from data_prep.sources.source_spec import SourceOptions
from tests.synthetic import make_cells, write_cells

OPTIONS = PrepareOptions(heldout_share=0.2, block_cells=16, vocabulary_min_cells=1)


def expand(*arguments: Path | str, **options):
    return expand_corpus([str(a) for a in arguments], SourceOptions(**options))


def names(*arguments: Path | str) -> list[str]:
    return [s.name for s in expand(*arguments)]


def write_list(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def column(folder: Path, name: str) -> dict[str, str]:
    """Return cell id with data set -> value of a column, over all shards of a folder."""
    values = {}
    for split in ("train", "heldout"):
        for block in ShardSet(folder).iter_blocks(split):
            cells = block.batch.select(["dataset", "cell_id", name]).to_pylist()
            new = {f"{c['dataset']}:{c['cell_id']}": c[name] for c in cells}
            assert len(new) == len(cells) and not new.keys() & values.keys()
            values |= new
    return values


def tars(manifest: dict) -> dict[str, str]:
    return {s["name"]: s["sha256"] for s in manifest["shards"]}


# --- YAML lists -----------------------------------------------------------------------------------


def test_a_list_says_how_each_source_is_read(tmp_path):
    path = write_list(
        tmp_path / "corpus.yaml",
        """
        defaults: {counts: raw, columns: {donor: donor_id}, organism: Homo sapiens}
        sources:
          - path: a.h5ad
          - {path: b.h5ad, dataset: heart, counts: layers/x, columns: [cell_type, donor=who]}
          - {path: c.h5ad, dataset: heart, strip_versions: true, total_column: n, gene_column: id}
          - {path: "census:2025-01-30", obs_filter: "tissue == 'blood'", organism: mus_musculus}
        """,
    )
    a, b, c, census = expand(path, dataset_column="study", counts="X")
    assert [s.path for s in (a, b, c)] == [str(tmp_path / f"{n}.h5ad") for n in "abc"]
    assert [s.dataset for s in (a, b, c)] == ["a", "heart", "heart"]
    plain = SourceOptions("raw", None, ("donor=donor_id",), None, False, "study", "human", None)
    assert a.options == plain
    assert b.options == replace(plain, counts="layers/x", columns=("cell_type", "donor=who"))
    assert c.options == replace(plain, strip_versions=True, total_column="n", gene_column="id")
    assert census.path == census.name == "census:2025-01-30"
    assert (census.options.obs_filter, census.options.organism) == ("tissue == 'blood'", "mouse")
    assert b.options.column_names == ("cell_type", "donor")
    assert b.options.column_sources == {"cell_type": "cell_type", "donor": "who"}


def test_renamed_columns_arrive_and_absent_ones_are_empty(tmp_path):
    first, second = make_cells(40), make_cells(30, seed=1)
    first.obs["who"] = [f"a{i}" for i in range(40)]
    second.obs["person"] = [f"b{i}" for i in range(30)]
    first.write_h5ad(tmp_path / "first.h5ad")
    second.write_h5ad(tmp_path / "second.h5ad")
    path = write_list(
        tmp_path / "corpus.yaml",
        """
        sources:
          - {path: first.h5ad, columns: {individual: who, kind: cell_type}}
          - {path: second.h5ad, columns: {individual: person}}
        """,
    )
    manifest = prepare(expand(path), tmp_path / "out", None, OPTIONS)
    assert manifest["columns"] == ["individual", "kind"]
    expected = {f"first:cell{i}": f"a{i}" for i in range(40)}
    assert column(tmp_path / "out", "individual") == expected | {
        f"second:cell{i}": f"b{i}" for i in range(30)
    }
    kinds = {f"first:cell{i}": f"type{i % 3}" for i in range(40)}
    assert column(tmp_path / "out", "kind") == kinds | {f"second:cell{i}": "" for i in range(30)}


def test_two_files_are_one_data_set(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        write_cells(tmp_path / f"{name}.h5ad", num_cells=30, seed=seed)
    path = write_list(tmp_path / "c.yml", "sources: [{path: '*.h5ad', dataset: heart}]")
    manifest = prepare(expand(path), tmp_path / "out", None, OPTIONS)
    assert [s["name"] for s in manifest["sources"]] == ["a", "b"]
    assert [(d["name"], d["cells_read"]) for d in manifest["datasets"]] == [("heart", 60)]


def test_the_stated_organism_is_checked(tmp_path):
    write_cells(tmp_path / "a.h5ad", num_cells=30)
    path = write_list(tmp_path / "c.yaml", "sources: [{path: a.h5ad, organism: mouse}]")
    with pytest.raises(ValueError, match=r"a\.h5ad.*human, but the organism is given as mouse"):
        prepare(expand(path), tmp_path / "out", None, OPTIONS)


@pytest.mark.parametrize("name", ["Homo sapiens", "homo_sapiens", " HUMAN ", "human"])
def test_names_of_organisms(name):
    assert organism_name(name) == "human"


def test_all_problems_of_a_list_are_in_one_message(tmp_path):
    path = write_list(
        tmp_path / "corpus.yaml",
        """
        default: {}
        sources:
          - {path: a.h5ad, layer: counts}
          - {dataset: heart}
          - {path: b.h5ad, strip_versions: perhaps}
        """,
    )
    with pytest.raises(ValueError) as caught:
        expand(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    for place in ("default", "sources.0.layer", "sources.1.path", "sources.2.strip_versions"):
        assert f"{place}: " in message


@pytest.mark.parametrize(
    "content",
    [b"", b"sources: []", b"just text", b"sources: [{path: a", b"- a.h5ad", b"a: \xff\xfe\x00"],
)
def test_what_is_no_list_is_named(content, tmp_path):
    (tmp_path / "corpus.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"corpus\.yaml: "):
        expand(tmp_path / "corpus.yaml")


def test_an_unknown_organism_is_named_with_its_list(tmp_path):
    path = write_list(tmp_path / "c.yaml", "sources: [{path: a.h5ad, organism: martian}]")
    with pytest.raises(ValueError, match=r"c\.yaml.*martian"):
        expand(path)


def test_missing_paths(tmp_path):
    with pytest.raises(ValueError, match=r"none\.yaml"):
        expand(tmp_path / "none.yaml")
    path = write_list(tmp_path / "c.yaml", "sources: [{path: 'none/*.h5ad'}]")
    with pytest.raises(ValueError, match=r"none/\*\.h5ad: matches no file"):
        expand(path)
    path = write_list(tmp_path / "c.yaml", "sources: [{path: none.h5ad}]")
    with pytest.raises(ValueError, match=r"none\.h5ad: no such file"):
        prepare(expand(path), tmp_path / "out", None, OPTIONS)
    assert not (tmp_path / "out").exists()


def test_paths_of_a_list_are_relative_to_it(tmp_path, monkeypatch):
    (tmp_path / "lists").mkdir()
    write_cells(tmp_path / "lists" / "a.h5ad", num_cells=5)
    path = write_list(tmp_path / "lists" / "c.yaml", "sources: [{path: a.h5ad}]")
    monkeypatch.chdir(tmp_path)
    assert [Path(s.path).resolve() for s in expand("lists/c.yaml")] == [path.parent / "a.h5ad"]


# --- globs and folders ----------------------------------------------------------------------------


def touch(folder: Path, *files: str) -> Path:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    return folder


def test_globs(tmp_path):
    touch(tmp_path, "b.h5ad", "a.h5ad", "x/c.h5ad", "x/y/d.h5ad", "x/y/e.loom", "note.txt")
    assert names(tmp_path / "*.h5ad") == ["a", "b"]
    assert sorted(names(tmp_path / "**" / "*.h5ad")) == ["a", "b", "c", "d"]
    assert names(tmp_path / "x" / "*" / "?.[lh]*") == ["d", "e"]
    with pytest.raises(ValueError, match="matches no file"):
        expand(tmp_path / "*.zarr")


def test_a_name_with_brackets_is_a_file(tmp_path):
    touch(tmp_path, "cells[1].h5ad", "cells1.h5ad")
    assert names(tmp_path / "cells[1].h5ad") == ["cells[1]"]


def test_a_folder_stands_for_its_files(tmp_path):
    folder = touch(
        tmp_path / "data", "b.h5ad", "a.loom", "c.zarr/.zgroup", "d/matrix.mtx.gz", "readme.md",
        ".hidden.h5ad", "e/other.txt",
    )  # fmt: skip
    assert names(folder) == ["a", "b", "c", "d"]
    with pytest.raises(ValueError, match=r"e: is a folder without any source.*h5ad"):
        expand(folder / "e")


@pytest.mark.filterwarnings("ignore::UserWarning")  # anndata's, about its next release
def test_a_folder_that_is_one_source(tmp_path):
    import datasets

    cells = make_cells(20)
    tenx = tmp_path / "tenx"
    tenx.mkdir()
    scipy.io.mmwrite(tenx / "matrix.mtx", cells.X.T.astype(np.int32), field="integer")
    datasets.Dataset.from_dict({"input_ids": [[2]], "length": [1]}).save_to_disk(tmp_path / "hf")
    cells.write_zarr(tmp_path / "plain")
    cells.write_zarr(tmp_path / "cells.zarr")
    for folder in ("tenx", "hf", "plain", "cells.zarr"):
        (spec,) = expand(tmp_path / folder)
        assert spec.path == str(tmp_path / folder)


@pytest.mark.parametrize("other", ["b.zarr.zip", "b.parquet", "b.dataset/state.json"])
def test_no_source_in_a_folder_is_left_out_silently(other, tmp_path):
    """Either it is a source like the rest, or the folder is refused."""
    write_cells(tmp_path / "a.h5ad", num_cells=20)
    touch(tmp_path, other)
    if other.endswith(".parquet"):
        pq.write_table(pa.table({"input_ids": [[2]], "length": [1]}), tmp_path / other)
    try:
        found = expand(tmp_path)
    except ValueError:
        return
    assert {Path(s.path).name for s in found} == {"a.h5ad", Path(other).parts[0]}


# --- names ----------------------------------------------------------------------------------------


def test_files_of_one_name_get_their_folders(tmp_path):
    for folder, seed in (("x", 0), ("y", 1)):
        (tmp_path / folder).mkdir()
        write_cells(tmp_path / folder / "cells.h5ad", num_cells=40, seed=seed)
    write_cells(tmp_path / "other.h5ad", num_cells=20, seed=2)
    specs = expand(tmp_path / "x", tmp_path / "y" / "cells.h5ad", tmp_path / "other.h5ad")
    assert [s.name for s in specs] == [s.dataset for s in specs]
    assert [s.name for s in specs] == ["x/cells", "y/cells", "other"]
    prepare(specs, tmp_path / "out", None, OPTIONS)
    arrived = column(tmp_path / "out", "dataset")
    assert len(arrived) == 100
    assert sum(d == "x/cells" for d in arrived.values()) == 40


def test_the_name_of_a_data_set_stays(tmp_path):
    touch(tmp_path, "x/cells.h5ad", "y/cells.h5ad")
    path = write_list(
        tmp_path / "c.yaml",
        "sources: [{path: x/cells.h5ad, dataset: heart}, {path: y/cells.h5ad}]",
    )
    assert [(s.name, s.dataset) for s in expand(path)] == [
        ("x/cells", "heart"),
        ("y/cells", "y/cells"),
    ]


def test_as_many_folders_in_front_as_tell_files_apart(tmp_path):
    """Cell Ranger calls every matrix the same."""
    touch(tmp_path, "x/data/cells.h5ad", "y/data/cells.h5ad", "y/other.1.h5ad", "y/other.2.h5ad")
    specs = expand(tmp_path / "**" / "*.h5ad")
    assert [s.name for s in specs] == ["x/data/cells", "y/data/cells", "other.1", "other.2"]
    assert [s.dataset for s in specs] == [s.name for s in specs]


def test_two_queries_of_one_census_are_two_sources(tmp_path):
    listed = "sources: [{path: 'census:1', organism: human}, {path: 'census:1', organism: mouse}]"
    specs = expand(write_list(tmp_path / "c.yaml", listed))
    assert [s.name for s in specs] == ["census:1 human", "census:1 mouse"]


def test_a_file_twice_is_refused(tmp_path, monkeypatch):
    path = write_cells(tmp_path / "cells.h5ad", num_cells=5)
    (tmp_path / "link.h5ad").symlink_to(path)
    again = write_list(tmp_path / "c.yaml", "sources: [{path: cells.h5ad}]")
    monkeypatch.chdir(tmp_path)
    for other in (path, "cells.h5ad", tmp_path / "c*.h5ad", "link.h5ad", again):
        with pytest.raises(ValueError, match=r"cells\.h5ad: given more than once"):
            expand(path, other)


def test_a_census_is_left_alone():
    (spec,) = expand("census:2025-01-30", obs_filter="tissue == 'lung'")
    assert spec.path == spec.name == spec.dataset == "census:2025-01-30"


# --- order ----------------------------------------------------------------------------------------


def test_order_of_arguments_changes_no_tar(tmp_path):
    paths = [
        write_cells(tmp_path / f"{name}.h5ad", num_cells=50, seed=seed)
        for seed, name in enumerate("cab")
    ]
    results = [
        prepare(expand(*order, columns=("donor",)), tmp_path / f"out{n}", None, OPTIONS)
        for n, order in enumerate((paths, paths[::-1], [tmp_path / "*.h5ad"]))
    ]
    assert tars(results[0]) == tars(results[1]) == tars(results[2])
    assert len({r["fingerprint"] for r in results}) == 1


def test_order_of_lists_with_different_columns_changes_no_tar(tmp_path):
    lists = []
    for seed, (name, carried) in enumerate([("a", "donor"), ("b", "cell_type")]):
        write_cells(tmp_path / f"{name}.h5ad", num_cells=40, seed=seed)
        text = f"sources: [{{path: {name}.h5ad, columns: [{carried}]}}]"
        lists.append(write_list(tmp_path / f"{name}.yaml", text))
    one = prepare(expand(*lists), tmp_path / "one", None, OPTIONS)
    two = prepare(expand(*lists[::-1]), tmp_path / "two", None, OPTIONS)
    assert tars(one) == tars(two)


def test_files_that_differ_in_the_suffix_only(tmp_path):
    touch(tmp_path, "x/s.h5ad", "x/s.loom")
    assert [s.name for s in expand(tmp_path / "x")] == ["x/s.h5ad", "x/s.loom"]
