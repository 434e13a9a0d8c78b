"""``geneloom probe``: parses and calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from data_prep.options import AsJson, spread
from data_prep.sources.source_spec import MATRIX, SourceOptions
from eval.options import quiet
from eval.probe.settings import ProbeSettings


@spread
def probe_command(
    model: Annotated[
        Path, typer.Argument(help="folder of `geneloom export`, Geneformer's, or a run folder")
    ],
    cells: Annotated[Path, typer.Argument(help="h5ad with raw counts and labels")],
    label: Annotated[str, typer.Option(help="column of obs to predict")],
    settings: ProbeSettings,
    reading: Annotated[SourceOptions, MATRIX],
    out: Annotated[
        Path | None, typer.Option(help="new .html, or a new folder for page, figure and scores")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Frozen cells beside what counting knows: has pretraining earned its hours?

    A few cells of each class are labelled, logistic regression predicts the others: from the
    model's frozen states, the SVD of its training cells, random weights, and the cells' own genes.
    """
    quiet()
    from eval.probe.page import print_probe, require_new_place, write_probe
    from eval.probe.run import probe_cells

    require_new_place(out)
    probe = probe_cells(model, cells, label, settings, reading)
    page = write_probe(probe, out) if out else None
    if as_json:
        print(json.dumps(probe.record, indent=1))
        return
    print_probe(probe)
    if page:
        print(page)
