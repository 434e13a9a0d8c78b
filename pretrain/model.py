"""The masked encoder: Hugging Face's network, its vocabulary head at hidden genes only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from data_prep.vocab import Vocabulary
from pretrain import kernels
from pretrain.cell_objective import cell_losses, mean_of_visible
from pretrain.encoders import (
    Network,
    Places,
    architecture_of,
    encoder_config,
    encoder_of,
    layers_of,
    new_network,
)
from pretrain.model_config import ModelConfig
from pretrain.prior import ArithmeticPrior, Hidden


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
        self._compiled: Callable[..., torch.Tensor] = self._architecture.through_layer
        self._compiled_shapes: set[tuple[int, int]] = set()

    def compile_layers(self, mode: str, shapes: set[tuple[int, int]]) -> None:
        """Compile the layers for training, each shape when it first comes.

        Layers of a kind share a graph, so it costs the same for six as for eighteen. Other shapes,
        and evaluation, run as written.

        Parameters
        ----------
        mode
            Of `torch.compile`.
        shapes
            (B, L) of the micro-batches to compile for.
        """
        # With and without a mask.
        graphs = 2 * self._architecture.graphs_of_layers
        torch._dynamo.config.recompile_limit = graphs * len(shapes)
        self._compiled = torch.compile(self._architecture.through_layer, mode=mode, dynamic=False)
        self._compiled_shapes = shapes

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
    ) -> tuple[torch.Tensor, ...]:
        """Return (float32 [M] cross-entropy in nats, int64 [M] place) of the hidden genes.

        With what `pretrain.cell_objective.CellTargets` holds, also float32 [B], the losses of
        cells, 0 where nothing is asked; the last layer then computes all places.

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
        """
        hidden = Hidden(input_ids, attention_mask, masked_places, labels, folds_B)
        if self._compiled_shapes:
            # Where CUDA graphs replay: what the pass before has left may be written over.
            torch.compiler.cudagraph_mark_step_begin()
        encoder, kind = encoder_of(self.bert), self._architecture
        hidden_BLD = encoder.embeddings(input_ids=input_ids)
        layers = layers_of(encoder)
        rotations = kind.rotations(encoder, input_ids.shape[1], input_ids.device)
        for layer, rotation in zip(layers[:-1], rotations, strict=False):
            hidden_BLD = self._layer(layer, hidden_BLD, Places(None, attention_mask, rotation))
        if visible_BL is None:
            asked_BQ, slots_M = asked_places(masked_places, labels, *input_ids.shape)
            asked = Places(asked_BQ, attention_mask, rotations[-1])
            asked_BQD = self._layer(layers[-1], hidden_BLD, asked)
            states_MD = kind.finished(encoder, asked_BQD.flatten(0, 1)[slots_M])
            return self._score(kind.logits(self.bert, states_MD), hidden)
        assert rows_H is not None and genes_H is not None
        everywhere = Places(None, attention_mask, rotations[-1])
        states_BLD = kind.finished(encoder, self._layer(layers[-1], hidden_BLD, everywhere))
        logits_BV = kind.logits(self.bert, mean_of_visible(states_BLD, visible_BL))
        of_cells = cell_losses(logits_BV, rows_H, genes_H)
        if len(labels) == 0:
            return of_cells.new_zeros(0), labels, of_cells
        logits_MV = kind.logits(self.bert, states_BLD.flatten(0, 1)[masked_places])
        return *self._score(logits_MV, hidden), of_cells

    def _score(self, logits_MV: torch.Tensor, hidden: Hidden) -> tuple[torch.Tensor, ...]:
        if self._prior:
            logits_MV = self._prior.added_to(logits_MV, hidden)
        return _score(logits_MV, hidden.labels)

    def _layer(self, layer: Any, hidden_BLD: torch.Tensor, places: Places) -> torch.Tensor:
        arguments = layer, hidden_BLD, places
        if not self.training:
            return self._architecture.through_layer(*arguments)
        is_compiled = tuple(hidden_BLD.shape[:2]) in self._compiled_shapes
        through_layer = self._compiled if is_compiled else self._architecture.through_layer
        if self._checkpointing:
            return checkpoint(through_layer, *arguments, use_reentrant=False)  # type: ignore
        return through_layer(*arguments)


def _score(logits_MV: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return float32 [M] losses and int64 [M] places of labels among all guesses."""
    if logits_MV.device.type == "cpu":
        return _ScoredLabels.apply(logits_MV, labels)  # type: ignore[return-value]
    # Cross-entropy in float32: in bfloat16 a loss of 6 is quantised to 1/64.
    logits_MV = logits_MV.float()
    # Before the loss: what is counted in is freed again when the loss needs its memory.
    places_M = guess_places(logits_MV.detach(), labels)
    return functional.cross_entropy(logits_MV, labels, reduction="none"), places_M


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


class _ScoredLabels(torch.autograd.Function):
    """Cross-entropy and place of each label on a CPU, in two passes over the logits.

    The logits are used up in backward.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_MV: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        losses, log_sums = torch.empty(len(labels)), torch.empty(len(labels))
        places = torch.empty(len(labels), dtype=torch.int64)
        logits_MV = logits_MV.detach()
        kernels.score_labels(
            kernels.numbers(logits_MV), labels.numpy(), losses.numpy(), places.numpy(),
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
        kernels.slopes_of_logits(
            kernels.numbers(logits_MV), labels.numpy(), log_sums.numpy(),
            slopes.float().contiguous().numpy(),
        )  # fmt: skip
        return logits_MV, None


def guess_places(logits_MV: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return int64 [M]: how many genes have a higher logit than the label; V where it is -100.

    Among T equal logits the label gets one of their T places, by its token modulo T. In bfloat16
    ties are the rule: counted from the best place, a model that has learnt nothing has a top-1 of
    100 %. A logit that is NaN gives V.
    """
    own_M1 = logits_MV.gather(1, labels.clamp(min=0)[:, None])
    counted_MV = torch.empty_like(logits_MV)
    # On a CPU the sum of floats takes a quarter of the time of a sum of booleans.
    below_M = torch.lt(logits_MV, own_M1, out=counted_MV).sum(dim=-1).long()
    not_above_M = torch.le(logits_MV, own_M1, out=counted_MV).sum(dim=-1).long()
    tied_M = (not_above_M - below_M).clamp(min=1)
    size = logits_MV.shape[1]
    return torch.where(labels < 0, size, size - not_above_M + labels % tied_M)


def build_model(
    config: ModelConfig, vocabulary: Vocabulary, seed: int, prior: ArithmeticPrior | None = None
) -> MaskedGeneModel:
    """Return a freshly initialised model; the same weights for the same seed."""
    torch.manual_seed(seed)
    bert = new_network(encoder_config(config, vocabulary))
    return MaskedGeneModel(bert, config.activation_checkpointing, prior)
