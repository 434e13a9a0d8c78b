"""The run itself, on real DeepSpeed ranks: exact over ranks and ZeRO stages, exact on resume."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ranks import run_ranks
from tests.runs import run_training, tiny_config


@pytest.fixture(scope="module")
def one_rank(shards, tmp_path_factory):
    """The reference: one rank, ZeRO 1, fp32."""
    config = tiny_config(shards, tmp_path_factory.mktemp("one") / "run")
    return run_ranks(1, run_training, config)[0]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_equal_one_rank(stage, one_rank, shards, tmp_path):
    config = tiny_config(shards, tmp_path / "run", run__deepspeed=f"zero{stage}")
    summary, weights = run_ranks(2, run_training, config)[0]
    reference, reference_weights = one_rank
    assert summary.cells_seen == reference.cells_seen
    np.testing.assert_allclose(summary.losses, reference.losses, rtol=1e-5)
    for name, weight in reference_weights.items():
        np.testing.assert_allclose(weights[name], weight, atol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16")]
)
def test_resume_is_bit_exact(stage, precision, shards, tmp_path):
    common = {"run__deepspeed": f"zero{stage}", "run__precision": precision,
              "model__hidden_dropout": 0.1}  # fmt: skip
    whole = tiny_config(shards, tmp_path / "whole", **common)
    summary, weights = run_ranks(2, run_training, whole)[0]
    # The checkpoint of step 5 is all that is left of a run that was cut off at step 7.
    again = tiny_config(shards, tmp_path / "whole", **common)
    newest = tmp_path / "whole" / "checkpoints" / "step-00000010"
    (newest / "rank-00001.safetensors").write_bytes(b"torn")
    resumed, resumed_weights = run_ranks(2, run_training, again, True)[0]
    assert resumed.first_step == 5
    assert resumed.losses == summary.losses[5:]
    for name, weight in weights.items():
        np.testing.assert_array_equal(resumed_weights[name], weight, err_msg=name)
