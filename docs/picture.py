"""Draws which package imports which rooms of which: ``python -m docs.picture`` writes an SVG.

A test compares the picture with the imports of the code as it is.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "images" / "imports.svg"
_LINE, _HALF = 15, (90, 26)
# Centres of the boxes, and of each arrow its corners and where its label begins.
_BOXES = {"launch": (110, 40), "eval": (590, 40), "pretrain": (350, 300), "data_prep": (350, 560)}
_ARROWS = {
    ("launch", "pretrain"): ([(150, 66), (150, 300), (257, 300)], (158, 90)),
    ("launch", "data_prep"): ([(60, 66), (60, 560), (257, 560)], (68, 340)),
    ("eval", "pretrain"): ([(550, 66), (550, 300), (443, 300)], (480, 90)),
    ("eval", "data_prep"): ([(640, 66), (640, 560), (443, 560)], (648, 90)),
    ("pretrain", "data_prep"): ([(350, 326), (350, 531)], (358, 360)),
}
_SAID = {
    "launch": "starts ranks; no torch",
    "eval": "scores beside baselines",
    "pretrain": "shards → checkpoints",
    "data_prep": "cells → shards; no torch",
}


def imports() -> dict[tuple[str, str], set[str]]:
    """Return (folder, folder it imports) -> rooms of the latter (folders, or files beside them)."""
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for folder in _BOXES:
        for path in (ROOT / folder).rglob("*.py"):
            for name in _names(path):
                other = name.split(".")[0]
                if other in _BOXES and other != folder:
                    found[folder, other].add(name.split(".")[1])
    return dict(found)


def _names(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def draw() -> str:
    """Return the picture as SVG.

    Raises
    ------
    ValueError
        A folder imports another in a direction that has no arrow.
    """
    found = imports()
    if set(found) != set(_ARROWS):
        raise ValueError(f"arrows that are not drawn, or not there: {set(found) ^ set(_ARROWS)}")
    shapes = []
    for arrow, (corners, (x, y)) in _ARROWS.items():
        line = " ".join(f"{a},{b}" for a, b in corners)
        shapes.append(f'<polyline points="{line}" class="arrow" marker-end="url(#head)"/>')
        for place, module in enumerate(sorted(found[arrow])):
            shapes.append(f'<text x="{x}" y="{y + place * _LINE}" class="module">{module}</text>')
    for name, (x, y) in _BOXES.items():
        width, height = _HALF
        shapes += [
            f'<rect x="{x - width}" y="{y - height}" width="{2 * width}" height="{2 * height}"/>',
            f'<text x="{x}" y="{y - 3}" class="folder">{name}</text>',
            f'<text x="{x}" y="{y + 14}" class="said">{_SAID[name]}</text>',
        ]
    style = (
        "svg{background:#fff;font:12px sans-serif}rect{fill:#e8f1f8;stroke:#0072b2;rx:5}"
        ".arrow{fill:none;stroke:#6b7177}.folder{font-weight:bold;font-size:14px}"
        ".folder,.said{text-anchor:middle}.said{font-size:11px}.module{fill:#3a3f44}"
    )
    return "\n".join(
        [
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 770 600" role="img" '
            'aria-label="Which folder imports which modules of which">',
            f"<style>{style}</style>",
            '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" '
            'markerHeight="8" orient="auto"><path d="M0 0 8 4 0 8z" fill="#6b7177"/></marker>',
            *shapes,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(draw())
    print(PICTURE)
