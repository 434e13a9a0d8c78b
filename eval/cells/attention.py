"""Sum attention over cells: how much each gene receives in each head, and from which gene.

`mean_attention` runs the cells through the encoder. Sums are added up layer by layer while a batch
is computed. The attention weights of a layer are not kept after its batch, so the memory depends on
the number of genes and not on the number of cells.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from data_prep.genes.vocabulary import Vocabulary
from pretrain.cell_states.frozen_states import computing, encode_batch, length_batches
from pretrain.model.architectures import Encoder, architecture_of, layers_of

# The weights of a layer have the size batch x heads x length x length.
_TOKEN_BUDGET = 4_096
_MOST_PAIR_BYTES = 4 * 1024**3


@dataclass(frozen=True)
class Attention:
    """Mean attention over the cells that have a gene, or both genes of a pair.

    A weight is relative to the mean weight in its cell: it is multiplied by the number of the
    cell's tokens. Thus every token gets 1 under uniform attention, and cells of all lengths count
    the same.

    Attributes
    ----------
    received
        float64 [groups, layers, heads, genes]: mean over cells of the attention that the gene
        receives, which is itself a mean over the attending genes of the cell. NaN without a cell.
    cells
        int64 [groups, genes]: number of cells with the gene among their tokens.
    pairs
        float64 [layers, heads, attending genes, attended genes], NaN without a cell; None if not
        asked for.
    pair_cells
        int64 [genes, genes]: number of cells with both genes.
    """

    received: np.ndarray
    cells: np.ndarray
    pairs: np.ndarray | None = None
    pair_cells: np.ndarray | None = None

    def over_groups(self) -> np.ndarray:
        """Return float64 [layers, heads, genes]: the mean over all cells of all groups."""
        total = np.nansum(self.received * self.cells[:, None, None], axis=0)
        return _means(total, self.cells.sum(axis=0))


def mean_attention(
    cells: list[np.ndarray],
    encoder: Encoder,
    vocabulary: Vocabulary,
    genes: np.ndarray,
    groups: np.ndarray | None = None,
    with_pairs: bool = False,
    token_budget: int = _TOKEN_BUDGET,
    device: str = "cpu",
    bf16: bool = False,
) -> Attention:
    """Return the attention that genes receive, averaged over cells.

    Parameters
    ----------
    cells
        Token ids of each cell, including special tokens.
    genes
        int [genes], tokens, each once.
    groups
        int [cells], group numbers 0, 1, ..., e.g. for means by donor; None: one group.
    with_pairs
        Also compute every pair of the genes, which needs layers x heads x genes x genes sums.
    token_budget
        Padded tokens of one forward pass.

    Raises
    ------
    ValueError
        No gene is among the tokens of a cell, or memory is too small for the pairs.
    """
    config = encoder.config
    heads = (config.num_hidden_layers, config.num_attention_heads)
    require_detected(cells, genes)
    if with_pairs and 8 * heads[0] * heads[1] * len(genes) ** 2 > _MOST_PAIR_BYTES:
        most = int((_MOST_PAIR_BYTES / (8 * heads[0] * heads[1])) ** 0.5)
        raise ValueError(f"{len(genes):,} genes: their pairs are too many; give {most:,} at most")
    if groups is None:
        groups = np.zeros(len(cells), dtype=np.int64)
    sums = _Sums(heads, len(genes), int(groups.max()) + 1, with_pairs, device)
    gene_of_token = torch.full((vocabulary.num_tokens,), -1)
    gene_of_token[torch.from_numpy(np.asarray(genes, np.int64))] = torch.arange(len(genes))
    lengths = np.array([len(c) for c in cells], dtype=np.int64)
    with _seen(encoder, sums.add), computing(encoder, 0, device, bf16):
        for batch in length_batches(lengths, token_budget):
            chosen = [cells[i] for i in batch]
            sums.place(chosen, groups[batch], gene_of_token, vocabulary)
            encode_batch(encoder, chosen, vocabulary)
    return sums.means()


def require_detected(cells: list[np.ndarray], genes: np.ndarray) -> None:
    """Raise ValueError if none of these tokens occurs in a cell."""
    if not any(np.isin(genes, c).any() for c in cells):
        raise ValueError(
            f"none of the {len(genes):,} genes is among the tokens of any of {len(cells):,} cells; "
            "give other genes, or cells that express them"
        )


@dataclass
class _Sums:
    """Running sums, and the positions of the genes in the cells of the current batch."""

    heads: tuple[int, int]
    num_genes: int
    num_groups: int
    with_pairs: bool
    device: str
    scale_B: torch.Tensor = field(init=False)
    attends_BL: torch.Tensor = field(init=False)
    wanted_BL: torch.Tensor = field(init=False)
    row_M: torch.Tensor = field(init=False)
    in_cell: list[tuple[torch.Tensor, torch.Tensor, int]] = field(init=False)

    def __post_init__(self) -> None:
        layers, heads = self.heads
        rows = self.num_groups * self.num_genes
        options = {"dtype": torch.float64, "device": self.device}
        self.received = torch.zeros(layers, rows, heads, **options)
        self.cells = torch.zeros(rows, **options)
        size = self.num_genes if self.with_pairs else 0
        self.pairs = torch.zeros(layers, heads, size, size, **options)
        self.pair_cells = torch.zeros(size, size, **options)

    def place(
        self,
        cells: list[np.ndarray],
        groups: np.ndarray,
        gene_of_token: torch.Tensor,
        vocabulary: Vocabulary,
    ) -> None:
        """Store the cells of the next forward pass, in its order."""
        width = max(len(c) for c in cells)
        tokens = torch.full((len(cells), width), vocabulary.pad_token)
        for row, cell in enumerate(cells):
            tokens[row, : len(cell)] = torch.from_numpy(cell.astype(np.int64))
        gene_BL = gene_of_token[tokens]
        self.attends_BL = (tokens >= vocabulary.first_gene_token).float().to(self.device)
        lengths_B = torch.tensor([len(c) for c in cells], device=self.device)
        self.scale_B = lengths_B / self.attends_BL.sum(dim=1).clamp(min=1)
        self.wanted_BL = (gene_BL >= 0).to(self.device)
        group_BL = torch.from_numpy(groups)[:, None].expand_as(gene_BL)
        self.row_M = (group_BL * self.num_genes + gene_BL)[gene_BL >= 0].to(self.device)
        self.cells.index_add_(0, self.row_M, torch.ones_like(self.row_M, dtype=torch.float64))
        self.in_cell = []
        for row, cell in enumerate(cells) if self.with_pairs else ():
            places = torch.nonzero(gene_BL[row] >= 0)[:, 0]
            genes = gene_BL[row, places].to(self.device)
            self.pair_cells[genes[:, None], genes] += 1
            self.in_cell.append((places.to(self.device), genes, len(cell)))

    def add(self, layer: int, weights_BHLL: torch.Tensor) -> None:
        """Add the attention of a layer in the current batch; padding is beyond `place`'s width."""
        width = self.attends_BL.shape[1]
        weights_BHLL = weights_BHLL.float()
        # A matrix product is used, and the weights are not sliced before it, so they are not
        # copied.
        attends_BL = nn.functional.pad(self.attends_BL, (0, weights_BHLL.shape[-1] - width))
        received_BHL = (attends_BL[:, None, None] @ weights_BHLL)[:, :, 0, :width]
        received_BLH = (received_BHL * self.scale_B[:, None, None]).transpose(1, 2)
        self.received[layer].index_add_(0, self.row_M, received_BLH[self.wanted_BL].double())
        for row, (places, genes, length) in enumerate(self.in_cell):
            found_HGG = weights_BHLL[row][:, places[:, None], places].double() * length
            self.pairs[layer][:, genes[:, None], genes] += found_HGG

    def means(self) -> Attention:
        layers, heads = self.heads
        cells = self.cells.reshape(self.num_groups, self.num_genes).cpu().numpy().astype(np.int64)
        shape = (layers, self.num_groups, self.num_genes, heads)
        received = self.received.reshape(shape).permute(1, 0, 3, 2).cpu().numpy()
        means = _means(received, cells[:, None, None])
        if not self.with_pairs:
            return Attention(means, cells)
        pair_cells = self.pair_cells.cpu().numpy().astype(np.int64)
        return Attention(means, cells, _means(self.pairs.cpu().numpy(), pair_cells), pair_cells)


def _means(sums: np.ndarray, cells: np.ndarray) -> np.ndarray:
    cells = np.broadcast_to(cells, sums.shape)
    return np.divide(sums, cells, out=np.full(sums.shape, np.nan), where=cells > 0)


@contextlib.contextmanager
def _seen(encoder: Encoder, add: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """Call `add` with (layer, weights) of every computed layer inside a ``with`` block.

    Fused kernels do not return attention weights, so attention is computed step by step inside the
    block.
    """
    before = encoder.config._attn_implementation
    assert before is not None

    kind = architecture_of(encoder)

    def shown(number: int) -> Callable:
        return lambda module, inputs, output: add(number, output[1])

    hooks = [
        kind.attention_of(layer).register_forward_hook(shown(number))
        for number, layer in enumerate(layers_of(encoder))
    ]
    try:
        encoder.set_attn_implementation("eager")
        yield
    finally:
        encoder.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()
