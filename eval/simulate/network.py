"""A gene regulatory network without cycles, and the effects of changing one of its genes.

`draw_network` makes a random network. The level of a TF is the logarithm of its expression relative
to the level at which it is half active; its activity is a Hill function of this level, from 0
(idle) to 1 (full).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse

from eval.simulate.settings import SimulationSettings

HILL = 2.0
HALF = 0.5
_PARETO = 1.5  # exponent of the numbers of targets; at most a third of the genes for one TF
_FEWEST_TARGETS, _MOST_TARGETS_SHARE = 3, 1 / 3
_TF_PREFERENCE = 2.0  # how much more likely a TF is a target than another gene
_HOUSEKEEPING = 1.0  # the most expressed genes vary least between types (PBMC: ribosomal genes)
_EFFECT_SHAPE = 2.0


@dataclass(frozen=True)
class Network:
    """The regulators and their targets.

    Attributes
    ----------
    tfs
        int64 [T], indices of the TFs among the genes; a TF regulates only TFs after it.
    weights
        CSR float64 [T, genes], change of the logarithm of expression when the TF goes from idle to
        full.
    """

    tfs: np.ndarray
    weights: scipy.sparse.csr_array

    @cached_property
    def among_tfs(self) -> np.ndarray:
        """Return float64 [T, T], weights of TFs on TFs; zero on and below the diagonal."""
        return self.weights[:, self.tfs].toarray()

    @cached_property
    def distances(self) -> np.ndarray:
        """Return int32 [T, genes], steps on the shortest path from TF to gene; 0 without a path."""
        is_edge = self.weights.toarray() != 0
        found = np.where(is_edge, 1, 0).astype(np.int32)
        for tf in reversed(range(len(self.tfs))):
            for middle in np.flatnonzero(self.among_tfs[tf]):
                through = np.where(found[middle] > 0, found[middle] + 1, 0)
                closer = (through > 0) & ((found[tf] == 0) | (through < found[tf]))
                found[tf, closer] = through[closer]
        return found

    @cached_property
    def total_weights(self) -> np.ndarray:
        """Return float64 [T, genes], the effect over all paths, linear at half activity."""
        slope = HILL / 4  # of the activity, per unit of the level
        total = self.weights.toarray()
        for tf in reversed(range(len(self.tfs))):
            total[tf] += slope * self.among_tfs[tf] @ total
        return total

    def activities(
        self,
        drives: np.ndarray,
        silenced: np.ndarray | None = None,
        boosts: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return the activities of the TFs at steady state, float64 [cells, T].

        Parameters
        ----------
        drives
            float64 [cells, T], the level of each TF with all its regulators half active.
        silenced
            bool [T], TFs without any expression.
        boosts
            float64 [T], added to the levels.
        """
        active = np.empty_like(drives)
        for tf in range(len(self.tfs)):
            level = drives[:, tf] + (active[:, :tf] - HALF) @ self.among_tfs[:tf, tf]
            if boosts is not None:
                level = level + boosts[tf]
            active[:, tf] = 1 / (1 + np.exp(-HILL * level))
            if silenced is not None and silenced[tf]:
                active[:, tf] = 0
        return active

    def log_effect(self, active: np.ndarray) -> np.ndarray:
        """Return the regulators' effect on the logarithm of expression, float64 [cells, genes].

        `active` is a difference from half activity, or a change of activity.
        """
        return active @ self.weights


def draw_network(
    settings: SimulationSettings, basal: np.ndarray, rng: np.random.Generator
) -> Network:
    """Return a random network: few TFs with many targets, signed effects, no cycles.

    `basal` is the logarithm of expression, float64 [genes]; higher values get fewer regulators.
    """
    num_genes, num_tfs = settings.genes, settings.tfs
    tfs = rng.choice(num_genes, num_tfs, replace=False)
    if settings.wiring == "opposed":
        return _opposed(settings, tfs, rng)
    mean_targets = settings.regulators_per_gene * num_genes / num_tfs
    pareto = 1 + rng.pareto(_PARETO, num_tfs)
    most = max(1, int(_MOST_TARGETS_SHARE * num_genes))
    wanted = np.clip(
        np.rint(mean_targets * pareto / pareto.mean()).astype(int), _FEWEST_TARGETS, most
    )
    attraction = rng.gamma(2.0, size=num_genes) * np.exp(-_HOUSEKEEPING * (basal - basal.min()))
    attraction[tfs] *= _TF_PREFERENCE
    rows, columns = [], []
    for tf in range(num_tfs):
        attraction[tfs[tf]] = 0  # not itself, and for later TFs no earlier TF
        count = min(wanted[tf], np.count_nonzero(attraction))
        chance = attraction / attraction.sum()
        columns.append(np.sort(rng.choice(num_genes, count, replace=False, p=chance)))
        rows.append(np.full(count, tf))
    row, column = np.concatenate(rows), np.concatenate(columns)
    sizes = rng.gamma(_EFFECT_SHAPE, settings.mean_effect / _EFFECT_SHAPE, size=len(row))
    signs = np.where(rng.random(len(row)) < settings.activator_share, 1.0, -1.0)
    weights = scipy.sparse.csr_array((signs * sizes, (row, column)), shape=(num_tfs, num_genes))
    return Network(tfs, weights)


def _opposed(settings: SimulationSettings, tfs: np.ndarray, rng: np.random.Generator) -> Network:
    """Return a network in which each gene that is no TF has one activator and one repressor.

    Where both follow the same programme, a target hardly varies with either of them.
    """
    targets = np.setdiff1d(np.arange(settings.genes), tfs)
    pairs = np.stack([rng.choice(settings.tfs, 2, replace=False) for _ in targets])
    signs = np.array([settings.mean_effect, -settings.mean_effect])
    weights = scipy.sparse.csr_array(
        (np.tile(signs, len(targets)), (pairs.ravel(), np.repeat(targets, 2))),
        shape=(settings.tfs, settings.genes),
    )
    return Network(tfs, weights)
