"""``geneloom finetune cells --save-head``, ``predict`` and several ranks, as a user starts them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from data_prep.prepare.medians import gene_medians
from data_prep.prepare.run import SERIAL
from data_prep.sources.source_spec import SourceOptions, source_at
from eval.cells.read_cells import encode_file
from pretrain.settings.model_settings import ModelConfig
from tests.ranks import kill, start_geneloom
from tests.synthetic import make_cells

if TYPE_CHECKING:
    from eval.finetune.classifier import FinetuneSettings

MODEL = ModelConfig(
    num_layers=2, hidden_size=32, num_heads=2, intermediate_size=64,
    hidden_dropout=0.0, attention_dropout=0.0,
)  # fmt: skip


def fast() -> FinetuneSettings:
    from eval.finetune.classifier import FinetuneSettings

    return FinetuneSettings(epochs=3, learning_rate=5e-3)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A folder with a model of random weights, cells beside it."""
    from pretrain.model.masked_gene_model import build_model

    folder = tmp_path_factory.mktemp("model")
    cells = make_cells(90)
    cells.write_h5ad(folder / "cells.h5ad")
    specs = [source_at(folder / "cells.h5ad", SourceOptions())]
    found = gene_medians(specs, folder, SERIAL, lambda what, done, total: None)
    vocabulary = found.vocabulary(1, 256, with_cls=False)
    build_model(MODEL, vocabulary, 0).bert.save_pretrained(folder)
    vocabulary.save(folder / "vocabulary.json")
    return folder


def test_saved_head_predicts_other_cells(model, tmp_path):
    import anndata

    from data_prep.genes.vocabulary import load_vocabulary
    from eval.api import FinetuneOptions, finetune
    from eval.finetune.predict import predict_file

    few = FinetuneOptions(donor="donor", settings=replace(fast(), patience=2))
    with pytest.raises(ValueError, match="--patience 2: .* validation cells of the smallest class"):
        finetune(model / "cells.h5ad", model, "cell_type", tmp_path / "scores", few)
    finetune(
        model / "cells.h5ad", model, "cell_type", tmp_path / "scores",
        FinetuneOptions(
            donor="donor", settings=fast(), max_test_per_class=5, save_head=tmp_path / "head"
        ),
    )  # fmt: skip
    record = json.loads((tmp_path / "head" / "classifier.json").read_text())
    results = json.loads((tmp_path / "scores" / "results.json").read_text())
    assert record["record"]["summary"] == results["summary"]
    chosen = {k: results[k] for k in ("donor", "max_train_per_class", "max_test_per_class")}
    assert chosen == {"donor": "donor", "max_train_per_class": None, "max_test_per_class": 5}
    assert all(s["test_cells"] <= 3 * 5 for s in results["seeds"])
    assert len(record["history"]) == 3

    others = make_cells(60, num_genes=200)
    others.var["ensembl_id"], others.var_names = others.var_names, others.var["symbol"].to_list()
    matrix = others.X.tolil()
    matrix[5] = 0
    others.X = matrix.tocsr()
    others.write_h5ad(tmp_path / "others.h5ad")
    said = predict_file(
        tmp_path / "others.h5ad", tmp_path / "head", tmp_path / "out.h5ad",
        SourceOptions(gene_column="ensembl_id"),
    )  # fmt: skip
    assert "60 cells" in said and "1 cells without any gene" in said
    known = load_vocabulary(tmp_path / "head" / "vocabulary.json").genes
    there = np.isin(others.var["ensembl_id"], known)
    share = others.X[:, np.flatnonzero(there)].sum() / others.X.sum()
    assert f"{share:.1%} of the counts are in the {there.sum()} of the file's 200 genes" in said
    assert f"{1 - there.sum() / len(known):.0%} of its genes are not in this file" in said
    out = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert list(out.obs_names) == list(others.obs_names)
    labels = out.obs["geneloom_cell_type"].astype(str).to_numpy()
    probabilities = out.obsm["geneloom_cell_type"]
    assert labels[5] == "" and np.flatnonzero(np.isnan(probabilities[:, 0])).tolist() == [5]
    full = np.delete(np.arange(60), 5)
    classes = np.array(out.uns["geneloom_predict"]["classes"]["cell_type"])
    np.testing.assert_array_equal(classes[probabilities[full].argmax(axis=1)], labels[full])
    np.testing.assert_array_equal(
        out.obs["geneloom_cell_type_probability"].to_numpy(), probabilities.max(axis=1)
    )
    truth = others.obs["cell_type"].astype(str).to_numpy()
    assert (labels == truth)[full].mean() > 0.8
    with pytest.raises(ValueError, match="exists"):
        predict_file(tmp_path / "others.h5ad", tmp_path / "head", tmp_path / "out.h5ad")
    with pytest.raises(ValueError, match="no classifier.json"):
        predict_file(tmp_path / "others.h5ad", model, tmp_path / "out2.h5ad")


def test_gene_heads_are_means_over_cells(model, tmp_path):
    import anndata

    from eval.finetune.classifier import Head, Target, save_classifier
    from eval.finetune.predict import predict_file
    from eval.finetune.training import finetune
    from pretrain.export.model_folder import load_exported

    network, vocabulary = load_exported(model)
    cells = encode_file(model / "cells.h5ad", vocabulary)
    labels = np.full(vocabulary.num_tokens, -1)
    labels[2:80] = np.arange(78) % 2
    target = Target(Head("dosage", "genes", ("no", "yes")), labels)
    classifier = finetune(network.bert, vocabulary, cells.tokens, [target], fast(), 0)
    save_classifier(classifier, tmp_path / "head", {})
    predict_file(model / "cells.h5ad", tmp_path / "head", tmp_path / "out.h5ad")
    var = anndata.read_h5ad(tmp_path / "out.h5ad").var
    found = classifier.predict_genes(cells.tokens, "dosage", np.ones(vocabulary.num_tokens, bool))
    for gene in (0, 33, 199):
        token = vocabulary.token_of.get(var.index[gene], -1)
        rows = found.token == token
        assert var["geneloom_dosage_cells"].iloc[gene] == rows.sum()
        np.testing.assert_allclose(
            var["geneloom_dosage_yes"].iloc[gene], found.probabilities[rows, 1].mean(), rtol=1e-5
        )


@pytest.mark.long
def test_killed_command_goes_on(model, tmp_path):
    """Killed with SIGKILL in the second seed: the same bytes as a run that was left alone."""
    from eval.finetune.score_cells import finetune_cells
    from eval.finetune.settings import OF_CELLS, FinetuneOptions

    out, log = tmp_path / "killed", tmp_path / "log"
    command = [
        "finetune", "cells", str(model / "cells.h5ad"), "--model", str(model), "--label",
        "cell_type", "--epochs", "6", "--device", "cpu", "--learning-rate", "0.005",
        "--out", str(out),
    ]  # fmt: skip
    process = start_geneloom(command, log)
    until = time.monotonic() + 120
    while not list(out.glob(".partial/*/seed-1, */epoch-*")):
        assert process.process.is_alive(), f"finished before it could be killed:\n{process.said}"
        assert time.monotonic() < until
        time.sleep(0.005)
    kill(process.process)
    assert not (out / "results.json").exists()
    (seed,) = out.glob(".partial/*/seed-0.json")
    written = seed.stat().st_mtime_ns
    (work,) = out.glob(".partial/*")
    options = FinetuneOptions(settings=replace(OF_CELLS, epochs=6, learning_rate=0.005))
    cells, alone = model / "cells.h5ad", tmp_path / "alone"
    other = finetune_cells(cells, model, "cell_type", alone, options)
    again = start_geneloom(command, log)
    while seed.exists():
        assert seed.stat().st_mtime_ns == written, "a finished seed was computed again"
        if not again.process.is_alive():
            break
        time.sleep(0.02)
    assert again.code() == 0, again.said
    assert json.loads((out / "results.json").read_text()) == other
    assert not work.parent.exists()


@pytest.mark.slow
def test_two_ranks_by_the_launcher(model, tmp_path):
    """Two ranks score and save once; the launcher and its ranks take 30 s to start and train."""
    from eval.finetune.score_cells import finetune_cells
    from eval.finetune.settings import FinetuneOptions

    arguments = [
        str(model / "cells.h5ad"), "--model", str(model), "--label", "cell_type", "--epochs", "2",
        "--device", "cpu", "--learning-rate", "0.005",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", "from launch.cli import main; main()", "launch", "local",
         "--ranks", "2", "--device", "cpu", "finetune", "cells", *arguments,
         "--out", str(tmp_path / "two"), "--save-head", str(tmp_path / "head")],
        cwd=Path(__file__).resolve().parent.parent, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("results.json") == 1
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    one = finetune_cells(
        model / "cells.h5ad", model, "cell_type", tmp_path / "one",
        FinetuneOptions(settings=replace(fast(), epochs=2, dropout=0.1)),
    )  # fmt: skip
    frozen = "frozen embedding, pretrained"
    assert two["summary"][frozen] == one["summary"][frozen]
    assert two["summary"]["fine-tuned, pretrained"]["macro_f1"]["mean"] > 0.5
    assert (tmp_path / "head" / "classifier.json").exists()
