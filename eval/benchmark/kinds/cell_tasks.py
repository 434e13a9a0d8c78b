"""Classification of cells: every contender on the same training and test cells, fold by fold."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from eval.benchmark.contest.cell_contest import (
    BAG_OF_GENES,
    SHUFFLED,
    CellFold,
    ClassifiedCells,
    Features,
)
from eval.benchmark.contest.contest import (
    ROLES,
    Contender,
    Results,
    Trained,
    baselines,
)
from eval.benchmark.contest.verdicts import FINE_TUNED, corrected_interval
from eval.benchmark.material.models_and_cells import Model
from eval.benchmark.material.twin_encoders import HEAD_NAME, train
from eval.benchmark.neighbours.cell_baselines import (
    BASELINES,
    LOGISTIC_REGRESSION,
    SCVI,
    embedding_classifier,
    scvi_missing,
)
from eval.benchmark.outcome import Role
from eval.benchmark.task_file import CellTask
from eval.finetune.results import training_record
from eval.scores.baselines import CELL_STATE, CORPUS_SVD
from pretrain.cell_states.cell_state import CellState, reduced

FROZEN = "frozen embedding"
# A handful of training cells gives a handful of steps; so many are taken at least.
_FEWEST_STEPS = 20


class ClassesOfCells(ClassifiedCells[CellTask]):
    """A classifier is trained on cells of each class."""

    layer = 0

    def contenders(self) -> list[Contender[CellFold]]:
        """Return the table's rows, then the points of the few-shot curve."""
        rows = baselines({n: partial(self.classify, BASELINES[n], self.genes) for n in BASELINES})
        if scvi_missing() is None:
            rows += baselines({SCVI: self.scvi})
        of_states = partial(self.classify, embedding_classifier)
        for model in self.models:
            if model.svd:
                predict = partial(of_states, partial(self.loadings, model))
                rows.append(Contender(CORPUS_SVD, "baseline", model, predict))
        shuffled = partial(self.classify, BASELINES[LOGISTIC_REGRESSION], self.genes, shuffled=True)
        rows.append(Contender(SHUFFLED, "control", None, shuffled))
        for model in self.models:
            features = {FROZEN: self.states, BAG_OF_GENES: self.inputs}
            features |= {CELL_STATE: self.cell_states} if model.state else {}
            for role in ROLES:
                rows.append(Contender(FINE_TUNED, role, model, partial(self.tuned, model, role)))
                for name, of_cells in features.items():
                    predict = partial(of_states, partial(of_cells, model, role))
                    rows.append(Contender(name, role, model, predict))
            shuffled = partial(of_states, partial(self.states, model, "model"), shuffled=True)
            rows.append(Contender(f"{SHUFFLED}, {FROZEN}", "control", model, shuffled))
        few = [r for r in rows if r.name in (FINE_TUNED, FROZEN, LOGISTIC_REGRESSION)]
        return rows + [self.few_shot(row, shots) for shots in self.size.shots for row in few]

    def few_shot(self, row: Contender[CellFold], shots: int) -> Contender[CellFold]:
        """Return a contender that gets at most so many training cells of each class."""

        def predict(fold: CellFold) -> Any:
            return row.predict(self.few(fold, shots))

        name, settings = f"{row.name}, {shots} a class", {"shots": shots}
        return replace(row, name=name, predict=predict, settings=settings)

    def cell_states(self, model: Model, role: Role, fold: CellFold) -> Features:
        """Return cell states of training and test cells."""
        used, number = np.concatenate([fold.capped, fold.test]), len(fold.capped)
        found = self.state(model, role, fold).of_means(*self.means(model, role, fold, used))
        return found[:number], found[number:]

    def state(self, model: Model, role: Role, fold: CellFold) -> CellState:
        """Return what makes cell states; the axes of a twin's are those of the training cells."""
        assert model.state
        if role == "model":
            return model.state
        return reduced(model.state.svd, *self.means(model, role, fold, fold.capped))

    def means(
        self, model: Model, role: Role, fold: CellFold, cells: np.ndarray
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """Return tokens and means of the last layer, float32 [cells, width], of cells of a fold."""
        tokens = [self.known.cells.tokens[model.name][i] for i in cells]
        return tokens, self.embeddings(0).of(model, fold.twin_seed(role), cells, fold.embedded)

    def loadings(self, model: Model, fold: CellFold) -> Features:
        """Return cells on the axes of the SVD of the model's training cells."""
        assert model.svd
        tokens, svd = self.known.cells.tokens[model.name], model.svd
        fitted, test = (svd.embed_cells([tokens[i] for i in c]) for c in (fold.capped, fold.test))
        return fitted, test

    def tuned(self, model: Model, role: Role, fold: CellFold) -> Trained:
        """Return float32 [test cells, classes] of a model that is trained on the fold."""
        settings, known = self.settings, self.known
        steps = -(-len(fold.train) // settings.batch_cells) * settings.epochs
        if steps < _FEWEST_STEPS:
            epochs = -(-_FEWEST_STEPS * settings.batch_cells // len(fold.train))
            settings = replace(settings, epochs=max(epochs, settings.epochs))
        tokens, state = known.cells.tokens[model.name], None
        if settings.reading(model.state is not None):
            state = self.state(model, role, fold)
        classifier = train(
            fold.encoder(model, role), model, tokens, known.labels, known.groups,
            fold.train, known.classes, settings, fold.seed, self.size.search_trials, state,
        )  # fmt: skip
        predicted = classifier.predict_cells([tokens[i] for i in fold.test], HEAD_NAME)
        return Trained(predicted, training_record(classifier))

    def curves(self, results: Results[CellFold], test_share: float) -> dict[str, Any]:
        """Return display name -> cells a class -> mean, low, high of macro-F1."""
        found: dict[str, Any] = {}
        ratio = test_share / (1 - test_share)
        for row, outcomes in results.of.items():
            if not row.settings:
                continue
            name = replace(row, name=row.name.rsplit(", ", 1)[0]).display_name
            scores = np.array([o.scores[self.headline] for o in outcomes], dtype=np.float64)
            interval = corrected_interval(scores, ratio)
            point = {k: interval[k] for k in ("mean", "low", "high")}
            found.setdefault(name, {})[str(row.settings["shots"])] = point
        return found
