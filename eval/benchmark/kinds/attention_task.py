"""Attention: do the heads attend more to listed genes than to others that are expressed alike?

In the paper a fifth of the heads attends more to transcription factors, mostly in early layers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from scipy.stats import false_discovery_control, wilcoxon

from eval.benchmark.contest.verdicts import ZERO_SHOT
from eval.benchmark.matched.matched_genes import (
    MATCHED,
    Contender,
    Fold,
    GenePairs,
    Scored,
    compete,
    matched_baselines,
    pair_genes,
    shuffled_control,
)
from eval.benchmark.material.models_and_cells import Bench, Model, TaskCells, load_cells
from eval.benchmark.material.twin_encoders import OncePerEncoder, encoder_of
from eval.benchmark.outcome import Role, TaskRun
from eval.benchmark.task_file import AttentionTask, Size
from eval.cells.attention import Attention, mean_attention

_FEWEST_CELLS = 10
_FALSE_DISCOVERIES = 0.05
_DECIMALS = 6  # what differs by less is rounding
_EARLY = "zero-shot, early layers"


class _World:
    """Cells, their donors, and what the paired genes receive, computed once for each encoder."""

    def __init__(self, cells: TaskCells, task: AttentionTask, bench: Bench) -> None:
        self.cells, self.bench = cells, bench
        self.donors = cells.codes(task.donor)
        self._known: OncePerEncoder[Attention] = OncePerEncoder()

    def is_usable(self, model: Model) -> np.ndarray:
        """Return bool [num_tokens]: in 10 cells."""
        tokens = np.concatenate(self.cells.tokens[model.name])
        return np.bincount(tokens, minlength=model.vocabulary.num_tokens) >= _FEWEST_CELLS

    def attention(self, model: Model, twin_seed: int | None, pairs: GenePairs) -> Attention:
        return self._known.get(
            model,
            twin_seed,
            lambda: mean_attention(
                self.cells.tokens[model.name], encoder_of(model, twin_seed), model.vocabulary,
                pairs.tokens[model.name], self.donors,
                device=self.bench.device, bf16=self.bench.bf16,
            ),
        )  # fmt: skip


def run(task: AttentionTask, size: Size, bench: Bench) -> TaskRun:
    """Return the outcomes of all contenders, one fold a seed; see `matched_genes.compete`.

    Raises
    ------
    ValueError
        The cells or lists cannot be had, or fewer than 10 pairs of genes are left.
    """
    columns = (task.donor,) if task.donor else ()
    cells = load_cells(task.cells, columns, bench.models, bench.data, size.max_cells, bench.seed)
    world = _World(cells, task, bench)
    pairs = pair_genes(task, cells, bench, world.is_usable)
    return compete(task, size, bench, cells, pairs, _contenders(bench.models, world, pairs))


def num_units(task: AttentionTask, size: Size, models: list[Model]) -> int:
    """Return how many outcomes `run` stores."""
    return size.seeds * (len(MATCHED) + 5 * len(models))


def _contenders(models: list[Model], world: _World, pairs: GenePairs) -> list[Contender]:
    rows = matched_baselines(pairs)
    roles: tuple[Role, ...] = ("model", "twin")
    for model in models:
        for role in roles:
            whole = Contender(ZERO_SHOT, role, model, partial(_all, world, pairs, model, role))
            rows.append(whole)
            if role == "model":
                rows.append(shuffled_control(whole))
            early = partial(_early, world, pairs, model, role)
            rows.append(Contender(_EARLY, role, model, early))
    return rows


def _all(world: _World, pairs: GenePairs, model: Model, role: Role, fold: Fold) -> Scored:
    """Score genes by what they receive, mean over all heads; and compare the heads one by one."""
    found = world.attention(model, fold.twin_seed(role), pairs)
    received = found.over_groups()[:, :, fold.genes].round(_DECIMALS)
    scores, details = compare_heads(received)
    if found.received.shape[0] > 1:
        details["donors_agree"] = _donors_agree(found.received[..., fold.genes]).round(3).tolist()
    return Scored(received.mean(axis=(0, 1)), scores, details)


def _early(world: _World, pairs: GenePairs, model: Model, role: Role, fold: Fold) -> Scored:
    received = world.attention(model, fold.twin_seed(role), pairs).over_groups()
    layers = -(-len(received) // 2)
    return Scored(received[:layers, :, fold.genes].mean(axis=(0, 1)))


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
