"""The masked encoder: Hugging Face's network, its vocabulary head at hidden genes only."""

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
    """Predicts hidden genes.

    Hugging Face's modules in an order of our own: the last layer is asked at hidden genes alone,
    unless the cell objective needs all states.

    Shapes: B cells, L places, D width, M hidden genes of the micro-batch, Q hidden genes of a cell
    at most, V vocabulary.

    Parameters
    ----------
    prior
        What is added to the logits of single hidden genes before their loss; None: nothing.
    """

    def __init__(
        self,
        bert: Network,
        activation_checkpointing: bool = False,
        prior: ArithmeticPrior | None = None,
    ) -> None:
        super().__init__()
        # The name is part of all names in checkpoints, whatever the architecture.
        self.bert = bert
        self._architecture = architecture_of(bert)
        self._checkpointing = activation_checkpointing
        self._prior = prior
        self._compiled: Callable[..., torch.Tensor] | None = None
        # (B, L) of rows that are compiled; None: packed cells of any number.
        self._compiled_shapes: set[tuple[int, int]] | None = set()
        self._has_graphs = False

    def compile_layers(self, mode: str, shapes: set[tuple[int, int]] | None) -> None:
        """Compile the layers for training, each shape when it first comes.

        Layers of a kind share a graph, so it costs the same for six as for eighteen. Other shapes,
        and evaluation, run as written.

        Parameters
        ----------
        mode
            Of `torch.compile`.
        shapes
            (B, L) of the micro-batches to compile for; None: packed cells, whose graphs hold for
            any number of places.
        """
        # Of rows one with and one without a mask.
        number = 1 if shapes is None else 2 * len(shapes)
        torch._dynamo.config.recompile_limit = self._architecture.graphs_of_layers * number
        self._compiled = torch.compile(
            self._architecture.through_layer, mode=mode, dynamic=shapes is None
        )
        self._compiled_shapes, self._has_graphs = shapes, mode == "reduce-overhead"

    @contextmanager
    def without_graphs(self) -> Iterator[None]:
        """Run layers as written, if they are compiled to CUDA graphs, inside a ``with`` block."""
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
        """Return (float32 [M] cross-entropy in nats, int64 [M] place) of the hidden genes.

        With what `pretrain.objective.cell_objective.CellTargets` holds, also float32 [B], the
        losses of cells, 0 where nothing is asked; the last layer then computes all places.

        The place is that of the hidden gene among all guesses, 0 = the first. Where the label is
        -100 the loss is 0 and the place V: no gene's.

        The head runs on M rows instead of B x L: at width 256 that is 51 instead of 84 MFLOP a
        token, and 45 with the last layer. M may be 0; the losses' sum is then an attached zero.

        Parameters
        ----------
        attention_mask
            bool [B, L], True at the first places of each row; None: nothing is padded.
        masked_places
            int64 [M], flat index into B x L; ascending where labels are not negative, and those
            come first. On a GPU no cell may have more than M / B of them: not checked.
        folds_B
            int64 [B], read by the prior: which of its tables was not counted on the cell; None: on
            none of the cells.
        packing
            Fields of a `Packing`: the cells stand end to end, `input_ids` are int32 [T] and there
            is no mask. Everything else is as it is in rows of L places, without filler in M.
        """
        cells = Packing(*packing) if packing else None
        if self._has_graphs:
            # Where CUDA graphs replay: what the pass before has left may be written over.
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
        # Sizes of 1 would make graphs of their own.
        sizes = [x.shape[1] for x in (hidden_BLD, places.asked_BQ) if x is not None]
        return places.cells is not None and min(sizes) > 1


def asked_places(
    masked_places: torch.Tensor, labels: torch.Tensor, num_cells: int, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return hidden genes cell by cell: int64 [B, Q] places, and int64 [M] where each is in them.

    Q is M / B, so that shapes depend on the bucket alone (on a CPU more, if a cell has more). Cells
    with fewer ask at their first place too, and nobody looks at the answers.
    """
    # Behind the last hidden gene: of a row that does not exist.
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
    """Return a freshly initialised model; the same weights for the same seed."""
    torch.manual_seed(seed)
    bert = new_network(encoder_config(config, vocabulary))
    return MaskedGeneModel(bert, config.activation_checkpointing, prior)
