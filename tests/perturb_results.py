"""A results folder of `geneloom perturb` with planted effects, written by the real writer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from eval.perturb.results import ResultsWriter


def make_results(
    folder: Path,
    num_cells: int = 24,
    num_donors: int = 3,
    effects: dict[str, float] | None = None,
    kind: str = "delete",
    detection: float = 0.7,
    cells_per_part: int = 5,
    noise: float = 0.01,
    seed: int = 0,
) -> Path:
    """Write a finished screen and return its folder.

    Parameters
    ----------
    effects
        Name of a perturbation ('+'-joined gene ids) -> mean of ``toward_goal`` in cells where it
        applies; None: G0 .. G9, of which G0 has 0.1. Donors have offsets of a fifth of `noise`.
    """
    rng = np.random.default_rng(seed)
    effects = {f"G{i}": 0.1 * (i == 0) for i in range(10)} if effects is None else effects
    applies = rng.random((num_cells, len(effects))) < detection
    offsets = rng.normal(0, noise / 5, num_donors)
    ranks = rng.integers(0, 500, len(effects))
    table = pd.DataFrame(
        {
            "kind": kind,
            "genes": [n.split("+") for n in effects],
            "name": list(effects),
            "cells": applies.sum(axis=0).astype(np.int32),
            "mean_rank": ranks.astype(np.float32),
            "detection": applies.mean(axis=0).astype(np.float32),
        }
    )
    parts = -(-num_cells // cells_per_part)
    writer = ResultsWriter(
        folder, {"settings": {"kind": kind, "states": ["start", "goal"]}, "model": "none"}, parts
    )
    folder.mkdir(parents=True, exist_ok=True)
    writer.begin(table, ["shift", "toward_start", "toward_goal"], {"cells": num_cells})
    for part in range(parts):
        chosen = np.arange(part * cells_per_part, min(num_cells, (part + 1) * cells_per_part))
        cell, perturbation = np.nonzero(applies[chosen])
        toward = np.array(list(effects.values()))[perturbation] + offsets[chosen[cell] % num_donors]
        toward = toward + rng.normal(0, noise, len(cell))
        shifts = {
            "cell": chosen[cell].astype(np.int32),
            "perturbation": perturbation.astype(np.int32),
            "changed": np.ones(len(cell), dtype=bool),
            "shift": np.abs(toward).astype(np.float32),
            "toward_start": -toward.astype(np.float32),
            "toward_goal": toward.astype(np.float32),
        }
        cells = {
            "cell": chosen.astype(np.int32),
            "cell_id": [f"cell{i}" for i in chosen],
            "donor": [f"donor{i % num_donors}" for i in chosen],
            "state": ["start"] * len(chosen),
            "tokens": np.full(len(chosen), 500, dtype=np.int32),
            "cosine_start": np.full(len(chosen), 0.9, dtype=np.float32),
            "cosine_goal": np.full(len(chosen), 0.8, dtype=np.float32),
        }
        writer.write_part(part, pa.table(cells), pa.table(shifts))
    writer.finish()
    return folder
