"""Shards without held-out cells are trained on; the run says that it evaluates nothing."""

from __future__ import annotations

import logging

import pytest

from tests.ranks import run_ranks
from tests.synthetic import make_shards


def _train(shards, out):
    from tests.runs import run_training, tiny_config

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("pretrain.measure.heldout").addHandler(handler)
    config = tiny_config(shards, out, evaluation__every_steps=2, run__max_steps=4)
    summary, _ = run_training(config)
    return summary.losses, summary.heldout, said


@pytest.mark.slow
def test_a_run_without_heldout_cells_says_that_it_evaluates_nothing(tmp_path):
    shards = make_shards(tmp_path, heldout=0.0)
    losses, heldout, said = run_ranks(1, _train, shards, tmp_path / "run")[0]
    assert len(losses) == 4 and heldout == {}
    assert any("no cell is held out" in text and "nothing is evaluated" in text for text in said)
