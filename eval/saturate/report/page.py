"""A measurement of saturation as one self-contained page: answer, curve, table."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.drawing import BLUE, GREY, ORANGE, new_figure
from eval.drawing.page import page_template
from eval.drawing.plot import Plot, as_svg, benchmark_style
from eval.drawing.tables import format_interval
from eval.saturate.report.fit import curve

PAGE_NAME = "saturation.html"
_TEMPLATE = Path(__file__).parent / "page.html"
_COLUMNS = ("cells", "tokens", "times seen", "held-out loss", "beyond counting", "beyond own")


def saturation_page(record: dict[str, Any]) -> str:
    """Return the page of what ``results.json`` holds."""
    with benchmark_style():
        plot = _plot(record)
        source = base64.b64encode(as_svg(plot.figure).encode()).decode()
    return page_template(_TEMPLATE).render(
        r=record,
        columns=columns(record),
        rows=rows(record),
        figure={"caption": plot.caption, "source": "data:image/svg+xml;base64," + source},
    )


def columns(record: dict[str, Any]) -> list[str]:
    """Return the heads of the table."""
    return [*_COLUMNS, *(["frozen cells", "corpus SVD"] if record["file"] else [])]


def rows(record: dict[str, Any]) -> list[list[str]]:
    """Return the table: a row for each size, the half of the tokens last."""
    found = []
    for size in record["sizes"]:
        row = [
            f"{size['cells']:,}" + (", half the tokens" if size["tokens_part"] < 1 else ""),
            f"{size['tokens']:,}",
            f"{size['epochs']:,.2f}",
            f"{size['loss']:.4f}",
            _signed(size["beyond_arithmetic"]),
            _signed(size["beyond_own_arithmetic"]),
        ]
        if record["file"]:
            probe = size["probe"] or {}
            scores = (probe.get(k) for k in ("model", "corpus_svd"))
            row += ["-" if score is None else format_interval(score) for score in scores]
        found.append(row)
    return found


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4f}".replace("-", "−")


def _plot(record: dict[str, Any]) -> Plot:
    sizes = [s for s in record["sizes"] if s["tokens_part"] == 1]
    half = [s for s in record["sizes"] if s["tokens_part"] < 1]
    cells, losses = ([s[k] for s in sizes] for k in ("cells", "loss"))
    figure = new_figure(3.4)
    axes = figure.subplots()
    caption = "Held-out loss by number of training cells"
    if fit := record["fit"]:
        shares = np.geomspace(sizes[0]["share"], 10, 100)
        parameters = np.array([fit[k]["value"] for k in "abc"])
        known = shares <= 1
        line = curve(parameters, shares)
        axes.plot(shares[known] * cells[-1], line[known], color=BLUE)
        axes.plot(shares[~known] * cells[-1], line[~known], color=BLUE, ls=":")
        then = fit["loss_of_ten_times"]
        axes.vlines(10 * cells[-1], then["low"], then["high"], color=BLUE, lw=2)
        low = [v - i["low"] for v, i in zip(losses, fit["intervals"], strict=True)]
        high = [i["high"] - v for v, i in zip(losses, fit["intervals"], strict=True)]
        bars = np.maximum([low, high], 0)
        axes.errorbar(cells, losses, yerr=bars, fmt="none", ecolor=GREY, lw=1)
        caption += ", the fitted curve, and dotted what it says of ten times the corpus; bars are "
        caption += "95 % intervals, those of single sizes mostly of what all sizes have alike"
    axes.plot(cells, losses, "o", color=BLUE, label="all tokens")
    axes.plot([s["cells"] for s in half], [s["loss"] for s in half], "s", color=ORANGE,
              label="half the tokens")  # fmt: skip
    if record["arithmetic"] is not None:
        axes.axhline(record["arithmetic"], color=GREY, ls="--", lw=1, label="counting")
    axes.set_xscale("log")
    axes.set_xlabel("training cells")
    axes.set_ylabel("held-out loss, nats")
    axes.legend()
    return Plot("saturation", caption, figure)
