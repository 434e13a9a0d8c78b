"""The state of a cell: counted and learned parts, where they come from, what refuses them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.synthetic import make_cells


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pretrain.export.model_folder import export

    out = tmp_path_factory.mktemp("state") / "model"
    assert "cell states of " in export(trained, out)
    return out


def test_axes_are_those_of_pretraining_cells(exported: Path, shards: Path):
    """By numpy, from states that embed_layers gives of cells of the shards."""
    from data_prep.shards.reader import ShardSet
    from pretrain.cell_states.cell_state import fit_cell_state, some_training_cells
    from pretrain.cell_states.frozen_states import embed_layers
    from pretrain.export.model_folder import folder_cell_state, load_exported
    from pretrain.model.architectures import encoder_of

    opened = ShardSet(shards)
    network, vocabulary = load_exported(exported)
    encoder = encoder_of(network)
    state = folder_cell_state(exported, vocabulary)
    assert state is not None
    cells = some_training_cells(opened, 256)
    means = embed_layers(cells, encoder, vocabulary, (0,))[0].astype(np.float64)
    values, vectors = np.linalg.eigh(np.cov(means.T))
    largest = vectors[:, ::-1][:, : state.axes.shape[1]]
    np.testing.assert_allclose(np.abs((largest * state.axes).sum(axis=0))[:8], 1, atol=1e-3)
    np.testing.assert_allclose(
        state.scales[1], np.sqrt(values[::-1][: state.axes.shape[1]].sum()), rtol=0.02
    )
    counted = state.svd.embed_cells(cells)
    np.testing.assert_allclose(state.scales[0], np.sqrt(counted.var(axis=0).sum()), rtol=1e-4)
    together = state.embed(cells, encoder, vocabulary)
    assert together.shape == (len(cells), state.width) and np.isfinite(together).all()
    np.testing.assert_allclose(together.var(axis=0).sum(), 2, rtol=0.02)
    (alone,) = state.embed(cells[5:6], encoder, vocabulary)
    np.testing.assert_array_equal(alone, together[5])
    again = fit_cell_state(encoder, opened, 256)
    np.testing.assert_array_equal(again.axes, state.axes)


def test_training_cells_are_of_all_lengths_and_none_twice(shards: Path):
    from data_prep.shards.reader import ShardSet
    from pretrain.cell_states.cell_state import some_training_cells

    opened = ShardSet(shards)
    every = {
        block.tokens[a:b].tobytes()
        for block in opened.iter_blocks("train")
        for a, b in zip(block.offsets[:-1], block.offsets[1:], strict=True)
    }
    buckets = opened.bucket_lengths("train")
    found = some_training_cells(opened, 40)
    assert len({c.tobytes() for c in found}) == len(found) <= 40
    assert {c.tobytes() for c in found} <= every
    assert len({np.searchsorted(buckets, len(c)) for c in found}) > len(buckets) // 2
    assert len(some_training_cells(opened, 10**6)) == len(every)


def test_embed_writes_states_unless_told_otherwise(exported: Path, tmp_path: Path):
    import anndata

    from eval.cells.embed import embed_file
    from eval.cells.settings import EmbedOptions
    from pretrain.export.model_folder import load_exported

    make_cells(20, seed=3).write_h5ad(tmp_path / "cells.h5ad")
    said = embed_file(tmp_path / "cells.h5ad", exported, tmp_path / "states.h5ad")
    assert "cell states" in said
    found = anndata.read_h5ad(tmp_path / "states.h5ad")
    assert found.uns["geneloom"]["pooling"] == "state"
    embed_file(tmp_path / "cells.h5ad", exported, tmp_path / "means.h5ad", EmbedOptions(layer=0))
    means = anndata.read_h5ad(tmp_path / "means.h5ad")
    network, _ = load_exported(exported)
    assert means.obsm["X_geneloom"].shape == (20, network.config.hidden_size)
    assert found.obsm["X_geneloom"].shape[1] > network.config.hidden_size
    bare = tmp_path / "bare"
    shutil.copytree(exported, bare)
    (bare / "cell_state.safetensors").unlink()
    of_state = EmbedOptions(pooling="state")
    with pytest.raises(ValueError, match=r"has no cell_state.*export the run again"):
        embed_file(tmp_path / "cells.h5ad", bare, tmp_path / "no.h5ad", of_state)
    with pytest.raises(ValueError, match="--layer 0: belongs to"):
        embed_file(
            tmp_path / "cells.h5ad", exported, tmp_path / "no.h5ad", replace(of_state, layer=0)
        )
    assert "mean of layer -1" in embed_file(tmp_path / "cells.h5ad", bare, tmp_path / "old.h5ad")
    assert not (tmp_path / "no.h5ad").exists()


def test_embeddings_as_table_and_zarr_are_those_of_the_h5ad(exported: Path, tmp_path: Path):
    import anndata
    import pyarrow.parquet as pq
    from typer.testing import CliRunner

    from launch.cli import build_app

    make_cells(20, seed=3).write_h5ad(tmp_path / "cells.h5ad")

    def embed(name: str):
        words = ["embed", tmp_path / "cells.h5ad", "--model", exported, "--out", tmp_path / name]
        return CliRunner().invoke(build_app("embed"), [*map(str, words), "--device", "cpu"])

    for name in ("a.h5ad", "a.zarr", "a.parquet"):
        done = embed(name)
        assert done.exit_code == 0, done.exception
    wanted = anndata.read_h5ad(tmp_path / "a.h5ad")
    found = anndata.read_zarr(tmp_path / "a.zarr")
    np.testing.assert_array_equal(found.obsm["X_geneloom"], wanted.obsm["X_geneloom"])
    assert found.uns["geneloom"]["pooling"] == "state"
    table = pq.read_table(tmp_path / "a.parquet")
    assert table["cell_id"].to_pylist() == list(wanted.obs_names)
    np.testing.assert_array_equal(np.array(table["embedding"].to_pylist(), np.float32),
                                  wanted.obsm["X_geneloom"])  # fmt: skip
    assert table["geneloom_tokens"].to_pylist() == wanted.obs["geneloom_tokens"].tolist()
    assert b"vocabulary_sha256" in table.schema.metadata[b"geneloom"]
    assert "must end in .h5ad" in str(embed("a.csv").exception)
    assert "exists" in str(embed("a.zarr").exception)
    assert not [p for p in tmp_path.iterdir() if "partial" in p.name]


def test_progress_counts_every_cell_once(exported: Path):
    from pretrain.cell_states.frozen_states import embed_layers
    from pretrain.export.model_folder import load_exported
    from pretrain.model.architectures import encoder_of

    network, vocabulary = load_exported(exported)
    cells = [np.arange(3, 9, dtype=np.uint16)] * 5 + [np.zeros(0, dtype=np.uint16)]
    said: list[tuple[str, int, int]] = []
    embed_layers(
        cells, encoder_of(network), vocabulary, (0,), progress=lambda *words: said.append(words)
    )
    assert said == [("embedding", n, 5) for n in range(1, 6)]


def test_a_state_of_other_weights_is_refused(exported: Path, tmp_path: Path):
    from pretrain.export.model_folder import folder_cell_state, load_exported

    changed = tmp_path / "changed"
    shutil.copytree(exported, changed)
    network, vocabulary = load_exported(changed)
    network.get_input_embeddings().weight.data[3] += 1
    network.save_pretrained(changed)
    with pytest.raises(ValueError, match="was made with weights .* belongs to another model"):
        folder_cell_state(changed, vocabulary)
    (changed / "cell_state.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="cannot be read"):
        folder_cell_state(changed, vocabulary)


def test_an_export_without_its_shards_says_so(trained: Path, tmp_path: Path):
    import yaml

    from pretrain.export.model_folder import export

    run = tmp_path / "run"
    shutil.copytree(trained, run)
    content = yaml.safe_load((run / "config.yaml").read_text())
    content["data"]["shards"] = str(tmp_path / "moved")
    (run / "config.yaml").write_text(yaml.safe_dump(content))
    assert "no cell state: " in export(run, tmp_path / "model")
    assert not (tmp_path / "model" / "cell_state.safetensors").exists()
    with pytest.raises(ValueError, match="--shards"):
        export(run, tmp_path / "other", shards=tmp_path / "moved")
    assert not (tmp_path / "other").exists()
    assert "no cell state" in export(run, tmp_path / "third", state_cells=0)
