"""The version stands in what every command leaves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from data_prep.version import VERSION


@pytest.fixture(scope="module")
def home(shards, trained, tmp_path_factory) -> Path:
    """Shards, a run, its model, embedded cells, tables of attention."""
    from eval.cells.attention_tables import attention_file
    from eval.cells.embed import embed_file
    from pretrain.export.model_folder import export

    folder = tmp_path_factory.mktemp("versions")
    shutil.copytree(shards, folder / "shards")
    shutil.copy(shards.parent / "cells.h5ad", folder)
    shutil.copytree(trained, folder / "run")
    export(folder / "run", folder / "model")
    embed_file(folder / "cells.h5ad", folder / "model", folder / "embedded.h5ad")
    attention_file(folder / "cells.h5ad", folder / "model", folder / "attention")
    return folder


def test_every_artefact_names_the_version(home):
    import anndata

    from pretrain.checkpoints.checkpoint import newest
    from pretrain.run_folder.run_record import environment

    read = lambda path: json.loads((home / path).read_text())  # noqa: E731
    last = newest(home / "run")
    assert last is not None
    said = {
        "shards": read("shards/manifest.json")["geneloom"],
        "run": read("run/env.json")["versions"]["geneloom"],
        "checkpoint": last.record["versions"]["geneloom"],
        "model": read("model/geneloom.json")["environment"]["versions"]["geneloom"],
        "embedding": anndata.read_h5ad(home / "embedded.h5ad").uns["geneloom"]["version"],
        "attention": read("attention/attention.json")["geneloom"],
        # Of a benchmark's results and of a screen's manifest.
        "environment": environment()["versions"]["geneloom"],
    }
    assert said == dict.fromkeys(said, VERSION)
