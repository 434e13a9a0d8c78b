"""What a model and its random twin make of cells: embeddings, and classifiers trained on them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.genes.vocabulary import Vocabulary
from eval.benchmark.material.gene_features import embed_genes, input_embeddings
from eval.benchmark.material.models_and_cells import Model, TaskCells
from eval.benchmark.material.once import Once
from eval.benchmark.scoring.gene_scores import mean_by_gene
from eval.benchmark.task_file import Size
from eval.finetune.classifier import Classifier, FinetuneSettings, Head, Target
from eval.finetune.results import training_record
from eval.finetune.training import finetune
from eval.scores.splits import validation_cells
from pretrain.cell_states.cell_state import CellState
from pretrain.cell_states.frozen_states import embed_cells
from pretrain.export.model_folder import random_twin
from pretrain.model import architectures
from pretrain.model.architectures import Encoder
from pretrain.ranks.dist import Ranks

logger = logging.getLogger(__name__)

HEAD_NAME = "label"
_GENE_HEAD = "genes"
# Epochs without a better validation loss; with so few epochs in all there is nothing to stop early,
# and all training cells are used for training. So they are where too few are left to stop by.
_PATIENCE = 2


@contextmanager
def kept_threads() -> Iterator[None]:
    """Give torch its number of threads back at the end.

    Numba, which scanpy and UMAP use, sets OpenMP's for the whole process when it starts: with
    OMP_NUM_THREADS=1 torch had two afterwards, and waited for the second on a busy machine.
    """
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def encoder_of(model: Model, twin_seed: int | None) -> Encoder:
    """Return the pretrained encoder (`twin_seed` None), or one of random weights."""
    network = model.network if twin_seed is None else random_twin(model.network, twin_seed)
    return architectures.encoder_of(network)


class Embeddings:
    """Mean gene states of cells, each computed once for each encoder."""

    def __init__(
        self, tokens: dict[str, list[np.ndarray]], layer: int, device: str, bf16: bool
    ) -> None:
        """Take model name -> token ids of every cell; `layer` as `embed_cells` has it."""
        self._tokens, self._layer = tokens, layer
        self._device, self._bf16 = device, bf16
        self._once = Once()

    def of(
        self, model: Model, twin_seed: int | None, cells: np.ndarray, of_fold: np.ndarray
    ) -> np.ndarray:
        """Return float32 [cells, width] of chosen cells (int positions).

        The pretrained encoder embeds all cells at once: folds share them, and no number depends on
        what was asked for first. A twin belongs to one fold and embeds that fold's cells
        (`of_fold`, sorted).
        """
        every = np.arange(len(self._tokens[model.name])) if twin_seed is None else of_fold
        wanted, states = self._once.get(
            model.name,
            twin_seed,
            lambda: (every, self.embed(encoder_of(model, twin_seed), model, every)),
        )
        place = np.searchsorted(wanted, cells)
        assert np.array_equal(wanted[np.minimum(place, len(wanted) - 1)], cells), "other cells"
        return states[place]

    def embed(self, encoder: Encoder, model: Model, cells: np.ndarray) -> np.ndarray:
        """Return float32 [cells, width] by an encoder of this model's vocabulary; not kept."""
        tokens = [self._tokens[model.name][i] for i in cells]
        return embed_cells(
            tokens, encoder, model.vocabulary,
            layer=max(self._layer, 1 - encoder.config.num_hidden_layers),
            device=self._device, bf16=self._bf16,
        )  # fmt: skip


def mean_of_inputs(
    encoder: Encoder, model: Model, tokens: list[np.ndarray], cells: np.ndarray
) -> np.ndarray:
    """Return float32 [cells, width]: the mean input embedding of a cell's genes, no layer above."""
    table = architectures.input_table(encoder).detach().cpu().numpy()
    first = model.vocabulary.first_gene_token
    return np.stack([table[tokens[i][tokens[i] >= first]].mean(axis=0) for i in cells])


def features_of_model(
    kind: str, model: Model, twin_seed: int | None, cells: TaskCells, settings: FinetuneSettings
) -> np.ndarray:
    """Return float32 [num_tokens, width] of a model (`twin_seed` None) or its twin.

    ``frozen embedding``: mean states of the last layer over the cells, NaN for tokens in none;
    ``input embeddings``: the embedding table; ``loadings``: of the SVD of its training cells.
    """
    if kind == "loadings":
        assert model.svd
        return model.svd.components
    encoder = encoder_of(model, twin_seed)
    if kind == "input embeddings":
        return input_embeddings(encoder)
    tokens, budget = cells.tokens[model.name], settings.token_budget
    return embed_genes(tokens, encoder, model.vocabulary, budget, settings.device, settings.bf16)


def settings_of(size: Size, device: str, bf16: bool) -> FinetuneSettings:
    """Return how a suite's size fine-tunes."""
    return FinetuneSettings(
        epochs=size.epochs,
        steps=size.steps,
        start=size.start,
        learning_rate=size.learning_rate,
        head_learning_rate=size.head_learning_rate,
        batch_cells=size.batch_cells,
        freeze_layers=size.freeze_layers,
        device=device,
        bf16=bf16,
        patience=_PATIENCE if size.epochs > _PATIENCE else 0,
    )


def train(
    encoder: Encoder,
    model: Model,
    tokens: list[np.ndarray],
    labels: np.ndarray,
    groups: np.ndarray | None,
    cells: np.ndarray,
    classes: list[str],
    settings: FinetuneSettings,
    seed: int,
    search_trials: int = 0,
    state: CellState | None = None,
) -> Classifier:
    """Return a classifier with the head `HEAD_NAME`, trained on `cells` and on nothing else.

    Cells for early stopping, and those that settings are chosen by, are taken from `cells`.

    Parameters
    ----------
    tokens, labels, groups
        Of all cells; labels int64 [cells], groups str [cells] or None.
    cells
        int positions of the training cells.
    search_trials
        Trials of the search for settings, starting from `settings`; 0: none.
    state
        As in `eval.finetune.training.finetune`.
    """
    target = Target(Head(HEAD_NAME, "cells", tuple(classes)), labels.astype(np.int64), groups)

    def examples(chosen: np.ndarray) -> tuple[list[np.ndarray], list[Target]]:
        return [tokens[i] for i in chosen], [target.of_cells(chosen)]

    divided = None
    if settings.patience:
        try:
            divided = validation_cells(cells, labels, groups, seed)
        except ValueError as few:
            logger.info("no early stopping: %s", few)
            settings = replace(settings, patience=0)
    if search_trials:
        from eval.finetune.search import search

        known = groups[cells] if groups is not None else None
        found, targets = examples(cells)
        settings = search(
            encoder, model.vocabulary, found, targets, settings, seed, search_trials, known, None,
            state=state,
        )  # fmt: skip
    fit, held = (cells, None) if divided is None else divided
    return finetune(
        encoder, model.vocabulary, *examples(fit), settings, seed,
        validation=None if held is None else examples(held), state=state,
    )  # fmt: skip


@dataclass(frozen=True)
class TunedGenes:
    """What a fine-tuned model says of test genes.

    Attributes
    ----------
    probability
        float64 [test genes]: mean over a gene's occurrences of the probability of the second class.
    gene, by_occurrence
        int [occurrences], position of the test gene; float [occurrences], its probability there.
    freeze_layers
        Layers that were not trained.
    training
        Its record (`eval.finetune.results.training_record`).
    """

    probability: np.ndarray
    gene: np.ndarray
    by_occurrence: np.ndarray
    freeze_layers: int
    training: dict[str, Any]


@dataclass(frozen=True)
class GeneTraining:
    """How an encoder is trained on genes.

    Attributes
    ----------
    settings
        A model of few layers keeps one to train, whatever `freeze_layers` says.
    folder, ranks
        As in `eval.finetune.training.finetune`.
    """

    settings: FinetuneSettings
    seed: int
    folder: Path | None = None
    ranks: Ranks | None = None

    def run(
        self,
        encoder: Encoder,
        vocabulary: Vocabulary,
        cells: list[np.ndarray],
        genes: tuple[np.ndarray, np.ndarray],
        head: Head,
    ) -> Classifier:
        """Return a classifier of genes, int64 tokens and labels, trained in cells' token ids."""
        depth = encoder.config.num_hidden_layers
        frozen = min(self.settings.freeze_layers, depth - 1)
        targets = np.full(vocabulary.num_tokens, -1, dtype=np.int64)
        targets[genes[0]] = genes[1]
        return finetune(
            encoder, vocabulary, cells, [Target(head, targets)],
            replace(self.settings, freeze_layers=frozen), self.seed,
            folder=self.folder, ranks=self.ranks,
        )  # fmt: skip


def tune_on_genes(
    encoder: Encoder,
    model: Model,
    cells: list[np.ndarray],
    train: tuple[np.ndarray, np.ndarray],
    test: np.ndarray,
    classes: tuple[str, str],
    training: GeneTraining,
) -> TunedGenes:
    """Return predictions of test genes by an encoder that is trained on the training genes.

    Parameters
    ----------
    cells
        Token ids of every cell.
    train
        int64 [training genes], their tokens and their labels.
    test
        int64 [test genes], their tokens.
    training
        How the encoder is trained.
    """
    head = Head(_GENE_HEAD, "genes", classes)
    classifier = training.run(encoder, model.vocabulary, cells, train, head)
    num_tokens = model.vocabulary.num_tokens
    wanted = np.zeros(num_tokens, dtype=bool)
    wanted[test] = True
    predictions = classifier.predict_genes(cells, _GENE_HEAD, wanted)
    place = np.full(num_tokens, -1)
    place[test] = np.arange(len(test))
    gene, by_occurrence = place[predictions.token], predictions.probabilities[:, 1]
    probability = mean_by_gene(gene, by_occurrence, len(test))
    frozen = classifier.settings.freeze_layers
    return TunedGenes(probability, gene, by_occurrence, frozen, training_record(classifier))
