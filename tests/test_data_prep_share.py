"""A share of the training cells: nested, chosen by hash, and all that a run can see."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from data_prep.shards.format import lay_out
from data_prep.shards.order import EpochPlan
from data_prep.shards.reader import ShardSet

SHARES = (0.1, 0.25, 0.5, 0.9)


def names_of(shards: ShardSet, split: str = "train") -> list[str]:
    return [n for b in shards.iter_blocks(split) for n in b.batch.column("cell_id").to_pylist()]


def test_smaller_shares_are_parts_of_larger_ones(shards):
    whole, before = ShardSet(shards), set()
    for share in SHARES:
        part = ShardSet(shards, share=share)
        names = names_of(part)
        assert len(set(names)) == len(names) == sum(e.num_cells for e in part.extents("train"))
        assert abs(len(names) - share * len(names_of(whole))) <= len(whole.extents("train"))
        assert before < set(names) < set(names_of(whole))
        assert names_of(part, "heldout") == names_of(whole, "heldout")
        before = set(names)


def test_tokens_and_numbers_of_cells_stay(shards):
    whole, part = ShardSet(shards), ShardSet(shards, share=0.4)
    for extent in part.extents("train"):
        for number in part.block_numbers("train", extent.length).tolist():
            few, all_of_it = part.read_block(number), whole.read_block(number)
            cells = len(few.offsets) - 1
            assert part.cells_of_blocks(np.array([number])).tolist() == [cells]
            assert few.offsets.tolist() == all_of_it.offsets[: cells + 1].tolist()
            assert few.tokens.tolist() == all_of_it.tokens[: few.offsets[-1]].tolist()
            assert few.batch.num_rows == cells


def test_many_small_buckets_have_their_share():
    """A bucket of 30 cells has 0.3 of them at 1 %: none or one, by its place."""
    tars = [{"split": "train", "bucket_length": 64 * i, "cells": 30} for i in range(1, 201)]
    manifest = {"settings": {"block_cells": 8}, "shards": tars}
    for share in (0.01, 0.02, 0.05):
        cells = sum(e.num_cells for _, e in lay_out(manifest, share)[0])
        assert cells == pytest.approx(share * 6000, abs=3)


def test_each_cell_of_a_share_once_per_epoch(shards):
    part = ShardSet(shards, share=0.5)
    plan = EpochPlan(part, "train", 3, 1024)
    shown = np.concatenate(
        [e.first_cell + np.arange(e.num_cells) for e in part.extents("train")]
    ).tolist()
    for epoch in range(3):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        cells = np.concatenate([plan.cells(plan.step(step)) for step in steps])
        assert sorted(cells.tolist()) == sorted(shown)


def test_a_long_bucket_still_permutes_its_blocks():
    """A share that lies in one tar is permuted by blocks, as a corpus of one tar is."""
    tars = [{"split": "train", "bucket_length": 64, "cells": 80}] * 10
    extents, _ = lay_out({"settings": {"block_cells": 8}, "shards": tars}, 0.1)
    assert [(e.num_cells, e.run_cells) for _, e in extents] == [(80, 8)]
    extents, _ = lay_out({"settings": {"block_cells": 8}, "shards": tars}, 0.5)
    assert [(e.num_cells, e.run_cells) for _, e in extents] == [(400, 80)]


def test_the_fingerprint_names_the_share(shards):
    whole = ShardSet(shards, share=1.0)
    assert whole.fingerprint == whole.manifest["fingerprint"]
    text = f"{whole.fingerprint} share 0.25"
    part = ShardSet(shards, share=0.25)
    assert part.fingerprint == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5, 1e-9])
def test_no_share(share, shards):
    with pytest.raises(ValueError, match=r"a share of .* leaves none, or is no share"):
        ShardSet(shards, share=share)


def test_counting_sees_the_share_alone(shards, tmp_path):
    """Baselines and SVD of a share are those of shards that hold nothing else."""
    from pretrain.counting.baselines import RankBaselines
    from pretrain.counting.corpus_svd import corpus_svd

    whole, part = ShardSet(shards), ShardSet(shards, share=0.3)
    tokens = np.concatenate([b.tokens for b in part.iter_blocks("train")])
    first = part.vocabulary.first_gene_token
    counts = np.bincount(tokens, minlength=part.vocabulary.num_tokens)[first:] + 0.5
    found = RankBaselines(part, 10**6).log_probabilities["unigram"][0][first:]
    assert np.allclose(found, np.log(counts / counts.sum()))
    few, many = (corpus_svd(s, 3, fallback=tmp_path) for s in (part, whole))
    assert few.origin["cells"] == len(names_of(part)) < many.origin["cells"]
    assert not np.allclose(few.components, many.components)


def test_another_share_is_another_run(shards, tmp_path):
    """Resuming with another share is refused by name; the scores of each cell are those of all."""
    import pyarrow.parquet as pq

    from pretrain.measure.metrics import read_metrics
    from tests.ranks import run_ranks
    from tests.runs import run_training, tiny_config

    out = tmp_path / "run"
    config = tiny_config(shards, out, data__share=0.5)
    run_ranks(1, run_training, config)
    other = tiny_config(shards, out, data__share=0.6)
    with pytest.raises(Exception, match=r"data\.share: 0\.5 -> 0\.6; shards: "):
        run_ranks(1, run_training, other, True)
    table = pq.read_table(out / "heldout_cells.parquet")
    assert table.schema.metadata[b"step"] == b"10"
    (last,) = [m for m in read_metrics(out) if m["kind"] == "heldout"]
    genes = table["genes"].to_numpy()
    assert genes.sum() == last["genes"]
    for column, name in [("loss", "loss")] + [
        (c, c) for c in table.column_names if c.startswith("baseline_")
    ]:
        assert np.average(table[column].to_numpy(), weights=genes) == pytest.approx(last[name])


def test_an_export_names_its_share_of_cells(trained):
    from pretrain.checkpoints import checkpoint
    from pretrain.export.model_folder import export_record

    last = checkpoint.newest(Path(trained))
    assert last is not None
    whole = export_record(trained, last)["train_cells"]
    last.record["recipe"]["data.share"] = 0.5
    assert 0 < export_record(trained, last)["train_cells"] < whole
