"""Simulated shifts: do edits in silico move cells as far, and where, as they truly move?

Predictions and truth are compared by Spearman's correlation, for they have no common scale.
"""

from __future__ import annotations

import math
from functools import cached_property, partial
from typing import Any

import numpy as np

from eval.benchmark.contest.contest import (
    DRAWN_SHARE,
    ROLES,
    Contender,
    Contest,
    Fold,
    Results,
    Scored,
    baselines,
    hash_of,
    mean_scores,
)
from eval.benchmark.contest.verdicts import ZERO_SHOT
from eval.benchmark.material.in_silico import engine_of, genes_of, moves_of_cells, set_types
from eval.benchmark.material.models_and_cells import Model
from eval.benchmark.material.simulated_truth import (
    Moves,
    SimulatedCells,
    load_simulated,
    score_moves,
    shuffled,
)
from eval.benchmark.neighbours.move_baselines import MOVE_BASELINES, KnownOfCells
from eval.benchmark.outcome import Role, TaskRun
from eval.benchmark.task_file import SimulatedShiftsTask
from eval.perturb.screen.edits import Edit

_NUM_SHUFFLES = 20
# Of cells of a type, so many place its centroid well enough.
_MOST_CELLS_A_TYPE = 20


class SimulatedShifts(Contest[SimulatedShiftsTask, Fold]):
    """A fold draws 80 % of the cells and regulators: `Fold.test` is bool [cells, regulators]."""

    headline = "spearman"

    @cached_property
    def world(self) -> SimulatedCells:
        """Cells, true moves and where regulators are edited."""
        return load_simulated(self.task, self.size, self.bench)

    @cached_property
    def known(self) -> KnownOfCells:
        """What is known of the cells without a model."""
        world, truth = self.world, self.world.truth
        return KnownOfCells(
            self.expression_of(world.cells), self.ranks_of(world.cells), world.context,
            self.models[0].tokens_of(truth.regulators), world.kinds, truth.types,
        )  # fmt: skip

    def contenders(self) -> list[Contender[Fold]]:
        """Return edits by every model, and moves by what is known without one."""
        rows = baselines({name: partial(self.without_model, name) for name in MOVE_BASELINES})
        for model in self.models:
            own, twin = (partial(self.edited, model, role) for role in ROLES)
            rows.append(Contender(ZERO_SHOT, "model", model, own))
            rows.append(Contender(ZERO_SHOT, "twin", model, twin))
            rows.append(Contender(f"shuffled truth, {ZERO_SHOT}", "control", model, own))
        return rows

    def folds(self, number: int) -> list[Fold]:
        """Return what is looked at: some regulators in some cells."""
        seed, whole = self.seed_of(number), self.world.asked
        rng, asked = np.random.default_rng(seed), whole.copy()
        for axis in (0, 1):
            used = rng.permutation(np.flatnonzero(whole.any(axis=1 - axis)))
            left_out = used[math.ceil(DRAWN_SHARE * len(used)) :]
            asked[(slice(None),) * axis + (left_out,)] = False
        return [Fold(number, seed, asked)]

    def without_model(self, name: str, fold: Fold) -> dict[str, Moves]:
        """Return a baseline's moves by edit, made once for all folds."""
        moves, edits = self.known.moves, self.task.edits
        return self.once.get(name, None, lambda: {e: Moves(*moves(name, e)) for e in edits})

    def edited(self, model: Model, role: Role, fold: Fold) -> dict[str, Moves]:
        """Return a model's moves; the pretrained one edits everything once."""
        if role == "twin":
            return self.model_moves(model, fold.seed, fold.test)
        make = partial(self.model_moves, model, None, self.world.asked)
        return self.once.get((model.name,), None, make)

    def model_moves(
        self, model: Model, twin_seed: int | None, asked: np.ndarray
    ) -> dict[str, Moves]:
        """Return how a model's states of cells move, by edit; NaN where it was not asked."""
        world, engine = self.world, engine_of(model, twin_seed, self.bench)
        genes = genes_of(model, world.cells.tokens[model.name])
        set_types(engine, genes, world.kinds, world.truth.types, _MOST_CELLS_A_TYPE)
        take = partial(
            moves_of_cells, engine, genes, model.tokens_of(world.truth.regulators), asked
        )
        values = {edit: take(Edit(edit)) for edit in self.task.edits}
        return {edit: Moves(v[0], v[1:]) for edit, v in values.items()}

    def decides(self, contender: Contender[Fold], fold: Fold) -> dict[str, Any]:
        """Return cells, true moves, and what is asked."""
        world, model = self.world, contender.model
        chosen = [world.truth.regulators, np.argwhere(fold.test).tolist()]
        return {
            "model": [model.name, model.digest, self.bench.bf16] if model else None,
            "seed": [self.bench.seed, fold.seed],
            "cells": world.cells.digest,
            "truth": world.truth.digest,
            "asked": hash_of(chosen),
        }

    def score(self, contender: Contender[Fold], fold: Fold, predicted: dict[str, Moves]) -> Scored:
        """Return means over edits, then the scores of each; a control's truth is shuffled."""
        rng = np.random.default_rng([fold.seed, fold.number])
        by_edit = {}
        for edit, own in predicted.items():
            truths = [self.world.truth.moves[edit]]
            if contender.role == "control":
                truths = [shuffled(truths[0], rng) for _ in range(_NUM_SHUFFLES)]
            by_edit[edit] = mean_scores([score_moves(t, own, fold.test) for t in truths])
        scores = mean_scores(list(by_edit.values()))
        if len(by_edit) > 1:
            scores |= {f"{k}_{e}": v for e, found in by_edit.items() for k, v in found.items()}
        return scores, {}

    def report(self, results: Results[Fold]) -> TaskRun:
        """Return the outcomes, with the cells that each regulator is edited in."""
        world = self.world
        held = world.asked.sum(axis=0).tolist()
        return TaskRun(
            cells=int(world.asked.any(axis=1).sum()),
            classes=[],
            split=f"{len(held)} regulators, each edited ({' and '.join(self.task.edits)}) in "
            f"{min(held)} to {max(held)} cells that hold it; {self.size.seeds} seeds draw 80 % of "
            "the regulators and 80 % of the cells each. Nothing is trained. Subsamples overlap: "
            "intervals say how scores vary with regulators and cells",
            headline=self.headline,
            chance=0.0,
            excluded=world.cells.excluded,
            outcomes=results.outcomes,
            details={
                "test_share": DRAWN_SHARE,
                "regulators": dict(zip(world.truth.regulators, held, strict=True)),
            },
        )
