"""Cell states of an encoder that is being trained: what a head of cells reads."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:
    from pretrain.cell_states.cell_state import CellState


class StateReader(nn.Module):
    """Computes cell states from the means of the last layer; gradients flow through the means.

    The counted part depends on a cell's genes alone, and the axes of the learned part stay those of
    the cell state.
    """

    centre: torch.Tensor
    axes: torch.Tensor

    def __init__(self, state: CellState) -> None:
        super().__init__()
        self.state = state
        # Not among the weights: they are saved with the state.
        self.register_buffer("centre", torch.from_numpy(state.centre), persistent=False)
        self.register_buffer("axes", torch.from_numpy(state.axes), persistent=False)

    @property
    def width(self) -> int:
        return self.state.width

    def forward(self, cells: list[np.ndarray], means_BD: torch.Tensor) -> torch.Tensor:
        """Return float32 [cells, width] from the tokens of cells and their means."""
        counted = self.state.svd.embed_cells(cells) / self.state.scales[0]
        learned = (means_BD - self.centre) @ self.axes / float(self.state.scales[1])
        return torch.cat([torch.from_numpy(counted).to(learned), learned], dim=1)


def digest_of(state: CellState) -> str:
    """Return a hash of all numbers of a cell state."""
    digest = hashlib.sha256()
    for table in (state.svd.components, state.centre, state.axes, state.scales):
        digest.update(np.ascontiguousarray(table).tobytes())
    return digest.hexdigest()
