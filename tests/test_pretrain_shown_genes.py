"""Cells as subsets of their genes, and cells without their hidden genes."""

from __future__ import annotations

import numpy as np
import pytest

from data_prep.hashing import keyed_hash
from pretrain.config import MaskingConfig, ObjectiveConfig, load_config
from pretrain.objective.masking import masks_of
from pretrain.objective.shown_genes import (
    draw_subsets,
    length_without_hidden,
    take_out_hidden,
)
from tests.ranks import run_ranks
from tests.runs import final_state, require_same_state
from tests.test_pretrain_cell_objective import STEPS, by_definition, config_of, train_all
from tests.test_pretrain_masking import rows

_ALONE = {"gene_weight": 0.0, "cell_weight": 1.0}
_SHOWN = {"masking__hidden": "remove", "masking__subset": 20}


def flat_rows(has_cls: bool, num_rows: int = 60):
    vocab, tokens, lengths = rows(has_cls, num_rows=num_rows)
    flat = np.concatenate([row[:n] for row, n in zip(tokens, lengths, strict=True)])
    return vocab, flat.astype(np.uint16), np.concatenate([[0], np.cumsum(lengths)])


@pytest.mark.quick
@pytest.mark.parametrize("has_cls", [False, True])
@pytest.mark.parametrize("subset", [2, 30, 150])
def test_subsets_are_the_lowest_hashes_in_the_order_of_ranks(has_cls, subset):
    vocab, tokens, offsets = flat_rows(has_cls)
    cells = np.random.default_rng(1).integers(0, 10**9, len(offsets) - 1)
    masks = masks_of(5, "train", 2, vocab, MaskingConfig())
    found, starts = draw_subsets(tokens, offsets, cells, subset, masks)
    assert found.dtype == tokens.dtype
    first = int(has_cls)
    for row, cell in enumerate(cells):
        whole = tokens[offsets[row] : offsets[row + 1]]
        genes = np.arange(first, max(first, len(whole) - first))
        hashes = keyed_hash(int(masks.subset_key), (np.int64(cell) << 16) + genes)
        kept = np.sort(genes[np.argsort(hashes)[:subset]])
        ends = [0, len(whole) - 1] if has_cls and len(whole) else []
        expected = whole[np.sort(np.concatenate([kept, ends]).astype(int))]
        np.testing.assert_array_equal(found[starts[row] : starts[row + 1]], expected)


@pytest.mark.quick
def test_subsets_belong_to_the_cell_and_the_epoch():
    vocab, tokens, offsets = flat_rows(False, 400)
    cells = np.arange(400) + 10**9

    def drawn(epoch, first=0):
        masks = masks_of(0, "train", epoch, vocab, MaskingConfig())
        found, starts = draw_subsets(tokens, offsets[first:], cells[first:], 20, masks)
        return [found[a:b].tolist() for a, b in zip(starts[:-1], starts[1:], strict=True)]

    assert drawn(0)[100:] == drawn(0, first=100)
    assert np.mean([a == b for a, b in zip(drawn(0), drawn(1), strict=True)]) < 0.1
    # Each place has the same chance, whatever its rank.
    sizes = np.diff(offsets)
    sizes, shown, early = np.diff(offsets), drawn(0), 0
    long = np.flatnonzero(sizes > 100)[:40]
    for row in long:
        first_half = tokens[offsets[row] : offsets[row] + sizes[row] // 2]
        early += len(set(first_half.tolist()) & set(shown[row]))
    assert 0.4 < early / (len(long) * 20) < 0.6


def step_data(shards, masking: MaskingConfig, rank: int = 0, world_size: int = 1):
    from data_prep.shards.reader import ShardSet
    from pretrain.batches.step_dataset import StepDataset

    objective = ObjectiveConfig(**_ALONE)
    return StepDataset(
        ShardSet(shards), "train", 0, 1024, 256, masking, rank, world_size, objective=objective
    )


def test_what_is_removed_is_what_was_masked(shards):
    masked = step_data(shards, MaskingConfig(probability=0.3, mask_share=1, random_share=0))
    removed = step_data(shards, MaskingConfig(probability=0.3, hidden="remove"))
    masks = masks_of(0, "train", 0, masked._vocabulary, MaskingConfig(probability=0.3))
    for step in range(6):
        before, after = masked[step], removed[step]
        hidden = 0
        for one, other in zip(before.micro_batches, after.micro_batches, strict=True):
            assert one.targets and other.targets
            for whole, visible, shown in zip(
                one.input_ids, one.targets.visible_BL, other.input_ids, strict=True
            ):
                expected = whole[visible].tolist()
                assert shown.tolist() == expected + [0] * (len(shown) - len(expected))
            assert other.input_ids.shape[1] == length_without_hidden(one.input_ids.shape[1], masks)
            assert other.targets.rows_H.equal(one.targets.rows_H)
            assert other.targets.genes_H.equal(one.targets.genes_H)
            assert other.targets.visible_BL.sum() == one.targets.visible_BL.sum()
            hidden += int((one.targets.genes_H >= 0).sum())
        assert after.tokens == before.tokens - hidden
        assert after.scored_cells == before.scored_cells == before.cells
        assert before.masked == after.masked == 0


@pytest.mark.quick
def test_special_tokens_stay_and_nothing_has_a_first_place():
    inputs = np.array([[2, 9, 1, 8, 3, 0], [1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]], np.int32)
    real = np.arange(6) < np.array([5, 2, 1])[:, None]
    shown, shown_real = np.empty((3, 5), np.int32), np.empty((3, 5), bool)
    take_out_hidden(inputs, real, np.array([2, 6, 7]), 0, shown, shown_real)
    assert shown.tolist() == [[2, 9, 8, 3, 0], [0] * 5, [0] * 5]
    assert shown_real.sum(axis=1).tolist() == [4, 1, 1]


def test_subsets_fill_the_budget_of_a_step(shards):
    masking = MaskingConfig(probability=0.3, subset=20, hidden="remove")
    data = step_data(shards, masking)
    plan = data.plan
    assert {b.cells_per_step for b in plan.buckets if b.extent.length >= 20} == {1024 // 20}
    heaviest = data.heaviest_micro_batch()
    shapes = {tuple(m.input_ids.shape) for s in range(4) for m in data[s].micro_batches}
    assert max(shapes)[1] == heaviest.input_ids.shape[1] == 20 - 6
    epoch = [data[step] for step in range(plan.steps_per_epoch)]
    assert sum(step.cells for step in epoch) == plan.num_cells


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shown")

    def config(name, **changes):
        return config_of(shards, folder / name, _ALONE, **(_SHOWN | changes))

    whole, again = config("whole", run__deepspeed="zero0"), config("again", run__deepspeed="zero0")
    shared = config("zero2", run__deepspeed="zero2", batch__tokens_per_micro_batch=128)
    one = run_ranks(1, train_all, [whole], again)[0]
    two = run_ranks(2, train_all, [shared])[0]
    summaries = [s.cell_losses for s in (*one, *two)]
    return (whole, again, shared), summaries


def test_trains_alike_on_any_ranks_and_goes_on_to_the_last_bit(runs):
    (whole, again, shared), (losses, later, on_two) = runs
    np.testing.assert_allclose(on_two, losses, rtol=1e-5)
    expected = final_state(whole.run.out)["weight"]
    for key, values in final_state(shared.run.out)["weight"].items():
        np.testing.assert_allclose(values, expected[key], atol=2e-5, err_msg=key)
    assert later == losses[STEPS // 2 :]
    require_same_state(again.run.out, whole.run.out)


def test_the_first_loss_is_that_of_hugging_faces_network(runs, shards):
    import torch

    from data_prep.shards.reader import ShardSet
    from pretrain.model.masked_gene_model import build_model

    (whole, *_), (losses, *_) = runs
    vocab = ShardSet(shards).vocabulary
    network = build_model(whole.model, vocab, 0).bert
    cells = []
    with torch.no_grad():
        for micro in step_data(shards, whole.masking)[0].micro_batches:
            cells += by_definition(network, micro, _ALONE, vocab.first_gene_token)[2]
    assert losses[0] == pytest.approx(float(sum(cells)) / len(cells), rel=1e-5)


def test_what_cannot_be_is_refused_and_the_record_names_what_is_new(shards, tmp_path):
    given = ["data.shards=.", "run.out=out"]
    with pytest.raises(ValueError, match=r"hidden=remove: a gene .* give objective.gene_weight=0"):
        load_config("tiny", [*given, "masking.hidden=remove"])
    alone = [*given, "objective.gene_weight=0", "objective.cell_weight=1", "masking.hidden=remove"]
    with pytest.raises(ValueError, match="mask_share: with hidden=remove nothing stands in"):
        load_config("tiny", [*alone, "masking.mask_share=0.5"])
    with pytest.raises(ValueError, match=r"masking.subset.*greater than or equal to 2"):
        load_config("tiny", [*given, "masking.subset=1"])
    older = config_of(shards, tmp_path, {}).recipe()
    newer = config_of(shards, tmp_path, _ALONE, **_SHOWN).recipe()
    new = {"masking.hidden", "masking.subset", "objective.gene_weight", "objective.cell_weight"}
    assert newer.keys() - older.keys() == new
