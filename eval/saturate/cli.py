"""``geneloom saturate``: parses and calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from data_prep.errors import EXIT_RESUMABLE
from data_prep.options import AsJson, spread
from data_prep.sources.source_spec import MATRIX_AND_FILTER, SourceOptions
from eval.options import quiet
from eval.saturate.settings import SaturateOptions
from eval.saturate.trainings import Training, plan_trainings


@spread
def saturate_command(
    shards: Annotated[str, typer.Argument(help="folder of `geneloom prepare`, or its URL")],
    out: Annotated[Path, typer.Option(help="new folder, or that of a killed command")],
    options: SaturateOptions,
    reading: Annotated[SourceOptions, MATRIX_AND_FILTER],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.field=value")] = None,
    config: Annotated[
        str, typer.Option(help="YAML file, or the name of a supplied one")
    ] = "geneloom_tiny",
    show: Annotated[bool, typer.Option("--show", help="print the trainings and end")] = False,
    as_json: AsJson = False,
) -> None:
    """Does more data pay? One recipe on growing shares of a corpus, and what more would bring.

    What is trained is not trained again: the same command goes on with one that was killed.
    """
    trainings = plan_trainings(shards, out, config, overrides or [], options)
    if show or not as_json:
        print_trainings(trainings, options)
    if show:
        return
    quiet()
    from eval.saturate.run import saturate
    from eval.train_run import Stopped

    try:
        record = saturate(
            shards, out, config, overrides or [], options, reading,
            print if not as_json else lambda _: None,
        )  # fmt: skip
    except Stopped:
        print(f"stopped; the same command goes on with {out}")
        raise SystemExit(EXIT_RESUMABLE) from None
    if as_json:
        print(json.dumps(record, indent=1))
    else:
        print_saturation(record, out)


def print_trainings(trainings: list[Training], options: SaturateOptions) -> None:
    """Print what will be trained, and how long it takes by ``geneloom plan``."""
    table = Table(title=f"trainings, equal {options.equal}", title_justify="left")
    for name in ("training", "cells", "steps", "tokens", "times seen", "minutes", ""):
        table.add_column(name, justify="left" if name in ("training", "") else "right")
    total = [0.0, 0.0, 0.0]
    for training in trainings:
        found = training.estimate(options)
        minutes = [60 * h for h in (found["hours"], *found["hours_interval"])]
        total = [t + m * (not training.is_done()) for t, m in zip(total, minutes, strict=True)]
        table.add_row(
            training.name, f"{training.corpus.cells:,}", f"{training.steps:,}",
            f"{training.tokens:,}", f"{training.epochs:,.2f}", _minutes(minutes),
            "done" if training.is_done() else "",
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(
        f"by the plan of {options.gpus} {options.gpu}: {_minutes(total)} minutes in all, without "
        "starting, counting and probing",
        highlight=False,
    )


def print_saturation(record: dict[str, Any], out: Path) -> None:
    """Print the sizes and the words."""
    from eval.saturate.report.page import PAGE_NAME, columns, rows

    console = Console()
    table = Table(title=f"{record['shards']}, {record['config']}", title_justify="left")
    for name in columns(record):
        table.add_column(name, justify="right")
    for row in rows(record):
        table.add_row(*row)
    console.print(table)
    for sentence in record["words"]:
        console.print(sentence, highlight=False, markup=False)
    print(out / PAGE_NAME)


def _minutes(values: list[float]) -> str:
    middle, low, high = values
    return f"{middle:,.1f} ({low:,.1f} to {high:,.1f})"
