"""The masked encoder: a Hugging Face network whose vocabulary head runs at hidden genes only.

`build_model` makes a `MaskedGeneModel` with random weights; its forward pass returns losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from data_prep.genes.vocabulary import Vocabulary
from pretrain.counting.arithmetic_prior import ArithmeticPrior, Hidden
from pretrain.model.architectures import (
    Network,
    Places,
    architecture_of,
    at_places,
    encoder_config,
    encoder_of,
    layers_of,
    new_network,
)
from pretrain.model.head_scores import score
from pretrain.model.packing import Packing, picked
from pretrain.objective.cell_objective import cell_losses, mean_of_visible
from pretrain.settings.model_settings import ModelConfig


class MaskedGeneModel(nn.Module):
    """A masked encoder that predicts hidden genes.

    It calls the modules of Hugging Face in its own order: the last layer computes the hidden genes
    alone, unless the cell objective needs the states of all positions.

    Shapes: B cells, L positions, D width, M hidden genes of the micro-batch, Q the largest number
    of hidden genes of a cell, V vocabulary.

    Parameters
    ----------
    prior
        The arithmetic prior that is added to the logits of single hidden genes before the loss;
        None: nothing is added.
    """

    def __init__(
        self,
        bert: Network,
        activation_checkpointing: bool = False,
        prior: ArithmeticPrior | None = None,
    ) -> None:
        super().__init__()
        # All parameter names in checkpoints begin with this name, whatever the architecture.
        self.bert = bert
        self._architecture = architecture_of(bert)
        self._checkpointing = activation_checkpointing
        self._prior = prior
        self._compiled: Callable[..., torch.Tensor] | None = None
        # The (B, L) of the padded micro-batches that are compiled; None: packed cells of any
        # number.
        self._compiled_shapes: set[tuple[int, int]] | None = set()
        self._has_graphs = False

    def compile_layers(self, mode: str, shapes: set[tuple[int, int]] | None) -> None:
        """Compile the layers for training; each shape is compiled when it first occurs.

        Layers of the same kind share a graph, so compiling costs the same for six layers as for
        eighteen. Other shapes, and evaluation, run without compilation.

        Parameters
        ----------
        mode
            The mode of `torch.compile`.
        shapes
            The (B, L) of the micro-batches to compile for; None: packed cells, whose graphs are
            valid for any number of tokens.
        """
        # Padded rows need two graphs per shape: one with an attention mask and one without.
        number = 1 if shapes is None else 2 * len(shapes)
        torch._dynamo.config.recompile_limit = self._architecture.graphs_of_layers * number
        self._compiled = torch.compile(
            self._architecture.through_layer, mode=mode, dynamic=shapes is None
        )
        self._compiled_shapes, self._has_graphs = shapes, mode == "reduce-overhead"

    @contextmanager
    def without_graphs(self) -> Iterator[None]:
        """Run layers that use CUDA graphs without compilation inside a ``with`` block."""
        compiled = self._compiled
        if self._has_graphs:
            self._compiled = None
        try:
            yield
        finally:
            self._compiled = compiled

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        masked_places: torch.Tensor,
        labels: torch.Tensor,
        visible_BL: torch.Tensor | None = None,
        rows_H: torch.Tensor | None = None,
        genes_H: torch.Tensor | None = None,
        folds_B: torch.Tensor | None = None,
        packing: tuple | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Return (float32 [M] cross-entropy in nats, int64 [M] guess number) of the hidden genes.

        With the fields of `pretrain.objective.cell_objective.CellTargets`, a third tensor follows:
        the losses of cells, float32 [B], 0 for cells without hidden genes. The last layer then
        computes all positions.

        The guess number is the place of the hidden gene among all guesses of the model, 0 = the
        first. Where the label is -100, the loss is 0 and the guess number is V, which no gene has.

        The head runs on M rows instead of B x L: at width 256 that is 51 instead of 84 MFLOP a
        token, and 45 with the last layer. M may be 0; the sum of the losses is then a zero that is
        attached to the graph.

        Parameters
        ----------
        attention_mask
            bool [B, L], True at the first positions of each row; None: nothing is padded.
        masked_places
            int64 [M], flat index into B x L. Entries with a label come first and are ascending. On
            a GPU no cell may have more than M / B of them, which is not checked.
        folds_B
            int64 [B], read by the prior: the number of the table that was not counted on this cell;
            None: no table was counted on these cells.
        packing
            The fields of a `Packing`: the cells stand one after another, `input_ids` are int32 [T]
            and there is no attention mask. All other arguments are as for padded rows of L
            positions, but the M hidden genes have no filler entries.
        """
        cells = Packing(*packing) if packing else None
        if self._has_graphs:
            # CUDA graphs are replayed here, and may overwrite the tensors of the previous pass.
            torch.compiler.cudagraph_mark_step_begin()
        encoder, kind = encoder_of(self.bert), self._architecture
        hidden_BLD = kind.embedded(encoder, input_ids, cells)
        layers = layers_of(encoder)
        length = input_ids.shape[1] if cells is None else cells.length
        rotations = kind.rotations(encoder, length, input_ids.device)
        hidden = Hidden(input_ids, attention_mask, masked_places, labels, folds_B)
        if cells is not None:
            rotations = at_places(rotations, cells.padded_T % length)
            if self._prior:
                hidden = hidden._replace(
                    input_ids=cells.rows(input_ids), attention_mask=cells.real()
                )
        everywhere = [Places(None, attention_mask, r, cells) for r in rotations]
        for layer, places in zip(layers[:-1], everywhere, strict=False):
            hidden_BLD = self._layer(layer, hidden_BLD, places)
        if visible_BL is None:
            if cells is None:
                asked_BQ, slots_M = asked_places(masked_places, labels, *input_ids.shape)
            else:
                asked_BQ, slots_M = cells.asked_A[None], cells.slots_M
            asked = everywhere[-1]._replace(asked_BQ=asked_BQ)
            asked_BQD = self._layer(layers[-1], hidden_BLD, asked)
            states_MD = kind.finished(
                encoder, picked(asked_BQD.flatten(0, 1), slots_M, cells is not None)
            )
            return self._score(kind.logits(self.bert, states_MD), hidden)
        assert rows_H is not None and genes_H is not None
        states_BLD = kind.finished(encoder, self._layer(layers[-1], hidden_BLD, everywhere[-1]))
        places_M = masked_places if cells is None else cells.places_M
        rows_BLD = states_BLD if cells is None else cells.rows(states_BLD.squeeze(0))
        logits_BV = kind.logits(self.bert, mean_of_visible(rows_BLD, visible_BL))
        of_cells = cell_losses(logits_BV, rows_H, genes_H)
        if len(labels) == 0:
            return of_cells.new_zeros(0), labels, of_cells
        logits_MV = kind.logits(
            self.bert, picked(states_BLD.flatten(0, 1), places_M, cells is not None)
        )
        return *self._score(logits_MV, hidden), of_cells

    def _score(self, logits_MV: torch.Tensor, hidden: Hidden) -> tuple[torch.Tensor, ...]:
        if self._prior is None:
            return score(logits_MV, hidden.labels)
        if logits_MV.device.type == "cpu":
            return score(self._prior.added_to(logits_MV, hidden), hidden.labels)
        return score(logits_MV, hidden.labels, self._prior.on_device(hidden))

    def _layer(self, layer: Any, hidden_BLD: torch.Tensor, places: Places) -> torch.Tensor:
        arguments = layer, hidden_BLD, places
        through_layer = self._architecture.through_layer
        if not self.training:
            return through_layer(*arguments)
        if self._compiled and self._is_compiled(hidden_BLD, places):
            through_layer = self._compiled
        if self._checkpointing:
            return checkpoint(through_layer, *arguments, use_reentrant=False)  # type: ignore
        return through_layer(*arguments)

    def _is_compiled(self, hidden_BLD: torch.Tensor, places: Places) -> bool:
        if self._compiled_shapes is not None:
            return tuple(hidden_BLD.shape[:2]) in self._compiled_shapes
        # A size of 1 would need a graph of its own.
        sizes = [x.shape[1] for x in (hidden_BLD, places.asked_BQ) if x is not None]
        return places.cells is not None and min(sizes) > 1


def asked_places(
    masked_places: torch.Tensor, labels: torch.Tensor, num_cells: int, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the hidden genes cell by cell: int64 [B, Q] positions, and int64 [M] index into them.

    Q is M / B, so that shapes depend on the bucket alone; on a CPU it is larger if a cell has more
    hidden genes. Cells with fewer hidden genes are filled up with their first position, whose
    results nobody reads.
    """
    # Entries behind the last hidden gene are assigned to a row that does not exist.
    rows_M = torch.where(labels >= 0, masked_places // length, num_cells)
    starts = torch.searchsorted(rows_M, torch.arange(num_cells + 1, device=rows_M.device))
    within_M = torch.arange(len(rows_M), device=rows_M.device) - starts[rows_M]
    most = -(-len(rows_M) // num_cells)
    if rows_M.device.type == "cpu":
        most = max(most, int((starts[1:] - starts[:-1]).max()))
    size = num_cells * most
    slots_M = torch.where(labels >= 0, rows_M * most + within_M, size)
    asked = torch.arange(0, num_cells * length, length, device=rows_M.device)
    asked = torch.cat([asked.repeat_interleave(most), asked[:1]])
    asked = asked.index_put((slots_M,), masked_places)[:size]
    return asked.view(num_cells, most), slots_M.clamp(max=max(size - 1, 0))


def build_model(
    config: ModelConfig, vocabulary: Vocabulary, seed: int, prior: ArithmeticPrior | None = None
) -> MaskedGeneModel:
    """Return a model with random weights, which are the same for the same seed."""
    torch.manual_seed(seed)
    bert = new_network(encoder_config(config, vocabulary))
    return MaskedGeneModel(bert, config.activation_checkpointing, prior)
