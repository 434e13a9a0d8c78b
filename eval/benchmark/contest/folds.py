"""What folds and contenders of cell tasks and of integration have in common."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from eval.benchmark.material.models_and_cells import Model, TaskCells
from eval.benchmark.material.twin_encoders import encoder_of, settings_of
from eval.benchmark.outcome import Outcome, Role
from eval.benchmark.task_file import Size
from eval.finetune.classifier import FinetuneSettings
from pretrain.model.architectures import Encoder

FINE_TUNED = "fine-tuned"
# Folds of two benchmarks with other seeds share none.
_SEED_STRIDE = 1_000


def seed_of_fold(seed: int, number: int) -> int:
    """Return what a fold's split, heads and random twins follow from."""
    return _SEED_STRIDE * seed + number


@dataclass(frozen=True)
class CellFold:
    """Training and test cells that all contenders see.

    Attributes
    ----------
    labels
        int64 [cells], positions in `classes`.
    train, test
        int positions in `cells`, sorted, none in both.
    """

    number: int
    seed: int
    cells: TaskCells
    labels: np.ndarray
    classes: list[str]
    train: np.ndarray
    test: np.ndarray
    size: Size
    device: str
    bf16: bool

    @property
    def settings(self) -> FinetuneSettings:
        """How a model is fine-tuned in this fold."""
        return settings_of(self.size, self.device, self.bf16)

    def encoder(self, model: Model, role: Role) -> Encoder:
        """Return a model's encoder, or its twin of this fold."""
        return encoder_of(model, self.twin_seed(role))

    def twin_seed(self, role: Role) -> int | None:
        """Return the seed of a twin's random weights; None: pretrained ones."""
        return self.seed if role == "twin" else None


@dataclass(frozen=True)
class CellContender:
    """A row of a task's table."""

    name: str
    role: Role
    model: Model | None

    def key(self, fold: CellFold) -> dict[str, Any]:
        """Return everything that decides an outcome, beside the store's base."""
        chosen = hashlib.sha256(fold.train.astype(np.int64).tobytes() + b"|")
        chosen.update(fold.test.astype(np.int64).tobytes())
        return {
            "contender": self.name,
            "role": self.role,
            "model": [self.model.name, self.model.digest] if self.model else None,
            "cells": fold.cells.digest,
            "fold": fold.number,
            "seed": fold.seed,
            "split": chosen.hexdigest(),
            "settings": asdict(fold.settings),
            "search_trials": fold.size.search_trials,
        }

    def outcome(
        self, fold: CellFold, scores: dict[str, float], seconds: float, details: dict[str, Any]
    ) -> Outcome:
        """Return the outcome of a fold; scores that are not finite are not defined."""
        return Outcome(
            contender=self.name,
            role=self.role,
            model=self.model.name if self.model else None,
            fold=fold.number,
            scores={k: v if math.isfinite(v) else None for k, v in scores.items()},
            seconds=seconds,
            details=details,
        )
