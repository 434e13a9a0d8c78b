"""One contest for every kind of task: folds x seeds x contenders -> scores -> outcomes.

How it goes, whatever is asked (`Contest.run`)::

    for each seed                     what is drawn, divided and random follows from it
        for each fold of the seed     the same examples for everyone
            for each contender        predict -> score -> outcome, kept in the store
    outcomes -> TaskRun               verdicts are made of it (`eval.benchmark.contest.verdicts`)

A kind of task is a class that says five things; nothing else is its business:

- `contenders`: who takes part: models, their twins with random weights, baselines, controls. Each
  has a function from a fold to a prediction, of whatever type the kind likes. Contenders are listed
  before any cell is read: their number times that of the folds is how many units a benchmark has.
- `folds`: the folds of one seed. Material (cells, labels, pairs of genes) is a `cached_property`,
  read when it is first needed, and what contenders share of it is made by `once`.
- `score`: a prediction -> scores and small details. It sees the role: a control's truth may be
  shuffled.
- `decides`: what of the material decides an outcome, as JSON. With the contender, its model, fold
  and seed it is the key of the unit in the store; a benchmark that was killed finds its units again
  as long as keys stay, so keys never change for a change of code that changes no number.
- `report`: all outcomes -> `TaskRun`: cells, classes, the sentence about the split, tables.

The contest does what must be the same everywhere: it keeps a unit as soon as it is there, stores
undefined scores as None, gives torch its threads back, and shares the seconds of what was made
once among the folds that use it. CONTRIBUTING.md adds a kind in one diff.
"""

from __future__ import annotations

import hashlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import scipy.sparse

from eval.benchmark.contest.verdicts import display_name
from eval.benchmark.material.gene_features import expression_of_tokens, ranks_of_tokens
from eval.benchmark.material.models_and_cells import Bench, Model, TaskCells
from eval.benchmark.material.once import Once
from eval.benchmark.material.twin_encoders import encoder_of, kept_threads
from eval.benchmark.outcome import Outcome, Role, TaskRun
from eval.benchmark.task_file import Size
from pretrain.model.architectures import Encoder

ROLES: tuple[Role, ...] = ("model", "twin")
# Score -> value, and small JSON values for the page.
Scored = tuple[dict[str, Any], dict[str, Any]]
# Of pairs, regulators or cells, where a fold is a draw and nothing is trained.
DRAWN_SHARE = 0.8
# Folds of two benchmarks with other seeds share none.
_SEED_STRIDE = 1_000


def seed_of_fold(seed: int, number: int) -> int:
    """Return what a fold's split, heads and random twins follow from."""
    return _SEED_STRIDE * seed + number


def draw_share(total: int, rng: np.random.Generator) -> np.ndarray:
    """Return sorted int positions: 80 % of so many."""
    return np.sort(rng.permutation(total)[: math.ceil(DRAWN_SHARE * total)])


def mean_scores(each: list[dict[str, Any]]) -> dict[str, float]:
    """Return the mean of every score over dicts with the same scores."""
    return {k: float(np.mean([scores[k] for scores in each])) for k in each[0]}


def hash_of(value: object) -> str:
    """Return a hash of a value's `repr`, for keys: plain lists and texts, no arrays."""
    return hashlib.sha256(repr(value).encode()).hexdigest()


@dataclass(frozen=True)
class Trained:
    """A prediction that something was fine-tuned for.

    Attributes
    ----------
    training
        The record of that (`eval.finetune.results.training_record`): goes into the outcome's
        details.
    """

    prediction: Any
    training: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Fold:
    """Examples that all contenders see.

    Attributes
    ----------
    number
        Position among all folds of the task.
    seed
        Of its draws, heads and random twins.
    test
        What is scored: sorted int positions (`simulated_shifts`: bool [cells, regulators]).
    train
        What may be learnt from: sorted int positions, none of them in `test`. Empty where nothing
        is trained.
    """

    number: int
    seed: int
    test: np.ndarray
    train: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    def twin_seed(self, role: Role) -> int | None:
        """Return the seed of a twin's random weights; None: pretrained ones."""
        return self.seed if role == "twin" else None

    def encoder(self, model: Model, role: Role) -> Encoder:
        """Return a model's encoder, or its twin of this fold."""
        return encoder_of(model, self.twin_seed(role))


TaskT = TypeVar("TaskT")
FoldT = TypeVar("FoldT", bound=Fold)


@dataclass(frozen=True, eq=False)
class Contender(Generic[FoldT]):
    """A row of a task's table.

    Attributes
    ----------
    predict
        Fold -> what the kind scores; or that as `Trained`.
    settings
        What decides its outcomes beside name, role, model and fold, as JSON: part of the keys.
    """

    name: str
    role: Role
    model: Model | None
    predict: Callable[[FoldT], Any]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def display_name(self) -> str:
        """What the contender is called in tables."""
        return display_name(self.name, self.role, self.model.name if self.model else None)


def baselines(by_name: Mapping[str, Callable[[FoldT], Any]]) -> list[Contender[FoldT]]:
    """Return contenders that know nothing of pretraining, from names and what they predict."""
    return [Contender(name, "baseline", None, predict) for name, predict in by_name.items()]


@dataclass(frozen=True)
class Results(Generic[FoldT]):
    """All folds, and every contender's outcomes in their order."""

    folds: list[FoldT]
    of: dict[Contender[FoldT], list[Outcome]]

    @property
    def outcomes(self) -> list[Outcome]:
        """All outcomes, fold after fold."""
        return [o for of_fold in zip(*self.of.values(), strict=True) for o in of_fold]

    def without(self, *names: str) -> list[Outcome]:
        """Return all outcomes, contender after contender, without details of these names."""
        return [o.without(*names) for found in self.of.values() for o in found]


class Contest(ABC, Generic[TaskT, FoldT]):
    """A task and what its kind says of it: see the module.

    Attributes
    ----------
    folds_per_seed
        How many folds `folds` returns.
    once
        What contenders share.
    """

    headline: ClassVar[str]

    def __init__(self, task: TaskT, size: Size, bench: Bench) -> None:
        """Take a task at one size; nothing is read yet."""
        self.task, self.size, self.bench, self.models = task, size, bench, bench.models
        self.once = Once()

    @property
    def folds_per_seed(self) -> int:
        """How many folds `folds` returns."""
        return 1

    @abstractmethod
    def contenders(self) -> list[Contender[FoldT]]:
        """Return who takes part in every fold, in the order of the page; no material is read."""

    @abstractmethod
    def folds(self, number: int) -> list[FoldT]:
        """Return the folds of one seed; `number` counts seeds from 0.

        Raises
        ------
        ValueError
            The material cannot be had, or not divided; the message says what to do.
        """

    @abstractmethod
    def decides(self, contender: Contender[FoldT], fold: FoldT) -> dict[str, Any]:
        """Return what of the material decides an outcome, as JSON; it adds to the key."""

    @abstractmethod
    def score(self, contender: Contender[FoldT], fold: FoldT, predicted: Any) -> Scored:
        """Return scores and details of a prediction; scores that are not finite are undefined."""

    @abstractmethod
    def report(self, results: Results[FoldT]) -> TaskRun:
        """Return what `results.json` holds about the task."""

    @cached_property
    def rows(self) -> list[Contender[FoldT]]:
        """The contenders, listed once."""
        return self.contenders()

    @property
    def num_units(self) -> int:
        """How many outcomes `run` asks its store for; no material is read."""
        return len(self.rows) * self.size.seeds * self.folds_per_seed

    def seed_of(self, number: int) -> int:
        """Return the seed that everything of the seed with this number follows from."""
        return seed_of_fold(self.bench.seed, number)

    def expression_of(self, cells: TaskCells, seed: int | None = None) -> scipy.sparse.csr_matrix:
        """Return log-normalised expression, CSR float32 [tokens of the first model, cells].

        `seed`: of the cells, where each seed has its own.
        """
        known = self.models[0].reading_vocabulary
        make = partial(expression_of_tokens, cells.counts, cells.genes, known)
        return self.once.get(("expression", cells.digest), seed, make)

    def ranks_of(self, cells: TaskCells, seed: int | None = None) -> scipy.sparse.csr_matrix:
        """Return what the first model reads, CSR float32 [tokens, cells]: see `ranks_of_tokens`."""
        first = self.models[0]
        make = partial(ranks_of_tokens, cells.tokens[first.name], first.vocabulary)
        return self.once.get(("ranks", cells.digest), seed, make)

    def run(self) -> TaskRun:
        """Return the outcomes of all contenders in all folds; what is stored is not done again.

        Raises
        ------
        ValueError
            As `folds` of the kind.
        """
        results: Results[FoldT] = Results([], {row: [] for row in self.rows})
        for number in range(self.size.seeds):
            for fold in self.folds(number):
                results.folds.append(fold)
                for row, found in results.of.items():
                    compute = partial(self._compete, row, fold)
                    found.append(self.bench.store.outcome(self.key(row, fold), compute))
        return self.report(results)

    def key(self, row: Contender[FoldT], fold: FoldT) -> dict[str, Any]:
        """Return everything that decides an outcome, beside the store's base."""
        own: dict[str, Any] = {
            "contender": row.name,
            "role": row.role,
            "model": [row.model.name, row.model.digest] if row.model else None,
            "fold": fold.number,
            "seed": fold.seed,
        }
        return own | self.decides(row, fold) | row.settings

    def _compete(self, row: Contender[FoldT], fold: FoldT) -> Outcome:
        correction, started = self.once.watch(), time.perf_counter()
        with kept_threads():
            predicted = row.predict(fold)
            seconds = time.perf_counter() - started
            seconds += correction(self.folds_per_seed, self.folds_per_seed * self.size.seeds)
            training: dict[str, Any] = {}
            if isinstance(predicted, Trained):
                training["training"], predicted = predicted.training, predicted.prediction
            scores, details = self.score(row, fold, predicted)
        return Outcome(
            contender=row.name,
            role=row.role,
            model=row.model.name if row.model else None,
            fold=fold.number,
            scores={k: _defined(v) for k, v in scores.items()},
            seconds=seconds,
            details=details | training,
        )


def _defined(score: float | None) -> float | None:
    return score if score is not None and math.isfinite(score) else None
