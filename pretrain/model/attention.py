"""Attention by device: torch's fused kernels, and one of our own where torch has none.

On a CPU torch has no fused attention with dropout: it writes all weights down, draws as many random
numbers as there are weights, and keeps all of it for backward. Here a tile of weights is made,
changed in place and used up while it lies in the cache, and made again in backward; whether a
weight is dropped is a hash of where it stands.

Shapes: B cells, Q places that ask, L places that are asked, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from pretrain.model import cpu_kernels

# Of a tile of weights: two of them and their keys fit the second-level cache of a core.
_TILE_BYTES = 524_288


def attention(
    query_BQD: torch.Tensor,
    key_BLD: torch.Tensor,
    value_BLD: torch.Tensor,
    num_heads: int,
    real_BL: torch.Tensor | None,
    dropout: float,
) -> torch.Tensor:
    """Return [B, Q, D], softmax(query key' / sqrt(D / H)) value of each head.

    Parameters
    ----------
    real_BL
        bool, places that may be asked: the first ones of each row, at least one; None: all.
    dropout
        Share of weights that are dropped (the others are scaled up); 0 for evaluation.
    """
    if dropout and query_BQD.device.type == "cpu":
        arguments = query_BQD, key_BLD, value_BLD, num_heads, real_BL, dropout
        return _with_dropout(*arguments)  # type: ignore  # the decorator hides its signature
    query, key, value = (
        x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query_BQD, key_BLD, value_BLD)
    )
    mask = None if real_BL is None else real_BL[:, None, None, :].expand(-1, -1, query.shape[2], -1)
    context = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout
    )
    return context.transpose(1, 2).flatten(2)


@torch.compiler.disable  # loops of numba, which torch.compile cannot see into
def _with_dropout(*arguments: Any) -> torch.Tensor:
    """Return what `attention` does, by our own kernel; arguments as there."""
    seed = int(torch.randint(2**31, ()))
    return _DroppedAttention.apply(*arguments, seed)  # type: ignore[return-value]


class _DroppedAttention(torch.autograd.Function):
    """Attention with dropout, tile by tile, for a CPU."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        num_heads: int,
        real_BL: torch.Tensor | None,
        dropout: float,
        seed: int,
    ) -> torch.Tensor:
        plan = _Plan(query, key, num_heads, real_BL, dropout, seed)
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        # Of each place and head: log of the sum of exponentials.
        log_sums = torch.empty((len(query), num_heads, query.shape[1]))
        sums = torch.empty(query.shape[1], 1)
        (room,) = plan.tiles(1)
        for cell, head, part in plan.heads():
            q, k, v = (x[cell, :, part].contiguous() for x in (query, key, value))
            known, number = log_sums[cell, head], plan.key(cell, head)
            for rows in plan.blocks:
                scores = torch.mm(q[rows], k.t(), out=room[: rows.stop - rows.start])
                cpu_kernels.exponentials(
                    cpu_kernels.numbers(scores), plan.real[cell], plan.scale, plan.threshold,
                    number, rows.start, sums[rows].numpy()[:, 0], known[rows].numpy(),
                )  # fmt: skip
                torch.div(scores @ v, sums[rows] * plan.kept, out=out[cell, rows, part])
        ctx.save_for_backward(query, key, value, out, log_sums)
        ctx.plan = plan
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple:
        (gradient,) = gradients
        query, key, value, out, log_sums = ctx.saved_tensors
        plan: _Plan = ctx.plan
        d_query, d_key, d_value = (torch.empty_like(x) for x in (query, key, value))
        room, other_room = plan.tiles(2)
        for cell, head, part in plan.heads():
            q, k, v, o, g = (
                x[cell, :, part].contiguous() for x in (query, key, value, out, gradient)
            )
            delta = (o.float() * g).sum(dim=-1).numpy()
            known, number = log_sums[cell, head].numpy(), plan.key(cell, head)
            # Sums over tiles, in float32.
            dk, dv = torch.zeros(k.shape), torch.zeros(v.shape)
            for rows in plan.blocks:
                size = rows.stop - rows.start
                weights = torch.mm(q[rows], k.t(), out=room[:size])
                slopes = torch.mm(g[rows], v.t(), out=other_room[:size])
                cpu_kernels.slopes_of_scores(
                    cpu_kernels.numbers(weights), cpu_kernels.numbers(slopes), plan.real[cell],
                    plan.scale, plan.threshold, np.float32(1 / plan.kept), number, rows.start,
                    known[rows], delta[rows],
                )  # fmt: skip
                d_query[cell, rows, part] = slopes @ k
                dk += slopes.t() @ q[rows]
                dv += weights.t() @ g[rows]
            d_key[cell, :, part], d_value[cell, :, part] = dk, dv
        return d_query, d_key, d_value, None, None, None, None


class _Plan:
    """How a micro-batch is cut into tiles. Shapes depend on B, Q and L alone, not on the cells:
    oneDNN makes and keeps a kernel for every shape."""

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        num_heads: int,
        real_BL: torch.Tensor | None,
        dropout: float,
        seed: int,
    ) -> None:
        cells, asking, width = query.shape
        self._num_heads, self._seed, self._dtype = num_heads, seed, query.dtype
        self._length, self._width = key.shape[1], width // num_heads
        self.scale = np.float32(self._width**-0.5)
        self.kept = 1 - dropout
        self.threshold = np.uint32(dropout * 2**32)
        self.real = [self._length] * cells if real_BL is None else real_BL.sum(dim=1).tolist()
        num_blocks = -(-asking * self._length * query.element_size() // _TILE_BYTES)
        step = -(-asking // num_blocks)
        self.blocks = [slice(a, min(a + step, asking)) for a in range(0, asking, step)]

    def heads(self) -> Iterator[tuple[int, int, slice]]:
        """Yield (cell, head, its part of the width)."""
        for cell in range(len(self.real)):
            for head in range(self._num_heads):
                yield cell, head, slice(head * self._width, (head + 1) * self._width)

    def key(self, cell: int, head: int) -> np.uint32:
        """Return what the random numbers of a head begin with."""
        return np.uint32(
            cpu_kernels.mix(np.uint32(self._seed), np.uint32(cell * self._num_heads + head))
        )

    def tiles(self, number: int) -> list[torch.Tensor]:
        """Return room for the largest block's weights."""
        rows = self.blocks[0].stop
        return [torch.empty((rows, self._length), dtype=self._dtype) for _ in range(number)]
