"""Measures the order of cells in training: mixing of labels in batches, and bytes that nodes read.

`measure_shuffle` returns all measures of a shard folder, and `print_shuffle` prints them.
`label_mixing` compares batches with random draws; `read_amplification` computes the bytes read.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data_prep.shards.format import BucketExtent
from data_prep.shards.order import EpochPlan, share
from data_prep.shards.reader import ShardSet

MOST_NODES = 64
_SHOWN_NODES = (1, 2, 4, 8, 16, 32, MOST_NODES)
_POOL_BLOCKS = 128  # number of blocks whose labels represent those of the whole bucket
_LEAST_BATCHES = 64
_DRAWS = 8  # random draws that each batch is compared with


@dataclass(frozen=True)
class Mixing:
    """Label entropy in batches and in random permutations of the same bucket, in nats.

    `label` is the metadata column; `batches` and `cells` are the numbers of batches and cells that
    were read; `error` is the standard error of the ratio, from the spread over batches.
    """

    label: str
    batches: int
    cells: int
    entropy: float
    permuted_entropy: float
    error: float

    @property
    def ratio(self) -> float:
        return self.entropy / self.permuted_entropy if self.permuted_entropy else 1.0


def label_mixing(
    shards: ShardSet, plan: EpochPlan, label: str, num_cells: int = 20_000, seed: int = 0
) -> Mixing:
    """Return the mean label entropy in batches of an epoch and in random draws of the same size.

    Parameters
    ----------
    label
        Metadata column of the shards.
    num_cells
        Steps are drawn until they hold this number of cells, but at least 64 steps. A small epoch
        is read as a whole.

    Raises
    ------
    ValueError
        The shards do not have the column.
    """
    known = ["dataset", *shards.manifest["columns"]]
    if label not in known:
        raise ValueError(f"--label {label}: the shards have no such column; they have {known}")
    rng = np.random.default_rng(seed)
    labels = _Labels(shards, label)
    pools: dict[int, np.ndarray] = {}
    sizes, found, permuted = [], [], []
    for number in rng.permutation(plan.steps_per_epoch):
        if sum(sizes) >= num_cells and len(sizes) >= _LEAST_BATCHES:
            break
        step = plan.step(int(number))
        extent = plan.buckets[step.bucket].extent
        if step.bucket not in pools:
            pools[step.bucket] = labels.pool(extent, rng)
        pool = pools[step.bucket]
        size = min(step.num_cells, len(pool))
        draws = [_entropy(rng.choice(pool, size, replace=False)) for _ in range(_DRAWS)]
        sizes.append(step.num_cells)
        found.append(_entropy(labels.of(extent, plan.cells(step))))
        permuted.append(np.mean(draws))
    # Batches are weighted by their cells, because the short last batch of a bucket says little.
    weights = np.array(sizes) / sum(sizes)
    entropy, expected = float(weights @ found), float(weights @ permuted)
    spread = np.sqrt(weights**2 @ (np.array(found) - permuted) ** 2)
    return Mixing(label, len(sizes), sum(sizes), entropy, expected, float(spread / (expected or 1)))


class _Labels:
    """Labels of cells as integer codes, cached for every block that was read."""

    def __init__(self, shards: ShardSet, label: str) -> None:
        self._shards, self._label = shards, label
        self._codes: dict[str, int] = {}
        self._blocks: dict[int, np.ndarray] = {}

    def _block(self, number: int) -> np.ndarray:
        if number not in self._blocks:
            names = self._shards.read_block(number).batch.column(self._label).to_pylist()
            codes = [self._codes.setdefault(str(n), len(self._codes)) for n in names]
            self._blocks[number] = np.array(codes)
        return self._blocks[number]

    def pool(self, extent: BucketExtent, rng: np.random.Generator) -> np.ndarray:
        """Return the labels of all cells of a bucket, or of some blocks of a large one."""
        chosen = rng.permutation(extent.num_blocks)[:_POOL_BLOCKS] + extent.first_block
        return np.concatenate([self._block(int(number)) for number in chosen])

    def of(self, extent: BucketExtent, cells: np.ndarray) -> np.ndarray:
        """Return the labels of the given cells of a bucket."""
        blocks, places = extent.locate(cells)
        pairs = zip(blocks.tolist(), places.tolist(), strict=True)
        return np.array([self._block(block)[place] for block, place in pairs])


def _entropy(labels: np.ndarray) -> float:
    shares = np.bincount(labels) / len(labels)
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum())


def read_amplification(shards: ShardSet, plan: EpochPlan, nodes: int) -> float:
    """Return the bytes that all nodes read in an epoch, divided by the bytes of the split.

    Every node reads the lanes that contain its cells, and each block once per lane, because its
    cache holds one block per lane (all blocks of a small bucket). The number is computed from the
    plan; a test compares it with what readers really read.
    """
    weight = {
        b["length"]: b["bytes"] / b["blocks"]
        for b in shards.manifest["buckets"]
        if b["split"] == "train"
    }
    read = sum(
        weight[b.extent.length] * sum(_blocks_read(plan, i, nodes))
        for i, b in enumerate(plan.buckets)
    )
    return read / sum(weight[b.extent.length] * b.extent.num_blocks for b in plan.buckets)


def _blocks_read(plan: EpochPlan, number: int, nodes: int) -> list[int]:
    """Return how many blocks of a bucket each node reads in an epoch."""
    bucket = plan.buckets[number]
    extent = bucket.extent
    bounds = bucket.lane_bounds(np.arange(bucket.num_lanes + 1))
    starts = plan.rotated(0, number, bounds[:-1])
    ends = starts + np.diff(bounds)
    # The sequence of blocks is a circle; it is cut after the last block, which may be short.
    over = np.maximum(ends - extent.num_cells, 0)
    blocks = -(-(ends - over) // extent.block_cells) - starts // extent.block_cells
    blocks += -(-over // extent.block_cells)
    blocks[ends == starts] = 0
    last = bucket.num_steps - 1
    in_last = min(bucket.cells_per_step, extent.num_cells - last * bucket.cells_per_step)
    read = []
    for node in range(nodes):
        touched = np.zeros(bucket.num_lanes, dtype=bool)
        if last > 0:
            touched[bucket.lane(np.arange(*share(bucket.cells_per_step, nodes, node)))] = True
        slots = np.arange(*share(in_last, nodes, node))
        strays = np.unique(bucket.lane(bucket.columns(last, slots)))
        blocks_read = int(blocks[touched].sum() + (~touched[strays]).sum())
        holds_all = bucket.open_blocks(nodes) == extent.num_blocks
        read.append(min(blocks_read, extent.num_blocks) if holds_all else blocks_read)
    return read


def measure_shuffle(
    shards: ShardSet, label: str, tokens_per_step: int, seed: int
) -> dict[str, Any]:
    """Return the measures of the order of the training cells, as JSON values."""
    plan = EpochPlan(shards, "train", seed, tokens_per_step)
    mixing = label_mixing(shards, plan, label)
    open_bytes = sum(
        b.open_blocks(1) * b.extent.block_cells * b.extent.length * 2 for b in plan.buckets
    )
    return {
        "cells": plan.num_cells,
        "steps_per_epoch": plan.steps_per_epoch,
        "tokens_per_step": tokens_per_step,
        "label": label,
        "mixing": asdict(mixing) | {"ratio": mixing.ratio},
        "read_amplification": {
            nodes: float(read_amplification(shards, plan, nodes))
            for nodes in range(1, MOST_NODES + 1)
        },
        "lanes_by_bucket": {b.extent.length: b.num_lanes for b in plan.buckets},
        "open_blocks_bytes": int(open_bytes),
        "step_found_s": time_of_a_step(plan),
    }


def print_shuffle(measured: dict[str, Any]) -> None:
    """Print the measures that `measure_shuffle` returned."""
    mixing, read = measured["mixing"], measured["read_amplification"]
    worst = max(read, key=read.__getitem__)
    lanes = ", ".join(f"{n} of {length}" for length, n in measured["lanes_by_bucket"].items())
    print(
        f"{measured['cells']:,} cells, {measured['steps_per_epoch']:,} steps an epoch at "
        f"{measured['tokens_per_step']:,} padded tokens a step\n"
        f"label entropy in batches: {mixing['ratio']:.4f} of a random permutation's within the "
        f"bucket (+- {mixing['error']:.4f}; '{measured['label']}', {mixing['entropy']:.4f} of "
        f"{mixing['permuted_entropy']:.4f} nats, "
        f"{mixing['batches']} batches, {mixing['cells']:,} cells)\n"
        "bytes read in an epoch / bytes of the cells, by nodes: "
        + "  ".join(f"{n}: {read[n]:.3f}" for n in _SHOWN_NODES)
        + f"  (worst of 1 to {MOST_NODES}: {read[worst]:.3f} at {worst})\n"
        f"lanes by bucket: {lanes}\n"
        f"memory for open blocks: {measured['open_blocks_bytes'] / 2**20:,.0f} MiB at most, "
        "divided among ranks\n"
        f"cells of any step found in {1e3 * measured['step_found_s']:.1f} ms (one of 1,024 ranks)"
    )


def time_of_a_step(plan: EpochPlan, ranks: int = 1024, tries: int = 64) -> float:
    """Return the median time in seconds in which one of `ranks` finds its cells of a step."""
    rng = np.random.default_rng(0)
    seconds = []
    for number in rng.integers(0, 3 * plan.steps_per_epoch, tries):
        started = time.perf_counter()
        step = plan.step(int(number))
        plan.cells(step, *share(step.num_cells, ranks, int(rng.integers(ranks))))
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds))
