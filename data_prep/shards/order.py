"""Computes the order of cells in training; nothing is stored.

`EpochPlan` maps (seed, epoch, step) to the length bucket and the cell numbers of the global batch.
Within an epoch the steps of a bucket, called its *turns*, are spread evenly with jitter, so that at
any time the buckets are drawn in proportion to the number of their remaining turns.

`geneloom prepare` has shuffled the cells of a bucket over the whole corpus. Every epoch permutes
the bucket's full tars (its full blocks, if there is only one tar or the tars have different sizes),
starts at another cell, and permutes the cells of each block. The resulting sequence is cut into
*lanes* of equal length, and a batch takes the next cells of every lane, side by side. A rank
computes a fixed range of the batch and therefore always the same lanes: whatever the world size, it
reads its own part of the tars, each block once, in the order of the file.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_prep.hashing import keyed_hash, permute, stream_key, stream_keys, unit_interval
from data_prep.shards.format import BucketExtent
from data_prep.shards.reader import ShardSet

# A lane that two nodes share is read by both. With N nodes these are at most N - 1 of 320 lanes, so
# 64 nodes read 1.197 times the corpus. More lanes mean more open blocks on a single node.
MAX_LANES = 320
# A block in which one lane ends and the next begins is read twice, so a lane has at least eight
# blocks.
_MIN_BLOCKS_PER_LANE = 8
# A small bucket has at least this many lanes; with fewer, the cells of a block would be in the same
# batch in every epoch.
_MIN_LANES = 16


@dataclass(frozen=True)
class Step:
    """One global batch: its bucket, the number of the turn, the padded length, and its cells.

    The last turn of a bucket in an epoch has the remaining cells, which may be few.
    """

    epoch: int
    bucket: int
    turn: int
    length: int
    num_cells: int


@dataclass(frozen=True)
class Bucket:
    """A length bucket, and how its cells are divided into turns and lanes."""

    extent: BucketExtent
    cells_per_step: int

    @property
    def num_steps(self) -> int:
        return -(-self.extent.num_cells // self.cells_per_step)

    @property
    def num_lanes(self) -> int:
        by_blocks = max(_MIN_LANES, self.extent.num_blocks // _MIN_BLOCKS_PER_LANE)
        return min(self.cells_per_step, MAX_LANES, by_blocks)

    def open_blocks(self, ranks: int) -> int:
        """Return how many blocks one of `ranks` readers keeps open.

        It needs one block for each of its lanes, and about a quarter more, because the batches
        that are prepared ahead have moved on to the next block of a lane.
        """
        lanes = -(-self.num_lanes // ranks) + 1
        return min(self.extent.num_blocks, lanes + lanes // 4 + 4)

    def lane(self, column: np.ndarray) -> np.ndarray:
        """Return the lane of each column of the batch."""
        return ((column + 1) * self.num_lanes - 1) // self.cells_per_step

    def columns(self, turn: int, slots: np.ndarray) -> np.ndarray:
        """Return the column of the batch that each slot of a turn belongs to.

        All columns have a cell in the first `num_steps` - 1 turns. The columns that also have a
        cell in the last turn are spread evenly, so that each rank stays in its lanes.
        """
        if turn < self.num_steps - 1:
            return slots
        return ((slots + 1) * self.cells_per_step - 1) // self._last_turn_cells

    @property
    def _last_turn_cells(self) -> int:
        return self.extent.num_cells - (self.num_steps - 1) * self.cells_per_step

    def lane_bounds(self, lane: np.ndarray) -> np.ndarray:
        """Return where lanes begin in the bucket's sequence; for `num_lanes`, where it ends."""
        column = lane * self.cells_per_step // self.num_lanes
        return column * (self.num_steps - 1) + self._longer_before(column)

    def places(self, turn: int, slots: np.ndarray) -> np.ndarray:
        """Return the places in the bucket's sequence of cells that the slots of a turn take."""
        columns = self.columns(turn, slots)
        lane = self.lane(columns)
        first = lane * self.cells_per_step // self.num_lanes
        width = (lane + 1) * self.cells_per_step // self.num_lanes - first
        before = columns - first
        if turn == self.num_steps - 1:
            before = self._longer_before(columns) - self._longer_before(first)
        return self.lane_bounds(lane) + turn * width + before

    def _longer_before(self, column: np.ndarray) -> np.ndarray:
        return column * self._last_turn_cells // self.cells_per_step


class EpochPlan:
    """Computes which cells are in which training step.

    Parameters
    ----------
    shards
        Shards, whose buckets are used.
    split
        ``train`` or ``heldout``.
    seed
        Seed of the order.
    tokens_per_step
        Padded tokens of a global batch; a bucket of length L gives ``tokens_per_step // L`` cells.
    subset
        Largest number of genes of a cell that the model sees; L is not larger. None: all genes.

    Raises
    ------
    ValueError
        `tokens_per_step` is less than one cell of the longest bucket.
    """

    def __init__(
        self,
        shards: ShardSet,
        split: str,
        seed: int,
        tokens_per_step: int,
        subset: int | None = None,
    ) -> None:
        self._key = stream_key(seed, "order", split)
        extents = shards.extents(split)
        lengths = [e.length if subset is None else min(e.length, subset) for e in extents]
        if extents and tokens_per_step < lengths[-1]:
            raise ValueError(
                f"batch.tokens_per_step={tokens_per_step}: below the longest bucket of the "
                f"shards ({lengths[-1]} tokens)"
            )
        sizes = zip(extents, lengths, strict=True)
        self.buckets = [Bucket(e, tokens_per_step // length) for e, length in sizes]
        self._steps = np.array([b.num_steps for b in self.buckets], dtype=np.int64)

    @property
    def steps_per_epoch(self) -> int:
        return int(self._steps.sum())

    @property
    def num_cells(self) -> int:
        return sum(b.extent.num_cells for b in self.buckets)

    def step(self, global_step: int) -> Step:
        """Return the global batch of a step (0-based, over all epochs)."""
        epoch, step = divmod(global_step, self.steps_per_epoch)
        bucket, turn = self._bucket_turn(epoch, step)
        chosen = self.buckets[bucket]
        cells_left = chosen.extent.num_cells - turn * chosen.cells_per_step
        return Step(
            epoch, bucket, turn, chosen.extent.length, min(chosen.cells_per_step, cells_left)
        )

    def cells(self, step: Step, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return int64 cell numbers of the slots start..stop-1 of a global batch; default: all."""
        slots = np.arange(start, step.num_cells if stop is None else stop)
        places = self.buckets[step.bucket].places(step.turn, slots)
        return self.cells_at(step.epoch, step.bucket, places)

    def cells_at(self, epoch: int, bucket: int, places: np.ndarray) -> np.ndarray:
        """Return the cell numbers at the given places of a bucket's sequence in an epoch."""
        extent = self.buckets[bucket].extent
        key = self._bucket_key(epoch, bucket)
        slots, inside = np.divmod(self.rotated(epoch, bucket, places), extent.run_cells)
        full_runs = extent.num_cells // extent.run_cells
        is_full = slots < full_runs
        runs = np.full_like(slots, full_runs)
        runs[is_full] = permute(slots[is_full], full_runs, key)
        blocks, offsets = np.divmod(runs * extent.run_cells + inside, extent.block_cells)
        starts = blocks * extent.block_cells
        sizes = np.minimum(extent.block_cells, extent.num_cells - starts)
        for size in np.unique(sizes):
            here = sizes == size
            offsets[here] = permute(offsets[here], int(size), stream_keys(key, blocks[here]))
        return extent.first_cell + starts + offsets

    def rotated(self, epoch: int, bucket: int, places: np.ndarray) -> np.ndarray:
        """Return the places in the row of permuted tars that belong to places of the sequence.

        The last tar may be short, so it is not permuted and always stands last in the row. The
        rotation by a random number of cells moves it to another time in each epoch.
        """
        num_cells = self.buckets[bucket].extent.num_cells
        return (places + self._bucket_key(epoch, bucket) % num_cells) % num_cells

    def _bucket_key(self, epoch: int, bucket: int) -> int:
        return stream_key(self._key, "cells", epoch, bucket)

    def _bucket_turn(self, epoch: int, step: int) -> tuple[int, int]:
        """Return the bucket and the number of its turn at a step of an epoch.

        Turn j of a bucket with S turns has the time (j + u) / S, where u in [0, 1) is from a hash.
        The steps of the epoch are the turns of all buckets, sorted by time. Before a time t a
        bucket has t S turns, plus or minus one, so it is enough to sort a window of a few turns per
        bucket.
        """
        margin = len(self.buckets) + 1
        before = self._turns_before(epoch, (step - margin) / self.steps_per_epoch)
        after = self._turns_before(epoch, (step + 1 + margin) / self.steps_per_epoch)
        owner = np.repeat(np.arange(len(self.buckets)), after - before)
        turns = np.concatenate([np.arange(a, b) for a, b in zip(before, after, strict=True)])
        order = np.lexsort((turns, owner, self._times(epoch, owner, turns)))
        at = order[step - int(before.sum())]
        return int(owner[at]), int(turns[at])

    def _turns_before(self, epoch: int, time: float) -> np.ndarray:
        """Return int64 [buckets], the number of turns of each bucket before a time."""
        if not 0 < time < 1:
            return np.zeros_like(self._steps) if time <= 0 else self._steps
        # Rounding can put a turn on the wrong side of the limit, so only times are compared.
        turn = np.minimum((time * self._steps).astype(np.int64), self._steps - 1)
        return turn + (self._times(epoch, np.arange(len(self._steps)), turn) < time)

    def _times(self, epoch: int, bucket: np.ndarray, turn: np.ndarray) -> np.ndarray:
        key = stream_key(self._key, "turn", epoch)
        jitter = unit_interval(keyed_hash(key, (bucket.astype(np.int64) << 48) + turn))
        return (turn + jitter) / self._steps[bucket]


def share(total: int, parts: int, number: int) -> tuple[int, int]:
    """Return (start, stop) of one of `parts` nearly equal ranges of ``range(total)``."""
    size, extra = divmod(total, parts)
    start = number * size + min(number, extra)
    return start, start + size + (number < extra)
