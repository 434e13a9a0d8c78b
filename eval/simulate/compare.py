"""Compare simulated with real counts by the same moments of both.

`measure_cells` computes the moments of a file; `print_moments` and `write_plot` show them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse
from matplotlib.ticker import FuncFormatter, NullFormatter
from rich.console import Console
from rich.table import Table

from data_prep.drawing import BLUE, ORANGE, new_figure
from data_prep.sources.count_source import CountSource
from data_prep.sources.open_source import open_path
from data_prep.sources.source_spec import SourceOptions
from eval.drawing.figures import style

_COLOURS = {"real": ORANGE, "simulated": BLUE}
_PLAIN = FuncFormatter(lambda value, _: f"{value:,g}")  # the style's text knows no powers
_LEAST_MEAN = 0.1  # below, a gene's dispersion is mostly sampling noise


@dataclass(frozen=True)
class CountMoments:
    """Moments of the most expressed genes of a file, of raw counts without normalisation.

    Attributes
    ----------
    total, detected
        float64 [cells], counts, and number of genes with a count.
    mean, variance, detection
        float64 [genes], over cells; detection is the share of cells with a count.
    """

    total: np.ndarray
    detected: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    detection: np.ndarray

    @property
    def dispersion(self) -> np.ndarray:
        """Return float64, (variance - mean) / mean^2 of genes with a mean of at least 0.1."""
        chosen = self.mean >= _LEAST_MEAN
        mean = self.mean[chosen]
        return (self.variance[chosen] - mean) / mean**2

    def summary(self) -> dict[str, float]:
        """Return the numbers that are compared."""
        low, middle, high = np.percentile(self.detected, [5, 50, 95])
        values = {
            "cells": len(self.total),
            "genes": len(self.mean),
            "counts per cell, median": np.median(self.total),
            "counts per cell, sd of ln": np.log(np.maximum(self.total, 1)).std(),
            "genes per cell, 5 %": low,
            "genes per cell, median": middle,
            "genes per cell, 95 %": high,
            "share of zeros": 1 - self.detection.mean(),
            "gene means, sd of ln": np.log(self.mean).std(),
        }
        varies = self.variance > 0
        if np.count_nonzero(varies) > 2:
            points = np.log(self.mean[varies]), np.log(self.variance[varies])
            values["slope of ln variance on ln mean"] = np.polyfit(*points, 1)[0]
        if len(self.dispersion):
            values["dispersion, median"] = np.median(self.dispersion)
        return {name: float(f"{value:.4g}") for name, value in values.items()}


def measure_cells(path: Path, num_genes: int) -> CountMoments:
    """Return the moments of the `num_genes` most expressed genes of a file, read in blocks.

    Raises
    ------
    ValueError
        The file is no count matrix, has no raw counts, or has no cells with counts.
    """
    source = open_path(path, SourceOptions())
    if not isinstance(source, CountSource):
        raise ValueError(f"{path}: expected a count matrix, e.g. an .h5ad with raw counts")
    sums, squares, cells_with = (np.zeros(source.num_genes) for _ in range(3))
    cells = 0
    for block in source.blocks():
        sums += np.bincount(block.indices, block.data, source.num_genes)
        squares += np.bincount(block.indices, np.square(block.data, dtype=float), source.num_genes)
        cells_with += np.bincount(block.indices, block.data > 0, source.num_genes)
        cells += len(block.cell_ids)
    top = np.sort(np.argsort(-sums, kind="stable")[: min(num_genes, np.count_nonzero(sums))])
    if not len(top):
        raise ValueError(f"{path}: holds no counts; more cells or a greater depth are needed")
    total, detected = [], []
    for block in source.blocks():
        shape = (len(block.cell_ids), source.num_genes)
        counts = scipy.sparse.csr_matrix((block.data, block.indices, block.indptr), shape)[:, top]
        total.append(np.asarray(counts.sum(axis=1), dtype=float).ravel())
        detected.append(np.asarray((counts > 0).sum(axis=1), dtype=float).ravel())
    mean = sums[top] / cells
    return CountMoments(
        np.concatenate(total),
        np.concatenate(detected),
        mean,
        squares[top] / cells - mean**2,
        cells_with[top] / cells,
    )


def print_moments(moments: dict[str, dict[str, float]]) -> None:
    """Print the summaries as a table with one column each."""
    table = Table(title="most expressed genes, raw counts", title_justify="left")
    table.add_column("")
    for name in moments:
        table.add_column(name, justify="right")
    for what in next(iter(moments.values())):
        table.add_row(what, *(f"{m[what]:,.4g}" if what in m else "-" for m in moments.values()))
    Console().print(table)


def write_plot(path: Path, moments: dict[str, CountMoments]) -> None:
    """Write a figure: detection and variance against the mean; genes against counts of cells."""
    with style():
        figure = new_figure(9.0)
        detection, variance, cells = figure.subplots(3)
        for name, m in moments.items():
            look = {"color": _COLOURS[name], "s": 5, "alpha": 0.5, "label": name, "lw": 0}
            detection.scatter(m.mean, m.detection, **look)
            variance.scatter(m.mean, m.variance, **look)
            cells.scatter(m.total, m.detected, **look)
        means = np.concatenate([m.mean for m in moments.values()])
        curve = np.geomspace(means.min(), means.max())
        line = {"color": "#222222", "lw": 1, "label": "Poisson"}
        detection.plot(curve, -np.expm1(-curve), **line)
        variance.plot(curve, curve, **line)
        detection.set(xscale="log", xlabel="mean count of a gene", ylabel="share of cells with it")
        variance.set(xscale="log", yscale="log", xlabel="mean count of a gene", ylabel="variance")
        cells.set(xscale="log", xlabel="counts of a cell", ylabel="genes of a cell")
        for axes in (detection, variance, cells):
            axes.xaxis.set_major_formatter(_PLAIN)
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.legend(markerscale=3)
        variance.yaxis.set_major_formatter(_PLAIN)
        figure.savefig(path, dpi=160, facecolor="white", metadata={"Software": None})
