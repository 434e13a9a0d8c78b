"""Simulate the cells of a tissue, block by block: latent state, expected counts, drawn counts.

A `Simulation` draws everything that is drawn once, and its `block` gives the cells of a block.
Every random number comes from a stream named by the seed, its purpose and its block, so that the
same settings give the same cells in any order of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from eval.simulate.network import HALF, Network, draw_network
from eval.simulate.settings import SimulationSettings

BLOCK_CELLS = 512
_STREAMS = ("network", "genes", "types", "donors", "batches", "cells", "block", "perturbation",
            "origins", "ids")  # fmt: skip
# The median counts of a cell, and the number of genes with at least one count, in PBMC of 10x
# Genomics (pbmc3k).
PBMC_COUNTS, PBMC_GENES = 2197.0, 16_634
_DISPERSION_SLOPE = -0.5  # on the logarithm of a gene's mean count
_TYPE_SD, _ON_SHARE = 0.3, 0.4


def stream(seed: int, purpose: str, *keys: int) -> np.random.Generator:
    """Return the random number generator of one purpose."""
    return np.random.default_rng([seed, _STREAMS.index(purpose), *keys])


@dataclass(frozen=True)
class SimulatedBlock:
    """The data of consecutive cells.

    Attributes
    ----------
    cells
        int64 [cells], indices.
    drives
        float64 [cells, T], as in `Network.activities`.
    active
        float64 [cells, T], activities of the TFs.
    state
        float64 [cells, genes], logarithm of expression without the gene effects of donor and batch.
    expected
        float64 [cells, genes], counts without noise.
    gains
        float64 [cells, genes], the gamma noise; mean 1.
    counts
        int32 [cells, genes].
    """

    cells: np.ndarray
    drives: np.ndarray
    active: np.ndarray
    state: np.ndarray
    expected: np.ndarray
    gains: np.ndarray
    counts: np.ndarray


class Simulation:
    """Everything that is drawn once: network, genes, types, donors, batches, the table of cells.

    Attributes
    ----------
    network
        The true network.
    basal, dispersion
        float64 [genes], logarithm of expression with all regulators half active; variance of the
        gamma noise.
    parents
        int64 [types], the type that each type develops from; the root is its own parent.
    programs
        float64 [types, T], drives of the TFs in mature cells of a type.
    cells
        One row per cell: branch, position on it (0 parent to 1 mature), type, donor, batch (all
        int), pseudotime, depth (expected counts).
    """

    network: Network
    basal: np.ndarray
    dispersion: np.ndarray
    parents: np.ndarray
    programs: np.ndarray
    cells: pd.DataFrame

    def __init__(self, settings: SimulationSettings) -> None:
        self.settings = settings
        self._draw_genes(stream(settings.seed, "genes"))
        self.network = draw_network(settings, self.basal, stream(settings.seed, "network"))
        self._draw_types(stream(settings.seed, "types"))
        rng = stream(settings.seed, "donors")
        self._donor_genes = settings.donor_sd * rng.normal(size=(settings.donors, settings.genes))
        self._donor_tfs = settings.donor_tf_sd * rng.normal(size=(settings.donors, settings.tfs))
        mixture = rng.dirichlet(np.full(settings.types, 5.0))
        self._mixtures = rng.dirichlet(20 * mixture + 0.5, size=settings.donors)
        rng = stream(settings.seed, "batches")
        self._batch_genes = settings.batch_sd * rng.normal(size=(settings.batches, settings.genes))
        self._batch_depths = settings.batch_depth_sd * rng.normal(size=settings.batches)
        self._batch_depths -= self._batch_depths.mean()
        self._draw_cells(stream(settings.seed, "cells"))

    @property
    def num_blocks(self) -> int:
        return -(-self.settings.cells // BLOCK_CELLS)

    def block(self, number: int) -> SimulatedBlock:
        """Return the block of cells from index number x 512 on."""
        settings = self.settings
        rng = stream(settings.seed, "block", number)
        table = self.cells.iloc[number * BLOCK_CELLS : (number + 1) * BLOCK_CELLS]
        branch, donor = table["branch"].to_numpy(), table["donor"].to_numpy()
        position = table["position"].to_numpy()[:, None]
        noise = settings.tf_noise_sd * rng.normal(size=(len(table), settings.tfs))
        drives = (1 - position) * self.programs[self.parents[branch]]
        drives += position * self.programs[branch] + self._donor_tfs[donor] + noise
        active = self.network.activities(drives)
        state = self.log_expression(drives, active)
        expressed = np.exp(state + self._donor_genes[donor] + self._batch_genes[table["batch"]])
        expected = expressed * (table["depth"].to_numpy() / expressed.sum(axis=1))[:, None]
        gains = rng.gamma(1 / self.dispersion, self.dispersion, size=expected.shape)
        counts = rng.poisson(expected * gains).astype(np.int32)
        return SimulatedBlock(
            table.index.to_numpy(), drives, active, state, expected, gains, counts
        )

    def log_expression(self, drives: np.ndarray, active: np.ndarray) -> np.ndarray:
        """Return the logarithm of expression of cells in a state, float64 [cells, genes]."""
        state = self.basal + self.network.log_effect(active - HALF)
        state[:, self.network.tfs] += drives
        return state

    def centroids(self) -> np.ndarray:
        """Return the logarithm of expression of mature cells of each type, [types, genes]."""
        return self.log_expression(self.programs, self.network.activities(self.programs))

    def _draw_genes(self, rng: np.random.Generator) -> None:
        settings = self.settings
        genome = max(PBMC_GENES, settings.genes)
        ordered = np.sort(settings.basal_sd * rng.normal(size=genome))[::-1]
        self.basal = rng.permutation(ordered[: settings.genes])
        share = np.exp(self.basal).sum() / np.exp(ordered).sum()
        self.depth = settings.depth or PBMC_COUNTS * share
        spread = settings.dispersion_sd * rng.normal(size=settings.genes)
        mean = self.depth * np.exp(self.basal) / np.exp(self.basal).sum()
        self.dispersion = settings.dispersion * mean**_DISPERSION_SLOPE * np.exp(spread)

    def _draw_types(self, rng: np.random.Generator) -> None:
        settings = self.settings
        self.parents = np.array([rng.integers(0, max(k, 1)) for k in range(settings.types)])
        is_on = np.empty((settings.types, settings.tfs), dtype=bool)
        is_on[0] = rng.random(settings.tfs) < _ON_SHARE
        for kind in range(1, settings.types):
            switched = rng.random(settings.tfs) < settings.switched_share
            is_on[kind] = is_on[self.parents[kind]] ^ switched
        if settings.program_share:
            # Not drawn otherwise, so that older settings give the bytes they gave.
            follows = rng.random(is_on.shape) < settings.program_share
            switch = np.arange(settings.types)[:, None] % 2 == 1
            is_on = np.where(follows, switch, is_on)
        # There is one offset for each TF and state, so types with the same state have the same
        # level.
        ends = np.array([-settings.switch_level, settings.switch_level])
        levels = ends[:, None] + _TYPE_SD * rng.normal(size=(2, settings.tfs))
        self.programs = np.where(is_on, levels[1], levels[0])

    def _draw_cells(self, rng: np.random.Generator) -> None:
        settings = self.settings
        size = settings.cells
        donor = rng.integers(0, settings.donors, size)
        batch = rng.integers(0, settings.batches, size)
        edges = np.cumsum(self._mixtures, axis=1)[donor]
        branch = (rng.random(size)[:, None] >= edges[:, :-1]).sum(axis=1)
        is_mature = (rng.random(size) < settings.mature_share) | (branch == 0)
        position = np.where(is_mature, 1.0, rng.random(size))
        steps = np.zeros(settings.types, dtype=int)
        for kind in range(1, settings.types):
            steps[kind] = steps[self.parents[kind]] + 1
        log_depth = self._batch_depths[batch] + settings.library_sd * rng.normal(size=size)
        self.cells = pd.DataFrame(
            {
                "branch": branch,
                "position": position,
                "type": np.where(position < HALF, self.parents[branch], branch),
                "donor": donor,
                "batch": batch,
                "pseudotime": steps[branch] - 1 + position,  # 0: mature cells of the root
                "depth": self.depth * np.exp(log_depth),
            }
        )
