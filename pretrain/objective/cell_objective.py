"""The cell objective: predict all hidden genes of a cell at once from its visible genes.

A cell is represented by the mean of the last layer's states of its visible genes. All later uses
describe the cell by this vector, but the loss of single genes never trains it directly. The model's
own vocabulary head reads this mean like a state and gives one softmax over the vocabulary; the loss
of a cell is the mean of -log p over its hidden genes. There are no weights besides those of Hugging
Face's model, so the format of a model folder does not change, and the mean stays in the space of
the gene embeddings.

`cell_targets` prepares a micro-batch; `mean_of_visible` and `cell_losses` run in the forward pass.

Shapes: B cells, L positions, D width, V vocabulary, H hidden genes of the micro-batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

from pretrain.objective.masking import NO_LABEL


class CellTargets(NamedTuple):
    """The targets of the cell objective in a micro-batch.

    Attributes
    ----------
    visible_BL
        bool, True at genes that the model sees. It is False at special tokens, padding and hidden
        positions, whatever token stands there.
    rows_H, genes_H
        int64, the cell of each hidden gene and its token; `NO_LABEL` behind the last hidden gene,
        and in cells without visible genes.
    """

    visible_BL: torch.Tensor
    rows_H: torch.Tensor
    genes_H: torch.Tensor

    @property
    def scored_rows(self) -> torch.Tensor:
        """Return int64, the cells that have a loss: those with a visible and a hidden gene."""
        return self.rows_H[self.genes_H != NO_LABEL].unique()


def cell_targets(
    input_ids: torch.Tensor, masked_places: torch.Tensor, labels: torch.Tensor, first_gene: int
) -> CellTargets:
    """Return the targets of the cell objective for cells with these hidden genes.

    Parameters
    ----------
    input_ids
        int32 [B, L], as the model receives them.
    masked_places, labels
        int64 [H], flat positions in B x L and hidden genes; label `NO_LABEL`: no hidden gene.
    first_gene
        The first gene token; lower tokens are special tokens.
    """
    visible_BL = input_ids >= first_gene
    visible_BL.view(-1)[masked_places[labels != NO_LABEL]] = False
    rows_H = masked_places // input_ids.shape[1]
    shows_genes_H = visible_BL.any(dim=1)[rows_H]
    return CellTargets(visible_BL, rows_H, torch.where(shows_genes_H, labels, NO_LABEL))


def mean_of_visible(states_BLD: torch.Tensor, visible_BL: torch.Tensor) -> torch.Tensor:
    """Return [B, D], the mean state of the visible genes of each cell; zeros if it has none."""
    # A matrix product sums in float32 even for bfloat16 states, and needs no copy.
    sums_BD = (visible_BL.to(states_BLD.dtype)[:, None] @ states_BLD)[:, 0]
    return sums_BD / visible_BL.sum(dim=1, keepdim=True).clamp(min=1)


def cell_losses(
    logits_BV: torch.Tensor, rows_H: torch.Tensor, genes_H: torch.Tensor
) -> torch.Tensor:
    """Return float32 [B], in nats: the mean of -log p over a cell's hidden genes; 0 without any.

    The gradient of a cell without hidden genes is an exact zero. `rows_H`, `genes_H`: see
    `CellTargets`.
    """
    logits_BV = logits_BV.float()
    is_asked_H = (genes_H != NO_LABEL).float()
    # The summands are ones and zeros, so their sums are the same in any order.
    size = logits_BV.shape[1]
    flat = logits_BV.new_zeros(len(logits_BV) * size)
    flat = flat.scatter_add_(0, rows_H * size + genes_H.clamp(min=0), is_asked_H)
    counts_BV = flat.unflatten(0, (-1, size))
    shares_BV = counts_BV / counts_BV.sum(dim=1, keepdim=True).clamp(min=1)
    return functional.cross_entropy(logits_BV, shares_BV, reduction="none")
