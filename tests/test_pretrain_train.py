"""The run itself, on real DeepSpeed ranks: k steps and a resume are the uninterrupted run.

Other numbers of ranks, stages and accumulation: test_pretrain_matrix.py.
"""

from __future__ import annotations

from itertools import product

import pytest

from tests.ranks import run_ranks
from tests.runs import (
    OFFLOAD,
    cut_off,
    elsewhere,
    require_same_state,
    run_training,
    tiny_config,
)


@pytest.mark.parametrize(
    ("deepspeed", "precision"),
    [
        ("zero0", "fp32"),
        pytest.param("zero1", "fp32", marks=pytest.mark.long),
        pytest.param("zero2", "fp32", marks=pytest.mark.long),
        ("zero3", "fp32"),
        pytest.param("zero1", "bf16", marks=pytest.mark.long),
    ]
    + [
        pytest.param(deepspeed, precision, marks=pytest.mark.slow)
        for deepspeed, precision in (
            ("zero0", "bf16"),
            ("zero2", "bf16"),
            ("zero3", "bf16"),
            *product(OFFLOAD, ("fp32", "bf16")),
        )
    ],
)
def test_resume_is_bit_exact(deepspeed, precision, shards, tmp_path):
    whole = tiny_config(
        shards, tmp_path / "whole", run__deepspeed=deepspeed, run__precision=precision,
        model__hidden_dropout=0.1,
    )  # fmt: skip
    summary, _ = run_ranks(2, run_training, whole)[0]
    cut = cut_off(whole, tmp_path / "cut")
    resumed, _ = run_ranks(2, run_training, cut, True)[0]
    assert resumed.first_step == 5
    assert resumed.losses == summary.losses[5:]
    require_same_state(cut.run.out, whole.run.out)


def _twice(config, out) -> list[list[float]]:
    """Train two runs in one process, as a notebook does."""
    return [run_training(each)[0].losses for each in (config, elsewhere(config, out))]


def test_one_process_can_train_twice(shards, tmp_path):
    first, second = run_ranks(1, _twice, tiny_config(shards, tmp_path / "a"), tmp_path / "b")[0]
    assert first == second
