"""How often a step waits for the device: once. Counted without one."""

from __future__ import annotations

import contextlib

import pytest

from tests.ranks import run_new_ranks
from tests.runs import tiny_config

CASES = [
    ("zero0", "bf16", "adamw"), ("zero1", "fp32", "muon"), ("zero1", "bf16", "adamw"),
    ("zero2", "bf16", "muon"),
]  # fmt: skip


def counted(configs):
    """Train, and return of each run the reads of a number of the device in each step.

    On a CPU all tensors look alike. Those made of Python's numbers, and what is computed of these
    alone, would be on the host beside a GPU; a number is read of any other where the host waits.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from pretrain import engine, train
    from pretrain.measure import step_loss
    from pretrain.ranks import dist

    reads: list[str] = []

    class Reads(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.on_host: dict[int, torch.Tensor] = {}

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            name = str(function)
            flat = torch.utils._pytree.arg_tree_leaves(*args)
            tensors = [x for x in flat if isinstance(x, torch.Tensor)]
            is_on_host = all(id(x) in self.on_host for x in tensors)
            if "lift_fresh" in name or (tensors and is_on_host):
                for result in torch.utils._pytree.tree_leaves(found):
                    if isinstance(result, torch.Tensor):
                        self.on_host[id(result)] = result
            waits = "_local_scalar_dense" in name or "nonzero" in name or "masked_select" in name
            if waits and not is_on_host:
                reads.append(name)
            return found

    mode, original = Reads(), step_loss.read

    def read(values):
        reads.append("read")
        return original(values)

    def watched(function):
        def inside(*args, **kwargs):
            with mode:
                return function(*args, **kwargs)

        return inside

    step_loss.read = read
    for owner, name in (
        (engine.Engine, "forward_backward"), (engine.Engine, "step"), (train._Run, "_agree"),
    ):  # fmt: skip
        setattr(owner, name, watched(getattr(owner, name)))
    found = []
    for config in configs:
        reads.clear()
        summary = train.train(config)
        found.append((len(summary.losses), list(reads)))
    with contextlib.suppress(RuntimeError):
        dist.leave()
    return found


@pytest.fixture(scope="module")
def reads(shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("waiting")
    configs = [
        tiny_config(
            shards, folder / f"{stage} {precision}", optim__kind=kind, run__max_steps=3,
            optim__warmup_steps=1, run__deepspeed=stage, run__precision=precision,
            run__packing="always", evaluation__svd_cells=0, checkpoint__every_steps=3,
        )
        for stage, precision, kind in CASES
    ]  # fmt: skip
    return dict(zip(CASES, run_new_ranks(1, counted, configs)[0], strict=True))


@pytest.mark.parametrize("case", CASES)
def test_a_step_waits_for_the_device_once(case, reads):
    steps, found = reads[case]
    assert steps == 3
    assert found == ["read"] * steps


def test_a_step_is_one_copy(shards):
    """What a GPU gets is what the loader made, from buffers that are used again."""
    import torch

    from data_prep.shards.reader import ShardSet
    from pretrain.batches.forward_arguments import device_arguments, to_device
    from pretrain.batches.pinned_memory import Staging
    from pretrain.batches.step_dataset import StepDataset, steps_in_background
    from pretrain.config import MaskingConfig, ObjectiveConfig
    from tests.test_pretrain_packing import Operations

    staging = Staging(torch.device("cpu"))
    data = StepDataset(
        ShardSet(shards), "train", 0, 2048, 512, MaskingConfig(), 0, 1, packs=True,
        objective=ObjectiveConfig(cell_weight=1, prior="arithmetic"), staging=staging,
    )  # fmt: skip
    buffers, number, passes = set(), 0, 0
    for step in steps_in_background(data, 0, 12, 2):
        expected = [to_device(m, torch.device("cpu")) for m in step.micro_batches]
        seen = Operations()
        with seen.mode():
            found = list(device_arguments(step, torch.device("cpu")))
        assert seen.counts.pop("aten.clone") == 1
        assert set(seen.counts) <= {"aten.slice", "aten.view", "aten.alias", "aten.detach"}
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            require_equal(one, other)
        assert step.staged is not None
        buffers.add(step.staged[1].buffer.data_ptr())
        number, passes = number + 1, passes + len(found)
    assert passes > number == 12
    # Ahead are five at most, one is being read; a buffer is new only where a step is larger.
    assert len(staging._free) + len(staging._busy) <= 7
    assert len(buffers) < 12


def require_equal(one, other):
    import torch

    if isinstance(one, tuple):
        for a, b in zip(one, other, strict=True):
            require_equal(a, b)
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
        assert one.data_ptr() % 64 == 0
    else:
        assert one is other or one == other
