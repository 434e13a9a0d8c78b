"""What a process did before does not change a run in it."""

from __future__ import annotations

import os

import numpy as np

from tests.ranks import run_ranks
from tests.runs import tiny_config


def _after_another_past(configs):
    """Train one after the other; before the last, rank 1 has had ZeRO 3 and rank 0 has not."""
    import torch
    from deepspeed.runtime.zero.partition_parameters import zero3_linear_wrap

    from pretrain.ranks import dist
    from pretrain.train import train

    own = torch.nn.functional.linear
    losses = [train(config).losses for config in configs[:-1]]
    if os.environ["RANK"] == "1":
        torch.nn.functional.linear = zero3_linear_wrap
    losses.append(train(configs[-1]).losses)
    restored = [torch.nn.functional.linear is own]
    torch.nn.functional.linear = zero3_linear_wrap
    dist.leave()
    return losses, [*restored, torch.nn.functional.linear is own]


def test_zero_2_on_ranks_of_which_one_has_had_zero_3(shards, tmp_path):
    """ZeRO 2 adds up gradients in the order in which they come: it must be the same on all."""
    steps = {"run__max_steps": 4, "checkpoint__every_steps": 100}
    configs = [
        tiny_config(shards, tmp_path / name, run__deepspeed=name, **steps)
        for name in ("zero1", "zero2")
    ]
    found = run_ranks(2, _after_another_past, configs)
    plain, shared = found[0][0]
    np.testing.assert_allclose(shared, plain, rtol=1e-6)
    assert [restored for _, restored in found] == [[True, True]] * 2


def _one_after_the_other(configs):
    from pretrain.ranks import dist
    from pretrain.train import train

    losses = [train(config).losses for config in configs]
    dist.leave()
    return losses


def test_bytes_of_gradients_after_a_run_in_autocast(shards, tmp_path):
    """A run in autocast decided for all that followed that gradients travel in float32."""
    first = {"run__deepspeed": "zero0", "run__precision": "bf16", "run__max_steps": 4}
    then = {"run__deepspeed": "nodes_slow", "run__max_steps": 4, "checkpoint__every_steps": 100}
    changes = {"before": then, "autocast": first, "after": then}
    configs = [tiny_config(shards, tmp_path / name, **given) for name, given in changes.items()]
    before, _, after = run_ranks(2, _one_after_the_other, configs)[0]
    assert after == before
