"""Scores as a table for the console."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

# A score's name for readers; the first one that a result has is its headline.
_SCORE_NAMES = {
    "auroc": "AUROC",
    "macro_f1": "macro-F1",
    "balanced_accuracy": "balanced accuracy",
    "accuracy": "accuracy",
}


def score_names(summary: dict[str, dict]) -> dict[str, str]:
    """Return score -> its name for readers, of the scores of a fine-tuning, the headline first."""
    known = next(iter(summary.values()))
    return {score: name for score, name in _SCORE_NAMES.items() if score in known}


def best_first(summary: dict[str, dict]) -> list[str]:
    """Return the contenders of a fine-tuning, the best mean headline first."""
    headline = next(iter(score_names(summary)))
    return sorted(summary, key=lambda name: -summary[name][headline]["mean"])


def format_steps(row: dict) -> str:
    """Return the optimizer steps of a contender's trainings: ``300``, ``280 to 310``, or ``-``."""
    if row.get("steps") is None:  # nothing was trained, or older results
        return "-"
    least, most = row["steps"]
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def about_results(results: dict) -> str:
    """Return what was told apart, how it was divided and how often, in one line."""
    folds, first = results["seeds"], results["seeds"][0]
    of = "genes" if results.get("kind") == "genes" else "cells"
    number = f"{results[of]:,} {of}"
    if of == "genes":
        number += f" in {results['cells']:,} cells"
    return (
        f"{len(results['classes'])} classes, {number}, split {results['split']}, "
        f"{first[f'train_{of}']:,} train / {first[f'test_{of}']:,} test, "
        f"{len(folds)} {'folds' if of == 'genes' else 'seeds'}, mean ± 95 % interval"
    )


def format_interval(value: dict[str, float]) -> str:
    """Return ``0.893 ± 0.012`` (mean and 95 % half-width)."""
    return f"{value['mean']:.3f} ± {value['half_width']:.3f}"


def print_scores(results: dict, console: Console | None = None) -> None:
    """Print the summary of a fine-tuning, best first, F1 by class, and what to know before."""
    console = console or Console()
    summary, names = results["summary"], score_names(results["summary"])
    ordered = best_first(summary)
    title = f"{results['task']}: {about_results(results)}"
    table = Table(title=title, title_justify="left")
    table.add_column("classifier")
    for name in (*names.values(), "steps"):
        table.add_column(name, justify="right")
    for name in ordered:
        scores = (format_interval(summary[name][k]) for k in names)
        table.add_row(name, *scores, format_steps(summary[name]))
    console.print(table)
    console.print(_f1_by_class(summary, ordered, results["classes"]))
    what = "cells: " if results.get("kind") != "genes" else ""  # there the reason says it
    for reason, number in results["dropped"].items():
        console.print(f"left out: {number:,} {what}{reason}", highlight=False)


def _f1_by_class(summary: dict[str, dict], ordered: list[str], classes: list[str]) -> Table:
    """Return F1 of all classes and contenders; what is many more than the other is in rows."""
    title = "F1 by class, mean over splits"
    found = {
        (n, c): "-" if (v := summary[n]["f1_by_class"].get(c)) is None else f"{v:.3f}"
        for n in ordered
        for c in classes
    }
    are_rows = len(ordered) > 2 * len(classes)
    columns = classes if are_rows else ordered
    table = Table("classifier" if are_rows else "class", title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="right")
    for name in ordered if are_rows else classes:
        table.add_row(name, *(found[(name, c) if are_rows else (c, name)] for c in columns))
    return table
