"""Whatever a command reads cells for, it recognises the same situations, in every format.

A table of situations by commands: what `prepare` refuses, all refuse with the same words; what
`prepare` says of a file it takes, all say. Beside it: commands take folders and single files alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse

from data_prep.sources.source_spec import SourceOptions
from tests.data_files import WRITERS, write_h5ad
from tests.synthetic import make_cells

CELLS = 40


def _plain():
    cells = make_cells(CELLS)
    cells.obs["label"] = ["x", "y"] * (CELLS // 2)
    return cells


def _antibodies():
    import anndata

    genes = _plain()
    proteins = anndata.AnnData(
        scipy.sparse.csr_matrix(np.full((CELLS, 7), 400, np.float32)), obs=genes.obs
    )
    proteins.var_names = [f"protein{i}" for i in range(7)]
    proteins.var["feature_types"], genes.var["feature_types"] = (
        "Antibody Capture",
        "Gene Expression",
    )
    both = anndata.concat([genes, proteins], axis=1, merge="first")
    both.obs = genes.obs
    return both


def _two_species():
    """The last 30 features are of a mouse, and so is cell 5."""
    cells = _plain()
    values = np.c_[cells.X.toarray(), np.zeros((CELLS, 30), np.float32)]
    values[5] = [*[0] * cells.n_vars, *[9] * 30]
    import anndata

    both = anndata.AnnData(scipy.sparse.csr_matrix(values), obs=cells.obs)
    both.var_names = [
        *(f"GRCh38_{g}" for g in cells.var_names), *(f"mm10_ENSMUSG{i:011d}" for i in range(30))
    ]  # fmt: skip
    return both


def _changed(change: Callable[[Any], None]) -> Callable[[], Any]:
    def cells():
        found = _plain()
        change(found)
        return found

    return cells


def _fractions(cells: Any) -> None:
    values = cells.X.data
    cells.X.data = values + np.random.default_rng(0).choice([0.0, 0.37], len(values))


def _ones(cells: Any) -> None:
    cells.X = scipy.sparse.csr_matrix((cells.X.toarray() > 0).astype(np.float32))


def _cpm(cells: Any) -> None:
    values = cells.X.toarray()
    cells.X = scipy.sparse.csr_matrix(np.rint(values / values.sum(1, keepdims=True) * 1e6))


def _logarithms(cells: Any) -> None:
    values = cells.X.toarray()
    cells.X = scipy.sparse.csr_matrix(np.log1p(values / values.sum(1, keepdims=True) * 1e4))


def _rename(number: int, name: str) -> Callable[[Any], None]:
    def change(cells: Any) -> None:
        cells.var_names = [*[name] * number, *cells.var_names[number:]]

    return change


def _unknown(number: int) -> Callable[[Any], None]:
    def change(cells: Any) -> None:
        cells.var_names = [*(f"clone_{i}" for i in range(number)), *cells.var_names[number:]]

    return change


def _versions(cells: Any) -> None:
    cells.var_names = [f"{g}.5" for g in cells.var_names]


def _obs(name: str, values: list[Any]) -> Callable[[Any], None]:
    def change(cells: Any) -> None:
        cells.obs[name] = values * (CELLS // len(values))

    return change


# Name -> (cells, options, what is said, whether the file is refused, whether medians say it too).
SITUATIONS: dict[str, tuple[Callable[[], Any], dict[str, Any], str, bool, bool]] = {
    "fractions": (_changed(_fractions), {}, "fractional counts", True, True),
    "binarised": (_changed(_ones), {}, "a binarised matrix", True, True),
    "cpm": (_changed(_cpm), {}, "rounded CPM or TPM", True, True),
    "logarithms": (_changed(_logarithms), {}, "looks log-transformed", True, True),
    "species": (_two_species, {}, "2 genomes", True, True),
    "word": (
        _changed(_obs("filter_pass", ["maybe"])), {}, "h5ad: obs['filter_pass'] holds", True, True
    ),
    "unknown": (_changed(_unknown(190)), {}, "less than --min-overlap 0.5", True, False),
    "antibodies": (_antibodies, {}, "7 features left out: Antibody Capture", False, True),
    "genome": (_two_species, {"genome": "GRCh38"}, "1 of 40 cells are left out", False, True),
    "mouse": (_two_species, {"genome": "GRCh38"}, "1 cells left out by --genome", False, True),
    "kept": (
        _changed(_fractions), {"fractional": "keep"}, "fractions: ranked as they are", False, True
    ),
    "primary": (
        _changed(_obs("is_primary_data", [True, False])), {},
        "20 of 40 cells are not primary data", False, True,
    ),
    "filter": (_changed(_obs("filter_pass", ["PASS", "no"])), {}, "20 of 40 cells", False, True),
    "nan": (_changed(_rename(3, "nan")), {}, "3 columns without a gene id", False, True),
    "versions": (_changed(_versions), {}, "200 as id without version or genome", False, False),
    "known": (_changed(_unknown(60)), {}, "below 90%; the costliest unknown", False, False),
}  # fmt: skip


def _vocabulary():
    from data_prep.genes.vocabulary import Vocabulary

    genes = tuple(make_cells(2).var_names)
    return Vocabulary(genes, np.ones(len(genes)), {"<pad>": 0, "<mask>": 1}, 256)


def _prepare(path: Path, options: SourceOptions, folder: Path) -> list[str]:
    from data_prep.prepare.options import PrepareOptions
    from data_prep.prepare.run import prepare
    from data_prep.sources.remarks import remarks
    from data_prep.sources.source_spec import source_at

    settings = PrepareOptions(heldout_share=0.0, max_sd_counts=0, max_sd_mito=0)
    manifest = prepare([source_at(path, options)], folder / "shards", _vocabulary(), settings)
    (source,) = manifest["sources"]
    rejected = [f"{n} of {source['cells_read']} cells: {r}" for r, n in source["rejected"].items()]
    return [*remarks(source), *manifest["warnings"], *rejected]


def _medians(path: Path, options: SourceOptions, folder: Path) -> list[str]:
    from data_prep.prepare.medians import gene_medians
    from data_prep.running.workers import SERIAL
    from data_prep.sources.source_spec import source_at

    (folder / "work").mkdir()
    found = gene_medians([source_at(path, options)], folder / "work", SERIAL, lambda *_: None)
    return [*found.remarks, *found.warnings]


def _whole(path: Path, options: SourceOptions, folder: Path) -> list[str]:
    """finetune, predict, perturb, attention, probe and benchmark."""
    from eval.cells.read_cells import encode_file

    encode_file(path, _vocabulary(), options)
    return []


def _parts(path: Path, options: SourceOptions, folder: Path) -> list[str]:
    """embed, of cells and of genes."""
    from eval.cells.read_cells import encode_parts, open_counts

    list(encode_parts(open_counts(path, options), _vocabulary(), 16))
    return []


@pytest.mark.parametrize("way", [_prepare, _medians, _whole, _parts])
@pytest.mark.parametrize("name", SITUATIONS)
def test_every_way_in_says_the_same(name, way, tmp_path, caplog):
    make, options, said, is_refused, medians_too = SITUATIONS[name]
    if way is _medians and not medians_too:
        options, is_refused, said = options, False, ""  # medians know no vocabulary
    path = write_h5ad(make(), tmp_path)
    caplog.set_level("INFO")
    if is_refused:
        with pytest.raises(ValueError, match=re.escape(said)) as refused:
            way(path, SourceOptions(**options), tmp_path)
        assert "damaged" not in str(refused.value)
        return
    lines = way(path, SourceOptions(**options), tmp_path)
    assert said in "\n".join([*lines, caplog.text])


def test_only_one_place_reads_cells_for_a_model():
    """The table above stands for all commands as long as no other module encodes cells."""
    root = Path(__file__).resolve().parent.parent / "eval"
    found = {
        p.relative_to(root).as_posix()
        for p in root.rglob("*.py")
        if "encode_cells(" in p.read_text()
    }
    assert found == {"cells/read_cells.py"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Write an encoder of random weights, and a head of it for cells and one for genes."""
    from eval.finetune.classifier import Classifier, Head, save_classifier
    from eval.finetune.settings import FinetuneSettings
    from pretrain.model.architectures import encoder_of
    from pretrain.model.masked_gene_model import build_model
    from pretrain.settings.model_settings import ModelConfig

    made = tmp_path_factory.mktemp("model")
    small = ModelConfig(num_layers=1, hidden_size=16, num_heads=2, intermediate_size=16)
    network = build_model(small, _vocabulary(), 0).bert
    network.save_pretrained(made / "model")
    _vocabulary().save(made / "model" / "vocabulary.json")
    heads = (Head("type", "cells", ("a", "b")), Head("kind", "genes", ("c", "d")))
    settings = FinetuneSettings(device="cpu")
    classifier = Classifier(encoder_of(network), _vocabulary(), heads, settings)
    save_classifier(classifier, made / "head", {})
    return made


def _vectors(path: Path) -> np.ndarray:
    import pandas as pd

    return np.stack(pd.read_parquet(path)["embedding"].tolist())


@pytest.mark.parametrize("write", WRITERS)
def test_cells_of_every_format_are_embedded_alike(write, folder, tmp_path):
    from eval.cells.annotated import read_annotated
    from eval.cells.embed import embed_file
    from eval.cells.settings import EmbedOptions

    expected = tmp_path / "expected.parquet"
    (tmp_path / "plain").mkdir()
    options = EmbedOptions(layer=0)
    embed_file(write_h5ad(_plain(), tmp_path / "plain"), folder / "model", expected, options)
    (tmp_path / "cells").mkdir()
    path = write(_plain(), tmp_path / "cells")
    embed_file(path, folder / "model", tmp_path / "out.parquet", options)
    assert np.array_equal(_vectors(tmp_path / "out.parquet"), _vectors(expected))
    for out in (tmp_path / "out.h5ad", tmp_path / "out.zarr"):
        if path.suffix in (".h5ad", ".zarr"):
            embed_file(path, folder / "model", out, options)
            data = read_annotated(out)
            assert np.array_equal(data.obsm["X_geneloom"], _vectors(expected))
            assert list(data.obs["label"]) == list(_plain().obs["label"])
        else:
            with pytest.raises(ValueError, match="is no AnnData file .*give --out NAME.parquet"):
                embed_file(path, folder / "model", out, options)
            assert not out.exists()


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_results_stand_beside_their_cells_and_genes(suffix, folder, tmp_path):
    """A file with a cell and features of another species: both have no result, no other moves."""
    from eval.cells.annotated import read_annotated
    from eval.cells.embed import embed_file
    from eval.cells.settings import EmbedOptions
    from eval.finetune.predict import predict_file

    cells, reading, options = _two_species(), SourceOptions(genome="GRCh38"), EmbedOptions(layer=0)
    path = tmp_path / f"cells.{suffix}"
    (cells.write_zarr if suffix == "zarr" else cells.write_h5ad)(path)
    out, table = tmp_path / f"out.{suffix}", tmp_path / "out.parquet"
    embed_file(path, folder / "model", out, options, reading)
    embed_file(path, folder / "model", table, options, reading)
    data, others = read_annotated(out), np.arange(CELLS) != 5
    assert np.isnan(data.obsm["X_geneloom"][5]).all() and data.obs["geneloom_tokens"].iloc[5] == 0
    assert np.array_equal(data.obsm["X_geneloom"][others], _vectors(table))
    predict_file(path, folder / "head", tmp_path / "said.h5ad", reading, "cpu")
    said = read_annotated(tmp_path / "said.h5ad")
    assert said.obs["geneloom_type"].iloc[5] == "" and np.isnan(said.obsm["geneloom_type"][5]).all()
    assert np.isfinite(said.obsm["geneloom_type"][others]).all()
    found = said.var["geneloom_kind_cells"].to_numpy()
    assert np.array_equal(found[:200], (cells.X.toarray()[others, :200] > 0).sum(0))
    assert not found[200:].any() and said.var["geneloom_kind_c"].iloc[200:].isna().all()


def test_cells_in_a_folder_have_a_hash(folder, tmp_path):
    """What is recorded of the cells of a fine-tuning, of tables of attention and of a benchmark."""
    import json
    import shutil

    from data_prep.files import file_sha256
    from data_prep.sources.source_spec import content_sha256
    from eval.cells.attention_tables import attention_file

    path = write_h5ad(_plain(), tmp_path)
    assert content_sha256(path) == file_sha256(path)
    _plain().write_zarr(tmp_path / "cells.zarr")
    attention_file(tmp_path / "cells.zarr", folder / "model", tmp_path / "tables")
    record = json.loads((tmp_path / "tables" / "attention.json").read_text())
    shutil.copytree(tmp_path / "cells.zarr", tmp_path / "copy.zarr")
    assert record["cells"]["sha256"] == content_sha256(tmp_path / "copy.zarr")
    chunk = max((p for p in (tmp_path / "copy.zarr").rglob("*") if p.is_file()), key=str)
    chunk.write_bytes(chunk.read_bytes() + b"x")
    assert record["cells"]["sha256"] != content_sha256(tmp_path / "copy.zarr")
    with pytest.raises(ValueError, match="no such file or folder"):
        content_sha256(tmp_path / "nothing")


def test_a_folder_may_hold_the_one_source(tmp_path):
    from data_prep.sources.open_source import open_path

    write_h5ad(_plain(), tmp_path)
    assert open_path(tmp_path, SourceOptions()).num_cells == CELLS
    (tmp_path / "cells.h5ad").rename(tmp_path / "a.h5ad")
    write_h5ad(_plain(), tmp_path)
    with pytest.raises(ValueError, match=r"holds 2 sources.*give one: .*a\.h5ad"):
        open_path(tmp_path, SourceOptions())


def test_a_benchmark_reads_its_own_cells_as_it_is_told(folder, tmp_path):
    """Options of reading reach the cells of --cells; tasks of files say it themselves."""
    from eval.api import BenchmarkOptions, OwnTask, benchmark
    from eval.benchmark import cli
    from eval.benchmark.material.models_and_cells import Bench, load_models
    from eval.benchmark.outcome import Store

    cells = _two_species()
    cells.layers["raw"] = cells.X.copy()
    cells.X = scipy.sparse.csr_matrix(np.log1p(cells.X.toarray()))
    reading = SourceOptions(counts="layers/raw", genome="GRCh38")
    own = OwnTask(cells=write_h5ad(cells, tmp_path), label="label")
    (task,), data = cli._own_tasks(own, BenchmarkOptions(), reading)
    assert not isinstance(task, Path)
    models = load_models([folder / "model"])
    bench = Bench(models, data, Store(tmp_path / "units", {}), 0, "cpu", False, reading=reading)
    assert len(bench.cells(task.cells).metadata) == CELLS - 1
    plain = Bench(models, data, Store(tmp_path / "units", {}), 0, "cpu", False)
    with pytest.raises(ValueError, match="2 genomes"):
        plain.cells(task.cells)
    with pytest.raises(ValueError, match="are of --cells alone"):
        benchmark([folder / "model"], tmp_path / "out", reading=reading)


def test_a_benchmark_has_no_cell_twice(folder, tmp_path):
    """Folds would train on a copy of a cell that they ask for."""
    from eval.benchmark.material.models_and_cells import load_cells, load_models
    from eval.benchmark.task_file import Cells

    cells = _plain()
    values = cells.X.toarray()
    values[-3:] = values[:3]
    cells.X = scipy.sparse.csr_matrix(values)
    write_h5ad(cells, tmp_path)
    asked = Cells(files=("cells.h5ad",), recipe="made here")
    models = load_models([folder / "model"])
    found = load_cells(asked, ("label",), models, tmp_path, None, 0)
    assert found.excluded == {"exactly the counts of another cell": 3}
    assert list(found.metadata.index) == list(cells.obs_names[:-3])
