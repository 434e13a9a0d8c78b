"""Local attention: each position attends only to the positions within a window around it.

Long cells are cut into blocks of query positions. A block needs the keys of its own positions and
of half a window on each side, and nothing else is computed. Measured on one core (8 cells of 1,024
positions, 4 heads of 32, window 32, forward and backward): all positions and a mask 0.66 s, blocks
0.12 s; without a window 0.49 s.

Shapes: B cells, Q query positions, L key positions, H heads, E width of a head, N blocks, C
positions of a block, W half the window.
"""

from __future__ import annotations

import torch
from torch.nn import functional

# The size of a block in windows: smaller blocks copy more, larger ones compute more useless
# products.
_WINDOWS_OF_A_BLOCK = 2
# With fewer blocks than this, a mask over all positions is as fast.
_FEWEST_BLOCKS = 4


def window_attention(
    query_BHQE: torch.Tensor,
    key_BHLE: torch.Tensor,
    value_BHLE: torch.Tensor,
    half: int,
    real_BL: torch.Tensor | None,
    places_BQ: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return [B, H, Q, E]: softmax(query key' / sqrt(E)) value over keys at most `half` away.

    Parameters
    ----------
    real_BL
        bool, True at real tokens: the first positions of each row, at least one; None: all
        positions. The results of other positions have no meaning, but are finite.
    places_BQ
        int64, the positions of the queries; None: Q = L, in order.
    """
    length = key_BHLE.shape[2]
    if places_BQ is None and length >= _FEWEST_BLOCKS * _WINDOWS_OF_A_BLOCK * 2 * half:
        return _in_blocks(query_BHQE, key_BHLE, value_BHLE, half, real_BL)
    place_L = torch.arange(length, device=key_BHLE.device)
    asking = place_L[None] if places_BQ is None else places_BQ
    distance_BQL = (asking[:, :, None] - place_L).abs()
    mask = _seen(distance_BQL, half, None if real_BL is None else real_BL[:, None])
    mask = mask[:, None].expand(len(key_BHLE), -1, -1, -1)
    return functional.scaled_dot_product_attention(query_BHQE, key_BHLE, value_BHLE, attn_mask=mask)


def _seen(distance: torch.Tensor, half: int, real: torch.Tensor | None) -> torch.Tensor:
    """Return bool, True where a query attends to a key.

    Each position attends to itself, because a query without any key would give NaN.
    """
    near = distance <= half
    return near if real is None else near & (real | (distance == 0))


def _in_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    half: int,
    real_BL: torch.Tensor | None,
) -> torch.Tensor:
    cells, heads, length, _ = query.shape
    size = _WINDOWS_OF_A_BLOCK * 2 * half
    number = -(-length // size)
    place_NC = torch.arange(number * size, device=query.device).view(number, size)
    # The keys of each block: its own positions, and half a window before and after.
    ahead = torch.arange(-half, size + half, device=query.device)
    asked_NK = place_NC[:, :1] + ahead
    exists_NK = (asked_NK >= 0) & (asked_NK < length)
    real = exists_NK[None, :, None]
    if real_BL is not None:
        real = real & real_BL[:, asked_NK.clamp(0, length - 1)][:, :, None]
    distance_NCK = (place_NC[:, :, None] - asked_NK[:, None]).abs()
    mask = _seen(distance_NCK[None], half, real).expand(cells, -1, -1, -1)
    query_BNHCE = _blocks(query, number, size)
    key_BNHKE, value_BNHKE = (_with_edges(_blocks(x, number, size), half) for x in (key, value))
    found = functional.scaled_dot_product_attention(
        query_BNHCE.flatten(0, 1), key_BNHKE.flatten(0, 1), value_BNHKE.flatten(0, 1),
        attn_mask=mask.flatten(0, 1)[:, None],
    )  # fmt: skip
    # [B x N, H, C, E] -> [B, H, N x C, E]
    found = found.unflatten(0, (cells, number)).transpose(1, 2).flatten(2, 3)
    return found[:, :, :length]


def _blocks(states_BHLE: torch.Tensor, number: int, size: int) -> torch.Tensor:
    """Return [B, N, H, C, E]; the last block is filled up with zeros."""
    missing = number * size - states_BHLE.shape[2]
    if missing:
        states_BHLE = functional.pad(states_BHLE, (0, 0, 0, missing))
    return states_BHLE.unflatten(2, (number, size)).transpose(1, 2)


def _with_edges(states_BNHCE: torch.Tensor, half: int) -> torch.Tensor:
    """Return [B, N, H, C + 2 W, E]: each block with the edges of its neighbours, or zeros."""
    before = functional.pad(states_BNHCE[:, :-1, :, -half:], (0, 0, 0, 0, 0, 0, 1, 0))
    after = functional.pad(states_BNHCE[:, 1:, :, :half], (0, 0, 0, 0, 0, 0, 0, 1))
    return torch.cat([before, states_BNHCE, after], dim=3)
