"""Which checkpoints stay, and what is recorded of writing them."""

from __future__ import annotations

import pytest

from tests.ranks import commands, run_ranks
from tests.runs import metrics, run_training, tiny_config
from tests.test_pretrain_faults import checkpoint_mib, small_disk


def test_the_newest_and_every_so_many_stay(shards, tmp_path):
    config = tiny_config(
        shards, tmp_path / "run", run__max_steps=20, checkpoint__every_steps=2, checkpoint__keep=2,
        checkpoint__keep_every_steps=6,
    )  # fmt: skip
    run_ranks(1, run_training, config)
    names = sorted(p.name for p in (config.run.out / "checkpoints").glob("step-*"))
    assert names == [f"step-{n:08d}" for n in (6, 12, 18, 20)]
    records = metrics(config.run.out, "checkpoint")
    assert [r["step"] for r in records] == list(range(2, 21, 2))
    assert all(0 < r["blocked_s"] < 5 and r["written_s"] > 0 and r["bytes"] > 0 for r in records)


def test_keeping_what_is_never_saved_is_refused(shards, tmp_path):
    with pytest.raises(ValueError, match="keep_every_steps 5 is no multiple of every_steps 2"):
        tiny_config(shards, tmp_path, checkpoint__every_steps=2, checkpoint__keep_every_steps=5)


def test_no_room_for_one_checkpoint_is_refused_before_anything_is_written(shards, tmp_path):
    config = tiny_config(shards, tmp_path / "disk" / "run")
    with small_disk(tmp_path / "disk", 0.9 * checkpoint_mib(config)):
        path = tmp_path / "run.yaml"
        path.write_text(config.to_yaml())
        with commands([["--config", str(path)]], tmp_path / "logs") as (rank,):
            assert rank.code() == 2
        assert "no room for one checkpoint: it needs" in rank.said
        assert not config.run.out.exists()
