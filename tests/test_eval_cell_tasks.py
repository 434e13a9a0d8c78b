"""Cell tasks of the benchmark: planted truth, clean splits, scores by hand, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from eval.benchmark.outcome import Outcome, Store, TaskRun
from eval.benchmark.task_file import Cells, CellTask, Size
from pretrain.settings.model_settings import ModelConfig
from tests.contests import num_units
from tests.synthetic import make_cells
from tests.test_eval import vocabulary_of

if TYPE_CHECKING:
    from eval.benchmark.material.models_and_cells import Model, TaskCells

MODEL = ModelConfig(
    num_layers=1, hidden_size=16, num_heads=2, intermediate_size=32,
    hidden_dropout=0.0, attention_dropout=0.0,
)  # fmt: skip
SIZE = Size(
    seeds=2, epochs=4, learning_rate=5e-3, batch_cells=16, max_train_per_class=20, shots=(5,)
)
TASK = CellTask(
    name="types", title="Types", kind="cells", label="cell_type", group="donor", sizes={},
    cells=Cells(files=("cells.h5ad",), recipe="made by the tests"),
)  # fmt: skip


def planted_models(path: Path) -> list[Model]:
    """Return a model whose gene embeddings are the types' expression, and one of zeros.

    The first has a folder with an SVD of the cells, and cell states of it.
    """
    import anndata
    import torch

    from eval.benchmark.material.models_and_cells import Model
    from eval.cells.read_cells import encode_file
    from pretrain.cell_states.cell_state import reduced
    from pretrain.cell_states.frozen_states import embed_cells
    from pretrain.counting.corpus_svd import CorpusSvd
    from pretrain.export.model_folder import weights_digest
    from pretrain.model.masked_gene_model import build_model

    vocabulary = vocabulary_of(path)
    cells = anndata.read_h5ad(path)
    kinds = np.arange(cells.n_obs) % 3
    means = np.stack([np.asarray(cells.X[kinds == k].mean(axis=0)).ravel() for k in range(3)])
    typical = means - means.mean(axis=0)
    marker, constant = (build_model(MODEL, vocabulary, 0).bert for _ in range(2))
    with torch.no_grad():
        table = marker.bert.embeddings.word_embeddings.weight
        table[vocabulary.first_gene_token :, :3] = torch.from_numpy(
            typical[:, [cells.var_names.get_loc(g) for g in vocabulary.genes]].T
        ).float()
        for parameter in constant.parameters():
            parameter.zero_()
    folder = path.parent / "marker"
    marker.save_pretrained(folder)
    tokens = encode_file(path, vocabulary).tokens
    vectors = np.linalg.svd(weights_of(tokens, vocabulary.num_tokens), full_matrices=False)[2]
    svd = CorpusSvd(
        vectors[:9].T.astype(np.float32), np.ones(9, np.float32), vocabulary.sha256,
        vocabulary.first_gene_token, {"shards_fingerprint": "", "cells": 120, "residual": 0.0},
    )  # fmt: skip
    svd.save(folder)
    means = embed_cells(tokens, marker.bert, vocabulary, layer=0)
    reduced(svd, tokens, means, weights_digest(folder)).save(folder)
    return [
        Model("marker", folder, marker, vocabulary, digest="marker"),
        Model("constant", path.parent, constant, vocabulary, digest="constant"),
    ]


def weights_of(tokens: list[np.ndarray], num_tokens: int) -> np.ndarray:
    """Return float64 [cells, tokens]: 1 - i / L for the gene at place i of a cell's L."""
    weights = np.zeros((len(tokens), num_tokens))
    for row, cell in zip(weights, tokens, strict=True):
        row[cell.astype(np.int64)] = 1 - np.arange(len(cell)) / len(cell)
    return weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cells")
    # Small, because a whole benchmark of two models runs on it, twins and few-shot curve included.
    make_cells(120, num_genes=60).write_h5ad(path / "cells.h5ad")
    return path


@pytest.fixture(scope="module")
def models(folder: Path) -> list[Model]:
    return planted_models(folder / "cells.h5ad")


@pytest.fixture(scope="module")
def found(folder: Path, models: list[Model]) -> tuple[TaskRun, list[str]]:
    """A whole run of two folds, and the names of its units."""
    from eval.benchmark.kinds.cell_tasks import ClassesOfCells
    from eval.benchmark.material.models_and_cells import Bench

    units: list[str] = []
    store = Store(folder / "units", {}, lambda name, seconds: units.append(name))
    return ClassesOfCells(TASK, SIZE, Bench(models, folder, store, 0, "cpu", False)).run(), units


def mean_score(outcomes: list[Outcome], contender: str, model: str | None = None, role=None):
    scores = [
        o.scores["macro_f1"] for o in outcomes
        if (o.contender, o.model) == (contender, model) and role in (None, o.role)
    ]  # fmt: skip
    assert scores, contender
    return np.mean(scores)


def test_what_is_planted_is_found(found):
    result = found[0]
    score = {
        (name, m): mean_score(result.outcomes, name, m, "model")
        for name in ("fine-tuned", "frozen embedding", "bag of genes")
        for m in ("marker", "constant")
    }
    for name in ("fine-tuned", "frozen embedding", "bag of genes"):
        assert score[name, "marker"] > 0.6
        assert score[name, "constant"] < 0.35, "one answer for all cells"
        assert score[name, "constant"] < score[name, "marker"]
    for name, role in (("corpus SVD", "baseline"), ("cell state", "model")):
        assert mean_score(result.outcomes, name, "marker", role) > 0.6
    assert mean_score(result.outcomes, "logistic regression") > 0.9
    assert mean_score(result.outcomes, "majority class") < 0.35


def test_shuffled_labels_give_chance(found):
    result = found[0]
    assert result.chance is not None and 0.25 < result.chance < 0.4
    for name, model in (("shuffled labels", None), ("shuffled labels, frozen embedding", "marker")):
        assert abs(mean_score(result.outcomes, name, model) - result.chance) < 0.2
    assert {o.role for o in result.outcomes if o.contender.startswith("shuffled")} == {"control"}


def test_every_contender_is_in_every_fold(found, models):
    from eval.benchmark.kinds.cell_tasks import ClassesOfCells
    from eval.benchmark.neighbours.cell_baselines import BASELINES

    result, units = found
    assert len(units) == num_units(ClassesOfCells, TASK, SIZE, models)
    by_fold = [
        [(o.contender, o.role, o.model) for o in result.outcomes if o.fold == fold]
        for fold in range(2)
    ]
    assert by_fold[0] == by_fold[1]
    assert len(set(by_fold[0])) == len(by_fold[0]) == len(BASELINES) + 1 + 2 * (6 + 1) + 3
    for outcome in result.outcomes:
        assert set(outcome.scores) == {
            "macro_f1", "balanced_accuracy", "accuracy", "auprc", "ece"
        }  # fmt: skip
        confusion = np.array(outcome.details["confusion"])
        assert confusion.sum() == result.details["folds"][outcome.fold]["test_cells"]


def test_few_shot_curve_stands_apart(found):
    result = found[0]
    curve = result.details["few_shot"]
    assert not [o.contender for o in result.outcomes if "a class" in o.contender]
    assert set(curve) == {"logistic regression"} | {
        f"{how}, {model}{twin}"
        for how in ("fine-tuned", "frozen embedding")
        for model in ("marker", "constant")
        for twin in ("", " with random weights")
    }
    for points in curve.values():
        assert set(points) == {"5"} and points["5"]["low"] <= points["5"]["mean"]
    assert curve["frozen embedding, marker"]["5"]["mean"] > 0.6


def test_donors_stay_whole_in_the_run(found):
    sets = [tuple(f["test_groups"]) for f in found[0].details["folds"]]
    assert len(set(sets)) == 2, "each seed tests other donors"
    assert "donor" in found[0].split


def test_same_seed_same_numbers_and_stored_ones_are_taken(found, folder, models, tmp_path):
    """One fold again: from the store without computing, and in a new folder from nothing."""
    from eval.benchmark.kinds.cell_tasks import ClassesOfCells
    from eval.benchmark.material.models_and_cells import Bench

    size = SIZE.model_copy(update={"seeds": 1, "shots": ()})
    first = [o for o in found[0].outcomes if o.fold == 0 and o.model != "constant"]
    only = [models[0]]
    stored = ClassesOfCells(
        TASK, size, Bench(only, folder, Store(folder / "units", {}), 0, "cpu", False)
    ).run()
    assert stored.outcomes == first
    new = ClassesOfCells(
        TASK, size, Bench(only, folder, Store(tmp_path / "units", {}), 0, "cpu", False)
    ).run()
    assert [o.scores for o in new.outcomes] == [o.scores for o in first]


def task_cells(counts: np.ndarray, **columns: list[str]) -> TaskCells:
    from eval.benchmark.material.models_and_cells import TaskCells

    matrix = scipy.sparse.csr_matrix(counts.astype(np.float32))
    genes = [f"g{i}" for i in range(counts.shape[1])]
    return TaskCells(matrix, genes, pd.DataFrame(columns), {}, {}, "digest")


def random_counts(num_cells: int, num_genes: int = 30) -> np.ndarray:
    return np.random.default_rng(0).poisson(2.0, size=(num_cells, num_genes))


def test_leaked_splits_are_refused():
    from eval.scores.splits import require_clean_split, seen_in_training

    counts = scipy.sparse.csr_matrix(random_counts(8))
    groups = np.array(list("aabbccdd"))
    train, test = np.arange(4), np.arange(4, 8)
    require_clean_split(train, test, groups, counts)
    require_clean_split(train, test, None, counts)
    with pytest.raises(ValueError, match="groups have cells in training and in test, e.g. 'b'"):
        require_clean_split(np.arange(3), np.arange(3, 8), groups, counts)
    with pytest.raises(ValueError, match="1 cells are in training and in test"):
        require_clean_split(np.arange(5), test, None, counts)
    with pytest.raises(ValueError, match="0 test cells"):
        require_clean_split(train, test[:0], None, counts)
    again = counts.tolil()
    again[6] = again[1]
    assert seen_in_training(train, test, again.tocsr()).tolist() == [False, False, True, False]
    with pytest.raises(ValueError, match="1 test cells have exactly the counts"):
        require_clean_split(train, test, groups, again.tocsr())


def test_repeated_cells_leave_the_test_side():
    from eval.benchmark.material.labelled_cells import divide

    counts = random_counts(80)
    counts[1::20] = counts[0]
    labels = np.arange(80) % 2
    cells = task_cells(counts, label=list("ab" * 40))
    train, test, removed = divide(cells, labels, None, Size(seeds=1), 3)
    known = np.isin([0, 1, 21, 41, 61], train)
    assert known.any() and removed == (~known).sum() > 0
    assert len(train) + len(test) + removed == 80


def test_unusable_cells_are_counted():
    from eval.benchmark.material.labelled_cells import usable_cells

    labels = ["a"] * 20 + ["b"] * 20 + ["rare"] * 3 + ["alone"] * 8 + ["", "nan"] + ["a"]
    donors = ["1", "2"] * 20 + ["1", "2", "1"] + ["3"] * 8 + ["1", "2"] + [""]
    cells = task_cells(random_counts(len(labels)), label=labels, donor=donors)
    kept, excluded = usable_cells(cells, "label", "donor")
    assert excluded == {
        "no label": 2, "no group": 1, "class below 5 cells": 3, "class in one donor only": 8
    }  # fmt: skip
    assert len(kept.metadata) == 40 and set(kept.metadata["label"]) == {"a", "b"}
    without = usable_cells(cells, "label", None)[1]
    assert without == {"no label": 2, "class below 5 cells": 3}
    one = replace(cells, metadata=cells.metadata.assign(label="a"))
    with pytest.raises(ValueError, match="column 'label': fewer than two classes"):
        usable_cells(one, "label", None)
    confounded = cells.metadata.assign(donor=cells.metadata["label"])
    with pytest.raises(ValueError, match="'donor' kept whole"):
        usable_cells(replace(cells, metadata=confounded), "label", "donor")


def test_impossible_groups_are_refused():
    from eval.benchmark.material.labelled_cells import divide

    cells = task_cells(random_counts(40), label=["a", "b"] * 20)
    labels = np.arange(40) % 2
    with pytest.raises(ValueError, match="no choice of"):
        divide(cells, labels, np.array(["x"] * 40), Size(seeds=1), 0)


def test_few_donors_are_tried_in_every_way():
    """Two donors of one arm, four of the other: 8 test sets of one each, all used in 8 seeds."""
    from eval.scores.splits import split_cells, validation_cells

    donors = np.repeat(["h1", "h2", "c1", "c2", "c3", "c4"], 140)
    labels = np.array([int(d.startswith("c")) for d in donors])
    sets = []
    for seed in range(8):
        train, test = split_cells(labels, donors, seed)
        sets.append(tuple(np.unique(donors[test])))
        assert sorted(d[0] for d in sets[-1]) == ["c", "h"]
        fit, held = validation_cells(train, labels, donors, seed)
        assert not set(fit) & set(held) and set(fit) | set(held) == set(train)
    assert len(set(sets)) == 8
    three = np.array([0, 0, 1, 1, 2, 2]).repeat(140)
    _, test = split_cells(three, donors, 0)
    assert len(np.unique(donors[test])) == 3, "fewer would leave a class out"


def test_validation_keeps_donors_whole_where_it_can():
    from eval.scores.splits import validation_cells

    donors = np.repeat([f"d{i}" for i in range(8)], 50)
    labels = np.tile([0, 1], 200)
    train = np.arange(300)
    fit, held = validation_cells(train, labels, donors, 0)
    assert not set(donors[fit]) & set(donors[held])
    assert set(labels[held]) == {0, 1}


def test_scores_of_probabilities_by_hand():
    from eval.scores.metrics import calibration_error, score_probabilities

    truth = np.array([0, 0, 1, 1])
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.3, 0.7]])
    scores = score_probabilities(truth, probabilities, ["a", "b"])
    assert scores["accuracy"] == 0.75
    # Both orders are perfect: .9 > .4 > .3 > .2 for "a", and the other way round for "b".
    assert scores["auprc"] == 1.0
    np.testing.assert_allclose(scores["ece"], (0.1 + 0.6 + 0.2 + 0.3) / 4)
    error, bins = calibration_error(np.zeros(10, int), np.tile([0.7, 0.3], (10, 1)))
    np.testing.assert_allclose(error, 0.3)
    assert bins == [{"cells": 10, "confidence": pytest.approx(0.7), "accuracy": 1.0}]
    with pytest.raises(ValueError, match="shape"):
        score_probabilities(truth, probabilities, ["a", "b", "c"])
    with pytest.raises(ValueError, match="do not sum to 1"):
        score_probabilities(truth, probabilities * np.nan, ["a", "b"])


def test_chance_is_the_mean_over_permutations():
    from eval.scores.metrics import chance_macro_f1, score_classes

    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 3, 40), rng.choice(3, 40, p=[0.7, 0.2, 0.1])
    drawn = [
        score_classes(rng.permutation(truth), predicted, list("abc"))["macro_f1"]
        for _ in range(100)
    ]
    assert abs(np.mean(drawn) - chance_macro_f1(truth, predicted)) < 4 * np.std(drawn) / 100**0.5


def test_genes_are_chosen_by_training_cells():
    from eval.benchmark.neighbours.cell_baselines import gene_features

    rng = np.random.default_rng(0)
    counts = rng.poisson(0.5, size=(60, 2_500)).astype(np.float32)
    train, test = np.arange(40), np.arange(40, 60)
    fitted, _ = gene_features(scipy.sparse.csr_matrix(counts), train, test)
    counts[40:] = rng.poisson(5.0, size=(20, 2_500))
    again, changed = gene_features(scipy.sparse.csr_matrix(counts), train, test)
    np.testing.assert_array_equal(fitted, again)
    assert fitted.shape == (40, 2_000) and changed.shape == (20, 2_000)
    with pytest.raises(ValueError, match="0 genes are detected"):
        gene_features(scipy.sparse.csr_matrix((60, 30), dtype=np.float32), train, test)


def test_torch_keeps_its_threads():
    import torch

    from eval.benchmark.material.twin_encoders import kept_threads

    before = torch.get_num_threads()
    with kept_threads():
        torch.set_num_threads(before + 1)
    assert torch.get_num_threads() == before


def test_absent_classes_get_no_probability():
    from eval.benchmark.neighbours.cell_baselines import BASELINES, predict_probabilities

    features = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
    labels = np.repeat([0, 2], 10)
    for name, make in BASELINES.items():
        found = predict_probabilities(make(labels, 5, 0), features, labels, features[:4], 3)
        np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-6, err_msg=name)
        assert (found[:, 1] == 0).all(), name
