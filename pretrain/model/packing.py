"""Packing: the cells of a micro-batch stand one after another without padding.

A padded micro-batch wastes the computation at padding, and its mask rules out the fused kernels of
a GPU. When packed, all tokens of a micro-batch form one row of T positions, and attention is told
where each cell begins. Losses, their order, and masks are those of the padded micro-batch; the
length bucket still decides which cells are in it.

`packed` makes a `Packing` of a padded micro-batch; `packed_attention` computes attention within
each cell. On a GPU a kernel of torch does this. Everywhere else a plain loop over cells does; it is
the reference that the tests compare with, and is not meant for speed.

Shapes: B cells, L positions of the longest cell, T positions of all cells, A query positions of the
last layer, M hidden genes, H heads, E width of a head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from pretrain.model.attention import attention

# The kernel accepts heads whose width is a multiple of 8 and at most 256.
_HEAD_MULTIPLE, _WIDEST_HEAD = 8, 256
OLDEST_GPU = (8, 0)


class Packing(NamedTuple):
    """Where the cells of a packed micro-batch are.

    Attributes
    ----------
    starts_B
        int32 [B + 1], where each cell begins, and T. Every cell has at least one position.
    padded_T
        int64, the index of each position in B x L: its cell and position in the cell.
    places_M
        int64, the index of each hidden gene in T, ascending.
    asked_A
        int64, query positions of the last layer in T, ascending: those of hidden genes, and the
        first position of a cell without any, because the kernel needs a query from each cell.
    asked_starts_B
        int32 [B + 1], where the query positions of each cell begin, and A.
    slots_M
        int64, the index of each hidden gene in `asked_A`.
    length, most_asked
        L, and an upper limit of the query positions of a cell; both are the same for a whole
        bucket.
    """

    starts_B: torch.Tensor
    padded_T: torch.Tensor
    places_M: torch.Tensor
    asked_A: torch.Tensor
    asked_starts_B: torch.Tensor
    slots_M: torch.Tensor
    length: int
    most_asked: int

    @property
    def num_places(self) -> int:
        """Return T, the number of positions."""
        return len(self.padded_T)

    @property
    def num_cells(self) -> int:
        """Return B, the number of cells."""
        return len(self.starts_B) - 1

    def rows(self, values_T: torch.Tensor) -> torch.Tensor:
        """Return [B, L, ...], the values of positions as one row per cell, filled with zeros."""
        shape = self.num_cells, self.length
        flat = values_T.new_zeros(shape[0] * shape[1], *values_T.shape[1:])
        return flat.index_copy(0, self.padded_T, values_T).unflatten(0, shape)

    def real(self) -> torch.Tensor:
        """Return bool [B, L], True at the positions of `rows` that belong to a cell."""
        place_L = torch.arange(self.length, device=self.starts_B.device)
        return place_L < self.starts_B.diff()[:, None]


def packed(
    input_ids: torch.Tensor, real: torch.Tensor | None, masked_places: torch.Tensor, most: int
) -> tuple[torch.Tensor, Packing]:
    """Return int32 [T] tokens and the packing of a padded micro-batch.

    Parameters
    ----------
    input_ids, real
        int32 and bool [B, L]; `real` is True at the first positions of each row, at least one;
        None: at all positions.
    masked_places
        int64 [M], flat index into B x L, ascending, without filler entries.
    most
        Largest possible number of hidden genes of a cell.
    """
    num_cells, length = input_ids.shape
    places = masked_places.numpy()
    if real is None:
        lengths = np.full(num_cells, length)
        padded = np.arange(num_cells * length)
    else:
        lengths = real.numpy().sum(axis=1)
        padded = np.flatnonzero(real.numpy())
    starts = _starts(lengths)
    cells = places // length
    packed_places = places + (starts[:-1] - np.arange(num_cells) * length)[cells]
    hidden = np.bincount(cells, minlength=num_cells)
    has_none = hidden == 0
    # Each earlier cell without hidden genes takes one query position as well.
    slots = np.arange(len(places)) + np.cumsum(has_none)[cells]
    asked_starts = _starts(np.maximum(hidden, 1))
    asked = np.empty(asked_starts[-1], np.int64)
    asked[slots] = packed_places
    asked[asked_starts[:-1][has_none]] = starts[:-1][has_none]
    packing = Packing(
        torch.from_numpy(starts.astype(np.int32)),
        torch.from_numpy(padded.astype(np.int64)),
        torch.from_numpy(packed_places),
        torch.from_numpy(asked),
        torch.from_numpy(asked_starts.astype(np.int32)),
        torch.from_numpy(slots),
        length,
        most,
    )
    return torch.from_numpy(input_ids.numpy().ravel()[padded]), packing


def _starts(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def kernel_refuses(
    head_width: int, precision: str, capability: tuple[int, int] | None
) -> str | None:
    """Return why the GPU kernel for packed cells cannot be used, or None if it can.

    Parameters
    ----------
    precision
        The setting `run.precision`.
    capability
        Compute capability of the GPU as torch reports it; None: there is no GPU.
    """
    if capability is None:
        return "there is no GPU"
    if capability < OLDEST_GPU:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, below 8.0"
    if precision != "bf16":
        return f"run.precision={precision}: the kernel computes in bf16"
    if head_width % _HEAD_MULTIPLE or head_width > _WIDEST_HEAD:
        return f"a head is {head_width} wide: no multiple of 8 up to 256"
    return None


def packed_attention(
    query_AHE: torch.Tensor,
    key_THE: torch.Tensor,
    value_THE: torch.Tensor,
    cells: Packing,
    half: int | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Return [A, H, E]: softmax(query key' / sqrt(E)) value over the keys of the same cell.

    Parameters
    ----------
    query_AHE
        Queries of all T positions, or of `cells.asked_A`.
    half
        Each query attends to keys at most this far away; all T positions must be queries then.
        None: to all keys of its cell.
    dropout
        Share of attention weights that are dropped; 0 for evaluation.
    """
    is_few = len(query_AHE) != len(key_THE)
    assert half is None or not is_few, "a window needs all places to ask"
    starts, most = (
        (cells.asked_starts_B, cells.most_asked) if is_few else (cells.starts_B, cells.length)
    )
    if key_THE.device.type != "cpu" and key_THE.dtype == torch.bfloat16:
        return _by_kernel(query_AHE, key_THE, value_THE, starts, most, cells, half, dropout)
    if dropout:
        arguments = query_AHE, key_THE, value_THE, starts, cells.starts_B, dropout
        return _by_cell_with_dropout(*arguments)  # type: ignore  # the decorator hides its signature
    return _by_cell(
        query_AHE, key_THE, value_THE, starts, cells.starts_B, -1 if half is None else half
    )[0]


def _by_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    most: int,
    cells: Packing,
    half: int | None,
    dropout: float,
) -> torch.Tensor:
    # The import is not at the top, because it loads torch.compile's machinery for two seconds,
    # which no CPU run needs.
    from torch.nn.attention.varlen import varlen_attn

    if dropout:
        assert half is None
        # `varlen_attn` calls this operation, but has no argument for dropout.
        return torch.ops.aten._flash_attention_forward(
            query, key, value, starts, cells.starts_B, most, cells.length, dropout, False, False
        )[0]
    window = (-1, -1) if half is None else (half, half)
    # With one split, the result of a cell does not depend on the other cells.
    found = varlen_attn(
        query, key, value, starts, cells.starts_B, most, cells.length,
        window_size=window, num_splits=1,
    )  # fmt: skip
    assert isinstance(found, torch.Tensor)
    return found


def picked(states_ND: torch.Tensor, places: torch.Tensor, are_unique: bool) -> torch.Tensor:
    """Return [..., D], the states at an array of positions of any shape.

    On a GPU torch's own indexing sorts the positions in backward, because some may be equal.

    Parameters
    ----------
    are_unique
        No position occurs twice; this is not checked.
    """
    if are_unique:
        found = _Picked.apply(states_ND, places.flatten())
        assert isinstance(found, torch.Tensor)
        return found.unflatten(0, places.shape)
    if states_ND.device.type == "cpu":
        return states_ND[places]
    return states_ND.index_select(0, places.flatten()).unflatten(0, places.shape)


class _Picked(torch.autograd.Function):
    """Selects states at positions of which none occurs twice."""

    @staticmethod
    def forward(ctx: Any, states_ND: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places)
        ctx.size = states_ND.shape[0]
        return states_ND.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple:
        (places,), (slopes,) = ctx.saved_tensors, gradients
        whole = slopes.new_zeros(ctx.size, *slopes.shape[1:])
        return whole.index_copy_(0, places, slopes), None


def _ranges(starts: torch.Tensor) -> list[tuple[int, int]]:
    bounds = starts.tolist()
    return list(zip(bounds[:-1], bounds[1:], strict=True))


@torch.compiler.disable
def _by_cell_with_dropout(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    asked_starts: torch.Tensor,
    starts: torch.Tensor,
    dropout: float,
) -> torch.Tensor:
    """Return attention within cells as `_by_cell` does, but with dropout of attention weights."""
    found = []
    for (a, b), (c, d) in zip(_ranges(asked_starts), _ranges(starts), strict=True):
        q, k, v = query[None, a:b], key[None, c:d], value[None, c:d]
        context = attention(q.flatten(2), k.flatten(2), v.flatten(2), key.shape[1], None, dropout)
        found.append(context[0].unflatten(-1, query.shape[1:]))
    return torch.cat(found)


@torch.library.custom_op("geneloom::attention_by_cell", mutates_args=())
def _by_cell(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    asked_starts: torch.Tensor,
    starts: torch.Tensor,
    half: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention within cells, and float32 [A, H], the logs of the sums of exponentials.

    This is the reference for the kernel: one cell after another, with all attention weights in
    memory. For torch.compile it is a single operation, as the kernel is. `half` = -1 means no
    window.
    """
    found = torch.empty_like(query, memory_format=torch.contiguous_format)
    log_sums = query.new_empty(query.shape[:2], dtype=torch.float32)
    for (a, b), (c, d) in zip(_ranges(asked_starts), _ranges(starts), strict=True):
        scores = _scores(query[a:b], key[c:d], half)
        log_sum = scores.logsumexp(-1)
        found[a:b] = _weighted((scores - log_sum[..., None]).exp(), value[c:d])
        log_sums[a:b] = log_sum.t()
    return found, log_sums


def _scores(query: torch.Tensor, key: torch.Tensor, half: int) -> torch.Tensor:
    """Return float32 [H, A, T], the attention scores of one cell."""
    scores = torch.einsum("ahe,the->hat", query, key).float() * query.shape[-1] ** -0.5
    if half < 0:
        return scores
    place = torch.arange(len(key), device=key.device)
    return scores.masked_fill((place[:, None] - place).abs() > half, -torch.inf)


def _weighted(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.einsum("hat,the->ahe", weights.to(value.dtype), value)


@_by_cell.register_fake
def _(query, key, value, asked_starts, starts, half):  # noqa: ANN001, ANN202
    contiguous = torch.empty_like(query, memory_format=torch.contiguous_format)
    return contiguous, query.new_empty(query.shape[:2], dtype=torch.float32)


@torch.library.custom_op("geneloom::attention_by_cell_backward", mutates_args=())
def _by_cell_backward(
    slope: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    found: torch.Tensor,
    log_sums: torch.Tensor,
    asked_starts: torch.Tensor,
    starts: torch.Tensor,
    half: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of queries, keys and values."""
    slopes = [torch.empty_like(x, memory_format=torch.contiguous_format)
              for x in (query, key, value)]  # fmt: skip
    scale = query.shape[-1] ** -0.5
    for (a, b), (c, d) in zip(_ranges(asked_starts), _ranges(starts), strict=True):
        weights = (_scores(query[a:b], key[c:d], half) - log_sums[a:b].t()[..., None]).exp()
        of_weights = torch.einsum("ahe,the->hat", slope[a:b], value[c:d]).float()
        shared = (slope[a:b] * found[a:b]).float().sum(-1).t()
        of_scores = (weights * (of_weights - shared[..., None]) * scale).to(query.dtype)
        slopes[0][a:b] = torch.einsum("hat,the->ahe", of_scores, key[c:d])
        slopes[1][c:d] = torch.einsum("hat,ahe->the", of_scores, query[a:b])
        slopes[2][c:d] = torch.einsum("hat,ahe->the", weights.to(slope.dtype), slope[a:b])
    return slopes[0], slopes[1], slopes[2]


@_by_cell_backward.register_fake
def _(slope, query, key, value, found, log_sums, asked_starts, starts, half):  # noqa: ANN001, ANN202
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)
    )


def _keep(ctx, inputs, output) -> None:  # noqa: ANN001
    query, key, value, asked_starts, starts, ctx.half = inputs
    ctx.save_for_backward(query, key, value, *output, asked_starts, starts)


def _slopes(ctx, slope: torch.Tensor, _unused: torch.Tensor | None) -> tuple:  # noqa: ANN001
    query, key, value, found, log_sums, asked_starts, starts = ctx.saved_tensors
    slopes = _by_cell_backward(
        slope, query, key, value, found, log_sums, asked_starts, starts, ctx.half
    )
    return *slopes, None, None, None


_by_cell.register_autograd(_slopes, setup_context=_keep)
