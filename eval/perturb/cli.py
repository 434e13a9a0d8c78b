"""``geneloom perturb``: parses and calls."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from data_prep.options import spread
from data_prep.running.progress import show_progress
from data_prep.sources.source_spec import MATRIX_AND_FILTER, SourceOptions
from eval.options import CellsArgument, quiet
from eval.perturb.screen.cells_and_genes import StateOptions
from eval.perturb.screen.settings import ModelChoice, Screen


@spread
def perturb_command(
    context: typer.Context,
    cells: CellsArgument,
    out: Annotated[Path, typer.Option(help="folder for the results; goes on with its own")],
    model: ModelChoice,
    screen: Screen,
    states: StateOptions,
    reading: Annotated[SourceOptions, MATRIX_AND_FILTER],
    pairs: Annotated[bool, typer.Option("--pairs", help="--set-size 2")] = False,
) -> None:
    """Perturb genes in silico and write how far each cell moves, and toward which state."""
    quiet()
    from eval.perturb.screen.run import perturb_file

    if pairs:
        if screen.genes.set_size not in (1, 2):
            raise ValueError(f"--pairs and --set-size {screen.genes.set_size}: give one of them")
        screen = replace(screen, genes=replace(screen.genes, set_size=2))
    screen = replace(screen, cells=replace(screen.cells, states=states.states()))
    ranks = context.obj  # of `eval.perturb.__main__`; None without a launcher
    if ranks is not None:
        screen = replace(screen, engine=replace(screen.engine, device=ranks.device.type))
    with show_progress() as show:
        said = perturb_file(cells, out, screen, model, reading, ranks, show)
    if ranks is None or ranks.is_first:
        print(said)
