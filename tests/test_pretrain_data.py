"""From the order of cells to micro-batches: the same whatever reads them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from data_prep.hashing import mix64
from data_prep.shards.reader import DamagedBlock, ShardSet
from pretrain.config import MaskingConfig
from pretrain.objective.masking import NO_LABEL
from tests.synthetic import make_shards

if TYPE_CHECKING:
    from pretrain.batches.step_batch import MicroBatch
    from pretrain.batches.step_dataset import StepDataset

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    return make_shards(folder, num_cells=900, num_genes=300, block_cells=32)


def dataset(folder: Path, rank: int = 0, world_size: int = 1, **options) -> StepDataset:
    from pretrain.batches.step_dataset import StepDataset

    shards = ShardSet(folder)
    return StepDataset(
        shards, "train", 0, 2048, 512, MaskingConfig(), rank, world_size, **options
    )  # fmt: skip


def assert_equal(a: MicroBatch, b: MicroBatch) -> None:
    import torch

    for name in ("input_ids", "masked_places", "labels", "relative_ranks", "attention_mask"):
        one, other = getattr(a, name), getattr(b, name)
        assert (one is None) == (other is None), name
        assert one is None or torch.equal(one, other), name
    np.testing.assert_array_equal(a.cells, b.cells)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("budget", [400, 1024])
@pytest.mark.parametrize("num_cells", [1, 2, 11, 32])
def test_micro_batches_cover_the_batch(world_size, budget, num_cells):
    from pretrain.batches.step_dataset import micro_batch_slots

    length = 100
    parts = [micro_batch_slots(num_cells, length, r, world_size, budget) for r in range(world_size)]
    assert len({len(p) for p in parts}) == 1, "ranks must do the same number of passes"
    slots = [s for p in parts for s in p]
    assert np.concatenate([np.arange(*s) for s in slots]).tolist() == list(range(num_cells))
    assert all(b - a <= budget // length for a, b in slots)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_cell_is_served_once_with_its_tokens(world_size, many_shards):
    shards = ShardSet(many_shards)
    ranks = [dataset(many_shards, r, world_size) for r in range(world_size)]
    seen, digest = {}, 0
    for step in range(ranks[0].plan.steps_per_epoch):
        parts = [r[step] for r in ranks]
        digest += sum(p.cells_digest for p in parts)
        assert sum(p.cells for p in parts) == ranks[0].plan.step(step).num_cells
        for micro in (m for p in parts for m in p.micro_batches):
            tokens = micro.input_ids.numpy().copy()
            hidden = micro.labels.numpy() != NO_LABEL
            tokens.reshape(-1)[micro.masked_places.numpy()[hidden]] = micro.labels.numpy()[hidden]
            for cell, row in zip(micro.cells, tokens, strict=True):
                if cell >= 0:
                    assert cell not in seen
                    seen[int(cell)] = row[row != shards.vocabulary.pad_token]
                else:
                    assert (row == shards.vocabulary.pad_token).all()
    expected = [
        b.tokens[b.offsets[i] : b.offsets[i + 1]]
        for b in shards.iter_blocks("train")
        for i in range(len(b.offsets) - 1)
    ]
    assert len(seen) == len(expected)
    for cell, tokens in enumerate(expected):
        np.testing.assert_array_equal(seen[cell], tokens)
    assert digest % 2**64 == int(mix64(np.arange(len(expected))).sum(dtype=np.uint64))


def test_what_is_served_does_not_depend_on_history(many_shards):
    walked = dataset(many_shards, 1, 2)
    for step in range(9):
        walked[step]
    for a, b in zip(
        walked[9].micro_batches, dataset(many_shards, 1, 2)[9].micro_batches, strict=True
    ):
        assert_equal(a, b)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(threads, many_shards):
    from pretrain.batches.step_dataset import steps_in_background

    plain = list(steps_in_background(dataset(many_shards), 3, 40, 0))
    ahead = list(steps_in_background(dataset(many_shards), 3, 40, threads))
    assert [d.step for d in ahead] == list(range(3, 40))
    for one, other in zip(plain, ahead, strict=True):
        assert (one.masked, one.tokens, one.cells_digest) == (
            other.masked, other.tokens, other.cells_digest,
        )  # fmt: skip
        for a, b in zip(one.micro_batches, other.micro_batches, strict=True):
            assert_equal(a, b)


def test_each_block_is_read_once_by_many_threads(many_shards):
    from pretrain.batches.step_dataset import steps_in_background

    read = dataset(many_shards)
    steps = read.plan.steps_per_epoch
    for _ in steps_in_background(read, 0, steps, 4):
        pass
    # Small buckets are kept whole; one reader for each thread would read four times as much.
    assert read.blocks.blocks_read == sum(b.extent.num_blocks for b in read.plan.buckets)


@pytest.fixture
def damaged(many_shards, tmp_path) -> tuple[Path, ShardSet, int]:
    """Shards with one flipped bit in the block of some training cells."""
    folder = Path(shutil.copytree(many_shards, tmp_path / "damaged"))
    shards = ShardSet(folder)
    number = int(shards.extents("train")[0].first_block)
    path = folder / shards.manifest["shards"][0]["name"]
    data = bytearray(path.read_bytes())
    data[int(shards.index["offset"][number]) + int(shards.index["bytes"][number]) - 20] ^= 4
    path.write_bytes(data)
    return folder, shards, number


def test_damaged_block_stops_with_its_name(damaged):
    from pretrain.batches.step_dataset import steps_in_background

    folder, shards, _ = damaged
    name = shards.manifest["shards"][0]["name"]
    read = dataset(folder)
    with pytest.raises(DamagedBlock, match=f"{name}.*member .*arrow.*damaged"):
        list(steps_in_background(read, 0, read.plan.steps_per_epoch, 2))


@pytest.mark.parametrize("threads", [0, 3])
def test_damaged_block_is_quarantined_and_counted(threads, damaged, many_shards, caplog):
    from pretrain.batches.step_dataset import steps_in_background

    folder, shards, number = damaged
    lost = int(shards.index["cells"][number])
    read = dataset(folder, quarantine=True)
    steps = read.plan.steps_per_epoch
    served = list(steps_in_background(read, 0, steps, threads))
    assert sum(s.quarantined for s in served) == lost
    assert sum(s.cells for s in served) == read.plan.num_cells - lost
    assert "quarantined" in caplog.text
    assert shards.manifest["shards"][0]["name"] in caplog.text
    whole = list(steps_in_background(dataset(many_shards), 0, steps, 0))
    for one, other in zip(served, whole, strict=True):
        # The other cells are masked as ever, and the shapes stay.
        assert [m.input_ids.shape for m in one.micro_batches] == [
            m.input_ids.shape for m in other.micro_batches
        ]
        if one.quarantined == 0:
            for a, b in zip(one.micro_batches, other.micro_batches, strict=True):
                assert_equal(a, b)


def test_heaviest_micro_batch_is_the_largest_that_comes(many_shards):
    read = dataset(many_shards)
    heaviest = read.heaviest_micro_batch()
    assert (heaviest.labels == NO_LABEL).all()
    sizes = [
        m.input_ids.numel()
        for step in range(read.plan.steps_per_epoch)
        for m in read[step].micro_batches
    ]
    assert heaviest.input_ids.numel() == max(sizes)
