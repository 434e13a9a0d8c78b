"""Screens with a known truth, written as `geneloom perturb` writes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from eval.perturb.screen.results import Results, ResultsWriter


def write_screen(
    folder: Path,
    values: np.ndarray,
    donors: list[str],
    genes: list[list[str]],
    kind: str = "delete",
    column: str = "toward_goal",
    mean_rank: np.ndarray | None = None,
    detection: np.ndarray | None = None,
    parts: int = 3,
) -> Results:
    """Write values [cells, perturbations] (NaN: does not apply) and open the finished screen."""
    applies = np.isfinite(values)
    detected = applies.mean(axis=0) if detection is None else detection
    ranks = np.arange(len(genes), dtype=float) if mean_rank is None else mean_rank
    table = pd.DataFrame(
        {
            "kind": kind, "genes": genes, "name": ["+".join(g).lower() for g in genes],
            "cells": applies.sum(axis=0).astype(np.int64), "mean_rank": ranks,
            "detection": detected,
        }
    )  # fmt: skip
    writer = ResultsWriter(folder, {"settings": {"kind": kind}, "model": "m"}, parts)
    writer.begin(table, [column], {"cells": len(values)})
    for part, rows in enumerate(np.array_split(np.arange(len(values)), parts)):
        cell, perturbation = np.nonzero(applies[rows])
        shifts = {
            "cell": rows[cell].astype(np.int32),
            "perturbation": perturbation.astype(np.int32),
            "changed": np.ones(len(cell), dtype=bool),
            column: values[rows[cell], perturbation].astype(np.float32),
        }
        cells = {
            "cell": rows.astype(np.int32),
            "cell_id": [f"cell{r}" for r in rows],
            "donor": [donors[r] for r in rows],
        }
        writer.write_part(part, pa.table(cells), pa.table(shifts))
    writer.finish()
    return Results.open(folder)


def noise(
    rng: np.random.Generator, num_genes: int, num_donors: int, cells_of_donor: int, donor_sd: float
) -> tuple[np.ndarray, list[str]]:
    """Return values [cells, genes] without any effect, whose donors differ, and the donors."""
    donors = [f"d{i}" for i in range(num_donors) for _ in range(cells_of_donor)]
    of_donor = rng.normal(0, donor_sd, (num_donors, num_genes)).repeat(cells_of_donor, axis=0)
    return of_donor + rng.normal(0, 1, (len(donors), num_genes)), donors


def names(num: int) -> list[list[str]]:
    return [[f"G{i:04d}"] for i in range(num)]
