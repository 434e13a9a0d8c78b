"""Attention: do the heads attend more to listed genes than to others that are expressed alike?

In the paper a fifth of the heads attends more to transcription factors, mostly in early layers.
"""

from __future__ import annotations

from functools import cached_property, partial
from typing import Any

import numpy as np
from scipy.stats import false_discovery_control, wilcoxon

from eval.benchmark.contest.contest import ROLES, Contender, Fold
from eval.benchmark.contest.verdicts import ZERO_SHOT
from eval.benchmark.matched.matched_contest import MatchedContest, Ordered
from eval.benchmark.material.models_and_cells import Model, TaskCells
from eval.benchmark.outcome import Role
from eval.benchmark.task_file import AttentionTask
from eval.cells.attention import Attention, mean_attention

_FEWEST_CELLS = 10
_FALSE_DISCOVERIES = 0.05
_DECIMALS = 6  # what differs by less is rounding
_EARLY = "zero-shot, early layers"


class AttentionToGenes(MatchedContest[AttentionTask]):
    """Genes are ordered by the attention that they receive."""

    @cached_property
    def cells(self) -> TaskCells:
        """The cells, with their donors."""
        return self.bench.cells(self.task.cells, (self.task.donor,), self.size.max_cells)

    def is_usable(self, model: Model) -> np.ndarray:
        """Return bool [num_tokens]: in 10 cells."""
        tokens = np.concatenate(self.cells.tokens[model.name])
        return np.bincount(tokens, minlength=model.vocabulary.num_tokens) >= _FEWEST_CELLS

    def contenders(self) -> list[Contender[Fold]]:
        """Return all heads, those of early layers, and what the pairs were matched by."""
        rows = self.matched_baselines()
        for model in self.models:
            for role in ROLES:
                whole = Contender(ZERO_SHOT, role, model, partial(self.all_heads, model, role))
                rows.append(whole)
                if role == "model":
                    rows.append(self.shuffled_control(whole))
                early = partial(self.early_heads, model, role)
                rows.append(Contender(_EARLY, role, model, early))
        return rows

    def attention(self, model: Model, role: Role, fold: Fold) -> Attention:
        """Return what the paired genes receive, once for each encoder."""

        def make() -> Attention:
            return mean_attention(
                self.cells.tokens[model.name], fold.encoder(model, role), model.vocabulary,
                self.pairs.tokens[model.name], self.cells.codes(self.task.donor),
                device=self.bench.device, bf16=self.bench.bf16,
            )  # fmt: skip

        return self.once.get(model.name, fold.twin_seed(role), make)

    def all_heads(self, model: Model, role: Role, fold: Fold) -> Ordered:
        """Order genes by the mean over all heads, and compare the heads one by one."""
        found = self.attention(model, role, fold)
        received = found.over_groups()[:, :, fold.test].round(_DECIMALS)
        scores, details = compare_heads(received)
        if found.received.shape[0] > 1:
            agree = _donors_agree(found.received[..., fold.test])
            details["donors_agree"] = agree.round(3).tolist()
        return Ordered(received.mean(axis=(0, 1)), scores, details)

    def early_heads(self, model: Model, role: Role, fold: Fold) -> Ordered:
        """Order genes by the mean over the heads of the first half of the layers."""
        received = self.attention(model, role, fold).over_groups()
        layers = -(-len(received) // 2)
        return Ordered(received[:layers, :, fold.test].mean(axis=(0, 1)))


def compare_heads(received: np.ndarray) -> tuple[dict[str, float], dict[str, Any]]:
    """Return the shares of heads that attend more, or less, to listed genes; and the heads.

    Wilcoxon's signed-rank test over pairs of genes, Benjamini-Hochberg over heads at 5 %. Genes
    are the units: with enough cells, any two sets of genes differ.

    Parameters
    ----------
    received
        float [layers, heads, genes]: listed genes, then their partners.

    Returns
    -------
    tuple
        Scores, and details: ``heads`` and ``heads_q``, lists [layers][heads] of the median
        difference of a pair and of its q.
    """
    listed, partner = np.split(received, 2, axis=2)
    difference = listed - partner
    p = np.ones(difference.shape[:2])
    for place in np.ndindex(p.shape):
        if np.any(difference[place]):
            p[place] = wilcoxon(difference[place]).pvalue
    q = false_discovery_control(p.ravel()).reshape(p.shape)
    middle = np.median(difference, axis=2)
    more = (q <= _FALSE_DISCOVERIES) & (middle > 0)
    less = (q <= _FALSE_DISCOVERIES) & (middle < 0)
    scores = {"heads_more": float(more.mean()), "heads_less": float(less.mean())}
    early = -(-len(more) // 2)
    scores["heads_more_early"] = float(more[:early].mean())
    return scores, {"heads": np.round(middle, 6).tolist(), "heads_q": np.round(q, 6).tolist()}


def _donors_agree(received: np.ndarray) -> np.ndarray:
    """Return float [layers, heads]: share of donors whose median difference has the common sign.

    Parameters
    ----------
    received
        float [donors, layers, heads, genes], NaN where a donor lacks a gene.
    """
    listed, partner = np.split(received, 2, axis=3)
    signs = np.sign(np.nanmedian(listed - partner, axis=3))
    return np.maximum((signs > 0).mean(axis=0), (signs < 0).mean(axis=0))
