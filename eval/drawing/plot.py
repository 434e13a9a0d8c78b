"""A figure with a name and a caption, as SVG for both colour schemes and as PNG."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

from matplotlib.figure import Figure

from data_prep.drawing import BLUE, GREY, LIGHT_BLUE, ORANGE, inked, png_bytes, svg_text
from eval.drawing.figures import GRID, style

ROLE_COLOURS = {"model": BLUE, "twin": LIGHT_BLUE, "baseline": ORANGE, "control": GREY}
ROLE_NAMES = {
    "model": "pretrained", "twin": "random weights", "baseline": "baseline", "control": "control"
}  # fmt: skip
INK = "#222222"
# A figure is an image: only its own style sheet can follow the reader's colour scheme.
DARK_COLOURS = {
    INK: "#e6e7e8", GRID: "#43474b", BLUE: "#3b9fdd", LIGHT_BLUE: "#b3e0fa", "#6b7075": "#a3a8ad"
}  # fmt: skip


@dataclass(frozen=True)
class Plot:
    """A figure with the name of its file and what it shows."""

    name: str
    caption: str
    figure: Figure


def benchmark_style() -> AbstractContextManager:
    """Return the context in which these figures are made and saved."""
    return style(inked(INK) | {"axes.facecolor": "none"})


def as_svg(figure: Figure) -> str:
    """Return a figure as SVG without a background, in the reader's light or dark scheme."""
    rules = "".join(
        f'[style*="{kind}: {light}"]{{{kind}:{dark} !important}}'
        for light, dark in DARK_COLOURS.items()
        for kind in ("fill", "stroke")
    )
    sheet = f"<style>@media (prefers-color-scheme: dark) {{{rules}}}</style>"
    text = svg_text(figure, transparent=True, dpi=160)
    return text.replace("<defs>", f"{sheet}<defs>", 1)


def as_png(figure: Figure) -> bytes:
    """Return a figure as PNG on white, 160 pixels an inch."""
    return png_bytes(figure, dpi=160, facecolor="white")
