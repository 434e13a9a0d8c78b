"""What the head's answers are worth: the loss of each hidden gene, and its place among all guesses.

Shapes: M hidden genes, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from pretrain import kernels


def score(logits_MV: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return float32 [M] losses and int64 [M] places of labels among all guesses."""
    if logits_MV.device.type == "cpu":
        return _ScoredLabels.apply(logits_MV, labels)  # type: ignore[return-value]
    # Cross-entropy in float32: in bfloat16 a loss of 6 is quantised to 1/64.
    logits_MV = logits_MV.float()
    # Before the loss: what is counted in is freed again when the loss needs its memory.
    places_M = guess_places(logits_MV.detach(), labels)
    return functional.cross_entropy(logits_MV, labels, reduction="none"), places_M


class _ScoredLabels(torch.autograd.Function):
    """Cross-entropy and place of each label on a CPU, in two passes over the logits.

    The logits are used up in backward.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_MV: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        losses, log_sums = torch.empty(len(labels)), torch.empty(len(labels))
        places = torch.empty(len(labels), dtype=torch.int64)
        logits_MV = logits_MV.detach()
        kernels.score_labels(
            kernels.numbers(logits_MV), labels.numpy(), losses.numpy(), places.numpy(),
            log_sums.numpy(),
        )  # fmt: skip
        ctx.save_for_backward(labels, log_sums)
        ctx.logits_MV = logits_MV
        ctx.mark_non_differentiable(places)
        return losses, places

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple:
        labels, log_sums = ctx.saved_tensors
        logits_MV, ctx.logits_MV = ctx.logits_MV, None
        slopes = gradients[0]
        assert slopes is not None and logits_MV is not None
        kernels.slopes_of_logits(
            kernels.numbers(logits_MV), labels.numpy(), log_sums.numpy(),
            slopes.float().contiguous().numpy(),
        )  # fmt: skip
        return logits_MV, None


def guess_places(logits_MV: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return int64 [M]: how many genes have a higher logit than the label; V where it is -100.

    Among T equal logits the label gets one of their T places, by its token modulo T. In bfloat16
    ties are the rule: counted from the best place, a model that has learnt nothing has a top-1 of
    100 %. A logit that is NaN gives V.
    """
    own_M1 = logits_MV.gather(1, labels.clamp(min=0)[:, None])
    counted_MV = torch.empty_like(logits_MV)
    # On a CPU the sum of floats takes a quarter of the time of a sum of booleans.
    below_M = torch.lt(logits_MV, own_M1, out=counted_MV).sum(dim=-1).long()
    not_above_M = torch.le(logits_MV, own_M1, out=counted_MV).sum(dim=-1).long()
    tied_M = (not_above_M - below_M).clamp(min=1)
    size = logits_MV.shape[1]
    return torch.where(labels < 0, size, size - not_above_M + labels % tied_M)
