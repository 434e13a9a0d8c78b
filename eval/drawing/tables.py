"""Scores as a table for the console."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

SCORE_NAMES = {
    "macro_f1": "macro-F1",
    "balanced_accuracy": "balanced accuracy",
    "accuracy": "accuracy",
}


def format_interval(value: dict[str, float]) -> str:
    """Return ``0.893 ± 0.012`` (mean and 95 % half-width over seeds)."""
    return f"{value['mean']:.3f} ± {value['half_width']:.3f}"


def print_scores(results: dict, console: Console | None = None) -> None:
    """Print the summary of a fine-tuning, best macro-F1 first, and F1 by class."""
    console = console or Console()
    seeds = results["seeds"]
    summary = results["summary"]
    ordered = sorted(summary, key=lambda n: -summary[n]["macro_f1"]["mean"])
    title = (
        f"{results['task']}: {len(results['classes'])} classes, {results['cells']:,} cells, split "
        f"{results['split']}, {seeds[0]['train_cells']:,} train / {seeds[0]['test_cells']:,} test, "
        f"{len(seeds)} seeds, mean ± 95 % interval"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("classifier")
    for name in SCORE_NAMES.values():
        table.add_column(name, justify="right")
    for name in ordered:
        table.add_row(name, *(format_interval(summary[name][k]) for k in SCORE_NAMES))
    console.print(table)
    classes = Table(title="F1 by class, mean over seeds", title_justify="left")
    classes.add_column("class")
    for name in ordered:
        classes.add_column(name, justify="right")
    for c in results["classes"]:
        cells = (summary[n]["f1_by_class"].get(c) for n in ordered)
        classes.add_row(c, *("-" if v is None else f"{v:.3f}" for v in cells))
    console.print(classes)
    for reason, cells in results["dropped"].items():
        console.print(f"left out: {cells:,} cells: {reason}", highlight=False)
