"""What a rank computes in one training step: micro-batches of tensors, and what they hold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pretrain.batches.pinned_memory import Staged, Staging
from pretrain.model.packing import Packing
from pretrain.objective.cell_objective import CellTargets


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass.

    ``input_ids`` int32 [B, L]; ``attention_mask`` bool [B, L], None when nothing is padded;
    ``masked_places`` int64 [M], flat index into B x L; ``labels`` int64 [M], `NO_LABEL` behind the
    hidden genes, so that M depends on the bucket alone; ``relative_ranks`` float32 [M], place of
    the hidden gene in its cell, 0 = highest expression; ``cells`` int64 [B] numbers in the shards,
    -1 for filler (numpy: it stays on the host); ``targets`` of the cell objective, None without it.
    Where that is the only objective, M is 0. ``folds`` int64 [B], the fold of each cell under which
    a prior was not counted, None without one. ``packed``: int32 [T] tokens and where they are, if
    the model gets the cells end to end; then M is the number of hidden genes.
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
        """Places that are computed: padding too, unless the cells are packed."""
        return len(self.packed[0]) if self.packed else self.input_ids.numel()


@dataclass(frozen=True)
class RankStep:
    """What one rank computes in one step: micro-batches, and what they hold.

    `masked`: hidden genes whose loss counts; `scored_cells`: cells whose loss does.
    `cells_digest`: sum of a hash of every cell served, modulo 2**64, as int64; it adds up over
    ranks and steps to the same number for the same cells, in any order.
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
        """Padded length of all its cells."""
        return self.micro_batches[0].input_ids.shape[1]
