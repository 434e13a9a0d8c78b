"""Figures of a fine-tuning: every contender's headline, and the loss of every training by step."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from data_prep.drawing import BLUE, GREY, RED, new_figure
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
        colours = [BLUE if n.endswith(f", {PRETRAINED}") else GREY for n in ordered]
        axes.barh(ordered, means, xerr=spread, color=colours, capsize=3)
        axes.invert_yaxis()
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.set(xlim=(0, 1), xlabel=f"{label}, mean and 95 % interval")
        return as_image(figure)


def curves_image(trainings: dict[str, list[dict[str, Any]]]) -> str | None:
    """Return the losses of trainings as an image (`draw_curves`); None if there are none."""
    if not any(trainings.values()):
        return None
    with style():
        return as_image(draw_curves(trainings))


def draw_curves(trainings: dict[str, list[dict[str, Any]]]) -> Figure:
    """Draw loss against step, a panel for each contender and a line for each of its folds.

    Parameters
    ----------
    trainings
        Contender -> records of its trainings (`eval.finetune.results.training_record`).
    """
    figure = new_figure(0.7 + 1.7 * len(trainings))
    rows = figure.subplots(len(trainings), sharex=True, sharey=True, squeeze=False)[:, 0]
    has_validation = any(t["validation"] for of_name in trainings.values() for t in of_name)
    for axes, (name, records) in zip(rows, trainings.items(), strict=True):
        colour = BLUE if name.endswith(f", {PRETRAINED}") else GREY
        for record in records:
            _draw(axes, record, colour)
        axes.set_title(name, fontsize="medium", loc="left")
        axes.set_ylabel("loss (nats)")
        axes.set_ylim(0, None)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    rows[-1].set_xlabel("optimizer step")
    if has_validation:
        rows[0].plot([], [], color=GREY, label="training")
        rows[0].plot([], [], ".--", color=RED, label="validation")
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def _draw(axes: Axes, record: dict[str, Any], colour: str) -> None:
    axes.plot(*zip(*record["curve"], strict=True), color=colour, lw=1, alpha=0.7)
    if record["validation"]:
        axes.plot(*zip(*record["validation"], strict=True), ".--", color=RED, lw=0.9, alpha=0.7)
