"""Compute what a perturbation does to a cell: encode its copies and compare them with the original.

`CopyEngine.perturb` does this for one cell and all its gene sets. The copies in a batch have
the same length, so there is no padding and no mask. Layers above those that are read, and the
vocabulary head, are not computed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from data_prep.genes.vocabulary import CLS, EOS, Vocabulary
from eval.finetune.classifier import Classifier, Head
from eval.options import choose_device
from eval.perturb.screen.edits import (
    Copies,
    Edit,
    GeneSets,
    applicable,
    copies_of,
    places_in,
)
from eval.perturb.screen.settings import EngineSettings
from pretrain.cell_states.frozen_states import (
    embed_cells,
    num_layers_up_to,
    require_pooling,
)
from pretrain.model.architectures import (
    Encoder,
    architecture_of,
    layers_of,
    set_layers,
    to_bfloat16,
)


@dataclass(frozen=True)
class CellShifts:
    """All perturbations of one cell, by the number of their set.

    Attributes
    ----------
    sets
        int64 [S].
    values
        Column -> float32 [S]: ``shift``, ``toward_<state>``, ``class_<label>``.
    changed
        bool [S]: False if the perturbation left the cell unchanged; all values are 0 then.
    before
        Column -> value of the unperturbed cell: ``cosine_<state>``, ``probability_<label>``.
    genes
        For each batch of copies (sets int64 [C], tokens int64 [C, G], compared bool [C, G], shift
        float32 [C, G]) of every gene; empty unless asked for.
    """

    sets: np.ndarray
    values: dict[str, np.ndarray]
    changed: np.ndarray
    before: dict[str, float]
    genes: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)


@dataclass(frozen=True)
class CopyStates:
    """Hidden states of sequences of the same length: of the wanted layer and the head's layer.

    `genes` are the sequences, int64 [B, G] without special tokens; None where there are none but
    embeddings.
    """

    cell_BLD: torch.Tensor
    head_BLD: torch.Tensor | None
    genes: np.ndarray | None = None


class CopyEngine:
    """An encoder, optionally with a head, that compares perturbed copies with their cell."""

    def __init__(
        self,
        encoder: Encoder,
        vocabulary: Vocabulary,
        settings: EngineSettings = EngineSettings(),  # noqa: B008  frozen
        classifier: Classifier | None = None,
        centroids: dict[str, np.ndarray] | None = None,
    ) -> None:
        """Take over the encoder (the classifier's own, if there is a classifier).

        Parameters
        ----------
        centroids
            State -> float [D] embedding.

        Raises
        ------
        ValueError
            The pooling is unknown, ``cls`` is asked for without ``<cls>`` tokens, the layer does
            not exist, or the classifier does not have exactly one head of cells.
        """
        settings = replace(settings, device=choose_device(settings.device))
        require_pooling(settings.pooling, vocabulary)
        number = num_layers_up_to(encoder, settings.layer)
        self.encoder, self.vocabulary, self.settings = encoder, vocabulary, settings
        self.head = _cell_head(classifier)
        self._output = None if self.head is None else _output(classifier, self.head)
        self._reader = classifier.reader if classifier else None
        self.max_genes = vocabulary.max_length - (2 if vocabulary.has_cls else 0)
        self._device = torch.device(settings.device)
        nn.Module.to(encoder, self._device)
        encoder.eval().requires_grad_(False)
        self._wanted: torch.Tensor | None = None
        if settings.bf16:
            # Norms and the residual stream are bfloat16 too; in float32 they cost a fifth of the
            # time (LOG.md).
            to_bfloat16(encoder)
        layers = layers_of(encoder)
        if self.head is None:
            set_layers(encoder, nn.ModuleList(layers[:number]))
        layers[number - 1].register_forward_hook(self._remember)
        self.set_centroids(centroids or {})

    @property
    def reads_state(self) -> bool:
        """Whether there is a head that reads cell states."""
        return self._reader is not None

    @property
    def _scores_genes(self) -> bool:
        return self.settings.score == "geneformer" and self.settings.pooling == "mean"

    def set_centroids(self, centroids: dict[str, np.ndarray]) -> None:
        """Set the centroids of the states that `toward_<state>` refers to."""
        self.states = list(centroids)
        width = self.encoder.config.hidden_size
        stacked = np.stack(list(centroids.values())) if centroids else np.zeros((0, width))
        self._centroids = torch.from_numpy(stacked).double().to(self._device)

    @property
    def columns(self) -> list[str]:
        """Return the names of the values of a shift."""
        labels = self.head.classes if self.head else ()
        return ["shift", *(f"toward_{s}" for s in self.states), *(f"class_{c}" for c in labels)]

    def embed(self, cells: list[np.ndarray]) -> np.ndarray:
        """Return float32 [cells, D] embeddings of unperturbed cells, over all of their genes."""
        tokens = [self.sequences(c[None])[0] for c in cells]
        found = embed_cells(
            tokens, self.encoder, self.vocabulary, self.settings.pooling, self.settings.layer,
            self.settings.batch_tokens, self.settings.device, self.settings.bf16,
        )  # fmt: skip
        self._wanted = None
        return found

    @torch.inference_mode()
    def perturb(
        self, genes: np.ndarray, sets: GeneSets, edit: Edit, gene_shifts: bool = False
    ) -> CellShifts:
        """Return the effect of each applicable set on one cell.

        Parameters
        ----------
        genes
            int64 [n] tokens by rank, without special tokens.
        gene_shifts
            Also compare every gene's own state.
        """
        places = places_in(genes, sets.members, self.vocabulary.num_tokens)
        possible = np.flatnonzero(applicable(sets, places, edit.kind, len(genes), self.max_genes))
        row_of = np.full(len(sets), -1)
        row_of[possible] = np.arange(len(possible))
        originals = {len(genes): self._run(genes[None])}
        before = self._before(originals[len(genes)])
        values = np.zeros((len(possible), len(self.columns)))
        changed = np.zeros(len(possible), dtype=bool)
        by_gene = []
        for copies in copies_of(
            genes, sets, edit, self.max_genes, self.vocabulary.num_tokens,
            self.settings.batch_tokens,
        ):  # fmt: skip
            kept = copies.num_kept
            if kept not in originals:
                originals[kept] = self._run(genes[None, :kept])
            is_changed = copies.changed
            if gene_shifts and not is_changed.all():
                same = copies.take(np.flatnonzero(~is_changed))
                nothing = np.zeros(same.genes.shape, dtype=np.float32)
                by_gene.append((same.sets, same.genes, same.compared, nothing))
            if not is_changed.any():
                continue
            differ = copies.take(np.flatnonzero(is_changed))
            rows = row_of[differ.sets]
            changed[rows] = True
            states = self._run(differ.genes)
            values[rows] = self._compare(originals[kept], states, differ)
            if gene_shifts or self._scores_genes:
                shift = self._gene_shifts(originals[kept], states, differ)
            if self._scores_genes:
                values[rows, 0] = _means(shift, differ.compared)
            if gene_shifts:
                by_gene.append((differ.sets, differ.genes, differ.compared, shift))
        columns = {c: values[:, i].astype(np.float32) for i, c in enumerate(self.columns)}
        return CellShifts(possible, columns, changed, before, by_gene)

    def _remember(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._wanted = output[0] if isinstance(output, tuple) else output

    def sequences(self, genes: np.ndarray) -> np.ndarray:
        """Return int64 [B, L]: genes [B, G] between the special tokens, if there are any."""
        if not self.vocabulary.has_cls:
            return genes
        edge = np.ones((len(genes), 1), dtype=np.int64)
        special = self.vocabulary.special_tokens
        return np.concatenate([edge * special[CLS], genes, edge * special[EOS]], axis=1)

    def _run(self, genes: np.ndarray) -> CopyStates:
        ids = torch.from_numpy(self.sequences(genes)).to(self._device)
        return replace(self.forward(input_ids=ids), genes=genes)

    def forward(self, **inputs: torch.Tensor) -> CopyStates:
        """Return the hidden states for inputs of the encoder."""
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self.settings.bf16):
            last = self.encoder(**inputs).last_hidden_state
        assert self._wanted is not None
        wanted = architecture_of(self.encoder).finished(self.encoder, self._wanted).float()
        self._wanted = None
        return CopyStates(wanted, None if self.head is None else last.float())

    def genes_only(self, hidden_BLD: torch.Tensor) -> torch.Tensor:
        return hidden_BLD[:, 1:-1] if self.vocabulary.has_cls else hidden_BLD

    def embedding(self, states: CopyStates) -> torch.Tensor:
        """Return float64 [B, D], embeddings of whole cells, over all of their genes."""
        if self.settings.pooling == "cls":
            return states.cell_BLD[:, 0].double()
        return self.genes_only(states.cell_BLD).double().mean(dim=1)

    def _before(self, original: CopyStates) -> dict[str, float]:
        cosines = self.cosines(self.embedding(original))[0].tolist()
        found = {f"cosine_{s}": v for s, v in zip(self.states, cosines, strict=True)}
        if self.head is not None:
            shares = self.probabilities(original)[0].tolist()
            classes = zip(self.head.classes, shares, strict=True)
            found |= {f"probability_{c}": p for c, p in classes}
        return found

    def _compare(self, original: CopyStates, states: CopyStates, copies: Copies) -> np.ndarray:
        """Return float64 [C, columns]; `shift` is that of pooled states, whatever the score."""
        if self.settings.pooling == "cls" or self.settings.score == "geneformer":
            after = self.embedding(states)
            ahead = self.embedding(original).expand_as(after)
        else:
            after, ahead = self._pooled(original, states, copies)
        parts = [(1 - torch.cosine_similarity(after, ahead, dim=1))[:, None]]
        parts.append(self.cosines(after) - self.cosines(ahead))
        if self.head is not None:
            parts.append(self.probabilities(states) - self.probabilities(original))
        return torch.cat(parts, dim=1).cpu().numpy()

    def _pooled(
        self, original: CopyStates, states: CopyStates, copies: Copies
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return two arrays float64 [C, D]: means over the compared genes, after and before."""
        compared_CG = torch.from_numpy(copies.compared).to(self._device)
        counts = compared_CG.sum(dim=1, keepdim=True)
        weights = compared_CG.float()[:, None] / counts[..., None]
        after = (weights @ self.genes_only(states.cell_BLD))[:, 0]
        # The same genes in the original, where each has its own position.
        share_CK = np.zeros((len(copies.sets), copies.num_kept + 1), dtype=np.float32)
        at = np.where(copies.compared, copies.origin, copies.num_kept)
        np.put_along_axis(share_CK, at, 1.0, axis=1)
        share = torch.from_numpy(share_CK[:, :-1]).to(self._device) / counts
        ahead = share @ self.genes_only(original.cell_BLD)[0]
        return after.double(), ahead.double()

    def cosines(self, cells: torch.Tensor) -> torch.Tensor:
        """Return float64 [C, states], the cosines of cells with the centroids."""
        return torch.cosine_similarity(cells[:, None], self._centroids[None], dim=2)

    def probabilities(
        self, states: CopyStates, weights_L: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return float64 [B, classes], the head's probabilities.

        It reads the mean over all genes, or the cell state that is made of it and of the genes.
        `weights_L` are the weights of the genes in this mean; None: all are equal.
        """
        assert states.head_BLD is not None and self._output is not None
        genes = self.genes_only(states.head_BLD)
        pooled = genes.mean(dim=1) if weights_L is None else (genes * weights_L[:, None]).sum(dim=1)
        if self._reader is not None:
            assert states.genes is not None
            pooled = self._reader(list(states.genes), pooled)
        return self._output(pooled).double().softmax(dim=1)

    def _gene_shifts(self, original: CopyStates, states: CopyStates, copies: Copies) -> np.ndarray:
        """Return float32 [C, G]: 1 - cosine of each gene's state with that in the original."""
        after = self.genes_only(states.cell_BLD)
        origin = torch.from_numpy(copies.origin.clip(0, copies.num_kept - 1)).to(self._device)
        ahead = self.genes_only(original.cell_BLD)[0][origin]
        return (1 - torch.cosine_similarity(after, ahead, dim=2)).cpu().numpy()


def centroid(embeddings: np.ndarray, donors: np.ndarray) -> np.ndarray:
    """Return float64 [D]: the mean over donors of each donor's mean over its cells."""
    means = [embeddings[donors == d].mean(axis=0, dtype=np.float64) for d in np.unique(donors)]
    return np.mean(means, axis=0)


def _means(values: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Return float64 [C], means of float32 [C, G] over counted entries, at least one in a row."""
    total = np.where(counted, values, 0).sum(axis=1, dtype=np.float64)
    return total / counted.sum(axis=1)


def _cell_head(classifier: Classifier | None) -> Head | None:
    if classifier is None:
        return None
    heads = [h for h in classifier.heads if h.kind == "cells"]
    if len(heads) != 1:
        names = [f"{h.name} ({h.kind})" for h in classifier.heads]
        raise ValueError(f"--head: needs a classifier with one head of cells, this has {names}")
    return heads[0]


def _output(classifier: Classifier | None, head: Head) -> nn.Module:
    assert classifier is not None
    return classifier.outputs[classifier.heads.index(head)]
