"""A loss or gradient that is not finite: who, where, which cells; and a small dump to look at."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.shards import ShardSet
from pretrain import dist
from pretrain.data import MicroBatch, RankStep
from pretrain.dist import Ranks
from pretrain.masking import NO_LABEL

logger = logging.getLogger(__name__)

_SHOWN_CELLS = 5
_DUMPED_ROWS = 64


def stop_not_finite(
    what: str,
    step: int,
    data: RankStep,
    losses: list[torch.Tensor],
    run: Path,
    shards: ShardSet,
    ranks: Ranks,
) -> None:
    """Write dumps, then raise on every rank with one text. Called by all ranks together.

    Parameters
    ----------
    what
        E.g. ``loss is nan``.
    step
        0-based.
    data, losses
        What this rank computed: micro-batches, and float32 [M] of each.

    Raises
    ------
    FloatingPointError
        Always.
    """
    rows = [_rows_not_finite(m, part) for m, part in zip(data.micro_batches, losses, strict=True)]
    cells = np.concatenate([m.cells[r] for m, r in zip(data.micro_batches, rows, strict=True)])
    # Finite losses with a gradient that is not: no cell stands out, all are dumped.
    guilty = len(cells) > 0
    if not guilty:
        rows = [np.flatnonzero(m.cells >= 0) for m in data.micro_batches]
    mine: dict[str, Any] = {
        "rank": ranks.rank,
        "cells": [_name(shards, int(c)) for c in cells[:_SHOWN_CELLS]],
        "num_cells": len(cells),
    }
    everyone = [json.loads(text) for text in dist.gather_text(json.dumps(mine), ranks)]
    found = [m for m in everyone if m["num_cells"]]
    if guilty or not found:
        _dump(run / f"not-finite-step-{step + 1:08d}-rank-{ranks.rank:05d}.npz", data, rows, losses)
    where = "; ".join(
        f"rank {m['rank']}: {m['num_cells']} cells ({', '.join(m['cells'])}"
        + (", ..." if m["num_cells"] > len(m["cells"]) else "")
        + ")"
        for m in found
    )
    raise FloatingPointError(
        f"{what} in step {step + 1}: stopped before the optimizer's step, nothing was changed or "
        f"saved. {where or 'The loss of every cell is finite'}. Tokens, labels and losses are in "
        f"{run}/not-finite-step-{step + 1:08d}-*.npz. Lower optim.learning_rate or raise "
        "optim.warmup_steps, and --resume from the last checkpoint"
    )


def _rows_not_finite(micro: MicroBatch, losses: torch.Tensor) -> np.ndarray:
    bad = ~np.isfinite(losses.cpu().numpy()) & (micro.labels.numpy() != NO_LABEL)
    return np.unique(micro.masked_places.numpy()[bad] // micro.input_ids.shape[1])


def _name(shards: ShardSet, cell: int) -> str:
    """Return a cell's number and its id in the shards."""
    extents = shards.extents("train")
    owner = next(e for e in extents if e.first_cell <= cell < e.first_cell + e.num_cells)
    block, place = owner.locate(np.int64(cell))
    return f"{cell} = {shards.read_block(int(block)).batch.column('cell_id')[int(place)].as_py()}"


def _dump(path: Path, data: RankStep, rows: list[np.ndarray], losses: list[torch.Tensor]) -> None:
    arrays: dict[str, np.ndarray] = {}
    left = _DUMPED_ROWS
    for number, (micro, chosen, loss) in enumerate(
        zip(data.micro_batches, rows, losses, strict=True)
    ):
        chosen = chosen[:left]
        left -= len(chosen)
        if len(chosen) == 0:
            continue
        of_row = micro.masked_places.numpy() // micro.input_ids.shape[1]
        hidden = np.isin(of_row, chosen) & (micro.labels.numpy() != NO_LABEL)
        arrays |= {
            f"micro{number}/cells": micro.cells[chosen],
            f"micro{number}/input_ids": micro.input_ids.numpy()[chosen],
            f"micro{number}/row": of_row[hidden],
            f"micro{number}/place": micro.masked_places.numpy()[hidden] % micro.input_ids.shape[1],
            f"micro{number}/label": micro.labels.numpy()[hidden],
            f"micro{number}/loss": loss.cpu().numpy()[hidden],
        }
    np.savez(path, **arrays)
