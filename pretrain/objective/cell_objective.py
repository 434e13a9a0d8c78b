"""The cell objective: from the genes that a cell shows, tell all those that it hides, at once.

A cell is the mean of the last layer's states of its visible genes: the vector that describes it in
every later use, which the loss of single genes never touches. The model's own head of genes reads
this mean as it reads a state, one softmax over the vocabulary; the loss of a cell is the mean of
-log p over its hidden genes. There are no weights beside Hugging Face's: a model folder stays what
it is, and the mean stays in the space in which the embeddings of genes are.

Shapes: B cells, L places, D width, V vocabulary, H hidden genes of the micro-batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

from pretrain.objective.masking import NO_LABEL


class CellTargets(NamedTuple):
    """What the cell objective asks of a micro-batch.

    Attributes
    ----------
    visible_BL
        bool: a gene that the model is shown. No special token, no padding, and no hidden place,
        whatever stands there.
    rows_H, genes_H
        int64, the cell of each hidden gene and its token; `NO_LABEL` where nothing is asked: behind
        the last hidden gene, and in cells that show no gene.
    """

    visible_BL: torch.Tensor
    rows_H: torch.Tensor
    genes_H: torch.Tensor

    @property
    def scored_rows(self) -> torch.Tensor:
        """int64, the cells that have a loss: those with a visible gene and a hidden one."""
        return self.rows_H[self.genes_H != NO_LABEL].unique()


def cell_targets(
    input_ids: torch.Tensor, masked_places: torch.Tensor, labels: torch.Tensor, first_gene: int
) -> CellTargets:
    """Return what is asked of cells with these hidden genes.

    Parameters
    ----------
    input_ids
        int32 [B, L], as the model is shown them.
    masked_places, labels
        int64 [H], flat places in B x L and hidden genes; label `NO_LABEL`: none.
    first_gene
        Lower tokens are special.
    """
    visible_BL = input_ids >= first_gene
    visible_BL.view(-1)[masked_places[labels != NO_LABEL]] = False
    rows_H = masked_places // input_ids.shape[1]
    shows_genes_H = visible_BL.any(dim=1)[rows_H]
    return CellTargets(visible_BL, rows_H, torch.where(shows_genes_H, labels, NO_LABEL))


def mean_of_visible(states_BLD: torch.Tensor, visible_BL: torch.Tensor) -> torch.Tensor:
    """Return [B, D], the mean of the states of visible genes; zeros where there are none."""
    # A product of matrices: it adds in float32 also what is bfloat16, and copies nothing.
    sums_BD = (visible_BL.to(states_BLD.dtype)[:, None] @ states_BLD)[:, 0]
    return sums_BD / visible_BL.sum(dim=1, keepdim=True).clamp(min=1)


def cell_losses(
    logits_BV: torch.Tensor, rows_H: torch.Tensor, genes_H: torch.Tensor
) -> torch.Tensor:
    """Return float32 [B], nats: the mean of -log p over a cell's hidden genes; 0 without any.

    Its gradient is an exact zero where a cell has none. `rows_H`, `genes_H`: see `CellTargets`.
    """
    logits_BV = logits_BV.float()
    is_asked_H = (genes_H != NO_LABEL).float()
    # Ones and zeros: their sums are the same in any order.
    size = logits_BV.shape[1]
    flat = logits_BV.new_zeros(len(logits_BV) * size)
    flat = flat.scatter_add_(0, rows_H * size + genes_H.clamp(min=0), is_asked_H)
    counts_BV = flat.unflatten(0, (-1, size))
    shares_BV = counts_BV / counts_BV.sum(dim=1, keepdim=True).clamp(min=1)
    return functional.cross_entropy(logits_BV, shares_BV, reduction="none")
