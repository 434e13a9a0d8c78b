"""``geneloom finetune genes``: the benchmark's folds and neighbours, a saved head, two ranks."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.ranks import kill, run_ranks, start_geneloom
from tests.test_cli import geneloom
from tests.test_eval_genes import GENES, IS_POSITIVE, knowing_model, make_vocabulary, write_data

FOLDS = 3
# A rate and steps for an encoder of width 32.
ARGUMENTS = (
    "--label", "label", "--folds", FOLDS, "--max-cells", 24, "--epochs", 3, "--steps", 0,
    "--learning-rate", 0.002, "--head-learning-rate", 0.002, "--device", "cpu",
)  # fmt: skip


def options(**changes: Any):
    from eval.finetune.settings import OF_GENES, FinetuneGenesOptions

    rates = {"learning_rate": 2e-3, "head_learning_rate": 2e-3}
    settings = replace(OF_GENES, **({"epochs": 3, "steps": 0} | rates | changes))
    return FinetuneGenesOptions(folds=FOLDS, max_cells=24, settings=settings, device="cpu")


@dataclass(frozen=True)
class Done:
    folder: Path
    results: dict
    said: str


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Done:
    """A planted model that knows the labels, fine-tuned by the command, its head saved."""
    folder = write_data(tmp_path_factory.mktemp("genes"))
    model = knowing_model(make_vocabulary())
    model.network.save_pretrained(folder / "model")
    model.vocabulary.save(folder / "model" / "vocabulary.json")
    ran = geneloom(
        "finetune", "genes", "cells.h5ad", "--genes", "labels.tsv", "--model", "model",
        "--out", "scores", "--save-head", "head", *ARGUMENTS, cwd=folder,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return Done(folder, json.loads((folder / "scores" / "results.json").read_text()), ran.stdout)


def test_a_model_that_knows_is_told_from_all_neighbours(done):
    found = done.results
    assert found["format"] == "geneloom-finetune/1" and found["kind"] == "genes"
    assert found["classes"] == ["no", "yes"] and found["cells"] == 24
    assert found["genes"] + sum(v for k, v in found["dropped"].items() if "genes" in k) == 90
    auroc = {n: s["auroc"]["mean"] for n, s in found["summary"].items()}
    assert len(auroc) == 12 + 2 * 3, "the benchmark's baselines, and three readings of two weights"
    assert auroc["fine-tuned, pretrained"] > 0.97
    assert auroc["frozen embedding, pretrained"] > 0.97
    others = [v for n, v in auroc.items() if not n.endswith(", pretrained")]
    assert max(others) < 0.75
    assert found["remarks"] == []
    assert len(found["seeds"]) == FOLDS
    for fold in found["seeds"]:
        assert fold["train_genes"] + fold["test_genes"] == found["genes"]
        assert (
            sum(map(sum, fold["scores"]["fine-tuned, pretrained"]["confusion"]))
            == (fold["test_genes"])
        )
    genes = {row["gene"]: row for row in found["predictions"]}
    assert len(genes) == found["genes"]
    assert all(genes[g]["label"] == IS_POSITIVE[GENES.index(g)] for g in genes)
    assert "F1 by class" in done.said and "fine-tuned, pretrained" in done.said
    assert "AUROC" in done.said and "steps" in done.said and f"{FOLDS} folds" in done.said
    assert not (done.folder / "scores" / ".partial").exists()


def test_folds_and_neighbours_are_the_benchmarks(done, tmp_path):
    """Bit for bit, where nothing is trained: there is one implementation."""
    from eval.benchmark.kinds.gene_tasks import ClassesOfGenes
    from eval.benchmark.material.models_and_cells import Bench, load_models
    from eval.benchmark.outcome import Store
    from eval.benchmark.own_task import own_task
    from eval.benchmark.task_file import Size

    task = own_task(done.folder / "cells.h5ad", "label", done.folder / "labels.tsv")
    task = task.model_copy(update={"folds": FOLDS})
    bench = Bench(
        load_models([done.folder / "model"]), done.folder, Store(tmp_path, {}), 0, "cpu", False
    )
    contest = ClassesOfGenes(task, Size(seeds=1, max_cells=24), bench)  # type: ignore
    names = {"frozen embedding": "frozen embedding, pretrained", "detection rate alone": ""}
    rows = [r for r in contest.rows if r.name in names and r.role in ("model", "baseline")]
    assert len(rows) == 2
    for row in rows:
        for fold in contest.folds(0):
            scores, _ = contest.score(row, fold, row.predict(fold))
            found = done.results["seeds"][fold.number]["scores"][names[row.name] or row.name]
            assert found["auroc"] == scores["auroc"] and found["macro_f1"] == scores["macro_f1"]


def test_steps_and_curves_are_in_the_record_and_on_the_page(done):
    from eval.report.any_folder import write_stage_report

    steps = 3 * (24 // 4)
    for name in ("fine-tuned, pretrained", "fine-tuned, random weights"):
        assert done.results["summary"][name]["steps"] == [steps, steps]
        for fold in done.results["seeds"]:
            training = fold["trainings"][name]
            assert training["steps"] == training["kept_step"] == steps
            assert [point[0] for point in training["curve"]] == list(range(1, steps + 1))
            assert training["validation"] == []
    assert "steps" not in done.results["summary"]["frozen embedding, pretrained"]
    page = Path(write_stage_report(done.folder / "scores")).read_text()
    assert page.count("<img src=") == 2 and "Training loss by optimizer step" in page
    assert f"<td>{steps}</td>" in page and f"{done.results['genes']} genes in 24 cells" in page


def test_a_saved_head_says_what_genes_are(done):
    """As a table, and beside the cells; a table of a head of cells is refused."""
    import anndata

    from eval.api import predict_genes
    from eval.finetune.classifier import load_classifier

    classifier = load_classifier(done.folder / "head")
    (head,) = classifier.heads
    assert (head.name, head.kind, head.classes) == ("label", "genes", ("no", "yes"))
    table = predict_genes(done.folder / "cells.h5ad", done.folder / "head")
    assert list(table.columns) == ["gene", "no", "yes", "class", "cells"]
    assert (table["yes"].diff().dropna() <= 0).all()
    np.testing.assert_allclose(table["no"] + table["yes"], 1, atol=1e-5)
    truth = pd.Series(IS_POSITIVE, index=GENES)[table["gene"]].to_numpy()
    assert ((table["class"] == "yes") == truth).mean() > 0.95, "it was trained on these"
    for out in ("beside.h5ad", "genes.tsv"):
        ran = geneloom("predict", "cells.h5ad", "--head", "head", "--out", out, cwd=done.folder)
        assert ran.returncode == 0, ran.stderr
    var = anndata.read_h5ad(done.folder / "beside.h5ad").var.loc[table["gene"]]
    np.testing.assert_allclose(var["geneloom_label_yes"], table["yes"], atol=1e-5)
    assert (var["geneloom_label_cells"].to_numpy() == table["cells"]).all()
    written = pd.read_csv(done.folder / "genes.tsv", sep="\t")
    pd.testing.assert_frame_equal(written, table)


def test_a_table_of_a_head_of_cells_is_refused(done, tmp_path):
    from eval.finetune.classifier import Classifier, FinetuneSettings, Head, save_classifier
    from eval.finetune.predict import predict_file
    from pretrain.export.model_folder import load_exported
    from pretrain.model.architectures import encoder_of

    network, vocabulary = load_exported(done.folder / "model")
    head = Head("type", "cells", ("a", "b"))
    made = Classifier(encoder_of(network), vocabulary, (head,), FinetuneSettings())
    save_classifier(made, tmp_path / "head", {})
    with pytest.raises(ValueError, match=r"a table is of genes.* has only type \(of cells\)"):
        predict_file(done.folder / "cells.h5ad", tmp_path / "head", tmp_path / "genes.csv")
    assert not (tmp_path / "genes.csv").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--label": "symbol"}, "has 90 classes"),
        ({"--label": "nope"}, "--label nope: .* has the columns"),
        ({"--genes": "nope.csv"}, "--genes nope.csv: no such file"),
        ({"--folds": 2}, "--folds 2: at least 3"),
        ({"--patience": 2}, "--patience 2: early stopping needs genes of its own"),
        ({"--out": "scores"}, "scores"),
    ],
)
def test_refuses(changes, message, done):
    given = {"--genes": "labels.tsv", "--model": "model", "--out": "new", "--label": "label"}
    words = [str(w) for pair in (given | changes).items() for w in pair]
    ran = geneloom("finetune", "genes", "cells.h5ad", *words, cwd=done.folder)
    assert ran.returncode == 2 and not (done.folder / "new").exists()
    with pytest.raises(ValueError, match=message):
        raise ValueError(ran.stderr)


def test_a_table_in_memory_is_a_table(done, tmp_path):
    """Two of its three classes are left where the third has no label."""
    from eval.api import FinetuneGenesOptions, finetune_genes

    table = pd.read_csv(done.folder / "labels.tsv", sep="\t")
    table["three"] = np.arange(len(table)) % 3
    given = (done.folder / "cells.h5ad", table, done.folder / "model")
    with pytest.raises(ValueError, match="three has 3 classes.* leave the labels of others empty"):
        finetune_genes(*given, "three", tmp_path / "out")
    few = table.assign(two=table["three"].astype(str).replace("2", "")).head(10)
    with pytest.raises(ValueError, match="genes of the class '0' are left for 5 folds"):
        finetune_genes(given[0], few, given[2], "two", tmp_path / "out", FinetuneGenesOptions())
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.long
def test_killed_command_goes_on(done, tmp_path):
    """Killed with SIGKILL in a training of the second fold: the numbers of a run left alone."""
    out = tmp_path / "killed"
    command = [
        "finetune", "genes", "cells.h5ad", "--genes", "labels.tsv", "--model", "model", "--out",
        str(out), *map(str, ARGUMENTS),
    ]  # fmt: skip
    process = start_geneloom(command, tmp_path / "log", done.folder)
    until = time.monotonic() + 240
    while not list(out.glob(".partial/*/fold-1, */epoch-*")):
        assert process.process.is_alive(), f"finished before it could be killed:\n{process.said}"
        assert time.monotonic() < until
        time.sleep(0.005)
    kill(process.process)
    assert list(out.glob(".partial/*/units/*.json")) and not (out / "results.json").exists()
    again = start_geneloom(command, tmp_path / "log", done.folder)
    assert again.code() == 0, again.said
    assert json.loads((out / "results.json").read_text()) == done.results
    assert not (out / ".partial").exists()


def _on_ranks(folder: Path, out: Path) -> dict:
    from eval.benchmark.finetune_genes import finetune_genes
    from pretrain.ranks import dist

    ranks = dist.start(timeout_s=120, threads=1)
    found = finetune_genes(
        folder / "cells.h5ad", folder / "labels.tsv", folder / "model", "label", out,
        options(epochs=1), ranks=ranks,
    )  # fmt: skip
    dist.leave()
    return found


@pytest.mark.long
def test_two_ranks_write_the_same_scores_once(done, tmp_path):
    """Its short siblings: `test_two_ranks_are_one` of the training, and the test below."""
    one, other = run_ranks(2, _on_ranks, done.folder, tmp_path / "two")
    assert one == other == json.loads((tmp_path / "two" / "results.json").read_text())
    frozen = "frozen embedding, random weights"
    assert one["summary"][frozen] == done.results["summary"][frozen]
    assert one["summary"]["fine-tuned, pretrained"]["auroc"]["mean"] > 0.97
    assert {p.name for p in (tmp_path / "two").iterdir()} <= {"results.json", ".owner.json"}


def test_one_rank_writes_and_all_read(tmp_path):
    from eval.benchmark.outcome import Outcome, Store

    outcome = Outcome("fine-tuned", "model", "m", 0, {"auroc": 0.5}, 1.0)
    other = replace(outcome, scores={"auroc": 0.6})
    assert Store(tmp_path, {}, writes=False).outcome({}, lambda: outcome) == outcome
    assert not list(tmp_path.iterdir())
    assert Store(tmp_path, {}).outcome({}, lambda: other) == other
    assert Store(tmp_path, {}, writes=False).outcome({}, lambda: outcome) == other
