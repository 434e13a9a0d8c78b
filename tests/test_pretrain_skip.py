"""Steps whose loss or gradient is not finite can be left out, exactly, on all ranks alike."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.shards.order import EpochPlan
from data_prep.shards.reader import ShardSet
from pretrain.config import RunConfig
from tests.ranks import run_new_ranks, run_ranks
from tests.runs import metrics, require_same_state, tiny_config

# Steps counted from 1, and what goes wrong in them on the last rank.
FAULTS = {4: "loss", 7: "gradient"}


def run_with_faults(config: RunConfig, faults: dict[int, str], resume: bool = False) -> Any:
    """Train; in some steps the last rank's loss, or its gradients alone, are no numbers.

    The loss gets a constant: its gradients stay finite.
    """
    from pretrain import train
    from pretrain.engine import Engine
    from pretrain.ranks import dist

    class Faulty(Engine):
        def forward_backward(self, data, step, *counts):
            kind = faults.get(step + 1) if self._ranks.rank == self._ranks.world_size - 1 else None
            module, backward = self.deepspeed.module, self.deepspeed.backward
            hook = module.register_forward_hook(_spoil) if kind == "loss" else None
            if kind == "gradient":
                self.deepspeed.backward = lambda loss, **how: backward(loss * float("nan"), **how)
            try:
                return super().forward_backward(data, step, *counts)
            finally:
                self.deepspeed.backward = backward
                if hook:
                    hook.remove()

    train.Engine = Faulty  # type: ignore[misc]
    try:
        return train.train(config, resume)
    except FloatingPointError as error:
        return str(error)
    finally:
        train.Engine = Engine  # type: ignore[misc]
        dist.leave()


def _spoil(_module, _inputs, outputs):
    losses, *rest = outputs
    spoiled = losses.clone()
    spoiled[0] = spoiled[0] + float("nan")
    return (spoiled, *rest)


def skipping(shards: Path, out: Path, **changes: Any) -> RunConfig:
    settings = {"run__on_not_finite": "skip", "checkpoint__every_steps": 1, "checkpoint__keep": 99}
    return tiny_config(shards, out, **settings | changes)


def state_at(run: Path, step: int) -> dict[str, np.ndarray]:
    from pretrain.checkpoints import checkpoint

    reader = checkpoint.find(run, step).reader()
    return {
        f"{kind}/{name}": reader.read(kind, name, 0, reader.numel(name)).numpy()
        for name in reader.names
        for kind in reader.kinds(name)
    }


_CASES = [("zero0", "fp32"), ("zero3", "fp32")]
_LONG = [("zero0", "bf16"), ("zero1", "bf16"), ("zero3", "bf16"), ("zero1", "fp32"),
         ("zero2", "fp32"), ("zero2_offload", "fp32")]  # fmt: skip


@pytest.fixture(scope="module")
def losses(shards, tmp_path_factory) -> list[float]:
    """Losses of one rank at ZeRO 1 in fp32, with the same steps left out."""
    config = skipping(shards, tmp_path_factory.mktemp("reference") / "run")
    return run_ranks(1, run_with_faults, config, FAULTS)[0].losses


@pytest.mark.parametrize(
    ("stage", "precision"), [*_CASES, *(pytest.param(*c, marks=pytest.mark.long) for c in _LONG)]
)
def test_a_skipped_step_changes_nothing_and_resume_is_exact(
    stage, precision, losses, shards, tmp_path
):
    changes = {"run__deepspeed": stage, "run__precision": precision, "checkpoint__every_steps": 1}
    whole, half = (skipping(shards, tmp_path / name, **changes) for name in ("whole", "half"))
    summary = run_ranks(2, run_with_faults, whole, FAULTS)[0]
    run = whole.run.out
    shutil.copytree(run, half.run.out)
    for step in range(6, 11):
        shutil.rmtree(half.run.out / "checkpoints" / f"step-{step:08d}")
    run_ranks(2, run_with_faults, half, FAULTS, True)
    for step in (4, 7):
        before, after = state_at(run, step - 1), state_at(run, step)
        assert all(np.array_equal(before[k], after[k]) for k in before), step
    for step in (5, 8):
        before, after = state_at(run, step - 1), state_at(run, step)
        assert sum(not np.array_equal(before[k], after[k]) for k in before) > 10, step
    require_same_state(half.run.out, run)
    records = metrics(run, "skipped")
    assert [(m["step"], m["skipped_steps"]) for m in records] == [(4, 1), (7, 2)]
    assert records[0]["reason"] == "loss is nan"
    # DeepSpeed calls a norm that is no number infinite.
    assert records[1]["reason"] in ("gradient norm is nan", "gradient norm is inf")
    assert metrics(half.run.out, "skipped")[-1]["cells"] == records[-1]["cells"]
    for record in records:
        assert sorted(record["cells"]) == ids_of_step(whole, record["step"])
    assert len(records[0]["cells_not_finite"]) == 2  # the first of each of two micro-batches
    assert records[1]["cells_not_finite"] == []
    logged = metrics(run, "train")
    assert [m["step"] for m in logged] == [1, 2, 3, 5, 6, 8, 9, 10]
    assert logged[-1]["skipped_steps"] == 2
    if precision == "fp32":
        taken = [n for n in range(10) if n + 1 not in FAULTS]
        np.testing.assert_allclose(
            np.array(summary.losses)[taken], np.array(losses)[taken], rtol=1e-5
        )


def ids_of_step(config: RunConfig, step: int) -> list[str]:
    """Return the ids of all cells of a step (counted from 1), sorted."""
    shards = ShardSet(config.data.shards)
    ids = [c for b in shards.iter_blocks("train") for c in b.batch.column("cell_id").to_pylist()]
    plan = EpochPlan(shards, "train", config.run.seed, config.batch.tokens_per_step, None)
    return sorted(ids[cell] for cell in plan.cells(plan.step(step - 1)))


def stopped_runs(skips: RunConfig, stops: RunConfig) -> list[str]:
    """Return what is said when too many steps are bad, again after a resume, and of a plain run."""
    # The window: of steps 4 to 7 the first is out of it again at step 8.
    first = run_with_faults(skips, {4: "loss", 8: "gradient", 10: "loss"})
    shutil.rmtree(skips.run.out / "checkpoints" / "step-00000009")
    again = run_with_faults(skips, {9: "gradient"}, True)
    return [first, again, run_with_faults(stops, FAULTS)]


def test_more_than_so_many_in_so_many_steps_stop_the_run(shards, tmp_path):
    few = {"run__max_skipped_steps": 1, "run__skip_window_steps": 4}
    config = skipping(shards, tmp_path / "run", **few)
    stops = tiny_config(shards, tmp_path / "stops")
    first, again, plain = run_new_ranks(1, stopped_runs, config, stops)[0]
    assert "loss is nan in step 10 after 2 skipped steps: stopped before" in first
    last = json.loads((config.run.out / "checkpoints/step-00000008/checkpoint.json").read_text())
    assert (last["updates"], last["skipped_steps"]) == (6, [4, 8])
    # What a checkpoint says of earlier ones counts after a resume too.
    assert " in step 9 after 2 skipped steps: stopped" in again
    assert "loss is nan in step 4: stopped" in plain and "run.on_not_finite=skip" in plain
