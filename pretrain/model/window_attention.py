"""Attention to neighbours alone: each place sees the places within a window around it.

Long cells are cut into blocks: a block of places that ask needs its own places and half a window on
each side, and nothing else is computed. Measured on one core (8 cells of 1,024 places, 4 heads of
32, window 32, forward and backward): all places and a mask 0.66 s, blocks 0.12 s; without a
window 0.49 s.

Shapes: B cells, Q places that ask, L places that are asked, H heads, E width of a head, N blocks,
C places of a block, W half the window.
"""

from __future__ import annotations

import torch
from torch.nn import functional

# Of a block, in windows: with less more is copied, with more there are more products in vain.
_WINDOWS_OF_A_BLOCK = 2
# Below so many blocks a mask over all places is as fast.
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
        bool, places that may be asked: the first ones of each row, at least one; None: all. What
        is returned for other places is of no meaning, but finite.
    places_BQ
        int64, where those that ask stand; None: Q = L, in their order.
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
    """Return which keys are seen. Each place sees itself: one without any key would give NaN."""
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
    # Of each block: its own places, and half a window before and after.
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
    """Return [B, N, H, C, E]; the last block is filled with zeros."""
    missing = number * size - states_BHLE.shape[2]
    if missing:
        states_BHLE = functional.pad(states_BHLE, (0, 0, 0, missing))
    return states_BHLE.unflatten(2, (number, size)).transpose(1, 2)


def _with_edges(states_BNHCE: torch.Tensor, half: int) -> torch.Tensor:
    """Return [B, N, H, C + 2 W, E]: each block between ends of its neighbours, or zeros."""
    before = functional.pad(states_BNHCE[:, :-1, :, -half:], (0, 0, 0, 0, 0, 0, 1, 0))
    after = functional.pad(states_BNHCE[:, 1:, :, :half], (0, 0, 0, 0, 0, 0, 0, 1))
    return torch.cat([before, states_BNHCE, after], dim=3)
