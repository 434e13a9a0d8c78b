"""``geneloom perturb-report``: parse and call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from data_prep.options import AsJson, spread
from eval.perturb.effects.analysis import FOUND, Analysis, AnalysisSettings, analyse
from eval.perturb.effects.gene_sets import read_gene_sets
from eval.perturb.report.page import format_number, format_p, write_perturb_report
from eval.perturb.screen.results import Results

_MOST_LINES = 15


@spread
def perturb_report_command(
    results: Annotated[Path, typer.Argument(help="folder of `geneloom perturb`")],
    out: Annotated[Path, typer.Option(help="folder of tables, figures and report.html")],
    settings: AnalysisSettings,
    also: Annotated[
        Path | None, typer.Option(help="a second screen: the opposite kind, or other donors")
    ] = None,
    gene_set: Annotated[
        Path | None, typer.Option(help=".gmt, or a list of genes: do they stand out as a group?")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Which genes do more than genes like them, in how many donors: tables, figures, one page."""
    screen = Results.open(results)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file; give a folder")
    analysis = analyse(
        screen, settings, Results.open(also) if also else None,
        read_gene_sets(gene_set) if gene_set else None,
    )  # fmt: skip
    path = write_perturb_report(screen, analysis, out)
    if as_json:
        genes = json.loads(analysis.genes.to_json(orient="records"))
        print(json.dumps({"warnings": analysis.warnings, "genes": genes}, indent=1))
    else:
        print_analysis(analysis)
        print(path)


def print_analysis(analysis: Analysis, console: Console | None = None) -> None:
    """Print warnings, and the genes that are found, or those furthest from matched ones."""
    console = console or Console()
    for warning in analysis.warnings:
        console.print(f"warning: {warning}", style="yellow", highlight=False)
    genes = analysis.genes
    found = genes[genes["verdict"] == FOUND]
    shown = found if len(found) else genes[genes["matched_effect"].notna()]
    tested = int(genes["matched_p"].notna().sum())
    title = f"{analysis.effect}: {len(found)} of {tested} tested genes found"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("gene", "minus matched genes", "95 % interval", "FDR", "effect", "donors"):
        table.add_column(column, justify="left" if column == "gene" else "right")
    for row in shown.head(_MOST_LINES).itertuples():
        interval = f"{format_number(row.matched_low)} to {format_number(row.matched_high)}"
        table.add_row(
            row.name, format_number(row.matched_effect), interval, format_p(row.matched_fdr),
            format_number(row.effect), str(row.donors),
        )  # fmt: skip
    console.print(table)
