"""``geneloom simulate``: parse and call."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from data_prep.options import AsJson, FieldsOf, spread
from eval.simulate.settings import SimulationSettings, make_settings


@spread
def simulate_command(
    out: Annotated[Path, typer.Option(help="new folder for cells and truth")],
    named: Annotated[
        dict[str, Any],
        FieldsOf(
            SimulationSettings,
            "cells",
            "genes",
            "tfs",
            "types",
            "donors",
            "batches",
            "depth",
            "seed",
            "perturb_cells",
        ),
    ],
    perturb: Annotated[str, typer.Option(help="none, all (each TF), or gene ids: A,B,A+B")] = "all",
    gene_ids: Annotated[
        Path | None,
        typer.Option(help="take gene ids of: .txt with one a line, vocabulary.json or its folder"),
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(help="real cells whose moments stand beside the simulated ones")
    ] = None,
    other: Annotated[
        list[str] | None,
        typer.Option("--set", help="another setting of eval/simulate/settings.py, NAME=VALUE"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Simulate cells with a known gene regulatory network, and true perturbations of them."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    from eval.simulate.compare import print_moments
    from eval.simulate.write import simulate

    settings = make_settings(**named | _named(other or []))
    start = time.monotonic()
    record = simulate(settings, out, perturb, gene_ids, compare)
    if as_json:
        print(json.dumps(record, indent=1))
        return
    print_moments(record["moments"])
    print(
        f"{out}: {settings.cells:,} cells x {settings.genes:,} genes, {record['regulations']:,} "
        f"regulations by {settings.tfs} TFs, {len(record['perturbations'])} perturbations; "
        f"{time.monotonic() - start:.1f} s"
    )


def _named(texts: list[str]) -> dict[str, object]:
    """Return NAME=VALUE as a dictionary."""
    for text in texts:
        if "=" not in text:
            raise ValueError(f"--set {text}: write NAME=VALUE, e.g. donor_sd=0.3")
    pairs = [text.split("=", 1) for text in texts]
    return {name: yaml.safe_load(value) for name, value in pairs}
