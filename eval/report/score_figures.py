"""Figures of a fine-tuning: every contender's headline, and the losses of its trainings by step."""

from __future__ import annotations

from typing import Any

from data_prep.drawing import BLUE, GREY, new_figure
from eval.drawing.curves import draw_curves
from eval.drawing.figures import as_image, style
from eval.drawing.tables import best_first, score_names
from eval.finetune.results import PRETRAINED


def score_figure(summary: dict[str, dict]) -> str:
    """Return the headline of all contenders as an image, the best first."""
    ordered, (headline, label) = best_first(summary), next(iter(score_names(summary).items()))
    with style():
        figure = new_figure(0.7 + 0.33 * len(ordered))
        axes = figure.subplots()
        means = [summary[n][headline]["mean"] for n in ordered]
        spread = [summary[n][headline]["half_width"] for n in ordered]
        colours = [_colour(n) for n in ordered]
        axes.barh(ordered, means, xerr=spread, color=colours, capsize=3)
        axes.invert_yaxis()
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.set(xlim=(0, 1), xlabel=f"{label}, mean and 95 % interval")
        return as_image(figure)


def curves_image(trainings: dict[str, list[dict[str, Any]]]) -> str | None:
    """Return the losses of trainings as an image (`draw_curves`); None if there are none."""
    if not trainings:
        return None
    colours = {name: _colour(name) for name in trainings}
    with style():
        return as_image(draw_curves(trainings, colours))


def _colour(contender: str) -> str:
    return BLUE if contender.endswith(f", {PRETRAINED}") else GREY
