"""Continue training from another program's DeepSpeed checkpoint: weights, moments, step count."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from data_prep.shards.reader import ShardSet
from pretrain.checkpoints.checkpoint import Checkpoint
from pretrain.checkpoints.zero_state import Reader, Renamed
from pretrain.config import RunConfig
from pretrain.model.masked_gene_model import build_model
from pretrain.start.stored_weights import StoredWeights
from pretrain.start.warm_start import compared, opened

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ForeignCheckpoint(Checkpoint):
    """A stand-in for a checkpoint of this project; `record` contains only what is known of it."""

    source: Reader

    def reader(self) -> Any:
        """Return a `Reader` of the files of all ranks, with the names of this run's model."""
        return self.source


def foreign_checkpoint(config: RunConfig, shards: ShardSet, steps: int) -> ForeignCheckpoint:
    """Return the checkpoint that a run with `model.init_moments` starts from.

    Each rank reads the files itself.

    Parameters
    ----------
    steps
        Total number of steps that the run is to have.

    Raises
    ------
    ValueError
        As in `warm_start.start_weights`; or the folder has no moments of AdamW or another
        vocabulary, or the run has another optimizer or no steps left.
    """
    folder = config.model.init_from
    assert folder is not None
    if config.optim.kind != "adamw":
        raise ValueError(
            f"model.init_moments: moments of AdamW are of no use to optim.kind={config.optim.kind};"
            " give optim.kind=adamw, or leave model.init_moments out"
        )
    model = build_model(config.model, shards.vocabulary, config.run.seed)
    stored, source = opened(model, config.model, config.objective.prior)
    step, updates = _counts(stored)
    record = compared(folder, stored, model, shards.vocabulary, source)
    genes, special = record["genes"], record["special_tokens"]
    others = sum(genes[k]["count"] for k in ("new", "dropped")) + sum(map(len, special.values()))
    if others or record["positions"]["new"] or record["positions"]["cut"]:
        raise ValueError(
            f"model.init_moments: {folder} has vocabulary {source.sha256[:12]}, data.shards "
            f"{shards.vocabulary.sha256[:12]}: moments belong to the same genes and places; leave "
            "model.init_moments out to start from its weights"
        )
    if step >= steps:
        raise ValueError(
            f"model.init_moments: {folder} has done {step} steps, this run would end at step "
            f"{steps}; raise run.epochs or run.max_steps"
        )
    names = {n: stored.names[n.removeprefix("bert.")] for n, _ in model.named_parameters()}
    assert stored.state is not None
    return ForeignCheckpoint(stored.path, _record(record, stored, step, updates),
                             Renamed(stored.state, names))  # fmt: skip


def log_continued(found: Checkpoint, seed: int) -> None:
    """Log what is known of the state that a run continues from, and what cannot be known."""
    init = found.record["init"]
    logger.warning(
        "weights, moments and step count are those of %s (DeepSpeed %s, %s): goes on at step %d, "
        "%d of them counted by the optimizer. Which cells it has seen cannot be known: the order "
        "from here on is that of run.seed=%d, so that some cells of this epoch may come again and "
        "others not; learning rate and its schedule are this run's settings",
        init["folder"], init["continued"]["version"], init["continued"]["kind"], found.step,
        found.updates, seed,
    )  # fmt: skip


def _counts(stored: StoredWeights) -> tuple[int, int]:
    """Return the steps that a DeepSpeed checkpoint has done, and those its optimizer counted."""
    state = stored.state
    if state is None or not state.has_moments(stored.names.values()):
        found = stored.path.name if state is None else f"files of {state.kind}"
        raise ValueError(
            f"model.init_moments: {stored.path}: {found} without AdamW's moments by name; expected "
            "a DeepSpeed checkpoint of ZeRO 1, 2 or 3, or a universal one. Leave "
            "model.init_moments out to start from the weights"
        )
    updates = state.steps if state.updates is None else state.updates
    step = updates if state.steps is None else state.steps
    if step is None or updates is None:
        raise ValueError(f"{state.tag}: does not say how many steps were done")
    return max(step, updates), updates


def _record(init: dict[str, Any], stored: StoredWeights, step: int, updates: int) -> dict[str, Any]:
    """Return the part of a checkpoint's record that is known."""
    assert stored.state is not None
    said = {"step": step, "updates": updates}
    continued = said | {"version": stored.state.version, "kind": stored.state.kind}
    unknown = {"cells_seen": 0, "cells_digest": f"{0:016x}", "cells_quarantined": 0}
    return said | unknown | {"prior": None, "init": init | {"continued": continued}}
