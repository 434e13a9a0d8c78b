"""The notebooks of the documents run, with a model of random weights in place of the demo's."""

from pathlib import Path

import nbformat
import pytest

from data_prep.prepare.medians import gene_medians
from data_prep.prepare.run import SERIAL
from data_prep.sources.source_spec import SourceOptions, source_at
from pretrain.settings.model_settings import ModelConfig

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    from eval.cells.demo_cells import recover_counts
    from pretrain.model.masked_gene_model import build_model

    folder = tmp_path_factory.mktemp("model")
    recover_counts().write_h5ad(folder / "cells.h5ad")
    specs = [source_at(folder / "cells.h5ad", SourceOptions())]
    medians = gene_medians(specs, folder, SERIAL, lambda what, done, total: None)
    vocabulary = medians.vocabulary(1, 512, with_cls=False)
    small = ModelConfig(num_layers=2, hidden_size=32, num_heads=2, intermediate_size=64)
    build_model(small, vocabulary, 0).bert.save_pretrained(folder)
    vocabulary.save(folder / "vocabulary.json")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, model, monkeypatch):
    """All its code; the kernel takes its time to start."""
    from nbclient import NotebookClient

    monkeypatch.setenv("GENELOOM_MODEL", str(model))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_was_executed(path):
    """Every code cell has been run, in order, and none ended with an error."""
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [o for cell in code for o in cell.outputs if o.output_type == "error"]
