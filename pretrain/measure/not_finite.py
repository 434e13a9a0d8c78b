"""Handle a loss or gradient that is not finite: report ranks and cells, skip the step or stop.

`Skips` decides whether the update of a step may be skipped. `stop_not_finite` writes a small dump
of the affected cells and ends the run on all ranks.
"""

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
    """A loss or gradient norm is infinite or NaN."""


class Skips:
    """Steps whose update was skipped, and whether another step may be skipped.

    All ranks decide the same, because loss and norm are sums over ranks. A skipped step still
    counts as a step: the order of cells and the learning rate continue as if it had been applied.
    Weights, moments and the optimizer's own count of updates stay unchanged.

    Attributes
    ----------
    steps
        Numbers of the skipped steps, counted from 1, including those before a resume.
    """

    def __init__(self, config: RunSection, last: Checkpoint | None) -> None:
        self._config = config
        self.steps: list[int] = list(last.record.get("skipped_steps", [])) if last else []
        self._left_out = last.step - last.updates if last else 0

    def may_skip(self, step: int) -> bool:
        """Return whether the update of a step (counted from 0) may be skipped."""
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
        """Count and log a skipped step, and return its record for metrics.jsonl.

        All ranks call it together. The arguments are as in `stop_not_finite`.
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
        """Return a checkpoint's entries after `done` steps: updates made, and skipped steps."""
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
    """Write dumps, then raise the same error on every rank; all ranks call it together.

    Ranks that have cells without a finite loss dump these cells; if no rank has such cells, all
    ranks dump all their cells.

    Parameters
    ----------
    what
        The problem, e.g. ``loss is nan``.
    step
        Number of the step, counted from 0.
    data, losses
        The micro-batches that this rank computed, and for each of them float32 [M] losses of hidden
        genes and, with a cell objective, [B] losses of cells.
    skips
        The skipped steps before this one.

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
    """Return a text that lists, by rank, the cells without a finite loss."""
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
    """Return for each micro-batch the rows without a finite loss."""
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
    """Return a cell's number and its id in the shards as text."""
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
    """Write arrays ``micro{N}/...`` to an npz file.

    They are the cells, their input_ids [rows, L], and for each hidden gene its row and position in
    input_ids, label and loss.
    """
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
