"""The losses of fine-tunings by step, for the pages of fine-tunings and benchmarks."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from data_prep.drawing import GREY, RED, new_figure


def draw_curves(trainings: dict[str, list[dict[str, Any]]], colours: dict[str, str]) -> Figure:
    """Draw loss against step, a panel for each contender and a line for each of its folds.

    Parameters
    ----------
    trainings
        Contender -> records of its trainings (`eval.finetune.results.training_record`), at least
        one of each.
    colours
        Contender -> colour of its lines; validation is dashed, in one colour for all.
    """
    validated = any(t["validation"] for records in trainings.values() for t in records)
    figure = new_figure(0.7 + 1.7 * len(trainings) + 0.3 * validated)
    rows = figure.subplots(len(trainings), sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (name, records) in zip(rows, trainings.items(), strict=True):
        for record in records:
            _draw(axes, record, colours[name])
        axes.set_title(name, fontsize="medium", loc="left")
        axes.set_ylabel("loss (nats)")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    rows[0].set_ylim(0, None)
    rows[-1].set_xlabel("optimizer step")
    if validated:
        rows[0].plot([], [], color=GREY, label="training")
        rows[0].plot([], [], ".--", color=RED, label="validation")
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def _draw(axes: Axes, record: dict[str, Any], colour: str) -> None:
    axes.plot(*zip(*record["curve"], strict=True), color=colour, lw=1, alpha=0.7)
    if record["validation"]:
        axes.plot(*zip(*record["validation"], strict=True), ".--", color=RED, lw=0.9, alpha=0.7)
