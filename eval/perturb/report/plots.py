"""Figures of a perturbation screen: found genes in colour, all others in grey."""

from __future__ import annotations

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from data_prep.drawing import BLUE, GREEN, GREY, RED, new_figure
from eval.drawing.plot import INK, Plot
from eval.perturb.effects.analysis import FOUND, Analysis

# The points are pixels, which do not follow the reader's colour scheme: seen on black and white.
ABOVE, BELOW, EXPECTED = RED, BLUE, GREEN
_MOST_LABELS, _MOST_ROWS, _MOST_DONORS, _MOST_INTERVALS = 12, 30, 40, 200
_LABEL_HEIGHT, _LABEL_WIDTH = 0.042, 0.017  # of the axes, for a line and for a letter
_SMALLEST_FDR = 1e-12


def effect_name(effect: str) -> str:
    """Return what an axis calls a value: `toward_healthy` is "shift toward healthy"."""
    for prefix, text in (("toward_", "shift toward "), ("class_", "change of probability of ")):
        if effect.startswith(prefix):
            return text + effect.removeprefix(prefix)
    return "shift of the cell"


def screen_plots(analysis: Analysis) -> list[Plot]:
    """Return the figures that a screen allows; call it within `benchmark_style`."""
    makers = (_volcano, _rank, _expression, _heatmap, _agreement, _combinations)
    return [plot for plot in (make(analysis) for make in makers) if plot is not None]


def _single(analysis: Analysis) -> pd.DataFrame:
    genes = analysis.genes
    return genes[(genes["genes"].map(len) == 1) & genes["matched_effect"].notna()]


def _points(axes: Axes, x: pd.Series, y: pd.Series, genes: pd.DataFrame) -> None:
    """Draw genes, found ones in colour and above the others."""
    is_found = genes["verdict"] == FOUND
    up = genes["matched_effect"] > 0
    for chosen, colour, size in (
        (~is_found, GREY, 7), (is_found & up, ABOVE, 18), (is_found & ~up, BELOW, 18)
    ):  # fmt: skip
        # As pixels: thousands of points as shapes make a page that hardly scrolls.
        axes.scatter(x[chosen], y[chosen], s=size, lw=0, color=colour, alpha=0.8, rasterized=True)


def _legend(figure: Figure, analysis: Analysis) -> None:
    if not analysis.has_donors:
        return
    handles = [
        Line2D([], [], color=colour, marker="o", ls="", ms=5, label=label)
        for colour, label in (
            (ABOVE, "found, above matched genes"), (BELOW, "found, below"), (GREY, "not found")
        )
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=3, columnspacing=1)


def _label(axes: Axes, x: pd.Series, y: pd.Series, names: pd.Series) -> None:
    """Name the first points that have room; within the axes, and not above each other."""
    low_x, high_x = axes.get_xlim()
    low_y, high_y = axes.get_ylim()
    taken: list[tuple[float, float, float]] = []
    for place_x, place_y, name in zip(x, y, names, strict=True):
        width = _LABEL_WIDTH * (len(name) + 1)
        across = (place_x - low_x) / (high_x - low_x)
        up = (place_y - low_y) / (high_y - low_y)
        is_left = across + width > 1
        start = across - width if is_left else across
        end = start + width
        if any(abs(up - u) < _LABEL_HEIGHT and start < e and s < end for u, s, e in taken):
            continue
        taken.append((up, start, end))
        axes.annotate(
            name, (place_x, place_y), (-4 if is_left else 4, 0), textcoords="offset points",
            ha="right" if is_left else "left", va="center", fontsize=8, color=INK,
        )  # fmt: skip
        if len(taken) == _MOST_LABELS:
            return


def _volcano(analysis: Analysis) -> Plot | None:
    genes = _single(analysis)
    genes = genes[genes["matched_fdr"].notna()]
    if genes.empty:
        return None
    figure = new_figure(4.2)
    axes = figure.subplots()
    height = -np.log10(genes["matched_fdr"].clip(lower=_SMALLEST_FDR))
    _points(axes, genes["matched_effect"], height, genes)
    line = -np.log10(analysis.settings.rate)
    axes.axhline(line, color=INK, ls=":", lw=1)
    axes.axvline(0, color=INK, lw=0.8)
    axes.margins(x=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(5))  # small effects have long numbers
    axes.set_ylim(-0.04 * max(height.max(), line), 1.15 * max(height.max(), line))
    shown = genes[genes["verdict"] == FOUND]
    _label(axes, shown["matched_effect"], height[shown.index], shown["name"])
    axes.set(
        xlabel=f"{effect_name(analysis.effect)}, minus matched genes",
        ylabel="-log10 of the false discovery rate",
    )
    _legend(figure, analysis)
    caption = (
        f"Volcano: effect minus matched genes, and its false discovery rate; dotted: "
        f"{analysis.settings.rate:g}"
    )
    return Plot("volcano", caption, figure)


def _rank(analysis: Analysis) -> Plot | None:
    genes = _single(analysis).sort_values("matched_effect", kind="stable")
    if genes.empty:
        return None
    figure = new_figure(4.2)
    axes = figure.subplots()
    place = pd.Series(np.arange(1, len(genes) + 1), index=genes.index)
    ends = genes[(place <= _MOST_INTERVALS) | (place > len(genes) - _MOST_INTERVALS)]
    axes.vlines(
        place[ends.index], ends["matched_low"], ends["matched_high"], color=GREY, lw=0.6,
        alpha=0.6, rasterized=True,
    )  # fmt: skip
    _points(axes, place, genes["matched_effect"], genes)
    axes.axhline(0, color=INK, lw=0.8)
    axes.margins(x=0.06)
    # Few donors have intervals that would flatten all else.
    low, high = genes["matched_effect"].min(), genes["matched_effect"].max()
    axes.set_ylim(low - 0.3 * (high - low), high + 0.3 * (high - low))
    chosen = genes[genes["verdict"] == FOUND]
    chosen = genes if chosen.empty else chosen
    for end in (chosen.iloc[::-1], chosen):
        end = end[np.sign(end["matched_effect"]) == np.sign(end["matched_effect"].iloc[0])]
        end = end.head(_MOST_LABELS // 2)
        _label(axes, place[end.index], end["matched_effect"], end["name"])
    axes.set(xlabel="genes by effect", ylabel=f"{effect_name(analysis.effect)}, minus matched")
    _legend(figure, analysis)
    intervals = "; lines: 95 % intervals over donors" if analysis.has_donors else ""
    return Plot("rank", f"Rank plot: genes by their effect minus matched genes{intervals}", figure)


def _expression(analysis: Analysis) -> Plot | None:
    genes = _single(analysis).sort_values("mean_rank")
    if genes.empty:
        return None
    figure = new_figure(4.2)
    axes = figure.subplots()
    _points(axes, genes["mean_rank"], genes["effect"], genes)
    axes.plot(
        genes["mean_rank"], genes["matched_null"], ".", color=EXPECTED, ms=1.5, rasterized=True
    )
    shown = genes[genes["verdict"] == FOUND].sort_index()
    _label(axes, shown["mean_rank"], shown["effect"], shown["name"])
    axes.set(xlabel="mean rank of the gene (0: highest)", ylabel=effect_name(analysis.effect))
    _legend(figure, analysis)
    caption = "Effect by rank; small green points: expected of a gene of this rank and detection"
    return Plot("by_rank", caption, figure)


def _heatmap(analysis: Analysis) -> Plot | None:
    genes = _single(analysis).head(_MOST_ROWS)
    if genes.empty or not analysis.has_donors:
        return None
    genes = genes.sort_values("matched_effect", ascending=False)
    by_donor = analysis.differences.loc[genes.index].iloc[:, :_MOST_DONORS]
    values = by_donor.to_numpy()
    figure = new_figure(1.4 + 0.2 * len(genes))
    axes = figure.subplots()
    largest = float(np.nanmax(np.abs(values))) or 1.0
    colours = matplotlib.colormaps["RdBu_r"].with_extremes(bad="#b5b8bb")
    norm = TwoSlopeNorm(0, -largest, largest)
    image = axes.imshow(values, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
    names = genes["name"] + np.where(genes["verdict"] == FOUND, "  ●", "")
    axes.set_yticks(range(len(genes)), [name[:24] for name in names])
    axes.set_xticks(range(values.shape[1]), [c[:18] for c in by_donor.columns], rotation=90)
    axes.grid(visible=False)
    figure.colorbar(image, label="effect minus matched genes", shrink=0.5, format="{x:.2g}")
    caption = f"The {len(genes)} genes furthest from their matched genes, by donor; ● found"
    if len(analysis.differences.columns) > _MOST_DONORS:
        caption += f"; the first {_MOST_DONORS} donors"
    return Plot("heatmap", caption, figure)


def _agreement(analysis: Analysis) -> Plot | None:
    if not analysis.agreement:
        return None
    genes = _single(analysis)
    genes = genes[genes["other_matched_effect"].notna()]
    if genes.empty:
        return None
    figure = new_figure(4.6)
    axes = figure.subplots()
    x, y = genes["matched_effect"], genes["other_matched_effect"]
    _points(axes, x, y, genes)
    axes.axhline(0, color=INK, lw=0.8)
    axes.axvline(0, color=INK, lw=0.8)
    axes.margins(0.12)
    shown = genes[genes["verdict"] == FOUND]
    _label(axes, x[shown.index], y[shown.index], shown["name"])
    kinds = analysis.agreement["kind"], analysis.agreement["other_kind"]
    axes.set(xlabel=f"{kinds[0]}, minus matched genes", ylabel=f"{kinds[1]}, minus matched genes")
    _legend(figure, analysis)
    signs = "opposite signs" if analysis.agreement["expected"] < 0 else "the same sign"
    caption = f"{kinds[0].capitalize()} against {kinds[1]}: a gene that matters has {signs}"
    return Plot("agreement", caption, figure)


def _combinations(analysis: Analysis) -> Plot | None:
    table = analysis.combinations[analysis.combinations["synergy"].notna()]
    if table.empty:
        return None
    figure = new_figure(4.4)
    axes = figure.subplots()
    x, y = table["sum_of_singles"], table["combined"]
    is_found = table["fdr"] < analysis.settings.rate
    up = table["synergy"] > 0
    for chosen, colour in ((~is_found, GREY), (is_found & up, ABOVE), (is_found & ~up, BELOW)):
        axes.scatter(x[chosen], y[chosen], s=16, lw=0, color=colour, alpha=0.8, rasterized=True)
    ends = [min(x.min(), y.min()), max(x.max(), y.max())]
    axes.plot(ends, ends, color=INK, lw=0.8)
    axes.margins(0.12)
    _label(axes, x[is_found], y[is_found], table["name"][is_found])
    axes.set(xlabel="sum of the single effects", ylabel="combined effect")
    caption = "Combinations against the sum of their single effects; line: equal, coloured: found"
    return Plot("combinations", caption, figure)
