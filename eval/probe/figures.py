"""Figures of a probe: all contenders of the last step, and the curve over a run's checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from data_prep.drawing import GREEN, GREY, ORANGE, RED, new_figure
from eval.drawing.plot import ROLE_COLOURS, ROLE_NAMES, Plot
from eval.probe.features import GENES, LAST, SECOND_LAST
from eval.probe.run import RANDOM_PREFIX, Probe
from eval.scores.baselines import CELL_STATE, CORPUS_SVD

# The neighbours in the curve: name, colour, line.
_LINES = (
    (CORPUS_SVD, RED, "-"),
    (GENES, ORANGE, "--"),
    (RANDOM_PREFIX + LAST, ROLE_COLOURS["twin"], "--"),
)
# What the model's own curves are of.
_FROZEN = ((SECOND_LAST, GREY), (LAST, ROLE_COLOURS["model"]), (CELL_STATE, GREEN))


def probe_plots(probe: Probe) -> list[Plot]:
    """Return the figures of a probe; call it within `eval.drawing.plot.benchmark_style`."""
    record = probe.record
    plots = [_contenders(record)]
    if len(record["steps"]) > 1:
        plots.append(_curve(record))
    return plots


def _contenders(record: dict[str, Any]) -> Plot:
    last = record["steps"][-1]
    shown = [r for r in record["scores"] if r["role"] != "model" or r["step"] == last]
    names = list(dict.fromkeys(r["contender"] for r in shown))
    sizes = [int(size) for size in record["classes"]]
    figure = Figure(figsize=(7.4, 1.2 + 0.27 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    for axes, size in zip(panels, sizes, strict=True):
        for row in (r for r in shown if r["cells_a_class"] == size):
            place, score = names.index(row["contender"]), row["macro_f1"]
            colour = RED if row["contender"] == CORPUS_SVD else ROLE_COLOURS[row["role"]]
            axes.plot(row["draws"], [place] * len(row["draws"]), "o", color=colour, ms=2.5,
                      alpha=0.35, mew=0)  # fmt: skip
            axes.errorbar(score["mean"], place, xerr=score["half_width"], color=colour, fmt="o",
                          ms=5, lw=1.6)  # fmt: skip
            if row["contender"] == CORPUS_SVD:
                axes.axvline(score["mean"], color=RED, lw=0.9)
        axes.set_title(f"{size} cells a class", fontsize=10)
        axes.set_xlabel("macro-F1")
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    caption = "Macro-F1 of every contender: mean, 95 % interval and draws (small)"
    line = f"; the line is the {CORPUS_SVD}" if record["corpus_svd"] else ""
    return Plot("contenders", caption + line, figure)


def _curve(record: dict[str, Any]) -> Plot:
    sizes = [int(size) for size in record["classes"]]
    figure = new_figure(0.9 + 2.3 * len(sizes))
    panels = figure.subplots(len(sizes), sharex=True, squeeze=False)[:, 0]
    for axes, size in zip(panels, sizes, strict=True):
        rows = [r for r in record["scores"] if r["cells_a_class"] == size]
        for name, colour, line in _LINES:
            for row in (r for r in rows if r["contender"] == name):
                axes.axhline(row["macro_f1"]["mean"], color=colour, ls=line, lw=1.2, label=name)
        for name, colour in _FROZEN:
            if not any(r["contender"] == name for r in rows):
                continue
            steps, means, spread = _series(r for r in rows if r["contender"] == name)
            axes.errorbar(steps, means, yerr=spread, color=colour, fmt="o-", ms=4, capsize=2,
                          label=f"{ROLE_NAMES['model']}, {name}")  # fmt: skip
        axes.set_ylabel(f"macro-F1, {size} a class")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    panels[-1].set_xlabel("optimizer step")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return Plot(
        "curve", "Frozen cells over the kept checkpoints, beside what does not learn", figure
    )


def _series(rows: Iterable[dict[str, Any]]) -> tuple[list[int], list[float], list[float]]:
    found = sorted((r["step"], r["macro_f1"]["mean"], r["macro_f1"]["half_width"]) for r in rows)
    steps, means, spread = zip(*found, strict=True) if found else ((), (), ())
    return list(steps), list(means), list(spread)
