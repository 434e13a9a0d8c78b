"""Names and values as people have them: GEO's files, molecule lists, words for pass, totals."""

from __future__ import annotations

import gzip
from pathlib import Path

import h5py
import numpy as np
import pytest
import zarr

from data_prep.genes.vocabulary import Vocabulary
from data_prep.prepare.options import PrepareOptions
from data_prep.prepare.run import prepare
from data_prep.sources.corpus_list import expand_corpus
from data_prep.sources.count_source import CountSource
from data_prep.sources.open_source import open_path
from data_prep.sources.source_spec import SourceOptions
from tests.data_files import write_h5ad, write_mtx
from tests.synthetic import make_cells


def counts_at(path, **options) -> CountSource:
    source = open_path(path, SourceOptions(**options))
    assert isinstance(source, CountSource)
    return source


def geo(folder: Path, names: list[str], pattern: str = "{name}_{part}") -> Path:
    """Write a sample for each name into one folder, as GEO does; all cells differ."""
    for seed, name in enumerate(names):
        sample = folder / f"sample{seed}"
        sample.mkdir(parents=True)
        write_mtx(make_cells(20, seed=seed), sample)
        for part in sample.iterdir():
            stem, rest = part.name.split(".", 1)
            part.rename(folder / f"{pattern.format(name=name, part=stem)}.{rest}")
        sample.rmdir()
    return folder


@pytest.mark.parametrize("pattern", ["{name}_{part}", "{name}.{part}", "{part}_{name}"])
def test_several_samples_in_one_folder(pattern, tmp_path):
    geo(tmp_path / "geo", ["GSM1_P1", "GSM2_P2"], pattern)
    specs = expand_corpus([str(tmp_path / "geo")], SourceOptions())
    assert [s.name.strip("_") for s in specs] == ["GSM1_P1", "GSM2_P2"]
    for seed, spec in enumerate(specs):
        total = sum(b.totals.sum() for b in counts_at(spec.path).blocks())
        assert total == make_cells(20, seed=seed).X.sum()
    before = [s.signature() for s in specs]
    (table,) = [p for p in (tmp_path / "geo").iterdir() if "barcodes" in p.name and "P1" in p.name]
    with gzip.open(table, "at") as file:
        file.write("another\n")
    assert specs[0].signature() != before[0] and specs[1].signature() == before[1]


def test_plain_folders_stay_one_source(tmp_path):
    (tmp_path / "sample").mkdir()
    write_mtx(make_cells(20), tmp_path / "sample")
    (spec,) = expand_corpus([str(tmp_path / "sample")], SourceOptions())
    assert spec.name == "sample"
    (again,) = expand_corpus([str(tmp_path / "sample" / "matrix.mtx")], SourceOptions())
    assert again.name == "sample" and counts_at(again.path).num_cells == 20


def test_molecule_lists_are_refused_with_what_to_give(tmp_path):
    with h5py.File(tmp_path / "molecule_info.h5", "w") as file:
        for name in ("barcode_idx", "feature_idx", "umi", "count"):
            file[name] = [1, 2]
    with pytest.raises(ValueError, match="molecule_info.*give filtered_feature_bc_matrix.h5"):
        open_path(tmp_path / "molecule_info.h5", SourceOptions())


def test_genomes_of_cell_ranger_2_are_chosen_by_name(tmp_path):
    with h5py.File(tmp_path / "cells.h5", "w") as file:
        for seed, name in enumerate(("GRCh38", "mm10")):
            group, cells = file.create_group(name), make_cells(15, seed=seed)
            for part in ("data", "indices", "indptr"):
                group[part] = getattr(cells.X, part)
            group["shape"] = cells.shape[::-1]
            group["barcodes"] = [i.encode() for i in cells.obs_names]
            group["genes"] = [i.encode() for i in cells.var_names]
            group["gene_names"] = [i.encode() for i in cells.var_names]
    with pytest.raises(ValueError, match="--genome GRCh38"):
        open_path(tmp_path / "cells.h5", SourceOptions())
    (block,) = counts_at(tmp_path / "cells.h5", genome="mm10").blocks()
    assert block.totals.sum() == make_cells(15, seed=1).X.sum()


@pytest.mark.parametrize(
    "words",
    [("PASS", "FAIL"), ("yes", "no"), (True, False), (1, 0), ("True", "False"), ("Passed", "")],
)
def test_words_for_pass(words, tmp_path):
    cells = make_cells(4)
    cells.obs["filter_pass"] = [words[0], words[1], words[0], words[1]]
    (block,) = counts_at(write_h5ad(cells, tmp_path)).blocks()
    assert block.passes.tolist() == [True, False, True, False]


def test_unknown_words_for_pass_are_refused(tmp_path):
    cells = make_cells(4)
    cells.obs["filter_pass"] = ["good", "bad", "good", "good"]
    with pytest.raises(ValueError, match=r"filter_pass'\] holds \['bad', 'good'\]"):
        list(counts_at(write_h5ad(cells, tmp_path)).blocks())


@pytest.mark.parametrize("container", ["h5ad", "zarr"])
@pytest.mark.parametrize("kept", ["reference", "values"])
def test_categories_of_old_anndata(container, kept, tmp_path):
    """anndata 0.7 kept the categories of a column as an attribute of its codes."""
    cells, codes = make_cells(6), np.array([0, 1, -1, 1, 0, 0], dtype=np.int8)
    del cells.obs["cell_type"]
    path, names = tmp_path / f"cells.{container}", ["B cell", "T cell"]
    if container == "h5ad":
        cells.write_h5ad(path)
        with h5py.File(path, "a") as root:
            obs = root["obs"]
            obs["kind"], obs["__categories/kind"] = codes, [n.encode() for n in names]
            reference = obs["__categories/kind"].ref
            obs["kind"].attrs["categories"] = reference if kept == "reference" else names
            obs.attrs["column-order"] = ["donor", "kind"]
    else:
        cells.write_zarr(path)
        (path / ".zmetadata").unlink(missing_ok=True)
        obs = zarr.open_group(str(path), mode="a")["obs"]
        obs.create_array("kind", data=codes)
        obs.create_group("__categories").create_array("kind", data=np.array(names))
        reference = "__categories/kind"
        obs["kind"].attrs["categories"] = reference if kept == "reference" else names
        obs.attrs["column-order"] = ["donor", "kind"]
        (path / ".zmetadata").unlink(missing_ok=True)
    (block,) = counts_at(path, columns=("kind",)).blocks()
    assert block.metadata["kind"] == ["B cell", "T cell", "", "T cell", "B cell", "B cell"]


@pytest.mark.parametrize(
    ("value", "message"),
    [(np.inf, "'total'.* is infinite for 1 cells"), (-5.0, "'total'"), (np.nan, "'total'")],
)
def test_totals_that_are_none(value, message, tmp_path):
    cells = make_cells(5)
    cells.obs["total"] = cells.X.toarray().sum(1) + 10
    cells.obs.loc["cell3", "total"] = value
    with pytest.raises(ValueError, match=message):
        list(counts_at(write_h5ad(cells, tmp_path), total_column="total").blocks())


@pytest.mark.parametrize("name", ["nan", "", "None", "NA", "<NA>"])
def test_genes_without_a_name_are_counted(name, tmp_path):
    cells = make_cells(30)
    vocabulary = Vocabulary(tuple(cells.var_names), np.ones(200), {"<pad>": 0, "<mask>": 1}, 256)
    ids = cells.var_names.to_numpy(dtype=object)
    ids[:5] = name
    cells.var_names = ids
    source = counts_at(write_h5ad(cells, tmp_path))
    assert source.gene_report(vocabulary).nameless == 5
    assert (source.column_tokens(vocabulary, 0.5)[:5] == -1).all()


@pytest.mark.long  # real cells; the cases beside it are synthetic
def test_real_files_of_geo(case):
    (spec,) = expand_corpus([str(case("geo_names"))], SourceOptions())
    assert (spec.name, counts_at(spec.path).num_cells) == ("GSM1_P1", 50)


@pytest.mark.long  # real cells; the cases beside it are synthetic
def test_real_infinite_total(case):
    path = case("odd_names") / "infinite_total.h5ad"
    with pytest.raises(ValueError, match=r"obs\['total'\] is infinite"):
        list(counts_at(path, total_column="total").blocks())


def test_a_folder_of_geo_goes_through_prepare(tmp_path):
    geo(tmp_path / "geo", ["GSM1", "GSM2"])
    specs = expand_corpus([str(tmp_path / "geo")], SourceOptions())
    manifest = prepare(specs, tmp_path / "out", None, PrepareOptions(heldout_share=0.2))
    assert {s["name"]: s["cells_read"] for s in manifest["sources"]} == {"GSM1": 20, "GSM2": 20}
