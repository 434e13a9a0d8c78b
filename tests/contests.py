"""Counting the units of a contest that has nothing to read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eval.benchmark.contest.contest import Contest
    from eval.benchmark.material.models_and_cells import Model
    from eval.benchmark.task_file import Size


def num_units(kind: type[Contest], task: Any, size: Size, models: list[Model]) -> int:
    """Return how many units a kind says that a task has; without data and without a store."""
    from eval.benchmark.material.models_and_cells import Bench

    nothing: Any = None
    return kind(task, size, Bench(models, None, nothing, 0, "cpu", False)).num_units
