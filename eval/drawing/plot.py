"""A figure with a name and a caption, as SVG for both colour schemes and as PNG."""

from __future__ import annotations

import io
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

import matplotlib
from matplotlib.figure import Figure

from eval.drawing.figures import BLUE, GREY, LIGHT_BLUE, style

ROLE_COLOURS = {"model": BLUE, "twin": LIGHT_BLUE, "baseline": "#e69f00", "control": GREY}
ROLE_NAMES = {
    "model": "pretrained", "twin": "random weights", "baseline": "baseline", "control": "control"
}  # fmt: skip
INK, _GRID = "#222222", "#dcdddd"
# A figure is an image: only its own style sheet can follow the reader's colour scheme.
DARK_COLOURS = {
    INK: "#e6e7e8", _GRID: "#43474b", BLUE: "#3b9fdd", LIGHT_BLUE: "#b3e0fa", "#6b7075": "#a3a8ad"
}  # fmt: skip
_INKS: dict = {
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.facecolor": "none",
}  # fmt: skip


@dataclass(frozen=True)
class Plot:
    """A figure with the name of its file and what it shows."""

    name: str
    caption: str
    figure: Figure


def benchmark_style() -> AbstractContextManager:
    """Return the context in which these figures are made and saved."""
    stack = ExitStack()
    stack.enter_context(style())
    stack.enter_context(matplotlib.rc_context(_INKS))
    return stack


def as_svg(figure: Figure) -> str:
    """Return a figure as SVG without a background, in the reader's light or dark scheme."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, dpi=160, metadata={"Date": None})
    rules = "".join(
        f'[style*="{kind}: {light}"]{{{kind}:{dark} !important}}'
        for light, dark in DARK_COLOURS.items()
        for kind in ("fill", "stroke")
    )
    sheet = f"<style>@media (prefers-color-scheme: dark) {{{rules}}}</style>"
    return buffer.getvalue().replace("<defs>", f"{sheet}<defs>", 1)


def as_png(figure: Figure) -> bytes:
    """Return a figure as PNG on white, 160 pixels an inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor="white")
    return buffer.getvalue()
