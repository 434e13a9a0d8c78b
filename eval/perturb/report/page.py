"""A screen as tables and one self-contained page: the answer first, then genes and figures."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.files import complete_file
from eval.drawing.page import page_template
from eval.drawing.plot import Plot, as_png, as_svg, benchmark_style
from eval.perturb.effects.analysis import FOUND, NOT_TESTED, Analysis
from eval.perturb.effects.columns import (
    AGREEMENT_COLUMNS,
    COMBINATION_COLUMNS,
    GENE_COLUMNS,
    GENE_SET_COLUMNS,
)
from eval.perturb.report.plots import effect_name, screen_plots
from eval.perturb.screen.results import Results

_NOUNS = {
    "delete": "deletion", "overexpress": "overexpression", "inhibit": "inhibition",
    "activate": "activation",
}  # fmt: skip
REPORT_NAME, PLOTS_FOLDER = "report.html", "plots"
_TEMPLATE = Path(__file__).parent / "page.html"
_MOST_ROWS = 40


def write_perturb_report(results: Results, analysis: Analysis, out: Path) -> Path:
    """Write tables, figures and the page into a folder, and return the page's path.

    Parameters
    ----------
    out
        Folder, made if need be: gets ``genes``, ``combinations`` and ``gene_sets`` (the latter two
        where there are any) as ``.parquet`` and ``.csv``, ``plots/*.png`` and ``.svg``, and
        ``report.html``, which is written last.
    """
    # All is drawn before anything is written.
    with benchmark_style():
        drawn = {plot.name: _drawn(plot) for plot in screen_plots(analysis)}
    page = _render(results, analysis, {name: shown for name, (shown, *_) in drawn.items()})
    (out / PLOTS_FOLDER).mkdir(parents=True, exist_ok=True)
    _write_table(analysis.genes, out / "genes", GENE_COLUMNS | AGREEMENT_COLUMNS)
    if len(analysis.combinations):
        _write_table(analysis.combinations, out / "combinations", COMBINATION_COLUMNS)
    if len(analysis.gene_sets):
        _write_table(analysis.gene_sets, out / "gene_sets", GENE_SET_COLUMNS)
    for name, (_, svg, png) in drawn.items():
        (out / PLOTS_FOLDER / f"{name}.svg").write_text(svg)
        (out / PLOTS_FOLDER / f"{name}.png").write_bytes(png)
    path = out / REPORT_NAME
    with complete_file(path) as aside:
        aside.write_text(page)
    return path


def perturb_page(results: Results, analysis: Analysis) -> str:
    """Return the page alone, which holds its figures and the first rows of its tables."""
    with benchmark_style():
        figures = {p.name: _shown(p, as_svg(p.figure)) for p in screen_plots(analysis)}
    return _render(results, analysis, figures)


def _render(results: Results, analysis: Analysis, figures: dict[str, dict[str, str]]) -> str:
    template = page_template(_TEMPLATE, number=format_number, p=format_p, rate=format_share)
    genes = analysis.genes
    beside = [figures.pop(name) for name in ("agreement", "combinations") if name in figures]
    return template.render(
        a=analysis,
        effect=effect_name(analysis.effect),
        cells=len(results.cells),
        kinds=[_NOUNS.get(kind, kind) for kind in dict.fromkeys(genes["kind"])],
        answer=_answer(analysis),
        found=_rows(genes[genes["verdict"] == FOUND]),
        others=_rows(genes[(genes["verdict"] != FOUND) & genes["matched_effect"].notna()]),
        groups=_rows(genes[genes["genes"].map(len) > 1]),
        combinations=analysis.combinations.head(_MOST_ROWS).to_dict("records"),
        sets=analysis.gene_sets.head(_MOST_ROWS).to_dict("records"),
        most=_MOST_ROWS,
        figures=list(figures.values()),
        beside={f["name"]: f for f in beside},
        columns=GENE_COLUMNS | (AGREEMENT_COLUMNS if analysis.agreement else {}),
        about=json.dumps(results.manifest, indent=1),
        folder=str(results.folder),
    )


def _write_table(table: pd.DataFrame, path: Path, meanings: dict[str, str]) -> None:
    """Write a table as Parquet, each column with its meaning, and as CSV (lists joined by ;)."""
    arrow = pa.Table.from_pandas(table, preserve_index=False)
    fields = [f.with_metadata({"description": meanings[f.name]}) for f in arrow.schema]
    arrow = arrow.cast(pa.schema(fields, metadata=arrow.schema.metadata))
    with complete_file(path.with_suffix(".parquet")) as aside:
        pq.write_table(arrow, aside)
    flat = table.copy()
    if "perturbation" in flat:
        flat["genes"] = flat["genes"].map(";".join)
    with complete_file(path.with_suffix(".csv")) as aside:
        flat.to_csv(aside, index=False)


def format_number(value: float | None, signed: bool = True) -> str:
    """Return three significant digits, `-` where there is no number."""
    if value is None or pd.isna(value):
        return "-"
    text = f"{value:+#.3g}" if signed else f"{value:#.3g}"
    return text.rstrip(".").replace("-", "−")


def format_p(value: float | None) -> str:
    """Return a p value or false discovery rate, `-` where nothing was tested."""
    if value is None or pd.isna(value):
        return "-"
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}" if value < 0.1 else f"{value:.2f}"


def format_share(value: float | None) -> str:
    """Return a share as per cent."""
    return "-" if value is None or pd.isna(value) else f"{100 * value:.0f} %"


def _rows(genes: pd.DataFrame) -> list[dict[str, Any]]:
    return genes.head(_MOST_ROWS).to_dict("records")


def _answer(analysis: Analysis) -> dict[str, Any]:
    """Return the counts that the page begins with."""
    genes = analysis.genes
    found = genes[genes["verdict"] == FOUND]
    return {
        "found": len(found),
        "tested": int((genes["verdict"] != NOT_TESTED).sum()),
        "above": int((found["matched_effect"] > 0).sum()),
        "below": int((found["matched_effect"] < 0).sum()),
        "naive": int((genes["fdr"] < analysis.settings.rate).sum()) if analysis.signed else None,
        "power": [r | {"size": _size(r["size"])} for r in analysis.power],
    }


def _size(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "any size is out of reach"


def _drawn(plot: Plot) -> tuple[dict[str, str], str, bytes]:
    """Return what the page needs of a figure, and the figure as SVG and PNG."""
    svg = as_svg(plot.figure)
    return _shown(plot, svg), svg, as_png(plot.figure)


def _shown(plot: Plot, svg: str) -> dict[str, str]:
    source = "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
    width = f"{round(96 * plot.figure.get_size_inches()[0])}px"
    return {"name": plot.name, "caption": plot.caption, "source": source, "width": width}
