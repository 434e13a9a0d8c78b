"""Embed cells with a frozen encoder, without its vocabulary head.

`embed_cells` gives one layer and `embed_layers` several; `computing` and `encode_batch` run the
encoder.

A cell's embedding must not depend on the other cells in the call. On a CPU each cell is computed
alone at its own length, so no other cell can change its bits and no position is padding. From 250
tokens on that is faster than padded passes of 16,384 tokens (a tenth to a fifth at 256 to 1,024
tokens a cell; a fifth slower at 64 to 128). One thread computes a cell, and several threads compute
several cells: where threads share a cell, their number decides how its matrices are divided, and
with that the last bits. On a GPU all passes of a length have the same shape: unused rows are filled
with copies of the first cell.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import nn

from data_prep.genes.vocabulary import Vocabulary
from pretrain.model.architectures import Encoder, architecture_of, layers_of, set_layers

# A function that receives the name of the work, the amount done, and the total amount.
Progress = Callable[[str, int, int], None]
_LENGTH_MULTIPLE = 8
# There are few different lengths of passes on a GPU, so that most passes are full.
_GPU_LENGTH_MULTIPLE = 64


def length_batches(lengths: np.ndarray, token_budget: int) -> Iterator[np.ndarray]:
    """Yield int64 indices of cells of similar length, at most `token_budget` padded tokens each.

    Cells of length 0 are left out; a single cell above the budget forms a batch of its own.
    """
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] > 0]
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and lengths[order[stop]] * (stop + 1 - start) <= token_budget:
            stop += 1
        yield order[start:stop]
        start = stop


def pool_genes(
    hidden_BLD: torch.Tensor, lengths: torch.Tensor, has_cls: bool, pooling: str
) -> torch.Tensor:
    """Return float32 [B, D]: the mean over a cell's genes, or its ``<cls>`` state.

    Parameters
    ----------
    lengths
        int64 [B], number of real tokens, including special ones.
    pooling
        ``mean`` or ``cls``.
    """
    if pooling == "cls":
        return hidden_BLD[:, 0].float()
    place_L = torch.arange(hidden_BLD.shape[1], device=hidden_BLD.device)
    first, last = (1, lengths - 1) if has_cls else (0, lengths)
    is_gene_BL = (place_L >= first) & (place_L < last[:, None])
    summed_BD = (hidden_BLD.float() * is_gene_BL[..., None]).sum(dim=1)
    return summed_BD / is_gene_BL.sum(dim=1, keepdim=True).clamp(min=1)


def embed_cells(
    tokens: list[np.ndarray],
    encoder: Encoder,
    vocabulary: Vocabulary,
    pooling: str = "mean",
    layer: int = -1,
    token_budget: int = 16_384,
    device: str = "cpu",
    bf16: bool = False,
    progress: Progress | None = None,
) -> np.ndarray:
    """Return float32 [cells, width] embeddings, in the order of `tokens`; NaN for empty cells.

    Arguments and errors are as in `embed_layers`, for one layer.
    """
    settings = token_budget, device, bf16, progress
    return embed_layers(tokens, encoder, vocabulary, (layer,), pooling, *settings)[layer]


def embed_layers(
    tokens: list[np.ndarray],
    encoder: Encoder,
    vocabulary: Vocabulary,
    layers: Sequence[int],
    pooling: str = "mean",
    token_budget: int = 16_384,
    device: str = "cpu",
    bf16: bool = False,
    progress: Progress | None = None,
) -> dict[int, np.ndarray]:
    """Return layer -> float32 [cells, width] embeddings, of several layers in one pass.

    The cells are in the order of `tokens`; empty cells give NaN.

    Parameters
    ----------
    tokens
        Token ids of each cell, as `eval.cells.read_cells.encode_file` returns them.
    layers
        0: last layer, -1: second-to-last (Geneformer's count and default), ...
    token_budget
        Padded tokens of one forward pass on a GPU. On a CPU each cell is a separate pass of one
        thread, so a cell's bits depend on the cell, the weights and the processor alone.
    bf16
        Compute in bfloat16.
    progress
        Called with ("embedding", cells done, cells in total) after each pass.

    Raises
    ------
    ValueError
        The pooling is unknown, ``cls`` is asked for without ``<cls>`` tokens, or the model does not
        have the layer.
    """
    require_pooling(pooling, vocabulary)
    lengths = np.array([len(t) for t in tokens], dtype=np.int64)
    genes = lengths - (2 if vocabulary.has_cls else 0)
    computed = np.where(genes > 0, lengths, 0)
    done, total = 0, int(np.count_nonzero(computed))
    shape = len(tokens), encoder.config.hidden_size
    out = {layer: np.full(shape, np.nan, dtype=np.float32) for layer in layers}
    top, kind = max(layers), architecture_of(encoder)
    with computing(encoder, top, device, bf16), _watched(encoder, set(layers) - {top}) as seen:

        def embed_pass(batch: np.ndarray, width: int) -> np.ndarray:
            cells = [tokens[i] for i in batch]
            with _inferring(device, bf16):
                hidden, batch_lengths = encode_batch(encoder, cells, vocabulary, width)
                states = {k: kind.finished(encoder, v) for k, v in seen.states.items()}
                for layer, found in (states | {top: hidden}).items():
                    pooled = pool_genes(found, batch_lengths, vocabulary.has_cls, pooling)
                    # A cell that fills unused rows of a pass is written again, the same numbers.
                    out[layer][batch] = pooled.cpu()
            return batch

        passes = _passes(computed, token_budget, device)
        for batch in _side_by_side(embed_pass, passes, device):
            done += len(np.unique(batch))
            if progress:
                progress("embedding", done, total)
    return out


def _side_by_side(
    embed_pass: Callable[[np.ndarray, int], np.ndarray],
    passes: Iterable[tuple[np.ndarray, int]],
    device: str,
) -> Iterator[np.ndarray]:
    """Yield what each pass returns; on a CPU torch's threads compute one pass each."""
    threads = torch.get_num_threads()
    if device != "cpu" or threads == 1:
        yield from itertools.starmap(embed_pass, passes)
        return
    torch.set_num_threads(1)  # new threads have this number too
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield from pool.map(embed_pass, *zip(*passes, strict=True))
    finally:
        torch.set_num_threads(threads)


def _passes(
    lengths: np.ndarray, token_budget: int, device: str
) -> Iterator[tuple[np.ndarray, int]]:
    """Yield (int64 indices of cells, padded length) of passes whose shape no other cell changes.

    Cells of length 0 are left out. On a CPU a pass is one cell. On a GPU all passes of one length
    have the same number of rows; the first cell of a pass fills the unused rows.
    """
    if device == "cpu":
        for cell in np.flatnonzero(lengths):
            yield np.array([cell]), int(lengths[cell])
        return
    widths = -(-lengths // _GPU_LENGTH_MULTIPLE) * _GPU_LENGTH_MULTIPLE
    for width in np.unique(widths[widths > 0]).tolist():
        members = np.flatnonzero(widths == width)
        rows = max(1, token_budget // width)
        for start in range(0, len(members), rows):
            batch = members[start : start + rows]
            yield np.concatenate([batch, np.repeat(batch[:1], rows - len(batch))]), width


class _Seen(threading.local):
    """Layer -> its states, in the thread that computed them."""

    def __init__(self) -> None:
        self.states: dict[int, torch.Tensor] = {}


@contextlib.contextmanager
def _watched(encoder: Encoder, layers: set[int]) -> Iterator[_Seen]:
    """Record the states [B, L, D] that these layers, counted as in `embed_layers`, gave last."""
    seen = _Seen()

    def keeping(layer: int) -> Callable:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            seen.states[layer] = output[0] if isinstance(output, tuple) else output

        return keep

    lowest = layers_of(encoder)
    hooks = [
        lowest[num_layers_up_to(encoder, layer) - 1].register_forward_hook(keeping(layer))
        for layer in layers
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def require_pooling(pooling: str, vocabulary: Vocabulary) -> None:
    """Raise ValueError if the pooling is unknown, or ``cls`` in a vocabulary without ``<cls>``."""
    if pooling not in ("mean", "cls"):
        raise ValueError(f"--pooling {pooling}: must be mean or cls")
    if pooling == "cls" and not vocabulary.has_cls:
        raise ValueError("--pooling cls: this vocabulary has no <cls> token; use mean")


def num_layers_up_to(encoder: Encoder, layer: int) -> int:
    """Return how many layers must be computed for one of them (0: last, -1: second-to-last, ...).

    Raises
    ------
    ValueError
        The model does not have this layer.
    """
    depth = encoder.config.num_hidden_layers
    if not -depth < layer <= 0:
        raise ValueError(f"--layer {layer}: the model has layers 0 (last) to {1 - depth} (first)")
    return depth + layer


@contextlib.contextmanager
def computing(encoder: Encoder, layer: int, device: str, bf16: bool) -> Iterator[None]:
    """Let an encoder compute states on a device, without gradients and dropout.

    No layer above the wanted one is computed. At the end of the ``with`` block the encoder has all
    its layers again.

    Raises
    ------
    ValueError
        As in `num_layers_up_to`.
    """
    layers, number = layers_of(encoder), num_layers_up_to(encoder, layer)
    nn.Module.to(encoder, device=torch.device(device))
    encoder.eval()
    try:
        set_layers(encoder, nn.ModuleList(layers[:number]))
        with _inferring(device, bf16):
            yield
    finally:
        set_layers(encoder, layers)


@contextlib.contextmanager
def _inferring(device: str, bf16: bool) -> Iterator[None]:
    """Compute without gradients, in bfloat16 if asked for: in this thread alone."""
    with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=bf16):
        yield


def encode_batch(
    encoder: Encoder, cells: list[np.ndarray], vocabulary: Vocabulary, width: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (hidden states [B, L, D], lengths int64 [B]) of cells, padded to a common length.

    `width` is that length, limited by the vocabulary's maximum length; by default it is the length
    of the longest cell, rounded up to a multiple of 8.
    """
    longest = max(len(c) for c in cells)
    width = min(width or -(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE, vocabulary.max_length)
    lengths = np.array([len(c) for c in cells], dtype=np.int64)
    real = np.arange(width) < lengths[:, None]
    rows = np.full(real.shape, vocabulary.pad_token, dtype=np.int64)
    rows[real] = np.concatenate(cells)
    mask = None if real.all() else torch.from_numpy(real)
    device = encoder.device
    hidden = encoder(
        input_ids=torch.from_numpy(rows).to(device),
        attention_mask=None if mask is None else mask.to(device),
    ).last_hidden_state
    return hidden, torch.from_numpy(lengths).to(device)
