"""Figures of the reports, as images in the page."""

from __future__ import annotations

import base64
from contextlib import AbstractContextManager
from typing import Any

from matplotlib.figure import Figure

from data_prep import drawing
from data_prep.drawing import svg_text

GRID = "#dcdddd"
_STYLE: dict[str, Any] = {
    "lines.linewidth": 1.4, "lines.markersize": 3.5, "axes.grid": True, "axes.grid.axis": "y",
    "grid.color": GRID,
}  # fmt: skip


def style(more: dict[str, Any] | None = None) -> AbstractContextManager:
    """Return the context in which figures are made and saved; `more`: settings of matplotlib."""
    return drawing.style(_STYLE | (more or {}))


def as_image(figure: Figure) -> str:
    """Return a figure as the source of an <img>."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg_text(figure).encode()).decode()
