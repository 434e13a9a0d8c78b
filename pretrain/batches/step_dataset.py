"""Turn the order of cells into tensors: the micro-batches that each rank computes in a step.

`data_prep.shards.order` decides which cells form the global batch of a step. `StepDataset` then
takes the range of one rank, reads its cells, cuts them into micro-batches (`micro_batch_slots`),
pads them and masks genes; `steps_in_background` does this ahead of training. The result is a
function of (seed, step, rank, world size) alone, whatever the number of threads and whatever was
computed before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch

from data_prep.hashing import mix64
from data_prep.shards.order import EpochPlan, share
from data_prep.shards.reader import ShardSet
from pretrain.batches.forward_arguments import host_arguments
from pretrain.batches.pinned_memory import Staging
from pretrain.batches.shard_blocks import BlockCache
from pretrain.batches.step_batch import MicroBatch, RankStep
from pretrain.config import MaskingConfig, ObjectiveConfig
from pretrain.counting.arithmetic import FOLDS
from pretrain.model.packing import packed
from pretrain.objective.cell_objective import CellTargets, cell_targets
from pretrain.objective.masking import NO_LABEL, Masks, mask_rows, masks_of
from pretrain.objective.shown_genes import (
    draw_subsets,
    length_without_hidden,
    shown_length,
    take_out_hidden,
)

# Each background thread prepares so many steps ahead of the training step.
_STEPS_AHEAD = 2


def micro_batch_slots(
    num_cells: int, length: int, rank: int, world_size: int, budget: int
) -> list[tuple[int, int]]:
    """Return (start, stop) in the global batch of each micro-batch of one rank.

    All ranks get the same number of micro-batches, because ZeRO 2 and 3 hang otherwise. Their sizes
    are as equal as possible, and some may be empty.

    Parameters
    ----------
    num_cells
        Number of cells of the global batch.
    length
        Padded length of the bucket.
    budget
        Padded tokens of one micro-batch; a micro-batch has at least one row.
    """
    most = -(-num_cells // world_size)
    num_micro = -(-most // max(1, budget // length))
    start, stop = share(num_cells, world_size, rank)
    parts = [share(stop - start, num_micro, i) for i in range(num_micro)]
    return [(start + a, start + b) for a, b in parts]


class StepDataset:
    """A dataset whose item i holds what one rank computes in global step i.

    Parameters
    ----------
    tokens_per_micro_batch
        Padded tokens of one forward pass.
    quarantine
        Replace the cells of damaged blocks by empty rows without a loss, instead of raising.
    objective
        The weights of the gene objective and the cell objective; a part with weight 0 is left out.
    packs
        The model receives the cells one after another without padding.
    staging
        Lay each step out in memory for a single copy to a GPU.
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
        quarantine: bool = False,
        objective: ObjectiveConfig = ObjectiveConfig(),  # noqa: B008  frozen
        packs: bool = False,
        staging: Staging | None = None,
    ) -> None:
        self.plan = EpochPlan(shards, split, seed, tokens_per_step, masking.subset)
        open_blocks = sum(b.open_blocks(world_size) for b in self.plan.buckets)
        self.blocks = BlockCache(shards, open_blocks, quarantine)
        self._vocabulary = shards.vocabulary
        self._split, self._seed, self._masking = split, seed, masking
        self._objective = objective
        self._budget = tokens_per_micro_batch
        self._rank, self._world_size = rank, world_size
        self.packs, self._staging = packs, staging
        # For each bucket, the length of its longest cell after the subset of genes is drawn.
        masks = masks_of(seed, split, 0, shards.vocabulary, masking)
        self._lengths = [
            shown_length(b.extent.length, masking.subset, masks) for b in self.plan.buckets
        ]

    def __getitem__(self, step: int) -> RankStep:
        batch = self.plan.step(step)
        masks = masks_of(self._seed, self._split, batch.epoch, self._vocabulary, self._masking)
        length = self._lengths[batch.bucket]
        slots = micro_batch_slots(
            batch.num_cells, length, self._rank, self._world_size, self._budget
        )
        # The rank reads one range of cells for all its micro-batches, because finding the cells
        # costs the same for one or many.
        first = slots[0][0]
        cells = self.plan.cells(batch, first, slots[-1][1])
        tokens, offsets = self.blocks.gather(self.plan.buckets[batch.bucket].extent, cells)
        if self._masking.subset:
            tokens, offsets = draw_subsets(tokens, offsets, cells, self._masking.subset, masks)
        micro_batches, hidden = [], 0
        for start, stop in slots:
            start, stop = start - first, stop - first
            micro, num_hidden = self._micro_batch(
                cells[start:stop], tokens, offsets[start : stop + 1], length, masks
            )
            micro_batches.append(micro)
            hidden += num_hidden
        scored = sum(len(m.targets.scored_rows) for m in micro_batches if m.targets)
        served = np.diff(offsets) > 0
        staging, staged = self._staging, None
        if staging:
            staged = staging, staging.fill([host_arguments(m) for m in micro_batches])
        return RankStep(
            step,
            micro_batches,
            hidden if self._objective.gene_weight else 0,
            scored,
            len(tokens) - (hidden if self._masking.hidden == "remove" else 0),
            sum(m.num_places for m in micro_batches),
            int(served.sum()),
            int(mix64(cells[served]).sum(dtype=np.uint64).view(np.int64)),
            int((~served).sum()),
            staged,
        )

    def most_micro_batches(self) -> int:
        """Return the largest number of micro-batches that a rank has in a step."""
        return max(
            len(micro_batch_slots(b.cells_per_step, length, 0, self._world_size, self._budget))
            for b, length in zip(self.plan.buckets, self._lengths, strict=True)
        )

    def full_shapes(self) -> set[tuple[int, int]]:
        """Return the (rows, length) of all micro-batches except in the last step of a bucket."""
        masks = masks_of(self._seed, self._split, 0, self._vocabulary, self._masking)
        return {
            (stop - start, self._width(length, masks))
            for bucket, length in zip(self.plan.buckets, self._lengths, strict=True)
            for start, stop in micro_batch_slots(
                bucket.cells_per_step, length, self._rank, self._world_size, self._budget
            )
        }

    def heaviest_micro_batch(self) -> MicroBatch:
        """Return a micro-batch of the largest possible shape, made of empty rows without a loss."""
        shapes = []
        for bucket, length in zip(self.plan.buckets, self._lengths, strict=True):
            most = min(bucket.cells_per_step, bucket.extent.num_cells)
            slots = micro_batch_slots(most, length, 0, self._world_size, self._budget)
            rows = slots[0][1] - slots[0][0]
            shapes.append((rows * length, length, rows))
        _, length, rows = max(shapes)
        masks = masks_of(self._seed, self._split, 0, self._vocabulary, self._masking)
        nothing, offsets = np.zeros(0, dtype=np.uint16), np.zeros(rows + 1, dtype=np.int64)
        micro = self._micro_batch(np.full(rows, -1), nothing, offsets, length, masks)[0]
        if not self.packs:
            return micro
        # When packed, an empty row is a single token. Here all its positions are computed, so that
        # the pass needs as much memory as with real cells.
        most = masks.most(length) if self._objective.gene_weight else 0
        places = torch.arange(rows)[:, None] * micro.input_ids.shape[1] + torch.arange(most)
        full = replace(
            micro, attention_mask=None, masked_places=places.flatten(),
            labels=torch.full((rows * most,), NO_LABEL),
        )  # fmt: skip
        return self._packed(full, rows * most, masks.most(length))

    def _micro_batch(
        self,
        cells: np.ndarray,
        tokens: np.ndarray,
        offsets: np.ndarray,
        length: int,
        masks: Masks,
    ) -> tuple[MicroBatch, int]:
        if len(cells) == 0:
            # An empty micro-batch is computed like the others, but has no loss.
            cells, offsets = np.array([-1], dtype=np.int64), np.zeros(2, dtype=np.int64)
        shape = (len(cells), length)
        # Each bucket has one shape, because every new shape costs a kernel, and on a CPU memory
        # that stays allocated.
        most = len(cells) * masks.most(length)
        inputs, real = self._tensor(shape, torch.int32), self._tensor(shape, torch.bool)
        places, labels = self._tensor((most,), torch.int64), self._tensor((most,), torch.int64)
        ranks = self._tensor((most,), torch.float32)
        hidden = mask_rows(
            tokens, offsets, cells, masks, self._vocabulary.pad_token,
            inputs.numpy(), real.numpy(), places.numpy(), labels.numpy(), ranks.numpy(),
        )  # fmt: skip
        is_padded = offsets[-1] - offsets[0] < len(cells) * length
        mask = real if is_padded else None
        targets, first_gene = None, self._vocabulary.first_gene_token
        if self._objective.cell_weight:
            targets = cell_targets(inputs, places, labels, first_gene)
            if self._masking.hidden == "remove":
                inputs, mask = self._without_hidden(inputs, real, places[:hidden], masks)
                targets = targets._replace(visible_BL=inputs >= first_gene)
        if self._objective.gene_weight == 0:
            places, labels, ranks = places[:0], labels[:0], ranks[:0]
        folds = None
        if self._objective.prior != "none":
            folds = self._tensor((len(cells),), torch.int64)
            folds.numpy()[:] = cells % FOLDS
        micro = MicroBatch(inputs, mask, places, labels, ranks, cells, targets, folds)
        return self._packed(micro, hidden, masks.most(length)), hidden

    def _packed(self, micro: MicroBatch, hidden: int, most: int) -> MicroBatch:
        """Return the micro-batch with its cells also in packed form, if the model needs it."""
        if not self.packs:
            return micro
        # Here the number of hidden genes need not be the same for all steps of a bucket, because
        # the number of packed tokens varies anyway.
        names = ("masked_places", "labels", "relative_ranks")
        micro = replace(micro, **{n: getattr(micro, n)[:hidden] for n in names})
        if targets := micro.targets:
            asked = targets.rows_H[:hidden], targets.genes_H[:hidden]
            micro = replace(micro, targets=CellTargets(targets.visible_BL, *asked))
        ids, packing = packed(micro.input_ids, micro.attention_mask, micro.masked_places, most)
        return replace(micro, packed=(ids, packing))

    def _width(self, length: int, masks: Masks) -> int:
        """Return how many tokens the model receives at most of a cell of `length` tokens."""
        return length_without_hidden(length, masks) if self._masking.hidden == "remove" else length

    def _without_hidden(
        self, inputs: torch.Tensor, real: torch.Tensor, places: torch.Tensor, masks: Masks
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return input ids and attention mask of a micro-batch without its hidden genes."""
        shape = len(inputs), self._width(inputs.shape[1], masks)
        shown, shown_real = self._tensor(shape, torch.int32), self._tensor(shape, torch.bool)
        take_out_hidden(
            inputs.numpy(), real.numpy(), places.numpy(), self._vocabulary.pad_token,
            shown.numpy(), shown_real.numpy(),
        )  # fmt: skip
        return shown, None if shown_real.all() else shown_real

    def _tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)


def steps_in_background(
    dataset: StepDataset, first: int, stop: int, num_threads: int
) -> Iterator[RankStep]:
    """Yield the steps in order; background threads prepare them ahead.

    With 0 threads each step is prepared when it is asked for. Reading, checksums, copying and
    masking release Python's global lock, so threads are as fast as processes here. They share one
    cache, so each block is read once per rank and not once per worker.
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
