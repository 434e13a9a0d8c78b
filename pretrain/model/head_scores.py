"""Score the logits of the head: the loss of each hidden gene, and its place among all guesses.

Shapes: M hidden genes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pretrain.model import cpu_kernels
from pretrain.plan.flops import CHUNK_BYTES

# A function that returns float32 [rows, V] to add to the logits of a range of rows.
Offset = Callable[[slice], torch.Tensor]


def score(
    logits_MV: torch.Tensor, labels: torch.Tensor, offset: Offset | None = None
) -> tuple[torch.Tensor, ...]:
    """Return float32 [M] losses and int64 [M] places of the labels among all guesses.

    The logits are overwritten. Losses are computed in float32, because in bfloat16 a loss of 6 is
    rounded to 1/64. `offset` is for GPUs only.
    """
    if logits_MV.device.type == "cpu" and offset is None:
        return _ScoredLabels.apply(logits_MV, labels)  # type: ignore[return-value]
    return _ChunkedScores.apply(logits_MV, labels, offset)  # type: ignore[return-value]


class _ChunkedScores(torch.autograd.Function):
    """Cross-entropy and guess places with torch's own operations, some rows at a time.

    No float32 copy of all logits is ever made, nor of their gradients. The gradients overwrite the
    logits already in forward, because backward only receives one factor for each row.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_MV: torch.Tensor, labels: torch.Tensor, offset: Offset | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        needs_slopes = ctx.needs_input_grad[0]
        logits_MV = logits_MV.detach()
        losses = torch.empty(len(labels), dtype=torch.float32, device=labels.device)
        places = torch.empty_like(labels)
        size = max(1, CHUNK_BYTES // (4 * logits_MV.shape[1]))
        for first in range(0, len(labels), size):
            rows = slice(first, first + size)
            chunk, own = logits_MV[rows].float(), labels[rows]
            if offset is not None:
                chunk = chunk + offset(rows)
            is_asked, at = own >= 0, own.clamp(min=0)[:, None]
            log_sums, own_logits = chunk.logsumexp(dim=1, keepdim=True), chunk.gather(1, at)
            # Booleans need a quarter of the bytes of floats, which are faster on a CPU.
            counts = (chunk < own_logits).sum(dim=1), (chunk <= own_logits).sum(dim=1)
            places[rows] = _places(*counts, own, chunk.shape[1])
            found = (log_sums - own_logits)[:, 0]
            losses[rows] = torch.where(is_asked, found, 0.0)
            if needs_slopes:
                slopes = (chunk - log_sums).exp_()
                slopes.scatter_add_(1, at, torch.full_like(found, -1.0)[:, None])
                logits_MV[rows] = slopes.mul_(is_asked[:, None])
        ctx.slopes_MV = logits_MV
        ctx.mark_non_differentiable(places)
        return losses, places

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple:
        slopes_MV, ctx.slopes_MV = ctx.slopes_MV, None
        assert gradients[0] is not None and slopes_MV is not None
        # A gradient that was 0 stays 0, whatever factor comes back for a row without a label.
        return slopes_MV.mul_(gradients[0].to(slopes_MV.dtype)[:, None]), None, None


class _ScoredLabels(torch.autograd.Function):
    """Cross-entropy and guess place of each label on a CPU, in two passes over the logits.

    Backward overwrites the logits.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_MV: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        losses, log_sums = torch.empty(len(labels)), torch.empty(len(labels))
        places = torch.empty(len(labels), dtype=torch.int64)
        logits_MV = logits_MV.detach()
        cpu_kernels.score_labels(
            cpu_kernels.numbers(logits_MV), labels.numpy(), losses.numpy(), places.numpy(),
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
        cpu_kernels.slopes_of_logits(
            cpu_kernels.numbers(logits_MV), labels.numpy(), log_sums.numpy(),
            slopes.float().contiguous().numpy(),
        )  # fmt: skip
        return logits_MV, None


def guess_places(logits_MV: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return int64 [M]: how many genes have a higher logit than the label; V where it is -100.

    Among T equal logits the label gets one of their T places, by its token modulo T. In bfloat16
    ties are common: if a label always got the best place of a tie, a model that has learnt nothing
    would have a top-1 accuracy of 100 %. A logit that is NaN gives V.
    """
    own_M1 = logits_MV.gather(1, labels.clamp(min=0)[:, None])
    counted_MV = torch.empty_like(logits_MV)
    # On a CPU a sum of floats takes a quarter of the time of a sum of booleans.
    below_M = torch.lt(logits_MV, own_M1, out=counted_MV).sum(dim=-1).long()
    not_above_M = torch.le(logits_MV, own_M1, out=counted_MV).sum(dim=-1).long()
    return _places(below_M, not_above_M, labels, logits_MV.shape[1])


def _places(
    below_M: torch.Tensor, not_above_M: torch.Tensor, labels: torch.Tensor, size: int
) -> torch.Tensor:
    tied_M = (not_above_M - below_M).clamp(min=1)
    return torch.where(labels < 0, size, size - not_above_M + labels % tied_M)
