"""A task's own world: cells that are simulated, and a model that is pretrained on them.

A suite that finds nothing may have a bad model or a bad instrument. In a world whose network is
known, and which pretraining can learn, a working instrument has to find that pretraining helps.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

from data_prep.api import PrepareOptions, prepare
from data_prep.shards.format import MANIFEST_NAME
from eval.benchmark.material.models_and_cells import Model, load_models
from eval.benchmark.task_file import OwnWorld
from eval.simulate.settings import make_settings
from eval.simulate.write import RECORD, simulate
from eval.train_run import train_run
from pretrain.config import load_config
from pretrain.export.model_folder import export

# What tables call the model.
MODEL_NAME = "model of the simulated cells"
_CELLS, _SHARDS, _RUN, _MODEL = "simulated", "shards", "run", "model"


def world_folder(world: OwnWorld, below: Path) -> Path:
    """Return the folder of a world: another declaration of it has another folder."""
    found = json.dumps(world.model_dump(mode="json"), sort_keys=True)
    return below / hashlib.sha256(found.encode()).hexdigest()[:16]


def make_world(world: OwnWorld, folder: Path) -> Model:
    """Return the model; simulate, prepare and pretrain what is not there yet.

    A call that was killed goes on: cells, shards and model are complete or absent, and a training
    goes on from its last checkpoint.

    Raises
    ------
    ValueError
        The settings of the simulation or of the training are wrong.
    OSError
        The training failed; the message says where its log is.
    eval.train_run.Stopped
        A signal stopped the training.
    """
    cells, shards, run, model = (folder / name for name in (_CELLS, _SHARDS, _RUN, _MODEL))
    settings = [f"{name}={value}" for name, value in world.pretrain.items()]
    settings += [f"data.shards={shards.absolute()}", f"run.out={run.absolute()}"]
    load_config(world.config, settings)  # what is wrong is told before anything is made
    if not (cells / RECORD).exists():
        simulate(make_settings(**world.simulate), cells, perturb="none")
    if not model.exists():
        if not (shards / MANIFEST_NAME).exists():
            options = PrepareOptions(heldout_share=world.heldout, vocabulary_min_cells=1)
            prepare(cells / "cells.h5ad", shards, options=options)
        train_run(("--config", world.config, *settings), "", folder / "pretrain.log")
        export(run, model)
    return replace(load_models([model], None, None)[0], name=MODEL_NAME)
