"""Figures of a benchmark: one colour for each role, and one for each verdict, everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from data_prep.drawing import new_figure
from eval.benchmark.contest.verdicts import FINE_TUNED, mean_of, state_of
from eval.benchmark.report.overview import main_of, overview_rows, score_label
from eval.drawing.curves import draw_curves
from eval.drawing.plot import INK, ROLE_COLOURS, ROLE_NAMES, Plot

STATE_COLOURS = {
    "better": "#009e73", "worse": "#d55e00", "neither": "#6b7075", "not_tested": "#a9adb1"
}  # fmt: skip
_MARKERS = "osD^v"
_LONGEST_NAME, _FEWEST_CELLS_OF_BIN = 26, 20
_MOST_FIGURES_IN_ROW, _MOST_NUMBERED_CLASSES, _MOST_CLASSES = 3, 8, 40


def short_name(name: str, models: list[str]) -> str:
    """Return a display name; where there is one model, without it."""
    if len(models) > 1:
        return name
    twin = f", {models[0]} with random weights" if models else ""
    if twin and name.endswith(twin):
        return name.removesuffix(twin) + ", random weights"
    return name.removesuffix(f", {models[0]}") if models else name


def overview_plot(results: dict[str, Any]) -> Plot:
    """Return the differences of all tasks, from the random-weights twin and the best baseline."""
    rows = overview_rows(results)
    several = len(results["models"]) > 1
    names = [
        r["task"]["name"]
        + (f"  ({r['model']})" if several else "")
        + ("  ✖ control" if r["control"] == "failed" else "")
        for r in rows
    ]
    figure = Figure(figsize=(7.4, 1.3 + 0.26 * len(rows)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    titles = {"pretraining": "minus random weights", "baselines": "minus best baseline"}
    for axes, (question, title) in zip(panels, titles.items(), strict=True):
        for place, row in enumerate(rows):
            verdict = row[question]
            if verdict is None or verdict["difference"] is None:
                continue
            colour = STATE_COLOURS[state_of(verdict)]
            if verdict["low"] is not None:
                axes.plot([verdict["low"], verdict["high"]], [place, place], color=colour, lw=1.6)
            axes.plot(verdict["difference"], place, "o", color=colour, ms=5)
        axes.axvline(0, color=INK, lw=0.8)
        axes.set_title(title, fontsize=10)
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("difference of the headline score")
    panels[0].set_yticks(range(len(rows)), names)
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    handles = [Line2D([], [], color=STATE_COLOURS[s], marker="o", ms=5, label=label)
               for s, label in (("better", "better"), ("worse", "worse"),
                                ("neither", "no difference seen"))]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    caption = "Pretrained model minus its random-weights twin, and minus the best baseline"
    return Plot("overview", f"{caption}; 95 % intervals, colours after Holm's correction", figure)


def task_plots(task: dict[str, Any], models: list[str]) -> list[Plot]:
    """Return the figures that a task's results allow; call it within `benchmark_style`."""
    makers: dict[str, list[Callable]] = {
        "genes": [_score_plot, _roc_plot],
        "cells": [_score_plot, _confusion_plot, _calibration_plot, _class_plot, _few_shot_plot],
        "annotation": [_score_plot, _confusion_plot, _class_plot],
        "integration": [_score_plot, _umap_by_label, _umap_by_batch],
        "context": [_score_plot, _roc_plot],
        "attention": [_score_plot, _heads_plot, _roc_plot],
    }
    chosen = [*makers.get(task["kind"], [_score_plot]), _training_plot]
    plots = (make(task, models) for make in chosen)
    return [plot for plot in plots if plot is not None]


def _training_plot(task: dict[str, Any], models: list[str]) -> Plot | None:
    trainings, colours = {}, {}
    for row in task["summary"]:
        records = [o["details"].get("training") for o in outcomes_of(task, row)]
        # Of few-shot curves only the scores are shown.
        if row["contender"] == FINE_TUNED and all(records):
            name = short_name(row["name"], models)
            trainings[name], colours[name] = records, ROLE_COLOURS[row["role"]]
    if not trainings:
        return None
    caption = "Loss of every fold's training by optimizer step"
    return Plot("training", caption, draw_curves(trainings, colours))


def shown_contenders(task: dict[str, Any], models: list[str]) -> list[dict[str, Any]]:
    """Return the summaries of the main contenders, their twins, and the best baseline."""
    mains = {m: main_of(task, m) for m in models}
    wanted = [r for r in task["summary"] if r["model"] and r["contender"] == mains.get(r["model"])
              and r["role"] in ("model", "twin")]  # fmt: skip
    wanted.sort(key=lambda r: (r["role"] != "model", models.index(r["model"])))
    return wanted + [r for r in task["summary"] if r["role"] == "baseline"][:1]


def outcomes_of(task: dict[str, Any], row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the outcomes behind one row of the summary."""
    keys = ("contender", "role", "model")
    return [o for o in task["outcomes"] if all(o[k] == row[k] for k in keys)]


def _score_plot(task: dict[str, Any], models: list[str]) -> Plot:
    score = task["headline"]
    rows = [r for r in task["summary"] if mean_of(r, score) is not None]
    figure = Figure(figsize=(6.4, 1.3 + 0.25 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        colour, value = ROLE_COLOURS[row["role"]], row["scores"][score]
        folds = [o["scores"].get(score) for o in outcomes_of(task, row)]
        folds = [f for f in folds if f is not None]
        axes.plot(folds, [place] * len(folds), "o", color=colour, ms=2.5, alpha=0.35, mew=0)
        if value["low"] is not None:
            axes.plot([value["low"], value["high"]], [place, place], color=colour, lw=1.8)
        marker = _MARKERS[models.index(row["model"]) % len(_MARKERS)] if row["model"] else "o"
        face = "none" if row["role"] == "control" else colour
        axes.plot(value["mean"], place, marker, color=colour, mfc=face, ms=6)
    if task["chance"] is not None:
        axes.axvline(task["chance"], color=INK, ls=":", lw=1, label="chance")
    axes.set_yticks(range(len(rows)), [short_name(r["name"], models) for r in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(score_label(score))
    _legend_of_roles(figure, {r["role"] for r in rows}, task["chance"] is not None)
    return Plot(
        "scores",
        f"{score_label(score)} of every contender: mean, 95 % interval, and folds (small)",
        figure,
    )


def _legend_of_roles(figure: Figure, roles: set[str], has_chance: bool) -> None:
    handles = [
        Line2D([], [], color=c, marker="o", ms=5, label=ROLE_NAMES[role],
               mfc="none" if role == "control" else c)
        for role, c in ROLE_COLOURS.items() if role in roles
    ]  # fmt: skip
    if has_chance:
        handles.append(Line2D([], [], color=INK, ls=":", lw=1, label="chance"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


def _roc_plot(task: dict[str, Any], models: list[str]) -> Plot | None:
    curves = task["details"].get("roc", {})
    rows = [r for r in shown_contenders(task, models) if r["name"] in curves]
    if not rows:
        return None
    figure = new_figure(4.6)
    axes = figure.subplots()
    for row in rows:
        points = np.array(curves[row["name"]])
        _draw_line(axes, points, row, models, "")
    axes.plot([0, 1], [0, 1], color=INK, ls=":", lw=1)
    axes.set(xlim=(0, 1), ylim=(0, 1.01), aspect="equal")
    axes.set(xlabel="false positive rate", ylabel="true positive rate")
    figure.legend(loc="outside lower center", ncols=1)
    return Plot("roc", "ROC curves over genes: mean of the folds", figure)


def _draw_line(
    axes: Axes, points: np.ndarray, row: dict[str, Any], models: list[str], marker: str
) -> None:
    """Draw a contender's points [points, 2]; lines of models beside the first are dashed."""
    number = models.index(row["model"]) if row["model"] else 0
    axes.plot(
        points[:, 0], points[:, 1], color=ROLE_COLOURS[row["role"]], marker=marker,
        ls=("-", "--", "-.", ":")[number % 4], label=short_name(row["name"], models),
    )  # fmt: skip


def _confusion_plot(task: dict[str, Any], models: list[str]) -> Plot | None:
    rows = [r for r in shown_contenders(task, models) if r["role"] != "twin"]
    counts = {r["name"]: _summed(task, r) for r in rows}
    counts = {name: c for name, c in counts.items() if c is not None}
    num_classes = len(task["classes"])
    if not counts or num_classes > _MOST_CLASSES:
        return None
    names = [_cut(c) for c in task["classes"]]
    side = max(1.8, 0.22 * num_classes)
    margin = 0.5 + 0.085 * max(map(len, names))  # inches of the labels
    size = ((side + 0.25) * len(counts) + margin, side + 0.5 + margin)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(counts), sharey=True, squeeze=False)[0]
    for axes, (name, matrix) in zip(panels, counts.items(), strict=True):
        share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        if num_classes <= _MOST_NUMBERED_CLASSES:
            for (y, x), value in np.ndenumerate(share):
                ink = "white" if value > 0.5 else "black"
                axes.text(x, y, f"{value:.0%}", ha="center", va="center", color=ink, fontsize=8.5)
        axes.set_xticks(range(num_classes), names, rotation=90)
        axes.set_yticks(range(num_classes), names)
        axes.grid(visible=False)
        axes.set_title(short_name(name, models), fontsize=10)
        axes.set_xlabel("predicted")
    panels[0].set_ylabel("truth")
    return Plot("confusion", "Share of each class's test cells by prediction, all folds", figure)


def _cut(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"


def _summed(task: dict[str, Any], row: dict[str, Any]) -> np.ndarray | None:
    found = [o["details"].get("confusion") for o in outcomes_of(task, row)]
    known = [np.array(f) for f in found if f is not None]
    return np.sum(known, axis=0) if known else None


def _calibration_plot(task: dict[str, Any], models: list[str]) -> Plot | None:
    rows = [(r, _pooled_bins(task, r)) for r in shown_contenders(task, models)]
    rows = [(r, bins) for r, bins in rows if len(bins)]
    if not rows:
        return None
    figure = new_figure(4.6)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=INK, ls=":", lw=1)
    for row, bins in rows:
        _draw_line(axes, bins, row, models, "o")
    axes.set(xlim=(0, 1), ylim=(0, 1.01), aspect="equal")
    axes.set(xlabel="probability of the prediction", ylabel="share that is right")
    figure.legend(loc="outside lower center", ncols=1)
    return Plot(
        "calibration",
        f"Calibration, tenths with {_FEWEST_CELLS_OF_BIN} cells or more: best on the dotted line",
        figure,
    )


def _pooled_bins(task: dict[str, Any], row: dict[str, Any]) -> np.ndarray:
    """Return float64 [bins, 2]: mean probability and share right, all folds together.

    Bins are tenths; what a few cells say is noise, so smaller bins are left out.
    """
    bins = [
        (b["confidence"], b["accuracy"], b["cells"])
        for o in outcomes_of(task, row)
        for b in o["details"].get("calibration", [])
    ]
    if not bins:
        return np.empty((0, 2))
    values = np.array(bins)
    tenth = np.minimum(values[:, 0] * 10, 9).astype(int)
    large = [t for t in np.unique(tenth) if values[tenth == t, 2].sum() >= _FEWEST_CELLS_OF_BIN]
    return np.array(
        [np.average(values[tenth == t, :2], axis=0, weights=values[tenth == t, 2]) for t in large]
    ).reshape(-1, 2)


def _heads_plot(task: dict[str, Any], models: list[str]) -> Plot | None:
    heads = {}
    for row in shown_contenders(task, models):
        found = [o["details"]["heads"] for o in outcomes_of(task, row) if "heads" in o["details"]]
        if found:
            heads[row["name"]] = np.mean(found, axis=0)
    if not heads:
        return None
    layers, width = next(iter(heads.values())).shape
    size = (1.2 + len(heads) * max(1.9, 0.25 * width), 1.8 + 0.25 * layers)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(heads), squeeze=False)[0]
    most = max(float(np.abs(h).max()) for h in heads.values()) or 1.0
    image = None
    for axes, (name, values) in zip(panels, heads.items(), strict=True):
        image = axes.imshow(values, cmap="PuOr_r", vmin=-most, vmax=most, aspect="auto")
        axes.set_xticks(range(values.shape[1]), [str(h + 1) for h in range(values.shape[1])])
        axes.set_yticks(range(len(values)), [str(layer + 1) for layer in range(len(values))])
        axes.grid(visible=False)
        axes.set_title(short_name(name, models), fontsize=9)
        axes.set(xlabel="head", ylabel="layer, 1 is the first")
    assert image is not None
    figure.colorbar(image, ax=list(panels), label="more attention")
    what = f"Attention to a {task['classes'][1]}, minus that to its partner"
    return Plot("heads", f"{what}: median pair, mean over folds; 1 is the mean of a cell", figure)


def f1_by_class(task: dict[str, Any], row: dict[str, Any]) -> dict[str, float]:
    """Return a contender's F1 of each class, mean over the folds that have the class."""
    found = [o["details"].get("f1_by_class", {}) for o in outcomes_of(task, row)]
    values = {c: [f[c] for f in found if f.get(c) is not None] for c in task["classes"]}
    return {c: float(np.mean(v)) for c, v in values.items() if v}


def _class_plot(task: dict[str, Any], models: list[str]) -> Plot | None:
    rows = [(r, f1_by_class(task, r)) for r in shown_contenders(task, models)]
    rows = [(r, f1) for r, f1 in rows if f1]
    if not rows:
        return None
    classes = task["classes"]
    figure = new_figure(1.2 + 0.24 * len(classes) + 0.2 * len(rows))
    axes = figure.subplots()
    for row, f1 in rows:
        number = models.index(row["model"]) if row["model"] else 0
        axes.plot(
            [f1.get(c, np.nan) for c in classes], range(len(classes)),
            _MARKERS[number % len(_MARKERS)], ms=6, alpha=0.9, color=ROLE_COLOURS[row["role"]],
            label=short_name(row["name"], models),
        )  # fmt: skip
    axes.set_yticks(range(len(classes)), [_cut(c) for c in classes])
    axes.set_ylim(len(classes) - 0.5, -0.5)
    axes.set(xlim=(-0.02, 1.02), xlabel="F1, mean over folds")
    axes.grid(axis="both")
    figure.legend(loc="outside lower center", ncols=1)
    return Plot("classes", "F1 of each class", figure)


def _few_shot_plot(task: dict[str, Any], models: list[str]) -> Plot | None:
    curves = task["details"].get("few_shot", {})
    if not curves:
        return None
    figure = new_figure(3.4 + 0.18 * len(curves))
    axes = figure.subplots()
    by_name = {r["name"]: r for r in task["summary"]}
    order = [r["name"] for r in task["summary"] if r["name"] in curves]
    for number, name in enumerate([*order, *(c for c in curves if c not in by_name)]):
        curve = sorted((int(shots), value) for shots, value in curves[name].items())
        shots = [s for s, _ in curve]
        low, mean, high = (
            np.array([v.get(k) for _, v in curve], dtype=np.float64)
            for k in ("low", "mean", "high")
        )
        role = by_name[name]["role"] if name in by_name else "baseline"
        axes.plot(
            shots, mean, color=ROLE_COLOURS[role], marker=_MARKERS[number % len(_MARKERS)], ms=5,
            label=short_name(name, models),
        )  # fmt: skip
        axes.fill_between(shots, low, high, color=ROLE_COLOURS[role], alpha=0.12, lw=0)
    axes.set_xscale("log")
    ticks = sorted({int(s) for curve in curves.values() for s in curve})
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.set(xlabel="training cells of each class", ylabel=score_label(task["headline"]))
    figure.legend(loc="outside lower center", ncols=1)
    return Plot("few_shot", "With few training cells: mean and 95 % interval", figure)


def _umap_by_label(task: dict[str, Any], models: list[str]) -> Plot | None:
    return _umap(task, models, "labels", "what should stay apart")


def _umap_by_batch(task: dict[str, Any], models: list[str]) -> Plot | None:
    return _umap(task, models, "batches", "what should mix")


def _umap(task: dict[str, Any], models: list[str], key: str, what: str) -> Plot | None:
    places = task["details"].get("umap", {})
    names = [r["name"] for r in task["summary"] if r["name"] in places]
    if not names or key not in task["details"]:
        return None
    groups = np.array(task["details"][key])
    kinds = np.unique(groups)
    columns = min(len(names), _MOST_FIGURES_IN_ROW)
    rows = -(-len(names) // columns)
    figure = Figure(
        figsize=(2.6 * columns, 2.6 * rows + 0.3 + 0.1 * len(kinds)), layout="constrained"
    )
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    colours = matplotlib.colormaps["tab10" if len(kinds) <= 10 else "tab20"]
    for axes, name in zip(panels, names, strict=False):
        points = np.array(places[name])
        for number, kind in enumerate(kinds):
            chosen = points[groups == kind]
            # As pixels: thousands of points as shapes make a page that hardly scrolls.
            axes.scatter(*chosen.T, s=4, lw=0, color=colours(number % colours.N), rasterized=True)
        axes.set(xticks=[], yticks=[])
        axes.set_title(short_name(name, models), fontsize=9)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    _legend_of_groups(figure, kinds, colours)
    return Plot(f"umap_{key}", f"UMAP of every contender, by {key}: {what}", figure)


def _legend_of_groups(figure: Figure, kinds: np.ndarray, colours: Any) -> None:
    handles = [
        Line2D([], [], color=colours(i % colours.N), marker="o", ls="", ms=4, label=str(k))
        for i, k in enumerate(kinds)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
