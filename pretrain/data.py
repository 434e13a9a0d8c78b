"""The order of cells, as arithmetic, and the batches that follow from it.

Three layers, each a pure function of the one before:

1. `EpochPlan.step`: (seed, epoch, step) -> length bucket and cell numbers of the global batch.
2. `rank_rows`: the share of one rank, cut into micro-batches, equally many on every rank.
3. `StepDataset`: reads the cells, masks them, returns tensors.

Within an epoch the steps of a bucket come in order, spread evenly with jitter over the epoch, so
that at any time the buckets are drawn in proportion to what is left of them, and neighbouring steps
read neighbouring blocks. Every epoch permutes the blocks of a bucket and the cells in each block
anew and starts at another cell. The cells were shuffled over the whole corpus when they were
prepared.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from data_prep.hashing import keyed_hash, permute, stream_key, unit_interval
from data_prep.shards import Block, ShardSet
from pretrain.config import MaskingConfig
from pretrain.masking import mask_rows, mask_stream, num_masked

NO_LABEL = -100  # what torch's cross_entropy leaves out
# Blocks of one bucket that a worker keeps decoded: consecutive steps share at most two.
_CACHED_BLOCKS_PER_BUCKET = 2


@dataclass(frozen=True)
class StepCells:
    """The global batch of one step: padded length and cell numbers (int64).

    The last step of a bucket in an epoch has what is left, which may be few.
    """

    epoch: int
    bucket: int
    length: int
    cells: np.ndarray


@dataclass(frozen=True)
class _Bucket:
    length: int
    first_cell: int
    num_cells: int
    block_cells: int
    cells_per_step: int

    @property
    def num_steps(self) -> int:
        return -(-self.num_cells // self.cells_per_step)


class EpochPlan:
    """Which cells are in which step, computed, never stored.

    Parameters
    ----------
    shards
        Gives bucket sizes and block sizes.
    split
        ``train`` or ``heldout``.
    seed
        Of the order.
    tokens_per_step
        Padded tokens of a global batch; a bucket of length L gives ``tokens_per_step // L`` cells.

    Raises
    ------
    ValueError
        The budget does not hold one cell of the longest bucket.
    """

    def __init__(self, shards: ShardSet, split: str, seed: int, tokens_per_step: int) -> None:
        self._key = stream_key(seed, "order", split)
        self.buckets = []
        for length in shards.bucket_lengths(split):
            blocks = shards.block_numbers(split, length)
            sizes = shards.index["cells"][blocks]
            if tokens_per_step < length:
                raise ValueError(
                    f"batch.tokens_per_step={tokens_per_step}: below the longest bucket of the "
                    f"shards ({shards.bucket_lengths(split)[-1]} tokens)"
                )
            self.buckets.append(
                _Bucket(
                    length,
                    int(shards.index["first_cell"][blocks[0]]),
                    int(sizes.sum()),
                    int(sizes[0]),
                    tokens_per_step // length,
                )
            )
        self._steps = np.array([b.num_steps for b in self.buckets], dtype=np.int64)

    @property
    def steps_per_epoch(self) -> int:
        return int(self._steps.sum())

    @property
    def num_cells(self) -> int:
        return sum(b.num_cells for b in self.buckets)

    def step(self, global_step: int) -> StepCells:
        """Return the global batch of a step (0-based, over all epochs)."""
        epoch, step = divmod(global_step, self.steps_per_epoch)
        bucket, turn = self._bucket_turn(epoch, step)
        chosen = self.buckets[bucket]
        start = turn * chosen.cells_per_step
        stop = min(start + chosen.cells_per_step, chosen.num_cells)
        cells = self._cells(epoch, bucket, np.arange(start, stop))
        return StepCells(epoch, bucket, chosen.length, cells)

    def _bucket_turn(self, epoch: int, step: int) -> tuple[int, int]:
        """Return (bucket, how many steps of it came before) of a step within its epoch.

        Turn j of a bucket with S turns has the time (j + u) / S, u from a hash; the steps of the
        epoch are all turns by time. How many turns lie before a time is a closed form, so the
        time of the step's turn is found by bisection and nothing is stored.
        """
        low, high = 0.0, 1.0
        while self._turns_before(epoch, high).sum() - self._turns_before(epoch, low).sum() > 64:
            middle = (low + high) / 2
            if self._turns_before(epoch, middle).sum() <= step:
                low = middle
            else:
                high = middle
        before, after = self._turns_before(epoch, low), self._turns_before(epoch, high)
        turns = np.concatenate([np.arange(a, b) for a, b in zip(before, after, strict=True)])
        owner = np.repeat(np.arange(len(self.buckets)), after - before)
        order = np.lexsort((turns, owner, self._times(epoch, owner, turns)))
        at = order[step - int(before.sum())]
        return int(owner[at]), int(turns[at])

    def _turns_before(self, epoch: int, time: float) -> np.ndarray:
        """Return int64 [buckets], the number of turns of each bucket with a smaller time."""
        if time >= 1.0:
            return self._steps
        owner = np.arange(len(self.buckets))
        # Rounding can put a turn of the neighbouring stratum on either side: compare times only.
        turn = np.minimum((time * self._steps).astype(np.int64), self._steps - 1)
        return turn + (self._times(epoch, owner, turn) < time)

    def _times(self, epoch: int, bucket: np.ndarray, turn: np.ndarray) -> np.ndarray:
        key = stream_key(self._key, "turn", epoch)
        jitter = unit_interval(keyed_hash(key, (bucket.astype(np.int64) << 48) + turn))
        return (turn + jitter) / self._steps[bucket]

    def _cells(self, epoch: int, bucket: int, positions: np.ndarray) -> np.ndarray:
        """Return the cell numbers at positions of a bucket's order in an epoch."""
        chosen = self.buckets[bucket]
        key = stream_key(self._key, "cells", epoch, bucket)
        # The last block may be short and keeps its slot; the rotation moves it through the epoch.
        positions = (positions + int(key % chosen.num_cells)) % chosen.num_cells
        full_blocks = chosen.num_cells // chosen.block_cells
        slots, offsets = np.divmod(positions, chosen.block_cells)
        cells = np.empty_like(positions)
        for slot in np.unique(slots):
            here = slots == slot
            is_full = slot < full_blocks
            block = int(permute(np.array([slot]), full_blocks, key)[0]) if is_full else full_blocks
            size = min(chosen.block_cells, chosen.num_cells - block * chosen.block_cells)
            inside = permute(offsets[here], size, stream_key(key, block))
            cells[here] = chosen.first_cell + block * chosen.block_cells + inside
        return cells


def rank_rows(
    cells: np.ndarray, length: int, rank: int, world_size: int, budget: int
) -> list[np.ndarray]:
    """Return the micro-batches of a rank: int64 cell numbers, its share of a global batch.

    All ranks get the same number of micro-batches (ZeRO 2 and 3 hang otherwise), as even as can be.
    A micro-batch without a cell is one row of -1: it is computed, and weighs nothing.

    Parameters
    ----------
    cells
        int64 [cells of the global batch].
    length
        Padded length of the bucket.
    budget
        Padded tokens of one micro-batch; at least one row is taken.
    """
    most = -(-len(cells) // world_size)
    num_micro = -(-most // max(1, budget // length))
    mine = np.array_split(cells, world_size)[rank]
    filler = np.array([-1], dtype=np.int64)
    return [part if part.size else filler for part in np.array_split(mine, num_micro)]


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass.

    ``input_ids`` int64 [B, L]; ``attention_mask`` bool [B, L], None when nothing is padded;
    ``masked_places`` int64 [M], flat index into B x L; ``labels`` int64 [M], `NO_LABEL` behind the
    hidden genes, so that M depends on the bucket alone; ``relative_ranks`` float32 [M], place of
    the hidden gene in its cell, 0 = highest expression.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    masked_places: torch.Tensor
    labels: torch.Tensor
    relative_ranks: torch.Tensor


@dataclass(frozen=True)
class RankStep:
    """What one rank computes in one step: micro-batches, and what they hold."""

    step: int
    micro_batches: list[MicroBatch]
    masked: int
    tokens: int
    padded_tokens: int
    cells: int


class CellReader:
    """Reads single cells by number; keeps the blocks in use decoded."""

    def __init__(self, shards: ShardSet, max_blocks: int) -> None:
        self._shards = shards
        self._starts = shards.index["first_cell"]
        self._blocks: OrderedDict[int, Block] = OrderedDict()
        self._max_blocks = max_blocks

    def tokens(self, cell: int) -> np.ndarray:
        """Return the tokens of a cell (uint16 or uint32)."""
        number = int(np.searchsorted(self._starts, cell, side="right")) - 1
        if number not in self._blocks:
            self._blocks[number] = self._shards.read_block(number)
            if len(self._blocks) > self._max_blocks:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(number)
        block = self._blocks[number]
        inside = cell - int(self._starts[number])
        return block.tokens[block.offsets[inside] : block.offsets[inside + 1]]


class StepDataset(Dataset):
    """Item i = what one rank computes in global step i. Nothing depends on worker or history."""

    def __init__(
        self,
        shards: ShardSet,
        split: str,
        seed: int,
        tokens_per_step: int,
        tokens_per_micro_batch: int,
        masking: MaskingConfig,
        rank: int,
        world_size: int,
        num_steps: int,
    ) -> None:
        self.plan = EpochPlan(shards, split, seed, tokens_per_step)
        self._shards = shards
        self._split = split
        self._seed = seed
        self._budget = tokens_per_micro_batch
        self._masking = masking
        self._rank, self._world_size = rank, world_size
        self._num_steps = num_steps
        self._reader: CellReader | None = None

    def __len__(self) -> int:
        return self._num_steps

    def __getitem__(self, step: int) -> RankStep:
        if self._reader is None:
            blocks = _CACHED_BLOCKS_PER_BUCKET * len(self.plan.buckets)
            self._reader = CellReader(self._shards, blocks)
        batch = self.plan.step(step)
        rows = rank_rows(batch.cells, batch.length, self._rank, self._world_size, self._budget)
        # Evaluation reads one "epoch"; its masks stay the same for ever.
        stream = mask_stream(self._seed, self._split, batch.epoch)
        micro_batches = []
        tokens = 0
        for cells in rows:
            micro, real = self._micro_batch(cells, batch.length, stream)
            micro_batches.append(micro)
            tokens += real
        return RankStep(
            step,
            micro_batches,
            sum(int((m.labels != NO_LABEL).sum()) for m in micro_batches),
            tokens,
            sum(m.input_ids.numel() for m in micro_batches),
            int(sum((cells >= 0).sum() for cells in rows)),
        )

    def _micro_batch(self, cells: np.ndarray, length: int, stream: int) -> tuple[MicroBatch, int]:
        assert self._reader is not None
        vocabulary = self._shards.vocabulary
        tokens, lengths = padded_rows(
            [self._reader.tokens(int(c)) if c >= 0 else None for c in cells],
            length,
            vocabulary.pad_token,
        )
        masked = mask_rows(tokens, lengths, cells, stream, vocabulary, self._masking)
        row, place = np.divmod(masked.places, length)
        # One shape per bucket: every new shape costs a kernel, and on CPU memory that is kept.
        most = len(cells) * int(num_masked(np.array([length]), self._masking.probability)[0])
        unused = (0, most - len(masked.places))
        return MicroBatch(
            torch.from_numpy(masked.inputs),
            attention_mask(lengths, length),
            torch.from_numpy(np.pad(masked.places, unused)),
            torch.from_numpy(np.pad(masked.labels, unused, constant_values=NO_LABEL)),
            torch.from_numpy(np.pad(place / lengths[row], unused).astype(np.float32)),
        ), int(lengths.sum())


def padded_rows(
    cells: list[np.ndarray | None], length: int, pad_token: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return (int64 [rows, length] tokens, int64 [rows] lengths); None gives a row of padding."""
    tokens = np.full((len(cells), length), pad_token, dtype=np.int64)
    lengths = np.zeros(len(cells), dtype=np.int64)
    for row, cell in enumerate(cells):
        if cell is not None:
            tokens[row, : len(cell)] = cell
            lengths[row] = len(cell)
    return tokens, lengths


def attention_mask(lengths: np.ndarray, length: int) -> torch.Tensor | None:
    """Return bool [rows, length], True at real tokens; None if there is no padding at all.

    Filler rows attend to their first place: a softmax over nothing would be NaN.
    """
    if lengths.min() == length:
        return None
    return torch.from_numpy(np.arange(length) < np.maximum(lengths, 1)[:, None])
