"""Gene tasks of the benchmark: planted truths, features and scores by hand, bad inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from data_prep.genes.vocabulary import CLS, EOS, MASK, PAD, Vocabulary
from eval.benchmark.outcome import Store, TaskRun
from eval.benchmark.task_file import Cells, GeneTask, Size, all_tasks
from pretrain.settings.model_settings import ModelConfig
from tests.contests import num_units

if TYPE_CHECKING:
    from eval.benchmark.material.models_and_cells import Model

NUM_GENES = 90
GENES = tuple(f"ENSG{i:011d}" for i in range(NUM_GENES))
CONFIG = ModelConfig(
    num_layers=2, hidden_size=32, num_heads=2, intermediate_size=64,
    hidden_dropout=0.0, attention_dropout=0.0,
)  # fmt: skip
SIZE = Size(max_cells=24, seeds=1, epochs=3, batch_cells=4, learning_rate=2e-3)
# Labels that no count tells, for they are drawn apart from the counts.
IS_POSITIVE = np.random.default_rng(5).permutation(NUM_GENES) < 30


def make_vocabulary(has_cls: bool = False) -> Vocabulary:
    special = {PAD: 0, MASK: 1} | ({CLS: 2, EOS: 3} if has_cls else {})
    medians = np.random.default_rng(1).uniform(0.5, 2.0, NUM_GENES)
    return Vocabulary(GENES, medians, special, 128, aliases={"RETIRED": GENES[3]})


def make_task(**changes: object) -> GeneTask:
    content = {
        "name": "planted", "title": "Planted", "kind": "genes", "labels": "labels.tsv",
        "positive": "yes", "negative": "no", "folds": 3, "sizes": {},
        "cells": Cells(files=("cells.h5ad",), recipe="None is needed."),
    }  # fmt: skip
    return GeneTask.model_validate(content | changes)


def write_data(folder: Path) -> Path:
    """Write 60 cells of independent counts, and a label for every gene."""
    import anndata

    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.gamma(0.8, 1.5, NUM_GENES), (60, NUM_GENES)).astype(np.float32)
    counts[:, :30] += rng.poisson(0.2, (60, 30))
    cells = anndata.AnnData(scipy.sparse.csr_matrix(counts), var=pd.DataFrame(index=GENES))
    cells.obs_names = [f"cell{i}" for i in range(60)]
    cells.write_h5ad(folder / "cells.h5ad")
    labels = np.where(IS_POSITIVE, "yes", "no")
    table = pd.DataFrame({"gene": GENES, "label": labels, "symbol": [f"S{g}" for g in GENES]})
    table.to_csv(folder / "labels.tsv", sep="\t", index=False)
    return folder


def make_model(name: str, vocabulary: Vocabulary, seed: int = 1) -> Model:
    from eval.benchmark.material.models_and_cells import Model
    from pretrain.model.masked_gene_model import build_model

    network = build_model(CONFIG, vocabulary, seed).bert
    return Model(name, Path(name), network, vocabulary, f"digest of {name}")


def knowing_model(vocabulary: Vocabulary) -> Model:
    """Return a model whose embedding table carries the label in one direction."""
    import torch

    model = make_model("knowing", vocabulary)
    table = model.network.bert.get_input_embeddings().weight
    direction = torch.randn(table.shape[1], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        signs = torch.from_numpy(np.where(IS_POSITIVE, 1.0, -1.0)).float()
        table[vocabulary.first_gene_token :] += signs[:, None] * direction
    return model


def constant_model(vocabulary: Vocabulary) -> Model:
    """Return a model that has the same state for every gene: all weights are zero."""
    import torch

    model = make_model("constant", vocabulary)
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.zero_()
    return model


@dataclass(frozen=True)
class Planted:
    run: TaskRun
    units: list[str]
    folder: Path
    models: list[Model]

    def scores(self, contender: str, role: str, model: str | None, score: str = "auroc") -> list:
        found = [
            o.scores[score]
            for o in self.run.outcomes
            if (o.contender, o.role, o.model) == (contender, role, model)
        ]
        assert len(found) == 3, f"{contender}, {role}, {model}: {len(found)} folds"
        return found


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Planted:
    """One run of two models; takes some seconds, for all contenders train in it."""
    from eval.benchmark.kinds.gene_tasks import ClassesOfGenes
    from eval.benchmark.material.models_and_cells import Bench

    folder = write_data(tmp_path_factory.mktemp("planted"))
    vocabulary = make_vocabulary()
    models = [knowing_model(vocabulary), constant_model(vocabulary)]
    units = []
    store = Store(folder / "store", {}, lambda name, seconds: units.append(name))
    found = ClassesOfGenes(make_task(), SIZE, Bench(models, folder, store, 0, "cpu", False)).run()
    return Planted(found, units, folder, models)


def test_a_model_that_knows_wins(planted):
    for contender in ("fine-tuned", "frozen embedding", "input embeddings"):
        assert np.mean(planted.scores(contender, "model", "knowing")) > 0.97, contender
        assert np.mean(planted.scores(contender, "twin", "knowing")) < 0.75, contender
    assert np.mean(planted.scores("fine-tuned", "model", "knowing", "auroc_occurrence")) > 0.9
    baselines = {o.contender for o in planted.run.outcomes if o.role == "baseline"}
    assert len(baselines) == 12
    for name in baselines:
        assert np.mean(planted.scores(name, "baseline", None)) < 0.75, name
    intervals = planted.run.details["intervals_over_genes"]
    for name in (*baselines, "fine-tuned, knowing with random weights", "fine-tuned, constant"):
        assert intervals[name]["difference"]["low"] > 0, name


def test_a_constant_model_is_at_one_half(planted):
    for contender in ("fine-tuned", "frozen embedding", "input embeddings"):
        for score in ("auroc", "balanced_accuracy"):
            assert planted.scores(contender, "model", "constant", score) == [0.5] * 3, contender


def test_shuffled_labels_are_at_one_half(planted):
    controls = [o for o in planted.run.outcomes if o.role == "control"]
    assert {(o.contender, o.model) for o in controls} == {
        ("shuffled labels, frozen embedding", "knowing"),
        ("shuffled labels, frozen embedding", "constant"),
        ("shuffled labels, logistic regression on counts", None),
    }
    for name in (None, "knowing"):
        mean = np.mean([o.scores["auroc"] for o in controls if o.model == name])
        # Standard error of 3 folds x 10 shuffles of 30 test genes: 0.02.
        assert abs(mean - 0.5) < 0.08, name


def test_every_unit_is_counted_and_details_are_whole(planted):
    from eval.benchmark.kinds.gene_tasks import ClassesOfGenes

    task_run = planted.run
    assert num_units(ClassesOfGenes, make_task(), SIZE, planted.models) == len(planted.units)
    assert len(planted.units) == len(task_run.outcomes)
    assert (task_run.cells, task_run.chance, task_run.classes) == (24, 0.5, ["no", "yes"])
    assert task_run.excluded["cells: not drawn"] == 36
    details = task_run.details
    assert sum(details["genes"]) + sum(
        v for k, v in task_run.excluded.items() if k.startswith("genes")
    ) == NUM_GENES  # fmt: skip
    assert details["test_share"] == 1 / 3
    assert set(details["predictions"]) == {"fine-tuned, knowing", "fine-tuned, constant"}
    genes = details["predictions"]["fine-tuned, knowing"]
    assert len({g["gene"] for g in genes}) == len(genes) == sum(details["genes"])
    probabilities = [g["probability"] for g in genes]
    assert probabilities == sorted(probabilities, reverse=True)
    assert all(g["label"] == IS_POSITIVE[GENES.index(g["gene"])] for g in genes)
    assert all(0 < g["cells"] <= 24 and g["symbol"] == f"S{g['gene']}" for g in genes)
    for name, points in details["roc"].items():
        assert len(points) <= 100 and points[0] == [0, 0] and points[-1] == [1, 1], name
    assert all("probability" not in o.details for o in task_run.outcomes)


@pytest.mark.long  # test_eval_cell_tasks.py: the same of cells
def test_again_from_the_store_and_from_nothing(planted, tmp_path):
    """A stored run is not computed again; a new one has the same numbers, whoever else takes part.

    Some seconds: every contender trains.
    """
    from eval.benchmark.kinds.gene_tasks import ClassesOfGenes
    from eval.benchmark.material.models_and_cells import Bench

    spent = []
    store = Store(planted.folder / "store", {}, lambda name, seconds: spent.append(seconds))
    again = ClassesOfGenes(
        make_task(), SIZE, Bench(planted.models, planted.folder, store, 0, "cpu", False)
    ).run()
    assert again == planted.run
    assert set(spent) == {0.0}
    store = Store(tmp_path, {})
    alone = ClassesOfGenes(
        make_task(), SIZE, Bench(planted.models[:1], planted.folder, store, 0, "cpu", False)
    ).run()
    before = {(o.contender, o.role, o.model, o.fold): o.scores for o in planted.run.outcomes}
    for o in alone.outcomes:
        assert o.scores == before[o.contender, o.role, o.model, o.fold]
    assert len(alone.outcomes) == num_units(ClassesOfGenes, make_task(), SIZE, planted.models[:1])
    for name, found in alone.details["intervals_over_genes"].items():
        assert found == planted.run.details["intervals_over_genes"][name], name


def test_folds_divide_the_genes():
    from eval.benchmark.material.gene_labels import gene_folds

    labels = IS_POSITIVE.astype(np.int64)
    folds = gene_folds(labels, 5, 0)
    assert sorted(np.concatenate([test for _, test in folds])) == list(range(NUM_GENES))
    for train, test in folds:
        assert not set(train) & set(test)
        assert len(train) + len(test) == NUM_GENES
        assert labels[test].sum() == 6, "stratified"
    again, other = gene_folds(labels, 5, 0), gene_folds(labels, 5, 1)
    assert all((a[1] == b[1]).all() for a, b in zip(folds, again, strict=True))
    assert any((a[1] != b[1]).any() for a, b in zip(folds, other, strict=True))


def test_labels_are_read_and_what_is_left_out_is_counted(tmp_path):
    from eval.benchmark.material.gene_labels import read_labels

    rows = [
        "ensembl_id\tlabel\tambiguous", "a\tyes\tFalse", "b\tno\tfalse", "b\tno\t0", "c\t\tFalse",
        "d\tmaybe\tFalse", "e\tyes\tTrue", "f\tyes\t", "f\tno\t", " g \tno\tno",
    ]  # fmt: skip
    (tmp_path / "labels.tsv").write_text("\n".join(rows) + "\n")
    task = make_task(expected_genes={"yes": 3, "no": 2})
    found = read_labels(task, tmp_path)
    assert found.symbols == ["", "", ""]
    assert (found.ids, found.labels.tolist()) == (["a", "b", "g"], [1, 0, 0])
    assert found.excluded == {
        "no label": 1, "label of neither class": 1, "ambiguous": 2, "repeated": 1,
        "(expected 2 of 'no', found 3)": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("symbol\tlabel\nA\tyes\n", "needed are ensembl_id"),
        ("gene\tclass\nA\tyes\n", "needed are ensembl_id"),
        ("gene\tlabel\nA\tyes\n\tno\n", r"no gene in line\(s\) \[3\]"),
        ("gene\tlabel\nA\tyes\nB\tyes\n", "no gene has the label 'no'"),
        ("gene\tlabel\nA\tYes\nB\tno\n", "no gene has the label 'yes'"),
        ("gene\tlabel\tambiguous\nA\tyes\tperhaps\nB\tno\tno\n", "holds 'perhaps'"),
        ("", "is empty"),
        (None, "no such file. None is needed."),
    ],
)
def test_bad_labels(text, message, tmp_path):
    from eval.benchmark.material.gene_labels import read_labels

    if text is not None:
        (tmp_path / "labels.tsv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_labels(make_task(), tmp_path)
    with pytest.raises(ValueError, match="--data"):
        read_labels(make_task(), None)


def test_genes_that_a_model_cannot_read_are_left_out(tmp_path):
    from eval.benchmark.material.gene_labels import choose_genes, read_labels
    from eval.benchmark.material.models_and_cells import load_cells

    data = write_data(tmp_path)
    short = Vocabulary(GENES[:80], np.ones(80), {PAD: 0, MASK: 1}, 8)
    models = [make_model("long", make_vocabulary()), make_model("short", short)]
    cells = load_cells(make_task().cells, (), models, data, None, 0)
    labelled = read_labels(make_task(), data)
    few = cells.subset(np.arange(10))
    chosen = choose_genes(labelled, models, [few, cells.subset(np.arange(10, 20))], make_task())
    assert chosen.excluded["not in the vocabulary of short"] == 10
    assert chosen.excluded["detected, but never among the tokens of a cell (short)"] > 10
    assert len(chosen.ids) + sum(chosen.excluded.values()) == NUM_GENES
    read = set(np.concatenate(few.tokens["short"]).tolist())
    assert set(short.tokens_of(chosen.ids).tolist()) <= read
    with pytest.raises(ValueError, match="genes of the class 'yes' are left for 40 folds"):
        choose_genes(labelled, models[:1], [cells], make_task(folds=40))


def test_an_alias_does_not_put_a_gene_on_both_sides(tmp_path):
    from eval.benchmark.material.gene_labels import choose_genes, read_labels
    from eval.benchmark.material.models_and_cells import load_cells

    data = write_data(tmp_path)
    model = make_model("one", make_vocabulary())
    with (data / "labels.tsv").open("a") as file:
        file.write("RETIRED\tyes\tOLD\n")
    cells = load_cells(make_task().cells, (), [model], data, None, 0)
    chosen = choose_genes(read_labels(make_task(), data), [model], [cells], make_task())
    assert "RETIRED" not in chosen.ids
    assert chosen.excluded["another id of a gene above"] == 1


def test_symbols_are_read_by_a_model_that_has_names_for_its_genes(tmp_path):
    from eval.benchmark.material.gene_labels import choose_genes, read_labels
    from eval.benchmark.material.models_and_cells import load_cells

    data = write_data(tmp_path)
    symbols = {f"G{i}": gene for i, gene in enumerate(GENES)}
    rows = [f"{name}\t{'yes' if IS_POSITIVE[i] else 'no'}" for i, name in enumerate(symbols)]
    (data / "labels.tsv").write_text("\n".join(["gene\tlabel", *rows]) + "\n")
    model = make_model("one", make_vocabulary())
    named = replace(model, gene_names=symbols)
    cells = load_cells(make_task().cells, (), [named], data, None, 0)
    labelled = read_labels(make_task(), data)
    assert choose_genes(labelled, [named], [cells], make_task()).ids[:2] == ["G0", "G1"]
    with pytest.raises(ValueError, match="0 genes of the class 'no' are left"):
        choose_genes(labelled, [model], [cells], make_task())


def test_features_by_hand():
    from eval.benchmark.material.gene_features import (
        STATIC_NAMES,
        expression_of_tokens,
        ranks_of_tokens,
        static_features,
    )
    from eval.scores.baselines import log_normalise

    vocabulary = Vocabulary(("A", "B", "C"), np.array([1.0, 2.0, 4.0]), {PAD: 0, MASK: 1}, 8,
                            aliases={"old A": "A"})  # fmt: skip
    counts = scipy.sparse.csr_matrix(
        np.array([[1, 2, 1, 6, 0], [0, 4, 0, 4, 2], [0, 0, 0, 5, 5]], dtype=np.float32)
    )
    genes = ["A", "B", "old A", "", "C"]
    expression = expression_of_tokens(counts, genes, vocabulary)
    joined = np.array([[2, 2, 0, 6], [0, 4, 2, 4], [0, 0, 5, 5]], dtype=np.float32)
    expected = log_normalise(scipy.sparse.csr_matrix(joined)).toarray()[:, :3].T
    np.testing.assert_allclose(expression[2:].toarray(), expected, rtol=1e-6)
    assert expression[:2].nnz == 0

    cells = [np.array([2, 3]), np.array([3, 4]), np.array([4])]
    ranks = ranks_of_tokens(cells, vocabulary)
    by_hand = np.array([[1, 0, 0], [0.5, 1, 0], [0, 0.5, 1]])
    np.testing.assert_allclose(ranks[2:].toarray(), by_hand)
    with_cls = Vocabulary(("A", "B", "C"), np.ones(3), {PAD: 0, MASK: 1, CLS: 2, EOS: 3}, 8)
    wrapped = [np.array([2, *(c + 2), 3]) for c in cells]
    np.testing.assert_allclose(ranks_of_tokens(wrapped, with_cls)[4:].toarray(), by_hand)

    static = static_features(expression, ranks, np.array([4, 2]), vocabulary)
    np.testing.assert_allclose(static[0, STATIC_NAMES.index("mean rank")], 0.75)
    np.testing.assert_allclose(static[0, STATIC_NAMES.index("detection rate")], 2 / 3)
    np.testing.assert_allclose(static[0, STATIC_NAMES.index("mean expression")],
                               (np.log1p(2000) + np.log1p(5000)) / 3, rtol=1e-6)  # fmt: skip
    np.testing.assert_allclose(static[0, STATIC_NAMES.index("non-zero median")],
                               (np.log1p(2000) + np.log1p(5000)) / 2, rtol=1e-6)  # fmt: skip
    np.testing.assert_allclose(
        static[:, STATIC_NAMES.index("median of the vocabulary")], np.log([4.0, 1.0])
    )


def test_reduced_profiles_keep_distances():
    from eval.benchmark.material.gene_features import reduce_profiles

    rng = np.random.default_rng(0)
    profiles = scipy.sparse.csr_matrix(rng.random((20, 6)) @ rng.random((6, 30)))
    reduced = reduce_profiles(profiles, np.array([4, 9, 17]), 0)
    whole = profiles.toarray()[[4, 9, 17]]
    np.testing.assert_allclose(
        np.linalg.norm(reduced[0] - reduced[1:], axis=1),
        np.linalg.norm(whole[0] - whole[1:], axis=1),
        rtol=1e-5,
    )


@pytest.mark.parametrize("has_cls", [False, True])
def test_gene_embeddings_are_means_over_cells(has_cls):
    import torch

    from eval.benchmark.material.gene_features import embed_genes

    vocabulary = make_vocabulary(has_cls)
    encoder = make_model("any", vocabulary).network.bert
    rng = np.random.default_rng(0)
    first = vocabulary.first_gene_token
    cells = [first + rng.choice(NUM_GENES, n, replace=False) for n in (5, 17, 30)]
    if has_cls:
        cells = [np.concatenate([[2], c, [3]]) for c in cells]
    found = embed_genes(cells, encoder, vocabulary, token_budget=64)
    states: dict[int, list] = {}
    with torch.inference_mode():
        for cell in cells:
            hidden = encoder(input_ids=torch.from_numpy(cell)[None]).last_hidden_state[0]
            for token, state in zip(cell.tolist(), hidden.numpy(), strict=True):
                states.setdefault(token, []).append(state)
    assert max(len(s) for s in states.values()) > 1
    for token, values in states.items():
        np.testing.assert_allclose(found[token], np.mean(values, axis=0), atol=1e-5)
    assert np.isnan(found[[t for t in range(len(found)) if t not in states]]).all()


@pytest.mark.parametrize("classifier", ["logistic regression", "random forest", "SVM", "MLP"])
def test_classifiers_learn_from_training_genes_only(classifier):
    from sklearn.metrics import roc_auc_score

    from eval.benchmark.neighbours.gene_baselines import predict_classes

    rng = np.random.default_rng(0)
    labels = np.arange(120) % 2
    features = rng.normal(size=(120, 4)) + labels[:, None] * [3.0, 0, 0, 0]
    train, test = np.arange(80), np.arange(80, 120)
    found = predict_classes(classifier, features, labels, train, test, 0)
    assert roc_auc_score(labels[test], found) > 0.85
    assert ((found >= 0) & (found <= 1)).all()
    lies = labels.copy()
    lies[test] = 1 - lies[test]
    np.testing.assert_array_equal(
        predict_classes(classifier, features, lies, train, test, 0), found
    )


def test_scores_count_a_gene_once():
    from sklearn.metrics import roc_auc_score

    from eval.benchmark.scoring.gene_scores import mean_by_gene, score_genes

    gene = np.array([0, 0, 0, 0, 1, 2, 3])
    occurrence = np.array([0.9, 0.9, 0.9, 0.9, 0.2, 0.3, 0.1])
    truth = np.array([1, 1, 0, 0])
    by_gene = mean_by_gene(gene, occurrence, 5)
    np.testing.assert_allclose(by_gene[:4], [0.9, 0.2, 0.3, 0.1])
    assert np.isnan(by_gene[4])
    scores = score_genes(truth, by_gene[:4])
    assert scores["auroc"] == 0.75 < roc_auc_score(truth[gene], occurrence)
    np.testing.assert_allclose(scores["auprc"], (1 + 2 / 3) / 2)
    assert scores["balanced_accuracy"] == 0.75
    np.testing.assert_allclose(scores["macro_f1"], (2 / 3 + 0.8) / 2)


def test_resampled_auroc_is_that_of_repeated_genes():
    from sklearn.metrics import roc_auc_score

    from eval.benchmark.material.gene_labels import gene_folds
    from eval.benchmark.scoring.gene_scores import interval, resample_genes, resampled_auroc

    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(40) % 4 == 0).astype(int)
    folds = [test for _, test in gene_folds(labels, 3, 0)]
    scores = [np.round(labels[f] + rng.normal(size=len(f)), 1) for f in folds]
    weights = resample_genes(labels, 0)
    assert (weights[:, labels == 1].sum(axis=1) == 10).all()
    assert (weights[:, labels == 0].sum(axis=1) == 30).all()
    found = resampled_auroc(labels, folds, scores, weights)
    for row in range(20):
        expected = []
        for fold, values in zip(folds, scores, strict=True):
            times = weights[row][fold].astype(int)
            drawn = np.repeat(labels[fold], times)
            if len(set(drawn)) == 2:
                expected.append(roc_auc_score(drawn, np.repeat(values, times)))
        np.testing.assert_allclose(found[row], np.mean(expected), rtol=1e-6)
    unchanged = resampled_auroc(labels, folds, scores, np.ones((1, 40), np.float32))
    plain = np.mean([roc_auc_score(labels[f], s) for f, s in zip(folds, scores, strict=True)])
    np.testing.assert_allclose(unchanged, [plain])
    found_interval = interval(found)
    assert found_interval["low"] < plain < found_interval["high"]


def test_repetitions_do_not_narrow_the_interval():
    """Ten repetitions of the same predictions know no more genes than one."""
    from eval.benchmark.scoring.gene_scores import interval, resample_genes, resampled_auroc

    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    score = labels + rng.normal(size=60)
    weights = resample_genes(labels, 0)
    once = interval(resampled_auroc(labels, [np.arange(60)], [score], weights))
    often = interval(resampled_auroc(labels, [np.arange(60)] * 10, [score] * 10, weights))
    np.testing.assert_allclose(list(once.values()), list(often.values()))
    assert once["high"] - once["low"] > 0.1


def test_mean_curve_has_the_mean_area():
    from sklearn.metrics import roc_auc_score

    from eval.benchmark.scoring.gene_scores import mean_roc

    rng = np.random.default_rng(0)
    truth = [rng.permutation(np.arange(400) % 3 == 0).astype(int) for _ in range(3)]
    scores = [t + rng.normal(size=400) for t in truth]
    points = np.array(mean_roc(truth, scores))
    expected = np.mean([roc_auc_score(t, s) for t, s in zip(truth, scores, strict=True)])
    assert abs(np.trapezoid(points[:, 1], points[:, 0]) - expected) < 0.01
    assert (np.diff(points, axis=0) >= 0).all()


def gene_tasks() -> dict[str, GeneTask]:
    return {n: t for n, t in all_tasks().items() if isinstance(t, GeneTask)}


def test_the_papers_gene_tasks_are_declared():
    tasks = gene_tasks()
    assert {
        "tf_dosage", "bivalent_unmethylated", "bivalent_lys4", "bivalent_genome_wide", "tf_range",
        "notch1_centrality", "notch1_targets", "cd_molecules",
    } <= tasks.keys()  # fmt: skip
    for name, task in tasks.items():
        assert name == "cd_molecules" or {"standard", "paper"} <= task.sizes.keys(), name
        if "paper" in task.sizes:
            paper = task.sizes["paper"]
            settings = (paper.learning_rate, paper.batch_cells, paper.epochs, paper.freeze_layers)
            assert settings == (5e-5, 12, 1, 4), name


def test_labels_of_the_package_are_those_of_its_cells():
    from eval.benchmark.material.gene_labels import read_labels
    from eval.cells.demo_cells import recover_counts

    task = gene_tasks()["cd_molecules"]
    labelled = read_labels(task, None)
    names = set(recover_counts().var_names)
    assert set(labelled.ids) <= names
    assert labelled.excluded == {"no label": 0, "label of neither class": 0, "repeated": 0,
                                 "ambiguous": 29}  # fmt: skip
    assert len(labelled.ids) + 29 == len(names)
    assert labelled.labels.sum() == 26


@pytest.mark.parametrize(
    "name", ["tf_dosage", "bivalent_unmethylated", "bivalent_lys4", "notch1_centrality"]
)
def test_real_labels_are_as_declared(name, real_data):
    from eval.benchmark.material.gene_labels import read_labels

    task = gene_tasks()[name]
    labelled = read_labels(task, real_data)
    assert not [reason for reason in labelled.excluded if reason.startswith("(expected")]
    assert set(np.unique(labelled.labels)) == {0, 1}
    for pattern in task.cells.files:
        assert list(real_data.glob(pattern)), pattern
