"""The folder of a perturbation screen: written in parts, read in parts, one job at a time."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from data_prep.running.owner import owned
from eval.perturb.screen.results import Results, ResultsWriter

pytestmark = pytest.mark.quick


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


def test_what_is_written_is_read(tmp_path):
    results = Results.open(make_results(tmp_path / "screen", num_cells=24, cells_per_part=5))
    assert results.columns == ["shift", "toward_start", "toward_goal"]
    assert results.cells["cell"].tolist() == list(range(24))
    assert results.perturbations["perturbation"].tolist() == list(range(10))
    assert results.perturbations["genes"].iloc[3].tolist() == ["G3"]
    parts = list(results.shifts())
    assert len(parts) == 5
    every = pd.concat(parts)
    assert every["cell"].is_monotonic_increasing
    assert (every.groupby("perturbation").size() == results.perturbations["cells"]).all()
    assert list(next(results.shifts(["shift"]))) == ["cell", "perturbation", "changed", "shift"]
    assert not {"cells", "gene_shifts"} & {p.name for p in results.folder.iterdir()}
    with pytest.raises(ValueError, match="no value 'toward_x', only shift"):
        next(results.shifts(["toward_x"]))


def test_donor_means_are_those_of_pandas(tmp_path):
    results = Results.open(make_results(tmp_path / "screen"))
    every = pd.concat(results.shifts()).merge(results.cells[["cell", "donor"]], on="cell")
    grouped = every.groupby(["perturbation", "donor"])["toward_goal"]
    expected = grouped.agg(lambda v: v.astype(np.float64).mean())
    found = results.donor_means("toward_goal").set_index(["perturbation", "donor"])
    assert found.index.tolist() == expected.index.tolist()
    np.testing.assert_allclose(found["mean"], expected, rtol=1e-12)
    assert found["cells"].tolist() == grouped.size().tolist()


def writer(folder, **settings) -> ResultsWriter:
    return ResultsWriter(folder, {"settings": {"kind": "delete"} | settings, "model": "m"}, 2)


def begin(made: ResultsWriter) -> None:
    table = pd.DataFrame({"kind": ["delete"], "genes": [["A"]], "name": ["A"]})
    made.begin(table, ["shift"], {})


def part(made: ResultsWriter, number: int) -> None:
    cells = pa.table({"cell": pa.array([number], pa.int32()), "donor": [""]})
    shifts = {"cell": [number], "perturbation": [0], "changed": [True], "shift": [0.5]}
    made.write_part(number, cells, pa.table(shifts))


def test_an_unfinished_screen_goes_on_with_the_same_settings_only(tmp_path):
    first = writer(tmp_path / "s")
    begin(first)
    part(first, 0)
    with pytest.raises(ValueError, match=r"not finished \(1 of 2 parts\)"):
        Results.open(tmp_path / "s")
    assert Results.open(tmp_path / "s", unfinished=True).cells["cell"].tolist() == [0]
    with pytest.raises(ValueError, match="kind: delete there, overexpress here"):
        begin(writer(tmp_path / "s", kind="overexpress"))
    again = writer(tmp_path / "s")
    begin(again)
    assert again.has_part(0) and not again.has_part(1)
    assert not writer(tmp_path / "s", layer=0).has_part(0)
    part(again, 1)
    again.finish()
    assert Results.open(tmp_path / "s").cells["cell"].tolist() == [0, 1]
    begin(again)
    again.finish()
    assert Results.open(tmp_path / "s").cells["cell"].tolist() == [0, 1], "nothing to do"


def test_folders_that_are_no_screen(tmp_path):
    with pytest.raises(ValueError, match="expected a folder of `geneloom perturb`"):
        Results.open(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        begin(writer(tmp_path))
    (tmp_path / "manifest.json").write_text('{"format": "else"}')
    with pytest.raises(ValueError, match="not of format geneloom-perturb/1"):
        Results.open(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="not readable as JSON"):
        Results.open(tmp_path)


def test_one_job_at_a_time(tmp_path):
    with owned(tmp_path / "a" / "s", "perturb"):
        message = f"another run works in this folder: perturb, process {os.getpid()} on"
        with pytest.raises(ValueError, match=message), owned(tmp_path / "a" / "s", "perturb"):
            pass
        assert (tmp_path / "a" / "s").exists()
    assert not (tmp_path / "a").exists(), "what nothing was written into is removed"
    with owned(tmp_path / "a", "perturb"):
        (tmp_path / "a" / "manifest.json").write_text("{}")
    with owned(tmp_path / "a", "perturb"):
        pass
    assert (tmp_path / "a" / "manifest.json").exists()
