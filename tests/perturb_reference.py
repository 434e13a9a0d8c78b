"""Perturbation as plainly as it can be said: lists, one sequence at a time, the whole model.

Shares no code with `eval.perturb`; tests compare the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.genes.vocabulary import CLS, EOS, Vocabulary

if TYPE_CHECKING:
    from transformers import BertForMaskedLM


def cut(genes: list, length: int) -> list:
    return genes[:length]


def middle_of_quartile(quartile: int, length: int) -> int:
    return (2 * quartile + 1) * length // 8


def moved_rank(rank: int, length: int, kind: str, shift: int, quantile: float | None) -> int:
    """Return the rank that a gene is to have."""
    if quantile is not None:
        goal = round(quantile * (length - 1))
    else:
        quartile = 4 * rank // length
        new = min(3, quartile + shift) if kind == "inhibit" else max(0, quartile - shift)
        goal = rank if new == quartile else middle_of_quartile(new, length)
    return max(rank, goal) if kind == "inhibit" else min(rank, goal)


def edited(
    cell: list[int],
    perturbed: list[int],
    kind: str,
    longest: int,
    shift: int = 1,
    quantile: float | None = None,
) -> tuple[list[int], list[int]]:
    """Return (original, copy): gene tokens by rank, the original cut as the copy was."""
    others = [g for g in cell if g not in perturbed]
    if kind == "delete":
        return cell, others
    if kind == "overexpress":
        copy = [*perturbed, *others]
        overflow = max(0, len(copy) - longest)
        return cut(cell, len(cell) - overflow), cut(copy, longest)
    goals = {g: moved_rank(cell.index(g), len(cell), kind, shift, quantile)
             for g in cell if g in perturbed}  # fmt: skip
    copy: list[int | None] = [None] * len(cell)
    in_order = sorted(goals, key=lambda g: (goals[g], cell.index(g)))
    slots = []
    for gene in in_order:  # no two at one place: the later one stands behind
        slots.append(max(goals[gene], slots[-1] + 1 if slots else 0))
    for i in range(len(slots)):  # nor beyond the end
        slots[i] = min(slots[i], len(cell) - len(slots) + i)
    for slot, gene in zip(slots, in_order, strict=True):
        copy[slot] = gene
    rest = iter(others)
    return cell, [g if g is not None else next(rest) for g in copy]


class Reference:
    """One call of the full model per sequence."""

    def __init__(
        self,
        network: BertForMaskedLM,
        vocabulary: Vocabulary,
        layer: int,
        pooling: str,
        centroids: dict[str, np.ndarray],
        probabilities: Callable[[list[int]], np.ndarray] | None = None,
        score: str = "mean_state",
    ) -> None:
        self.network, self.vocabulary = network, vocabulary
        self.layer, self.pooling, self.centroids = layer, pooling, centroids
        self.probabilities, self.score = probabilities, score

    def hidden(self, genes: list[int]) -> dict:
        """Return gene -> state; ``<cls>`` too."""
        import torch

        with torch.no_grad():
            return self._hidden(genes)

    def _hidden(self, genes: list[int]) -> dict:
        import torch

        tokens = list(genes)
        if self.vocabulary.has_cls:
            special = self.vocabulary.special_tokens
            tokens = [special[CLS], *genes, special[EOS]]
        out = self.network(input_ids=torch.tensor([tokens]), output_hidden_states=True)
        states = out.hidden_states[self.layer - 1][0].double().numpy()
        if not self.vocabulary.has_cls:
            return dict(zip(genes, states, strict=True))
        return {CLS: states[0]} | dict(zip(genes, states[1:-1], strict=True))

    def shifts(self, original: list[int], copy: list[int], perturbed: list[int]) -> dict:
        """Return the values of one perturbation of one cell."""
        before, after = self.hidden(original), self.hidden(copy)
        both = [g for g in copy if g in original and g not in perturbed]
        by_gene = {g: 1 - cosine(before[g], after[g]) for g in both}
        if self.pooling == "cls":
            old, new = before[CLS], after[CLS]
        elif self.score == "geneformer":
            old = np.mean([before[g] for g in original], axis=0)
            new = np.mean([after[g] for g in copy], axis=0)
        else:
            old = np.mean([before[g] for g in both], axis=0)
            new = np.mean([after[g] for g in both], axis=0)
        of_genes = self.score == "geneformer" and self.pooling == "mean"
        shift = np.mean(list(by_gene.values())) if of_genes else 1 - cosine(old, new)
        found: dict[str, Any] = {"shift": shift}
        for name, state in self.centroids.items():
            found[f"toward_{name}"] = cosine(new, state) - cosine(old, state)
        if self.probabilities is not None:
            found["classes"] = self.probabilities(copy) - self.probabilities(original)
        found["genes"] = by_gene
        return found


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
