"""Zero-shot annotation: what an embedding holds, its neighbours tell; what it does not, chance."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from eval.benchmark.outcome import Store, TaskRun
from eval.benchmark.task_file import AnnotationTask, Cells, Size
from tests.contests import num_units
from tests.synthetic import make_cells
from tests.test_eval_cell_tasks import planted_models

if TYPE_CHECKING:
    from eval.benchmark.material.models_and_cells import Bench, Model

SIZE = Size(seeds=3, max_train_per_class=20)
TASK = AnnotationTask(
    name="types", title="Types", kind="annotation", label="cell_type", group="donor", sizes={},
    cells=Cells(files=("cells.h5ad",), recipe="made by the tests"),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cells")
    make_cells(120, num_genes=60).write_h5ad(path / "cells.h5ad")
    return path


@pytest.fixture(scope="module")
def models(folder: Path) -> list[Model]:
    return planted_models(folder / "cells.h5ad")


@pytest.fixture(scope="module")
def found(folder: Path, models: list[Model]) -> TaskRun:
    from eval.benchmark.kinds.annotation import Annotation

    return Annotation(TASK, SIZE, bench(folder, models)).run()


def bench(folder: Path, models: list[Model]) -> Bench:
    from eval.benchmark.material.models_and_cells import Bench

    return Bench(models, folder, Store(folder / "units", {}), 0, "cpu", False)


def means(result: TaskRun) -> dict[str, float]:
    from eval.benchmark.contest.verdicts import summarise

    return {r["name"]: r["scores"]["macro_f1"]["mean"] for r in summarise(result)}


def test_the_planted_model_finds_the_types_and_the_constant_one_does_not(found):
    score = means(found)
    for name in ("zero-shot", "bag of genes"):
        assert score[f"{name}, marker"] > 0.8
        assert score[f"{name}, constant"] < 0.4, "all cells are equally near"
    for name in ("kNN on PCA", "kNN on variable genes", "kNN on ranks", "nearest centroid"):
        assert score[name] > 0.8, name
    assert score["majority class"] < 0.35


def test_shuffled_labels_give_chance(found):
    from eval.benchmark.contest.verdicts import verdicts

    controls = [v for v in verdicts(found, ["marker", "constant"]) if v["question"] == "control"]
    assert {v["contender"] for v in controls} == {
        "shuffled labels, kNN on PCA", "shuffled labels, zero-shot"
    }  # fmt: skip
    assert all(abs(v["difference"]) < 0.15 for v in controls)


def test_a_fold_equals_neighbours_by_hand(found, folder, models):
    """Of the second-to-last layer, by a plain loop over test cells."""
    from sklearn.neighbors import KNeighborsClassifier

    from eval.benchmark.contest.contest import seed_of_fold
    from eval.benchmark.material.labelled_cells import divide
    from eval.benchmark.material.models_and_cells import load_cells
    from eval.cells.embed import embed_cells
    from eval.scores.metrics import score_classes

    model = models[0]
    cells = load_cells(TASK.cells, ("cell_type", "donor"), models, folder, None, 0)
    types = cells.metadata["cell_type"].to_numpy()
    labels = np.array([found.classes.index(t) for t in types])
    donors = cells.metadata["donor"].to_numpy(dtype=str)
    train, test, _ = divide(cells, labels, donors, SIZE, seed_of_fold(0, 1))
    states = embed_cells(cells.tokens[model.name], model.network.bert, model.vocabulary, layer=0)
    plain = KNeighborsClassifier(15, weights="distance").fit(states[train], labels[train])
    expected = score_classes(labels[test], plain.predict(states[test]), found.classes)
    (outcome,) = (
        o for o in found.outcomes
        if (o.contender, o.role, o.model, o.fold) == ("zero-shot", "model", "marker", 1)
    )  # fmt: skip
    assert outcome.scores["macro_f1"] == pytest.approx(expected["macro_f1"])


def test_zero_shot_stands_for_the_model_and_every_contender_is_in_every_fold(found, models):
    from eval.benchmark.contest.verdicts import main_contender
    from eval.benchmark.kinds.annotation import Annotation

    assert main_contender(found) == "zero-shot"
    assert len(found.outcomes) == num_units(Annotation, TASK, SIZE, models)
    again = {(o.contender, o.role, o.model, o.fold) for o in found.outcomes}
    assert len(again) == len(found.outcomes)
    assert "each 'donor' whole on one side" in found.split


def test_one_type_is_refused(folder, models, tmp_path):
    from eval.benchmark.kinds.annotation import Annotation

    cells = make_cells(60, num_genes=60)
    cells.obs["cell_type"] = "one"
    cells.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(ValueError, match="fewer than two classes"):
        Annotation(TASK, SIZE, bench(tmp_path, models)).run()
