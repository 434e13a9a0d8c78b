"""The frozen probe of one size: how well its cells tell classes, beside its own corpus SVD."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from typing import Any

from data_prep.files import write_to_disk
from data_prep.sources.source_spec import SourceOptions
from eval.probe.run import RANDOM_PREFIX, main_contender, probe_cells
from eval.probe.settings import ProbeSettings
from eval.saturate.settings import SaturateOptions
from eval.saturate.trainings import Training
from eval.scores.baselines import CORPUS_SVD
from pretrain.api import export

logger = logging.getLogger(__name__)


def probe_size(
    training: Training, options: SaturateOptions, reading: SourceOptions
) -> dict[str, dict[str, float] | None]:
    """Return macro-F1 (``mean``, ``half_width``) of the model, its corpus SVD and random weights.

    The model is exported beside the runs. The scores are kept beside it with what was asked, and
    not made again.
    """
    assert options.cells is not None and options.label is not None
    asked: dict[str, Any] = {
        "file": str(options.cells.absolute()), "label": options.label,
        "cells_a_class": options.cells_a_class, "max_cells": options.probe_cells,
        "reading": json.loads(json.dumps(asdict(reading), default=str)),
    }  # fmt: skip
    home = training.run.parents[1]
    path = home / "probes" / f"{training.name}.json"
    if path.exists() and (known := json.loads(path.read_text()))["asked"] == asked:
        return known["scores"]
    model = home / "models" / training.name
    if not (model / "config.json").exists():
        logger.info("%s", export(training.run, model))
    settings = ProbeSettings(
        cells_a_class=(options.cells_a_class,), random_models=1, max_cells=options.probe_cells
    )
    record = probe_cells(model, options.cells, options.label, settings, reading).record
    main = main_contender(record)
    names = {"model": main, "corpus_svd": CORPUS_SVD, "random_weights": RANDOM_PREFIX + main}
    by_name = {row["contender"]: row["macro_f1"] for row in record["scores"]}
    scores = {key: by_name.get(name) for key, name in names.items()}
    path.parent.mkdir(exist_ok=True)
    write_to_disk(path, json.dumps({"asked": asked, "scores": scores}, indent=1) + "\n")
    return scores
