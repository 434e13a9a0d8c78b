"""The models of a folder: one of an export, or one for each checkpoint of a run."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.genes.vocabulary import Vocabulary, load_vocabulary
from pretrain.cell_states.cell_state import CellState
from pretrain.checkpoints import checkpoint
from pretrain.export.model_folder import (
    RECORD_NAME,
    folder_cell_state,
    load_checkpoint,
    load_exported,
    trained_share,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProbedModel:
    """Models of one folder, to be loaded one after the other.

    Attributes
    ----------
    sources
        Names of the files that the model was pretrained on, as far as the folder says.
    loaders
        (step, or None where it is not known; what loads the network), by ascending step.
    state
        Of an exported model; None where it has none. Those of a run are made of its shards.
    """

    folder: Path
    vocabulary: Vocabulary
    sources: tuple[str, ...]
    loaders: tuple[tuple[int | None, Callable[[], Any]], ...]
    state: CellState | None = None
    # Of the training cells of its shards.
    share: float = 1.0

    @property
    def name(self) -> str:
        return self.folder.resolve().name


def open_probed(
    folder: Path, vocabulary: Path | None, step: checkpoint.Which = None
) -> ProbedModel:
    """Return the models of a folder of ``geneloom export`` or ``pretrain``, or of Geneformer's.

    Parameters
    ----------
    step
        Of a run folder the checkpoint of this step, or the best; None: all.

    Raises
    ------
    ValueError
        The folder holds no model, or a run without a complete checkpoint or that one.
    """
    if (folder / "shards_manifest.json").exists() and not (folder / "config.json").exists():
        return _open_run(folder, step)
    if step is not None:
        raise ValueError(f"--step {step}: {folder} is no run folder, it holds one model")
    network, found = load_exported(folder, vocabulary)
    record = folder / RECORD_NAME
    content = json.loads(record.read_text()) if record.exists() else {}
    names = tuple(source["name"] for source in content.get("sources", []))
    state = folder_cell_state(folder, found)
    share = trained_share(content) if "recipe" in content else 1.0
    loader = content.get("step"), lambda: network
    return ProbedModel(folder, found, names, (loader,), state, share)


def _open_run(run: Path, step: checkpoint.Which) -> ProbedModel:
    loaders, share = [], 1.0
    folders = sorted((run / "checkpoints").glob("step-*"))
    for folder in [checkpoint.find(run, step).folder] if step is not None else folders:
        if problem := checkpoint.damage(folder):
            logger.warning("checkpoint %s is skipped: %s", folder, problem)
            continue
        found = checkpoint.open_checkpoint(folder)
        share = trained_share(found.record)
        loaders.append((found.step, lambda found=found: load_checkpoint(run, found)))
    if not loaders:
        raise ValueError(f"{run}: has no complete checkpoint to probe")
    manifest = json.loads((run / "shards_manifest.json").read_text())
    names = tuple(source["name"] for source in manifest["sources"])
    vocabulary = load_vocabulary(run / "vocabulary.json")
    return ProbedModel(run, vocabulary, names, tuple(loaders), share=share)
