"""A run on shards that are far away or damaged."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from data_prep.shards.reader import ShardSet
from tests.ranks import run_ranks
from tests.runs import run_training, tiny_config
from tests.test_data_prep_remote import Server


def test_training_from_a_url_is_training_from_the_folder(shards, tmp_path):
    near = tiny_config(shards, tmp_path / "near")
    summary, weights = run_ranks(2, run_training, near)[0]
    with Server(shards) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://me:canary7f3a@127.0.0.1:{server.server_address[1]}"
        far = tiny_config(
            shards, tmp_path / "far", data__shards=url, data__cache=tmp_path / "cache",
            data__num_workers=2,
        )  # fmt: skip
        far_summary, far_weights = run_ranks(2, run_training, far)[0]
        server.shutdown()
    assert far_summary.losses == summary.losses
    assert far_summary.cells_digest == summary.cells_digest
    for name, weight in weights.items():
        np.testing.assert_array_equal(far_weights[name], weight, err_msg=name)
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert "://HIDDEN@127.0.0.1" in (tmp_path / "far" / "config.yaml").read_text()
    assert not [p for p in written if b"canary7f3a" in p.read_bytes()], "the URL's password"


@pytest.fixture
def damaged(shards, tmp_path) -> tuple[Path, str, int]:
    """Shards with a flipped bit in the first training block; its tar, and how many cells it has."""
    folder = Path(shutil.copytree(shards, tmp_path / "damaged"))
    opened = ShardSet(folder)
    name = opened.manifest["shards"][0]["name"]
    data = bytearray((folder / name).read_bytes())
    data[int(opened.index["offset"][0]) + int(opened.index["bytes"][0]) - 20] ^= 4
    (folder / name).write_bytes(data)
    return folder, name, int(opened.index["cells"][0])


def one_epoch(folder: Path, out: Path, **changes):
    return tiny_config(
        folder, out, run__epochs=1, run__max_steps=None, optim__warmup_steps=1, **changes
    )


def test_damage_stops_the_run_with_its_name(damaged, tmp_path):
    folder, name, _ = damaged
    with pytest.raises(AssertionError, match=f"DamagedBlock: .*{name}: the member .*arrow"):
        run_ranks(2, run_training, one_epoch(folder, tmp_path / "run"))


@pytest.mark.parametrize("ranks", [1, 2])
def test_damage_is_quarantined_and_counted(ranks, damaged, shards, tmp_path):
    from pretrain.checkpoints import checkpoint

    folder, _, lost = damaged
    config = one_epoch(folder, tmp_path / "run", data__on_damage="quarantine")
    summary, _ = run_ranks(ranks, run_training, config)[0]
    whole = sum(e.num_cells for e in ShardSet(shards).extents("train"))
    assert (summary.cells_seen, summary.cells_quarantined) == (whole - lost, lost)
    last = checkpoint.newest(config.run.out)
    assert last is not None
    assert last.record["cells_quarantined"] == lost
    # The rest of the cells, whatever the number of ranks: compared through the digest.
    if ranks == 2:
        alone = one_epoch(folder, tmp_path / "alone", data__on_damage="quarantine")
        single, _ = run_ranks(1, run_training, alone)[0]
        assert single.cells_digest == summary.cells_digest
        np.testing.assert_allclose(single.losses, summary.losses, rtol=1e-5)
