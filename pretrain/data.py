"""From the order of cells to tensors: what each rank computes in a step.

`data_prep.order` says which cells are in a step. Here a rank takes its range of them, cuts it into
micro-batches, reads, pads and masks. Everything is a function of (seed, step, rank, world size):
threads and history change nothing.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from data_prep.hashing import mix64
from data_prep.order import EpochPlan, share
from data_prep.shards import BucketExtent, DamagedBlock, ShardSet
from pretrain.config import MaskingConfig
from pretrain.masking import Masks, mask_rows, masks_of

logger = logging.getLogger(__name__)

# Steps made ahead of the one that trains, for each background thread.
_STEPS_AHEAD = 2


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass.

    ``input_ids`` int64 [B, L]; ``attention_mask`` bool [B, L], None when nothing is padded;
    ``masked_places`` int64 [M], flat index into B x L; ``labels`` int64 [M], `NO_LABEL` behind the
    hidden genes, so that M depends on the bucket alone; ``relative_ranks`` float32 [M], place of
    the hidden gene in its cell, 0 = highest expression; ``cells`` int64 [B] numbers in the shards,
    -1 for filler (numpy: it stays on the host).
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    masked_places: torch.Tensor
    labels: torch.Tensor
    relative_ranks: torch.Tensor
    cells: np.ndarray


@dataclass(frozen=True)
class RankStep:
    """What one rank computes in one step: micro-batches, and what they hold.

    `cells_digest`: sum of a hash of every cell served, modulo 2**64, as int64; it adds up over
    ranks and steps to the same number for the same cells, in any order.
    """

    step: int
    micro_batches: list[MicroBatch]
    masked: int
    tokens: int
    padded_tokens: int
    cells: int
    cells_digest: int
    quarantined: int


def micro_batch_slots(
    num_cells: int, length: int, rank: int, world_size: int, budget: int
) -> list[tuple[int, int]]:
    """Return (start, stop) in the global batch of each micro-batch of a rank.

    All ranks get the same number of micro-batches (ZeRO 2 and 3 hang otherwise), as even as can be;
    some may be empty.

    Parameters
    ----------
    num_cells
        Of the global batch.
    length
        Padded length of the bucket.
    budget
        Padded tokens of one micro-batch; at least one row is taken.
    """
    most = -(-num_cells // world_size)
    num_micro = -(-most // max(1, budget // length))
    start, stop = share(num_cells, world_size, rank)
    parts = [share(stop - start, num_micro, i) for i in range(num_micro)]
    return [(start + a, start + b) for a, b in parts]


class BlockCache:
    """Decoded blocks, read once while they are in use, by any number of threads.

    Parameters
    ----------
    max_blocks
        Blocks kept; the one unused for longest goes first.
    quarantine
        Leave the cells of a damaged block out, instead of raising.
    """

    def __init__(self, shards: ShardSet, max_blocks: int, quarantine: bool) -> None:
        self._shards = shards
        self._max_blocks = max_blocks
        self._quarantine = quarantine
        self._lock = threading.Lock()
        self._blocks: OrderedDict[int, Future] = OrderedDict()
        self.blocks_read = 0

    def block(self, number: int) -> tuple[np.ndarray, list[int]] | None:
        """Return (tokens, offsets) of a block; None if it is damaged and quarantined."""
        with self._lock:
            known = self._blocks.get(number)
            if known is None:
                mine = self._blocks[number] = Future()
                if len(self._blocks) > self._max_blocks:
                    self._blocks.popitem(last=False)
            else:
                self._blocks.move_to_end(number)
        if known is not None:
            return known.result()
        try:
            mine.set_result(self._read(number))
        except BaseException as error:
            mine.set_exception(error)
            raise
        return mine.result()

    def _read(self, number: int) -> tuple[np.ndarray, list[int]] | None:
        self.blocks_read += 1
        try:
            block = self._shards.read_block(number)
        except DamagedBlock as error:
            if not self._quarantine:
                raise
            logger.warning("quarantined: %s", error)
            return None
        return block.tokens, block.offsets.tolist()

    def rows(self, extent: BucketExtent, cells: np.ndarray) -> list[np.ndarray | None]:
        """Return the tokens of each cell of one bucket; None where they are quarantined."""
        numbers, inside = extent.locate(cells)
        blocks = {n: self.block(n) for n in np.unique(numbers).tolist()}
        rows: list[np.ndarray | None] = []
        for number, place in zip(numbers.tolist(), inside.tolist(), strict=True):
            block = blocks[number]
            rows.append(block and block[0][block[1][place] : block[1][place + 1]])
        return rows


class StepDataset:
    """Item i = what one rank computes in global step i.

    Parameters
    ----------
    tokens_per_micro_batch
        Padded tokens of one forward pass.
    pin_memory
        Make tensors that a GPU copies from while it computes.
    quarantine
        Leave the cells of damaged blocks out (rows that weigh nothing), instead of raising.
    """

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
        pin_memory: bool = False,
        quarantine: bool = False,
    ) -> None:
        self.plan = EpochPlan(shards, split, seed, tokens_per_step)
        open_blocks = sum(b.open_blocks(world_size) for b in self.plan.buckets)
        self.blocks = BlockCache(shards, open_blocks, quarantine)
        self._vocabulary = shards.vocabulary
        self._token_type = np.uint16 if shards.vocabulary.num_tokens <= 2**16 else np.uint32
        self._split, self._seed, self._masking = split, seed, masking
        self._budget = tokens_per_micro_batch
        self._rank, self._world_size = rank, world_size
        self._pin_memory = pin_memory

    def __getitem__(self, step: int) -> RankStep:
        batch = self.plan.step(step)
        masks = masks_of(self._seed, self._split, batch.epoch, self._vocabulary, self._masking)
        slots = micro_batch_slots(
            batch.num_cells, batch.length, self._rank, self._world_size, self._budget
        )
        # One range of cells for the whole rank: finding them costs the same for one or many.
        first = slots[0][0]
        cells = self.plan.cells(batch, first, slots[-1][1])
        rows = self.blocks.rows(self.plan.buckets[batch.bucket].extent, cells)
        micro_batches, masked = [], 0
        for start, stop in slots:
            part = slice(start - first, stop - first)
            micro, hidden = self._micro_batch(cells[part], rows[part], batch.length, masks)
            micro_batches.append(micro)
            masked += hidden
        served = np.array([row is not None for row in rows], dtype=bool)
        return RankStep(
            step,
            micro_batches,
            masked,
            sum(len(row) for row in rows if row is not None),
            sum(m.input_ids.numel() for m in micro_batches),
            int(served.sum()),
            int(mix64(cells[served]).sum(dtype=np.uint64).view(np.int64)),
            int((~served).sum()),
        )

    def heaviest_micro_batch(self) -> MicroBatch:
        """Return the largest shape that can come, of filler rows: computed, it weighs nothing."""
        shapes = []
        for bucket in self.plan.buckets:
            most, length = min(bucket.cells_per_step, bucket.extent.num_cells), bucket.extent.length
            slots = micro_batch_slots(most, length, 0, self._world_size, self._budget)
            rows = slots[0][1] - slots[0][0]
            shapes.append((rows * length, length, rows))
        _, length, rows = max(shapes)
        masks = masks_of(self._seed, self._split, 0, self._vocabulary, self._masking)
        return self._micro_batch(np.full(rows, -1), [None] * rows, length, masks)[0]

    def _micro_batch(
        self, cells: np.ndarray, rows: list[np.ndarray | None], length: int, masks: Masks
    ) -> tuple[MicroBatch, int]:
        if len(rows) == 0:
            # Computed like the others, and weighs nothing.
            cells, rows = np.array([-1], dtype=np.int64), [None]
        nothing = np.zeros(0, dtype=self._token_type)
        filled = [nothing if row is None else row for row in rows]
        lengths = np.array([len(row) for row in filled])
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        # One shape per bucket: every new shape costs a kernel, and on CPU memory that is kept.
        most = len(rows) * masks.most(length)
        inputs = self._tensor((len(rows), length), torch.int64)
        places, labels = self._tensor((most,), torch.int64), self._tensor((most,), torch.int64)
        ranks = self._tensor((most,), torch.float32)
        hidden = mask_rows(
            np.concatenate(filled), offsets, cells, masks, self._vocabulary.pad_token,
            inputs.numpy(), places.numpy(), labels.numpy(), ranks.numpy(),
        )  # fmt: skip
        mask = attention_mask(lengths, length)
        if mask is not None and self._pin_memory:
            mask = mask.pin_memory()
        return MicroBatch(inputs, mask, places, labels, ranks, cells), hidden

    def _tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=self._pin_memory)


def steps_in_background(
    dataset: StepDataset, first: int, stop: int, num_threads: int
) -> Iterator[RankStep]:
    """Yield steps in order, made ahead by threads; 0 threads: made when asked for.

    Reading, checksums, copying and masking leave Python's lock, so threads do what processes would,
    and share one cache: each block is read once per rank, not once per worker.
    """
    if num_threads == 0:
        yield from (dataset[step] for step in range(first, stop))
        return
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="loader")
    ahead: deque[Future[RankStep]] = deque()
    try:
        for step in range(first, stop):
            while len(ahead) < 1 + _STEPS_AHEAD * num_threads and step + len(ahead) < stop:
                ahead.append(pool.submit(dataset.__getitem__, step + len(ahead)))
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def padded_rows(
    cells: list[np.ndarray], length: int, pad_token: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return (int64 [rows, length] tokens, int64 [rows] lengths)."""
    tokens = np.full((len(cells), length), pad_token, dtype=np.int64)
    for row, cell in enumerate(cells):
        tokens[row, : len(cell)] = cell
    return tokens, np.array([len(cell) for cell in cells], dtype=np.int64)


def attention_mask(lengths: np.ndarray, length: int) -> torch.Tensor | None:
    """Return bool [rows, length], True at real tokens; None if there is no padding at all.

    Filler rows attend to their first place: a softmax over nothing would be NaN.
    """
    if lengths.min() == length:
        return None
    return torch.from_numpy(np.arange(length) < np.maximum(lengths, 1)[:, None])
