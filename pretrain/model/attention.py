"""Attention by device: torch's fused kernels, and plain steps where torch has none.

On a CPU torch has no fused attention with dropout. There one head of one cell comes after the
other: its weights are written down, and made again in backward, so that memory holds those of one
head at a time. That is slower than without dropout, and only the published recipe asks for it.

Shapes: B cells, Q places that ask, L places that are asked, D width, H heads, E = D / H.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pretrain.model import cpu_kernels


def attention(
    query_BQD: torch.Tensor,
    key_BLD: torch.Tensor,
    value_BLD: torch.Tensor,
    num_heads: int,
    real_BL: torch.Tensor | None,
    dropout: float,
) -> torch.Tensor:
    """Return [B, Q, D], softmax(query key' / sqrt(E)) value of each head.

    Parameters
    ----------
    real_BL
        bool, places that may be asked: the first ones of each row, at least one; None: all.
    dropout
        Share of weights that are dropped (the others are scaled up); 0 for evaluation.
    """
    query, key, value = (
        x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query_BQD, key_BLD, value_BLD)
    )
    if dropout and query_BQD.device.type == "cpu":
        # The decorator hides the signature.
        context: torch.Tensor = _with_dropout(query, key, value, real_BL, dropout)  # type: ignore
        return context.transpose(1, 2).flatten(2)
    mask = None if real_BL is None else real_BL[:, None, None, :].expand(-1, -1, query.shape[2], -1)
    context = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout
    )
    return context.transpose(1, 2).flatten(2)


@torch.compiler.disable  # loops of numba, which torch.compile cannot see into
def _with_dropout(
    query_BHQE: torch.Tensor,
    key_BHLE: torch.Tensor,
    value_BHLE: torch.Tensor,
    real_BL: torch.Tensor | None,
    dropout: float,
) -> torch.Tensor:
    """Return [B, H, Q, E]; which weights are dropped is a hash of a seed and of where they are."""
    cells, num_heads = query_BHQE.shape[:2]
    seed = np.uint32(int(torch.randint(2**31, ())))
    found = [
        checkpoint(
            _of_head, query_BHQE[cell, head], key_BHLE[cell, head], value_BHLE[cell, head],
            None if real_BL is None else real_BL[cell], dropout,
            cpu_kernels.mix(seed, np.uint32(cell * num_heads + head)),
            use_reentrant=False, preserve_rng_state=False,
        )
        for cell, head in np.ndindex(cells, num_heads)
    ]  # fmt: skip
    return torch.stack(found).unflatten(0, (cells, num_heads))


def _of_head(
    query_QE: torch.Tensor,
    key_LE: torch.Tensor,
    value_LE: torch.Tensor,
    real_L: torch.Tensor | None,
    dropout: float,
    number: int,
) -> torch.Tensor:
    """Return [Q, E]; `number`: what the hash of this head's weights begins with."""
    scores_QL = (query_QE @ key_LE.t()).float() * query_QE.shape[1] ** -0.5
    if real_L is not None:
        scores_QL = scores_QL.masked_fill(~real_L, -torch.inf)
    factors_QL = torch.empty_like(scores_QL, requires_grad=False)
    cpu_kernels.dropout_factors(factors_QL.numpy(), number, dropout)
    weights_QL = scores_QL.softmax(-1) * factors_QL
    return weights_QL.to(value_LE.dtype) @ value_LE
