"""One page, for people, of what a shard folder holds: an HTML file or a PNG figure."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from data_prep.drawing import (
    BLUE,
    GREEN,
    GREY,
    LIGHT_BLUE,
    ORANGE,
    PINK,
    RED,
    WIDTH,
    inked,
    new_figure,
    png_bytes,
    style,
    svg_text,
)  # fmt: skip
from data_prep.encoding.filters import REASONS
from data_prep.files import complete_file, file_sha256
from data_prep.genes.annotation import mitochondrial_columns
from data_prep.genes.gene_names import ENSEMBL
from data_prep.inspection.tables import padding_share
from data_prep.shards.format import SPLITS, STATISTICS_NAME
from data_prep.shards.reader import ShardSet

_TEMPLATE = Path(__file__).parent / "page.html"
_MOST_DATASETS, _TOP_GENES, _MOST_BINS, _MOST_TICKS, _CURVE_POINTS = 30, 20, 80, 24, 2000
_HEIGHT, _BAR = 3.1, 0.2  # inches
_COLOURS = (BLUE, LIGHT_BLUE, GREEN, ORANGE, RED, PINK, GREY)  # of a reason, on every page
# In the HTML these two become the colours of the page, light or dark.
_INK, _LINE = "#1a1b1c", "#c9cacb"
_STYLE: dict = inked(_INK) | {"figure.titlesize": 11, "grid.color": _LINE}
# Title, height in inches, and what draws it.
Panel = tuple[str, float, Callable[[Axes], None]]


def write_page(shards: ShardSet, out: Path) -> None:
    """Write the page of a shard folder to `out`; a file that is there is replaced at the end.

    Parameters
    ----------
    out
        ``.html``: one file that needs no other and no network. ``.png``: all plots in one figure.

    Raises
    ------
    ValueError
        Another suffix, no folder to write into, or ``statistics.json`` is not the manifest's.
    """
    writers = {".html": _html, ".png": _png}
    if out.suffix not in writers:
        raise ValueError(f"{out}: a page is an .html or a .png file; give it one of these suffixes")
    if not out.parent.is_dir():
        raise ValueError(f"{out}: the folder {out.parent} does not exist")
    content = writers[out.suffix](shards, _read_statistics(shards))
    with complete_file(out) as aside:
        aside.write_bytes(content)


def _read_statistics(shards: ShardSet) -> dict | None:
    """Return the lengths of the cells and its genes, most frequent first; None: not recorded."""
    path, vocabulary = shards.find_statistics(), shards.vocabulary
    if not path.exists():
        return None
    if file_sha256(path) != shards.manifest.get("statistics_sha256"):
        raise ValueError(f"{path}: does not match the manifest; copy or prepare the folder again")
    content = json.loads(path.read_text())
    cells = np.array(content["cells_by_token"])[vocabulary.first_gene_token :]
    order = np.argsort(-cells, kind="stable")
    top = [vocabulary.genes[i] for i in order[:_TOP_GENES] if cells[i]]
    return {
        "lengths": np.array(content["cells_by_length"]),
        "genes": cells[order],
        "top": top,
        "top_mitochondrial": mitochondrial_columns(top, None, None),
    }


def _html(shards: ShardSet, statistics: dict | None) -> bytes:
    manifest = shards.manifest
    datasets = sorted(manifest.get("datasets", []), key=lambda d: -d["cells_read"])
    found = {reason for d in datasets for reason in d["rejected"]}
    names: dict[str, list[str]] = {}
    for alias, gene in shards.vocabulary.aliases.items():
        if not ENSEMBL.match(alias):
            names.setdefault(gene, []).append(alias)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["count"] = lambda value: "-" if value is None else f"{value:,.0f}"
    environment.filters["share"] = lambda value: "-" if value is None else f"{value:.1%}"
    environment.tests["ensembl"] = lambda gene: bool(ENSEMBL.match(gene))
    page = environment.from_string(_TEMPLATE.read_text()).render(
        folder=shards.name,
        manifest=manifest,
        padding=padding_share(manifest["buckets"]),
        datasets=datasets,
        most_datasets=_MOST_DATASETS,
        reasons=[r for r in REASONS if r in found],
        statistics=statistics,
        names=names,
        figures={name: _svg(name, panel) for name, panel in _panels(manifest, statistics).items()},
    )
    return page.encode()


def _svg(name: str, panel: Panel) -> Markup:
    """Return a plot as an element of the page; the same bytes every time."""
    title, height, draw = panel
    with style(_STYLE | {"svg.hashsalt": name}):
        figure = new_figure(height)
        draw(figure.subplots())
        unsaid = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        text = svg_text(figure, transparent=True, metadata=unsaid)
    text = text.replace(_INK, "currentColor").replace(_LINE, "var(--line)")
    # Groups are numbered within a figure: on one page their ids would repeat.
    text = re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])
    return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1))


def _png(shards: ShardSet, statistics: dict | None) -> bytes:
    manifest = shards.manifest
    panels = list(_panels(manifest, statistics).values())
    heights = [max(p[1] for p in panels[i : i + 2]) + 0.3 for i in range(0, len(panels), 2)]
    lines = [
        f"{shards.name}: {shards.num_cells:,} cells, "
        f"{manifest['num_tokens']:,} tokens in the vocabulary, padding "
        f"{padding_share(manifest['buckets']):.2%}, shards {shards.fingerprint[:12]}"
    ]
    if statistics is None:
        lines.append(f"lengths and genes are not shown: the folder has no {STATISTICS_NAME}")
    if "datasets" not in manifest:
        lines.append(f"data sets are not shown: {manifest['format']} does not record them")
    with style(_STYLE):
        figure = Figure(figsize=(2 * WIDTH + 0.4, sum(heights) + 0.7), layout="constrained")
        figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=9.5)
        parts = figure.subfigures(len(heights), 2, squeeze=False, height_ratios=heights).flat
        for part, (title, _, draw) in zip(parts, panels, strict=False):
            part.suptitle(title, x=0.01, ha="left")
            draw(part.subplots())
        return png_bytes(figure, dpi=150, metadata={"Software": None})


def _panels(manifest: dict, statistics: dict | None) -> dict[str, Panel]:
    """Return what can be drawn, by name, in pairs of one height."""
    buckets, panels = manifest["buckets"], {}
    if statistics:
        draw = partial(_draw_lengths, statistics["lengths"], buckets)
        panels["lengths"] = ("length of the cells", _HEIGHT, draw)
    panels["padding"] = ("padding by bucket", _HEIGHT, partial(_draw_padding, buckets))
    if statistics:
        genes, top, mito = (statistics[k] for k in ("genes", "top", "top_mitochondrial"))
        height = 0.9 + _BAR * len(top)
        panels["genes"] = ("cells by gene", height, partial(_draw_genes, genes))
        share = genes[: len(top)] / sum(b["cells"] for b in buckets)
        parts = [("_other", BLUE, share * ~mito), ("mitochondrial", ORANGE, share * mito)]
        draw = partial(_draw_bars, top, parts, "share of the cells")
        panels["top"] = ("genes of most cells", height, draw)
    largest = sorted(manifest.get("datasets", []), key=lambda d: -d["cells_read"])[:_MOST_DATASETS]
    if largest:
        names, height = [d["name"] for d in largest], 1.2 + _BAR * len(largest)
        read, kept = (np.array([d[k] for d in largest]) for k in ("cells_read", "cells_kept"))
        parts = [("kept", BLUE, kept), ("rejected", ORANGE, read - kept)]
        which = "" if len(largest) == len(manifest["datasets"]) else f" (largest {len(largest)})"
        draw = partial(_draw_bars, names, parts, "cells")
        panels["datasets"] = (f"cells of the data sets{which}", height, draw)
        parts = [
            (reason, colour, np.array([d["rejected"].get(reason, 0) for d in largest]) / read)
            for reason, colour in zip(REASONS, _COLOURS, strict=True)
        ]
        draw = partial(_draw_bars, names, parts, "share of the cells read")
        panels["rejected"] = (f"rejected cells{which}", height, draw)
    return panels


def _draw_lengths(histogram: np.ndarray, buckets: list[dict], axes: Axes) -> None:
    longest = int(np.flatnonzero(histogram.sum(axis=0)).max())
    width = 2 ** max(0, int(np.ceil(np.log2(longest / _MOST_BINS))))
    edges = np.arange(0, longest + width, width) + 0.5
    for number in {b["length"] for b in buckets}:
        axes.axvline(number + 0.5, color=GREY, lw=0.7, ls=":", zorder=0)
    axes.plot([], [], color=GREY, lw=0.7, ls=":", label="end of a bucket")
    for split, row, colour in zip(SPLITS, histogram, (BLUE, ORANGE), strict=True):
        share = np.histogram(np.arange(len(row)), edges, weights=row)[0] / row.sum()
        label = f"{split}, {row.sum():,} cells"
        axes.stairs(share, edges, fill=split == "train", color=colour, lw=1.3, label=label)
    axes.set(xlabel=f"tokens of a cell ({width} a step)", ylabel="share of the split's cells")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend()


def _draw_padding(buckets: list[dict], axes: Axes) -> None:
    lengths = sorted({b["length"] for b in buckets})
    for split, colour, shift in zip(SPLITS, (BLUE, ORANGE), (-0.2, 0.2), strict=True):
        mine = [b for b in buckets if b["split"] == split]
        shares = [padding_share([b]) for b in mine]
        places = [lengths.index(b["length"]) + shift for b in mine]
        axes.bar(places, shares, width=0.4, color=colour, label=split)
    axes.axhline(padding_share(buckets), color=_INK, lw=0.8, ls="--", label="all together")
    ticks = range(0, len(lengths), -(-len(lengths) // _MOST_TICKS))
    axes.set_xticks(ticks, [f"{lengths[i]:,}" for i in ticks], rotation=90)
    axes.set(xlabel="length of the bucket (tokens)", ylabel="padding")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend()


def _draw_genes(cells: np.ndarray, axes: Axes) -> None:
    seen = cells[cells > 0]
    ranks = np.unique(np.geomspace(1, len(seen), _CURVE_POINTS).astype(int))
    axes.fill_between(ranks, seen[ranks - 1], 0.8, color=BLUE, alpha=0.25, lw=0)
    axes.plot(ranks, seen[ranks - 1], color=BLUE, lw=1.5)
    if len(seen) < len(cells):
        axes.axvspan(len(seen), len(cells), color=GREY, alpha=0.3, lw=0, label="never seen")
        axes.legend()
    axes.set(yscale="log", ylim=(0.8, None), xlim=(0, len(cells)))
    axes.set(xlabel="genes of the vocabulary, most frequent first", ylabel="cells with the gene")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(axis="y")


def _draw_bars(
    names: list[str], parts: list[tuple[str, str, np.ndarray]], what: str, axes: Axes
) -> None:
    """Draw a bar per name, from the top, of coloured parts; those without any length are left out.

    Floating-point parts are shares of 1; a label that begins with "_" is not shown.
    """
    start = np.zeros(len(names))
    for label, colour, values in parts:
        if values.any():
            axes.barh(range(len(names)), values, 0.75, start, color=colour, label=label)
            start += values
    axes.set_yticks(range(len(names)), [n if len(n) < 28 else f"{n[:14]}…{n[-12:]}" for n in names])
    axes.set(ylim=(len(names) - 0.4, -0.6), xlabel=what)
    is_share = parts[0][2].dtype.kind == "f"
    axes.xaxis.set_major_formatter(PercentFormatter(1) if is_share else EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="x")
    if axes.get_legend_handles_labels()[0]:
        axes.figure.legend(loc="outside lower left")
