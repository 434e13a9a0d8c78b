"""What was written once must still be read, and what was computed once must still come out.

After an intended change of numerics ``python -m tests.test_golden`` renews the losses; the commit
shows both curves. Shards are never written again: for a new format a new folder.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest

from data_prep.prepare.options import PrepareOptions
from data_prep.prepare.run import prepare
from data_prep.shards.format import SHARD_FORMAT
from data_prep.shards.reader import ShardSet
from data_prep.sources.source_spec import SourceOptions, source_at
from pretrain.config import load_config
from tests.ranks import run_ranks
from tests.runs import run_training
from tests.synthetic import write_cells

GOLDEN = Path(__file__).parent / "golden"
SHARDS = GOLDEN / "shards-1"
LOSSES = GOLDEN / "tiny_losses.json"


def tiny_losses(out: Path) -> list[float]:
    """Return 30 losses of the supplied tiny configuration on the golden shards, one rank."""
    # A run keeps what it counts beside the shards: not in this repository.
    shards = Path(shutil.copytree(SHARDS, out.with_name("shards")))
    settings = [
        f"data.shards={shards}", f"run.out={out}", "run.max_steps=30", "run.epochs=40",
        "run.threads=1", "data.num_workers=0", "batch.tokens_per_step=1024",
    ]  # fmt: skip
    summary, _ = run_ranks(1, run_training, load_config("tiny", settings))[0]
    return summary.losses


def test_golden_losses(tmp_path):
    expected = json.loads(LOSSES.read_text())
    # Other processors sum in another order; the curve is the same to four digits.
    np.testing.assert_allclose(tiny_losses(tmp_path / "run"), expected, rtol=1e-3)


@pytest.mark.parametrize("number", [1, 2])
def test_golden_shards(number):
    shards = ShardSet(GOLDEN / f"shards-{number}")
    assert shards.manifest["format"] == f"geneloom-shards/{number}"
    expected = json.loads((GOLDEN / f"shards-{number}.cells.json").read_text())
    assert shards.num_cells == len(expected)
    for split in ("train", "heldout"):
        for block in shards.iter_blocks(split):
            for i, cell in enumerate(block.batch.column("cell_id").to_pylist()):
                tokens = block.tokens[block.offsets[i] : block.offsets[i + 1]]
                assert tokens.tolist() == expected[cell]


def _renew() -> None:
    with tempfile.TemporaryDirectory() as folder:
        newest = GOLDEN / SHARD_FORMAT.replace("geneloom-", "").replace("/", "-")
        if not newest.exists():
            _write_shards(newest, Path(folder))
        LOSSES.write_text(json.dumps(tiny_losses(Path(folder) / "run")) + "\n")


def _write_shards(out: Path, folder: Path) -> None:
    source = write_cells(folder / "cells.h5ad", num_cells=40, num_genes=60)
    options = PrepareOptions(heldout_share=0.2, block_cells=8, vocabulary_min_cells=1)
    prepare([source_at(source, SourceOptions())], out, None, options)
    cells = {}
    for split in ("train", "heldout"):
        for block in ShardSet(out).iter_blocks(split):
            for i, cell in enumerate(block.batch.column("cell_id").to_pylist()):
                cells[cell] = block.tokens[block.offsets[i] : block.offsets[i + 1]].tolist()
    out.with_name(f"{out.name}.cells.json").write_text(json.dumps(cells) + "\n")


if __name__ == "__main__":
    _renew()
