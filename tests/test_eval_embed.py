"""`geneloom embed`: parts, going on after a kill, memory, and embeddings of genes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_prep.shards.reader import ShardSet
from tests.synthetic import make_cells, write_cells

CELLS = 60


@pytest.fixture(scope="module")
def home(tmp_path_factory, shards) -> Path:
    """Cells, an empty one among them, and a model of random weights."""
    from pretrain.model.masked_gene_model import build_model
    from pretrain.settings.model_settings import ModelConfig

    folder = tmp_path_factory.mktemp("embed")
    cells = make_cells(CELLS)
    matrix = cells.X.tolil()
    matrix[5] = 0
    cells.X = matrix.tocsr()
    cells.uns["kept"] = {"as": np.arange(3)}
    cells.write_h5ad(folder / "cells.h5ad")
    cells.write_zarr(folder / "cells.zarr")
    vocabulary = ShardSet(shards).vocabulary
    small = ModelConfig(num_layers=2, hidden_size=16, num_heads=2, intermediate_size=16)
    build_model(small, vocabulary, 0).bert.save_pretrained(folder / "model")
    vocabulary.save(folder / "model" / "vocabulary.json")
    return folder


def in_parts_of(number: int, monkeypatch) -> None:
    from eval.cells import embed

    monkeypatch.setattr(embed, "PART_CELLS", number)


@pytest.mark.parametrize(
    ("cells", "suffix"),
    [("h5ad", "h5ad"), ("h5ad", "parquet"), ("zarr", "zarr"), ("zarr", "h5ad"), ("h5ad", "zarr")],
)
def test_parts_change_no_bit(cells, suffix, home, tmp_path, monkeypatch):
    from eval.cells.embed import embed_file

    cells = home / f"cells.{cells}"
    whole, cut = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
    assert "1 cells without any gene" in embed_file(cells, home / "model", whole)
    in_parts_of(7, monkeypatch)
    embed_file(cells, home / "model", cut)
    found = [vectors_of(path) for path in (whole, cut)]
    assert np.array_equal(*found, equal_nan=True) and len(found[0]) == CELLS
    assert np.flatnonzero(np.isnan(found[0]).any(axis=1)).tolist() == [5]
    assert not list(tmp_path.glob(".*"))


def vectors_of(path: Path) -> np.ndarray:
    import pandas as pd

    if path.suffix == ".parquet":
        return np.stack(pd.read_parquet(path)["embedding"].tolist())
    return read_cells(path).obsm["X_geneloom"]


def read_cells(path: Path):
    import anndata

    return anndata.read_zarr(path) if path.is_dir() else anndata.read_h5ad(path)


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_the_rest_of_the_file_is_as_it_was(suffix, home, tmp_path, monkeypatch):
    from eval.cells import embedded_parts
    from eval.cells.embed import embed_file

    # Memory does not grow with the cells: nobody reads the whole file.
    monkeypatch.setattr(embedded_parts, "read_annotated", None)
    cells, out, again = (f / f"{n}.{suffix}" for f, n in (
        (home, "cells"), (tmp_path, "out"), (tmp_path, "again")
    ))  # fmt: skip
    embed_file(cells, home / "model", out)
    before, after = read_cells(cells), read_cells(out)
    assert (before.X != after.X).nnz == 0 and before.var.equals(after.var)
    assert after.obs.columns.tolist() == [*before.obs.columns, "geneloom_tokens"]
    assert after.obs.drop(columns="geneloom_tokens").equals(before.obs)
    assert after.uns["kept"]["as"].tolist() == [0, 1, 2]
    assert after.uns["geneloom"]["pooling"] == "mean" and after.uns["geneloom"]["layer"] == -1
    assert after.obs["geneloom_tokens"].iloc[5] == 0
    # Again, on its own output.
    embed_file(out, home / "model", again)
    assert np.array_equal(vectors_of(again), vectors_of(out), equal_nan=True)


def test_it_goes_on_after_the_last_part(home, tmp_path, monkeypatch):
    """Stopped in the fourth part: three are there, and are not computed again."""
    from eval.cells import embed
    from eval.cells.settings import EmbedOptions

    in_parts_of(8, monkeypatch)
    out, seen = tmp_path / "out.parquet", []

    def stop(what: str, done: int, total: int) -> None:
        seen.append(done)
        assert total == CELLS
        if done > 24:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed.embed_file(home / "cells.h5ad", home / "model", out, progress=stop)
    parts = tmp_path / ".out.parquet.parts"
    assert len(list(parts.glob("*.parquet"))) == 3 and not out.exists()
    with pytest.raises(ValueError, match=r"parts that were made with another record; give"):
        embed.embed_file(home / "cells.h5ad", home / "model", out, EmbedOptions(layer=0))
    seen.clear()
    embed.embed_file(
        home / "cells.h5ad", home / "model", out, progress=lambda *now: seen.append(now[1])
    )
    assert seen[0] == 25 and seen[-1] == CELLS and not parts.exists()
    in_parts_of(4096, monkeypatch)
    whole = tmp_path / "whole.parquet"
    embed.embed_file(home / "cells.h5ad", home / "model", whole)
    assert np.array_equal(vectors_of(out), vectors_of(whole), equal_nan=True)


def test_two_at_once_are_refused(home, tmp_path):
    from data_prep.running.owner import FolderInUse, owned
    from eval.cells.embed import embed_file

    with (
        owned(tmp_path / ".out.h5ad.parts", "embed"),
        pytest.raises(FolderInUse, match="another run works in this folder: embed"),
    ):
        embed_file(home / "cells.h5ad", home / "model", tmp_path / "out.h5ad")


def test_genes(home, tmp_path):
    """The input table as it is; mean states as a plain computation; genes with their ids."""
    import pandas as pd
    import torch

    from eval.cells.embed_genes import embed_genes_file
    from eval.cells.read_cells import encode_file
    from eval.cells.settings import EmbedOptions
    from pretrain.export.model_folder import load_exported
    from pretrain.model.architectures import encoder_of

    out = tmp_path / "genes.parquet"
    options = EmbedOptions(genes=True, group="cell_type", layer=0)
    said = embed_genes_file(home / "cells.h5ad", home / "model", out, options)
    assert "3 groups of cell_type" in said
    table = pd.read_parquet(out)
    network, vocabulary = load_exported(home / "model")
    encoder, first = encoder_of(network), vocabulary.first_gene_token
    static = table[table["states"] == "input"]
    assert static["gene"].tolist() == list(vocabulary.genes) and static["group"].isna().all()
    weights = encoder.get_input_embeddings().weight.detach().numpy()[first:]
    assert np.array_equal(np.stack(static["embedding"].tolist()), weights)

    cells = encode_file(home / "cells.h5ad", vocabulary)
    kinds = np.arange(CELLS) % 3
    states: dict[tuple[str, str], list[np.ndarray]] = {}
    for tokens, kind in zip(cells.tokens, kinds, strict=True):
        if not len(tokens):
            continue
        with torch.no_grad():
            hidden = encoder(torch.from_numpy(tokens[None].astype(np.int64))).last_hidden_state[0]
        for token, state in zip(tokens.tolist(), hidden.numpy(), strict=True):
            gene = vocabulary.genes[token - first]
            states.setdefault((gene, f"type{kind}"), []).append(state)
    context = table[table["states"] == "context"]
    assert len(context) == len(states)
    for row in context.itertuples():
        mine = states[row.gene, row.group]
        assert row.cells == len(mine)
        assert np.allclose(row.embedding, np.mean(mine, axis=0), atol=1e-5)


def test_genes_go_on_after_a_kill(home, tmp_path, monkeypatch):
    """Stopped in the fourth part: the sums of three are kept, and the same bits come out."""
    import pandas as pd

    from eval.cells import embed_genes
    from eval.cells.settings import EmbedOptions

    options = EmbedOptions(genes=True, group="cell_type")
    out, whole, seen = tmp_path / "out.parquet", tmp_path / "whole.parquet", []

    def embed(path: Path, progress=None, asked=options) -> None:
        embed_genes.embed_genes_file(
            home / "cells.h5ad", home / "model", path, asked, progress=progress
        )

    def stop(what: str, done: int, total: int) -> None:
        if done > 28:
            raise KeyboardInterrupt

    embed(whole)
    monkeypatch.setattr(embed_genes, "_PART_CELLS", 8)
    monkeypatch.setattr(embed_genes, "_KEEP_EVERY_S", 0.0)
    with pytest.raises(KeyboardInterrupt):
        embed(out, stop)
    parts = tmp_path / ".out.parquet.parts"
    assert [p.name for p in parts.glob("*.npz")] == ["00000003.npz"] and not out.exists()
    with pytest.raises(ValueError, match=r"parts that were made with another record; give"):
        embed(out, asked=EmbedOptions(genes=True, group="cell_type", layer=0))
    embed(out, lambda *now: seen.append(now[1]))
    assert seen[0] == 25 and seen[-1] == CELLS and not parts.exists()
    found, expected = pd.read_parquet(out), pd.read_parquet(whole)
    assert np.array_equal(np.stack(found.embedding), np.stack(expected.embedding))
    assert found.drop(columns="embedding").equals(expected.drop(columns="embedding"))


@pytest.mark.parametrize(
    ("options", "name", "said"),
    [
        ({"genes": True}, "genes.h5ad", "must end in .parquet"),
        ({"genes": True, "pooling": "cls"}, "genes.parquet", "--pooling cls: belongs to cells"),
        ({"genes": True, "group": "nope"}, "genes.parquet", "nope"),
    ],
)
def test_refusals_of_genes(options, name, said, home, tmp_path):
    from eval.cells.embed_genes import embed_genes_file
    from eval.cells.settings import EmbedOptions

    with pytest.raises(ValueError, match=said):
        embed_genes_file(
            home / "cells.h5ad", home / "model", tmp_path / name, EmbedOptions(**options)
        )
    assert not list(tmp_path.iterdir())


def test_a_group_is_of_genes():
    from eval.cells.settings import EmbedOptions

    with pytest.raises(ValueError, match="--group cell_type: belongs to --genes"):
        EmbedOptions(group="cell_type")


@pytest.mark.long
def test_killed_and_gone_on_with(home, tmp_path):
    """kill -9 of the command; the same command gives the bits of one that was never killed."""
    cells = write_cells(tmp_path / "many.h5ad", num_cells=9000)
    out = tmp_path / "out.parquet"
    command = [
        sys.executable, "-c", "from launch.cli import main; main()", "embed", str(cells),
        "--model", str(home / "model"), "--out",
    ]  # fmt: skip
    first = subprocess.Popen([*command, str(out)])
    part, until = tmp_path / ".out.parquet.parts" / "000000.parquet", time.monotonic() + 300
    while not part.exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    made = part.stat().st_mtime_ns
    assert json.loads((part.parent / "parts.json").read_text())["part_cells"] == 4096
    subprocess.run([*command, str(out)], check=True)
    assert made < out.stat().st_mtime_ns and not part.exists()
    subprocess.run([*command, str(tmp_path / "whole.parquet")], check=True)
    assert np.array_equal(vectors_of(out), vectors_of(tmp_path / "whole.parquet"), equal_nan=True)
