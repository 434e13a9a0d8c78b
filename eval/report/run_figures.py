"""Figures of a run, from its metrics, as images in the page."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from data_prep.drawing import BLUE, GREEN, GREY, LIGHT_BLUE, ORANGE, PINK, RED, new_figure
from eval.drawing.figures import as_image, style
from pretrain.counting.baselines import ARITHMETIC, BASELINE_NAMES

_BASELINE_COLOURS = dict(zip(BASELINE_NAMES, (GREY, ORANGE, GREEN, PINK, RED), strict=True))
_MOST_POINTS, _MOST_TICKS = 1000, 24
_MOST_DATASETS, _LONGEST_NAME = 25, 28
_BEYOND = f"beyond_{ARITHMETIC}"


def run_figures(metrics: list[dict[str, Any]]) -> dict[str, str]:
    """Return the figures that a run's records allow, by what they show.

    Records of older runs lack some scores; a figure without any of its numbers is left out.
    """
    train = [m for m in metrics if m["kind"] == "train"]
    heldout = [m for m in metrics if m["kind"] == "heldout"]
    last = heldout[-1] if heldout else {}
    rates = [("learning rate", "learning_rate", ""), ("Muon's rate", "muon_learning_rate", "")]
    with style():
        figures = {
            "Loss of hidden genes, training and held out": _loss(train, heldout),
            "Nats below the arithmetic line, which needs no learning: above zero the model knows "
            "more than counting": _beyond(heldout),
            "Held-out genes guessed: first guess, first ten guesses": _accuracy(heldout),
            "Held-out loss by rank of the gene (1: most characteristic tenth)": _by_decile(last),
            "Held-out loss by length of the cell": _by_bucket(last),
            "Nats below the arithmetic line, by data set": _by_dataset(last),
            "Gradient norm before clipping (the largest, where steps are drawn together) and "
            "learning rate": _stacked(
                train,
                [("gradient norm", "grad_norm", "log"), *rates],
            ),
            "Speed, and share of the time spent waiting for data": _stacked(
                train, [("real tokens/s", "tokens_per_s", ""), ("data wait", "data_wait", "share")]
            ),
        }
        return {what: as_image(figure) for what, figure in figures.items() if figure}


def _loss(train: list[dict], heldout: list[dict]) -> Figure:
    figure = new_figure(3.6)
    axes = figure.subplots()
    axes.plot(*_thinned(*_series(train, "loss")), color=LIGHT_BLUE, lw=1, label="training")
    axes.plot(*_series(heldout, "loss"), "o-", color=BLUE, label="held out")
    _draw_bars(axes, heldout, "")
    axes.set(xlabel="optimizer step", ylabel="cross-entropy (nats)")
    _close(figure, [axes])
    return figure


def _beyond(heldout: list[dict]) -> Figure | None:
    """Draw how far the held-out loss is below the arithmetic line, and the other baselines are."""
    line = heldout[-1].get(f"baseline_{ARITHMETIC}") if heldout else None
    steps, values = _series(heldout, _BEYOND)
    if line is None or not np.isfinite(values).any():
        return None
    figure = new_figure(3.6)
    axes = figure.subplots()
    axes.plot(steps, values, "o-", color=BLUE, label="this model")
    for name, colour in _BASELINE_COLOURS.items():
        value = heldout[-1].get(f"baseline_{name}")
        if value is not None:
            axes.axhline(line - value, color=colour, ls="--", lw=1.2, label=_label(name))
    axes.set(xlabel="optimizer step", ylabel="nats beyond arithmetic")
    _close(figure, [axes])
    return figure


def _by_dataset(record: dict) -> Figure | None:
    """Draw the data sets with the most hidden genes, the best learned first."""
    beyond = record.get(f"{_BEYOND}_by_dataset") or {}
    known = {name: value for name, value in beyond.items() if value is not None}
    if len(known) < 2:
        return None
    genes = record["genes_by_dataset"]
    shown = sorted(known, key=lambda name: -genes[name])[:_MOST_DATASETS]
    shown = sorted(shown, key=lambda name: -known[name])
    figure = new_figure(0.9 + 0.24 * len(shown))
    axes = figure.subplots()
    values = [known[name] for name in shown]
    colours = [BLUE if value > 0 else GREY for value in values]
    labels = [name if len(name) <= _LONGEST_NAME else name[:_LONGEST_NAME] + "…" for name in shown]
    axes.barh(range(len(shown)), values, color=colours)
    axes.set_yticks(range(len(shown)), labels)
    axes.axvline(0, color="#222222", lw=0.8)
    axes.invert_yaxis()
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    axes.set(xlabel="nats beyond arithmetic")
    return figure


def _accuracy(heldout: list[dict]) -> Figure | None:
    wanted = [("top-1", "masked_accuracy", "_accuracy"), ("top-10", "top10", "_top10")]
    shown = [part for part in wanted if np.isfinite(_series(heldout, part[1])[1]).any()]
    if not shown:
        return None
    figure = new_figure(1.2 + 1.6 * len(shown))
    rows = figure.subplots(len(shown), sharex=True, squeeze=False)[:, 0]
    for axes, (name, key, suffix) in zip(rows, shown, strict=True):
        axes.plot(*_series(heldout, key), "o-", color=BLUE, label="this model")
        _draw_bars(axes, heldout, suffix)
        axes.set_ylim(0, None)
        axes.set_ylabel(name)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    rows[-1].set_xlabel("optimizer step")
    _close(figure, rows)
    return figure


def _by_decile(record: dict) -> Figure | None:
    if "loss_by_rank_decile" not in record:
        return None
    figure = new_figure(3.4)
    axes = figure.subplots()
    places = np.arange(1, len(record["loss_by_rank_decile"]) + 1)
    for name, colour, line in _curves():
        losses = record.get(f"{name}loss_by_rank_decile")
        if losses:
            axes.plot(places, _numbers(losses), line, color=colour, label=_label(name))
    axes.set_xticks(places)
    axes.set(xlabel="decile of rank", ylabel="held-out loss (nats)")
    _close(figure, [])
    return figure


def _by_bucket(record: dict) -> Figure | None:
    if not record.get("loss_by_bucket"):
        return None
    figure = new_figure(3.4)
    axes = figure.subplots()
    lengths = sorted(record["loss_by_bucket"], key=int)
    for name, colour, line in _curves():
        losses = record.get(f"{name}loss_by_bucket")
        if losses is None:
            continue
        values = _numbers(losses.get(length) for length in lengths)
        axes.plot(values, line, color=colour, label=_label(name))
    ticks = range(0, len(lengths), -(-len(lengths) // _MOST_TICKS))
    axes.set_xticks(ticks, [f"{int(lengths[i]):,}" for i in ticks], rotation=90)
    axes.set(xlabel="cells of at most so many tokens", ylabel="held-out loss (nats)")
    _close(figure, [])
    return figure


def _stacked(records: list[dict], parts: list[tuple[str, str, str]]) -> Figure | None:
    """Draw numbers of a run below each other; a part is (label, key, "log", "share" or "")."""
    shown = [part for part in parts if np.isfinite(_series(records, part[1])[1]).any()]
    if not shown:
        return None
    figure = new_figure(0.7 + 1.5 * len(shown))
    rows = figure.subplots(len(shown), sharex=True, squeeze=False)[:, 0]
    for axes, (label, key, kind) in zip(rows, shown, strict=True):
        steps, values = _series(records, key)
        axes.plot(*_thinned(steps, values, largest=kind == "log"), color=BLUE, lw=1)
        if kind == "log":
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(0, None)
            axes.yaxis.set_major_formatter(PercentFormatter(1) if kind == "share" else "{x:,g}")
        axes.set_ylabel(label)
    rows[-1].set_xlabel("optimizer step")
    _close(figure, rows, legend=False)
    return figure


def _curves() -> list[tuple[str, str, str]]:
    """Return (prefix of the record's keys, colour, line) of the model and the baselines."""
    beside = [(f"baseline_{name}_", colour, "--") for name, colour in _BASELINE_COLOURS.items()]
    return [*beside, ("", BLUE, "o-")]


def _label(prefix: str) -> str:
    return prefix.removeprefix("baseline_").replace("_", " ").strip() or "this model"


def _draw_bars(axes: Axes, heldout: list[dict], suffix: str) -> None:
    """Draw the baselines, which do not change over a run, as far as they were recorded."""
    for name, colour in _BASELINE_COLOURS.items():
        value = heldout[-1].get(f"baseline_{name}{suffix}") if heldout else None
        if value is not None:
            axes.axhline(value, color=colour, ls="--", lw=1.2, label=name.replace("_", " "))


def _close(figure: Figure, steps: Iterable[Axes], legend: bool = True) -> None:
    """Write steps as whole numbers, and one legend below."""
    for axes in steps:
        axes.set_xlim(0, None)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter("{x:,.0f}")
    if legend:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)


def _numbers(values: Iterable[Any]) -> np.ndarray:
    """Return float64, NaN where there is None."""
    return np.array(list(values), dtype=np.float64)


def _series(records: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (steps, values), NaN where a record has none."""
    return np.array([m["step"] for m in records]), _numbers(m.get(key) for m in records)


def _thinned(
    steps: np.ndarray, values: np.ndarray, largest: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Return at most `_MOST_POINTS` points: means, or the largest values, of neighbours."""
    group = -(-len(steps) // _MOST_POINTS)
    if group < 2:
        return steps, values
    starts = np.arange(0, len(steps), group)
    if largest:
        return steps[starts], np.fmax.reduceat(values, starts)
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        means = np.add.reduceat(np.where(known, values, 0.0), starts) / np.add.reduceat(
            known.astype(np.float64), starts
        )
    return steps[starts], means
