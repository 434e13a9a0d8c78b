"""The data types of a training step: the micro-batches of one rank, and their counts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pretrain.batches.pinned_memory import Staged, Staging
from pretrain.model.packing import Packing
from pretrain.objective.cell_objective import CellTargets


@dataclass(frozen=True)
class MicroBatch:
    """The input of one forward pass.

    ``input_ids`` int32 [B, L]. ``attention_mask`` bool [B, L], None if nothing is padded.
    ``masked_places`` int64 [M], flat index into B x L. ``labels`` int64 [M], `NO_LABEL` behind the
    hidden genes, so that M depends on the bucket alone. ``relative_ranks`` float32 [M], the rank of
    the hidden gene in its cell, 0 = highest expression. ``cells`` int64 [B], cell numbers in the
    shards, -1 for filler rows (numpy, because it stays on the host). ``targets``: the targets of
    the cell objective, None without it; if it is the only objective, M is 0. ``folds`` int64 [B],
    the fold of each cell that the prior's table was counted without, None without a prior.
    ``packed``: int32 [T] tokens and their packing, if the model takes packed cells; then M is the
    number of hidden genes.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    masked_places: torch.Tensor
    labels: torch.Tensor
    relative_ranks: torch.Tensor
    cells: np.ndarray
    targets: CellTargets | None
    folds: torch.Tensor | None = None
    packed: tuple[torch.Tensor, Packing] | None = None

    @property
    def num_places(self) -> int:
        """Return how many positions are computed, including padding unless the cells are packed."""
        return len(self.packed[0]) if self.packed else self.input_ids.numel()


@dataclass(frozen=True)
class RankStep:
    """The micro-batches of one rank in one step, and their counts.

    `masked` is the number of hidden genes that have a loss, `scored_cells` the number of cells that
    have a loss. `cells_digest` is the sum of a hash of every cell, modulo 2**64, as int64. Summed
    over ranks and steps, it is the same number for the same cells in any order.
    """

    step: int
    micro_batches: list[MicroBatch]
    masked: int
    scored_cells: int
    tokens: int
    padded_tokens: int
    cells: int
    cells_digest: int
    quarantined: int
    staged: tuple[Staging, Staged] | None = None

    @property
    def length(self) -> int:
        """Return the padded length of all cells of the step."""
        return self.micro_batches[0].input_ids.shape[1]
