"""The one look of all figures: colours, letters, width, and how a figure becomes a text.

What a figure shows is drawn beside the page that it is on: ``data_prep/inspection/page.py``,
``eval/report``, and the ``plots.py`` of benchmark and screen.
"""

from __future__ import annotations

import io
from contextlib import AbstractContextManager
from typing import Any

import matplotlib
from matplotlib.figure import Figure

# Okabe & Ito (2008): told apart with any colour vision.
BLUE, LIGHT_BLUE, GREEN, GREY = "#0072b2", "#56b4e9", "#009e73", "#8c8c8c"
ORANGE, RED, PINK = "#e69f00", "#d55e00", "#cc79a7"
WIDTH = 5.2  # inches: on a phone the text is still 9 pixels high
_INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
_STYLE: dict = {  # of matplotlib's own names
    "font.size": 9.5, "legend.fontsize": 9, "legend.frameon": False, "axes.spines.top": False,
    "axes.spines.right": False, "axes.axisbelow": True, "grid.linewidth": 0.6,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name may hold a dollar sign
}  # fmt: skip


def style(more: dict) -> AbstractContextManager:
    """Return the context in which figures are made and saved; `more`: settings of matplotlib."""
    return matplotlib.rc_context(_STYLE | more)


def inked(colour: str) -> dict:
    """Return the settings of matplotlib that give text and axes a colour."""
    return dict.fromkeys(_INKED, colour)


def new_figure(height: float) -> Figure:
    """Return an empty figure as wide as the page allows on a phone; height in inches."""
    return Figure(figsize=(WIDTH, height), layout="constrained")


def svg_text(figure: Figure, **options: Any) -> str:
    """Return a figure as SVG, without the time of day; `options`: of matplotlib's ``savefig``."""
    buffer = io.StringIO()
    options.setdefault("metadata", {"Date": None})
    figure.savefig(buffer, format="svg", **options)
    return buffer.getvalue()


def png_bytes(figure: Figure, **options: Any) -> bytes:
    """Return a figure as PNG; `options`: of matplotlib's ``savefig``."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", **options)
    return buffer.getvalue()
