"""A loss or gradient that is not finite: who, where, which cells; and a small dump to look at."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.errors import SharedFailure
from data_prep.shards.reader import ShardSet
from pretrain.batches.step_batch import MicroBatch, RankStep
from pretrain.checkpoints.checkpoint import Checkpoint
from pretrain.config import RunSection
from pretrain.objective.masking import NO_LABEL
from pretrain.ranks import dist
from pretrain.ranks.dist import Ranks

logger = logging.getLogger(__name__)

_SHOWN_RANKS = 5
_SHOWN_CELLS = 5
_DUMPED_ROWS = 64


class NotFinite(SharedFailure, FloatingPointError):
    """A loss or gradient norm is infinite or no number."""


class Skips:
    """Steps whose update was left out, and whether another may be.

    All ranks decide alike: loss and norm are sums over ranks. Such a step counts as a step: order
    of cells and learning rate go on as if it had been taken; weights, moments and the optimizer's
    own count of updates stay.

    Attributes
    ----------
    steps
        Numbers of the skipped steps, counted from 1, those before a resume included.
    """

    def __init__(self, config: RunSection, last: Checkpoint | None) -> None:
        self._config = config
        self.steps: list[int] = list(last.record.get("skipped_steps", [])) if last else []
        self._left_out = last.step - last.updates if last else 0

    def may_skip(self, step: int) -> bool:
        """Say whether the update of a step (0-based) may be left out."""
        config, first = self._config, step + 1 - self._config.skip_window_steps
        recent = [s for s in self.steps if s > first]
        return config.on_not_finite == "skip" and len(recent) < config.max_skipped_steps

    def skip(
        self,
        what: str,
        step: int,
        data: RankStep,
        losses: list[tuple[torch.Tensor, ...]],
        shards: ShardSet,
        ranks: Ranks,
    ) -> dict[str, Any]:
        """Count a skipped step, say so, and return what metrics.jsonl says of it.

        Called by all ranks together. Arguments as in `stop_not_finite`.
        """
        self.steps.append(step + 1)
        self._left_out += 1
        rows = _all_rows_not_finite(data, losses)
        shown = [m.cells[m.cells >= 0] for m in data.micro_batches]
        bad = [m.cells[r] for m, r in zip(data.micro_batches, rows, strict=True)]
        mine = {
            "cells": _ids(shards, np.concatenate(shown)),
            "cells_not_finite": _ids(shards, np.concatenate(bad)),
        }
        everyone = [json.loads(text) for text in dist.gather_text(json.dumps(mine), ranks)]
        found = {name: [cell for one in everyone for cell in one[name]] for name in mine}
        number, most = len(self.steps), self._config.max_skipped_steps
        if ranks.is_first:
            named = found["cells_not_finite"][:_SHOWN_CELLS] or found["cells"][:_SHOWN_CELLS]
            logger.warning(
                "%s in step %d: its update is left out on all ranks (%d so far; more than %d in %d "
                "steps stop the run); cells %s ... (all: metrics.jsonl)",
                what, step + 1, number, most, self._config.skip_window_steps, ", ".join(named),
            )  # fmt: skip
        return {"reason": what, "skipped_steps": number, **found}

    def record(self, done: int) -> dict[str, Any]:
        """Return what a checkpoint after so many steps says: which were skipped, how many not."""
        return {"updates": done - self._left_out, "skipped_steps": self.steps}


def stop_not_finite(
    what: str,
    step: int,
    data: RankStep,
    losses: list[tuple[torch.Tensor, ...]],
    run: Path,
    shards: ShardSet,
    ranks: Ranks,
    skips: Skips,
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
    skips
        Which may have come before.

    Raises
    ------
    NotFinite
        Always.
    """
    rows = _all_rows_not_finite(data, losses)
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
    before = f" after {len(skips.steps)} skipped steps" if skips.steps else ""
    raise NotFinite(
        f"{what} in step {step + 1}{before}: stopped before the optimizer's step, nothing was "
        f"changed or saved. {_say(found) or 'The loss of every cell is finite'}. Tokens, labels "
        f"and losses are in {run}/not-finite-step-{step + 1:08d}-*.npz. Lower "
        "optim.learning_rate or raise optim.warmup_steps, and --resume from the last checkpoint; "
        "run.on_not_finite=skip leaves such steps out"
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


def _all_rows_not_finite(
    data: RankStep, losses: list[tuple[torch.Tensor, ...]]
) -> list[np.ndarray]:
    """Return of each micro-batch the rows without a finite loss."""
    return [_rows_not_finite(m, *part) for m, part in zip(data.micro_batches, losses, strict=True)]


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
    return f"{cell} = {_ids(shards, np.array([cell]))[0]}"


def _ids(shards: ShardSet, cells: np.ndarray) -> list[str]:
    """Return the ids of cells in the shards; each block is read once."""
    columns: dict[int, Any] = {}
    found = []
    for cell in cells.tolist():
        extents = shards.extents("train")
        owner = next(e for e in extents if e.first_cell <= cell < e.first_cell + e.num_cells)
        block, place = (int(x) for x in owner.locate(np.array(cell)))
        if block not in columns:
            columns[block] = shards.read_block(block).batch.column("cell_id")
        found.append(columns[block][place].as_py())
    return found


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
