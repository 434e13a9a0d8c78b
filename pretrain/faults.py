"""A loss or gradient that is not finite: who, where, which cells; and a small dump to look at."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.errors import SharedFailure
from data_prep.shards import ShardSet
from pretrain import dist
from pretrain.data import MicroBatch, RankStep
from pretrain.dist import Ranks
from pretrain.masking import NO_LABEL

logger = logging.getLogger(__name__)

_SHOWN_RANKS = 5
_SHOWN_CELLS = 5
_DUMPED_ROWS = 64


class NotFinite(SharedFailure, FloatingPointError):
    """A loss or gradient norm is infinite or no number."""


def stop_not_finite(
    what: str,
    step: int,
    data: RankStep,
    losses: list[tuple[torch.Tensor, ...]],
    run: Path,
    shards: ShardSet,
    ranks: Ranks,
) -> None:
    """Write dumps, then raise on every rank with one text. Called by all ranks together.

    Ranks that have cells without a finite loss dump these; if no rank has, all dump all.

    Parameters
    ----------
    what
        E.g. ``loss is nan``.
    step
        0-based.
    data, losses
        What this rank computed: micro-batches, and of each float32 [M] of hidden genes and, with
        a cell objective, [B] of cells.

    Raises
    ------
    NotFinite
        Always.
    """
    rows = [_rows_not_finite(m, *part) for m, part in zip(data.micro_batches, losses, strict=True)]
    cells = np.concatenate([m.cells[r] for m, r in zip(data.micro_batches, rows, strict=True)])
    mine: dict[str, Any] = {
        "rank": ranks.rank,
        "cells": [_name(shards, int(c)) for c in cells[:_SHOWN_CELLS]],
        "num_cells": len(cells),
    }
    everyone = [json.loads(text) for text in dist.gather_text(json.dumps(mine), ranks)]
    found = [m for m in everyone if m["num_cells"]]
    if not found:
        rows = [np.flatnonzero(m.cells >= 0) for m in data.micro_batches]
    if len(cells) or not found:
        path = run / f"not-finite-step-{step + 1:08d}-rank-{ranks.rank:05d}.npz"
        try:
            _dump(path, data, rows, [of_genes for of_genes, *_ in losses])
        except OSError as error:
            logger.warning("%s could not be written: %s", path, error)
    dist.wait_for_all()  # the first rank that ends may end the others
    raise NotFinite(
        f"{what} in step {step + 1}: stopped before the optimizer's step, nothing was changed or "
        f"saved. {_say(found) or 'The loss of every cell is finite'}. Tokens, labels and losses "
        f"are in {run}/not-finite-step-{step + 1:08d}-*.npz. Lower optim.learning_rate or raise "
        "optim.warmup_steps, and --resume from the last checkpoint"
    )


def _say(found: list[dict[str, Any]]) -> str:
    """Return in words which ranks have which cells without a finite loss."""
    parts = []
    for one in found[:_SHOWN_RANKS]:
        more = ", ..." if one["num_cells"] > len(one["cells"]) else ""
        noun = "cell" if one["num_cells"] == 1 else "cells"
        parts.append(
            f"rank {one['rank']}: {one['num_cells']} {noun} ({', '.join(one['cells'])}{more})"
        )
    if len(found) > _SHOWN_RANKS:
        parts.append(f"and {len(found) - _SHOWN_RANKS} more ranks")
    return "; ".join(parts)


def _rows_not_finite(
    micro: MicroBatch, losses: torch.Tensor, *of_cells: torch.Tensor
) -> np.ndarray:
    bad = ~np.isfinite(losses.cpu().numpy()) & (micro.labels.numpy() != NO_LABEL)
    rows = [micro.masked_places.numpy()[bad] // micro.input_ids.shape[1]]
    for part in of_cells:
        rows.append(np.flatnonzero(~np.isfinite(part.cpu().numpy()) & (micro.cells >= 0)))
    return np.unique(np.concatenate(rows))


def _name(shards: ShardSet, cell: int) -> str:
    """Return a cell's number and its id in the shards."""
    extents = shards.extents("train")
    owner = next(e for e in extents if e.first_cell <= cell < e.first_cell + e.num_cells)
    block, place = owner.locate(np.array(cell))
    return f"{cell} = {shards.read_block(int(block)).batch.column('cell_id')[int(place)].as_py()}"


def _dump(path: Path, data: RankStep, rows: list[np.ndarray], losses: list[torch.Tensor]) -> None:
    """Write arrays ``micro{N}/...``: cells, input_ids [rows, L], and of each hidden gene its row
    and place in input_ids, label, loss."""
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
            f"micro{number}/row": np.searchsorted(chosen, of_row[hidden]),
            f"micro{number}/place": micro.masked_places.numpy()[hidden] % micro.input_ids.shape[1],
            f"micro{number}/label": micro.labels.numpy()[hidden],
            f"micro{number}/loss": loss.cpu().numpy()[hidden],
        }
    np.savez(path, **arrays)  # type: ignore[arg-type]
