"""A ModernBERT by Muon or AdamW on real ranks: plain PyTorch's numbers, resumed, and moved."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pretrain.config import RunConfig
from tests.ranks import run_ranks
from tests.runs import final_state, require_same_state, tiny_config
from tests.test_pretrain_muon import (
    CUT,
    ELASTIC_LIMIT,
    SETTINGS,
    Start,
    replayed_and_trained,
    require_replayed,
    train_all,
)

# A global and a local layer; no matrix has as many rows as two or three ranks share evenly.
# With weights of the usual size queries and keys have next to no gradient, and to make it
# orthogonal turns its last bits into differences of 4e-3.
_MODEL = {
    "architecture": "modernbert", "num_layers": 2, "hidden_size": 20, "num_heads": 2,
    "intermediate_size": 27, "local_window": 8, "initializer_range": 0.2,
}  # fmt: skip


def _config(shards: Path, out: Path, stage: int, **changes: Any) -> RunConfig:
    settings = {k: v for k, v in SETTINGS.items() if not k.startswith("model__")} | changes
    if settings.get("optim__kind") == "adamw":
        settings = {k: v for k, v in settings.items() if "muon" not in k}
    config = tiny_config(shards, out, run__deepspeed=f"zero{stage}", **settings)
    return RunConfig.model_validate(config.model_dump() | {"model": _MODEL})


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory) -> SimpleNamespace:
    """Runs of Muon and AdamW on one rank, on two, and moved from one to two."""
    folder = tmp_path_factory.mktemp("modernbert")

    def config(name: str, stage: int, **changes: Any) -> RunConfig:
        return _config(shards, folder / name, stage, **changes)

    adamw = {"optim__kind": "adamw"}
    one = [config("muon-0-1", 0), config("adamw-0-1", 0, **adamw)]
    replay, losses = run_ranks(1, replayed_and_trained, one[0], [Start(c) for c in one])[0]
    whole, on = (config(f"muon-3-2{end}", 3) for end in ("", "-on"))
    moved = [config("muon-0-1-to-2-2", 2), config("adamw-0-1-to-3-2", 3, **adamw)]
    starts = [
        Start(whole), Start(on, whole.run.out),
        *(Start(c, first.run.out) for c, first in zip(moved, one, strict=True)),
    ]  # fmt: skip
    losses += run_ranks(2, train_all, starts)[0]
    configs = [*one, whole, on, *moved]
    return SimpleNamespace(
        replay=replay,
        config=config,
        out={c.run.out.name: c.run.out for c in configs},
        losses=dict(zip([c.run.out.name for c in configs], losses, strict=True)),
    )


def test_muon_is_plain_pytorch(runs):
    """Also of two maps and three that are one parameter, each orthogonal by itself."""
    inside = [n for n in runs.replay["weights"] if "Wqkv" in n or "Wi" in n]
    assert len(inside) == 4
    for name in ("muon-0-1", "muon-3-2"):
        require_replayed(runs.out[name], runs.losses[name], runs.replay)


def test_resumed_on_the_same_ranks_to_the_last_bit(runs):
    assert runs.losses["muon-3-2-on"] == runs.losses["muon-3-2"][CUT:]
    require_same_state(runs.out["muon-3-2-on"], runs.out["muon-3-2"])


@pytest.mark.parametrize(
    ("moved", "first"), [("muon-0-1-to-2-2", "muon-0-1"), ("adamw-0-1-to-3-2", "adamw-0-1")]
)
def test_goes_on_at_another_stage_and_number_of_ranks(moved, first, runs):
    _require_moved(runs, runs.out[moved], runs.losses[moved], first)


def _require_moved(runs: SimpleNamespace, out: Path, losses: list[float], first: str) -> None:
    np.testing.assert_allclose(losses, runs.losses[first][CUT:], rtol=ELASTIC_LIMIT)
    weights = final_state(out)["weight"]
    for key, values in final_state(runs.out[first])["weight"].items():
        np.testing.assert_allclose(weights[key], values, atol=2e-5, err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_all_stages_whole_resumed_and_moved(ranks, stage, kind, runs):
    first = f"{kind}-0-1"
    whole, on, moved = (
        runs.config(f"all-{kind}-{ranks}-{stage}-{end}", stage, optim__kind=kind)
        for end in ("whole", "on", "moved")
    )
    starts = [Start(whole), Start(on, whole.run.out), Start(moved, runs.out[first])]
    of_whole, of_on, of_moved = run_ranks(ranks, train_all, starts)[0]
    np.testing.assert_allclose(of_whole, runs.losses[first], rtol=1e-6)
    assert of_on == of_whole[CUT:]
    require_same_state(on.run.out, whole.run.out)
    _require_moved(runs, moved.run.out, of_moved, first)
