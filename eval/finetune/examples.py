"""Labelled cells as a training takes them: items, the weights of their loss, what is wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch.nn import functional

from data_prep.genes.vocabulary import Vocabulary
from eval.finetune.classifier import Classifier, FinetuneSettings, Items, Target, gene_items


class Examples:
    """Labelled cells with the weights that their loss needs.

    Attributes
    ----------
    active
        int64 indices of cells with a labelled item.
    mass
        float64 [cells, heads], sum of the weights of a cell's labelled items, by which the loss is
        divided.
    """

    def __init__(
        self,
        tokens: list[np.ndarray],
        targets: list[Target],
        weights: list[np.ndarray],
        device: str,
        of_tokens: list[np.ndarray | None] | None = None,
    ) -> None:
        """Take the weights of each head's classes, or of tokens (`gene_weights`), where known."""
        self.tokens, self._targets = tokens, targets
        self._of_tokens = of_tokens or [None] * len(targets)
        self.lengths = np.array([len(t) for t in tokens], dtype=np.int64)
        self._weights = [torch.from_numpy(w.astype(np.float32)).to(device) for w in weights]
        columns = []
        for target, weight, known in zip(targets, weights, self._of_tokens, strict=True):
            of_label = np.append(weight, 0.0)  # the label -1 selects this 0
            if target.head.kind == "cells":
                columns.append(of_label[target.labels])
            else:
                of_token = of_label[target.labels] if known is None else known
                columns.append(np.array([of_token[t].sum() for t in tokens]))
        self.mass = np.stack(columns, axis=1)
        self.active = np.flatnonzero(self.mass.sum(axis=1) > 0)

    def scale(self, cells: np.ndarray) -> np.ndarray:
        """Return float64 [heads], the factors for the sums of losses over `cells`."""
        total = self.mass[cells].sum(axis=0)
        present = total > 0
        return np.divide(1.0, total * present.sum(), out=np.zeros_like(total), where=present)

    def groups(self, head: int) -> np.ndarray:
        """Return [cells]: cells of a group stay together when a head's penalty is chosen."""
        known = self._targets[head].groups
        return np.arange(len(self.tokens)) if known is None else known

    def items(self, cells: np.ndarray) -> list[Items]:
        """Return the labelled items of cells for each head."""
        members = [self.tokens[i] for i in cells]
        return [self._items(t, cells, members) for t in self._targets]

    def loss(self, model: Classifier, cells: np.ndarray, scale: np.ndarray) -> torch.Tensor:
        """Return the scaled loss of cells that are computed together."""
        members = [self.tokens[i] for i in cells]
        items = self.items(cells)
        total = torch.zeros((), device=self._weights[0].device)
        logits = model(members, items)
        for i, found in enumerate(items):
            label = torch.from_numpy(found.label).to(total.device)
            of_tokens = self._of_tokens[i]
            # The loss is computed in float32, because bfloat16 has only three digits.
            if of_tokens is None:
                loss = functional.cross_entropy(
                    logits[i].float(), label, weight=self._weights[i], reduction="sum"
                )
            else:
                first = np.cumsum([0, *map(len, members)])[:-1]
                tokens = np.concatenate(members)[first[found.cell] + found.place]
                weight = torch.from_numpy(of_tokens[tokens].astype(np.float32)).to(total.device)
                each = functional.cross_entropy(logits[i].float(), label, reduction="none")
                loss = (weight * each).sum()
            total = total + float(scale[i]) * loss
        return total

    @staticmethod
    def _items(target: Target, cells: np.ndarray, members: list[np.ndarray]) -> Items:
        if target.head.kind == "genes":
            return gene_items(members, target.labels)
        labels = target.labels[cells]
        labelled = np.flatnonzero(labels >= 0)
        return Items(labelled, np.zeros_like(labelled), labels[labelled])


def learnable(
    vocabulary: Vocabulary, tokens: list[np.ndarray], targets: list[Target]
) -> list[Target]:
    """Return targets without labels of cells that have no gene, so no state to learn from."""
    num_special = 2 if vocabulary.has_cls else 0
    empty = np.array([len(t) <= num_special for t in tokens])
    return [
        replace(t, labels=np.where(empty, -1, t.labels)) if t.head.kind == "cells" else t
        for t in targets
    ]


def class_weights(
    tokens: list[np.ndarray], targets: list[Target], settings: FinetuneSettings
) -> list[np.ndarray]:
    """Return float64 [classes] for each head: inverse frequency among its items, or ones."""
    weights = []
    for target in targets:
        num_classes = len(target.head.classes)
        if target.head.kind == "cells":
            found = target.labels[target.labels >= 0]
        else:
            found = np.concatenate([target.labels[t] for t in tokens])
            found = found[found >= 0]
        counts = np.bincount(found, minlength=num_classes)
        # A class without training examples may still occur in validation.
        inverse = np.where(counts > 0, len(found) / np.maximum(counts, 1) / num_classes, 1.0)
        weights.append(inverse if settings.class_weights else np.ones(num_classes))
    return weights


def gene_weights(
    tokens: list[np.ndarray], targets: list[Target], settings: FinetuneSettings
) -> list[np.ndarray | None]:
    """Return float64 [num_tokens] for heads of genes in which each gene counts once, else None.

    A gene that many cells express would otherwise decide the loss: its weight is divided by the
    number of cells that hold it. Classes weigh alike, if they are to, by their numbers of genes.
    """
    found: list[np.ndarray | None] = []
    for target in targets:
        if target.head.kind == "cells" or not settings.genes_count_once:
            found.append(None)
            continue
        cells = np.bincount(np.concatenate(tokens).astype(np.int64), minlength=len(target.labels))
        weight = np.where((target.labels >= 0) & (cells > 0), 1 / np.maximum(cells, 1), 0.0)
        if settings.class_weights:
            genes = np.bincount(target.labels[weight > 0], minlength=len(target.head.classes))
            weight *= 1 / np.maximum(genes, 1)[target.labels]
        # Their mean over all labelled items is 1, as that of the weights of classes.
        items = cells[weight > 0].sum()
        found.append(weight * items / max(float((weight * cells).sum()), 1e-300))
    return found


def require_fitting(
    vocabulary: Vocabulary, tokens: list[np.ndarray], targets: list[Target], what: str
) -> None:
    if not len(tokens):
        raise ValueError(f"{what}: there are none")
    for target in targets:
        wanted = len(tokens) if target.head.kind == "cells" else vocabulary.num_tokens
        if target.labels.shape != (wanted,):
            raise ValueError(
                f"{what}, head {target.head.name}: labels of shape {target.labels.shape}, "
                f"expected ({wanted},), one per {target.head.kind[:-1]}"
            )
        if target.groups is not None and target.groups.shape != (len(tokens),):
            raise ValueError(
                f"{what}, head {target.head.name}: groups of shape {target.groups.shape}, "
                f"expected ({len(tokens)},), one per cell"
            )
        if not -1 <= target.labels.min() <= target.labels.max() < len(target.head.classes):
            raise ValueError(
                f"{what}, head {target.head.name}: labels must be -1 (none) or 0 to "
                f"{len(target.head.classes) - 1}, found {target.labels.min()} to "
                f"{target.labels.max()}"
            )
