"""Nobody is declared dead who lives: slow ranks, busy ranks, ranks that are stopped for a while."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.busy import busy
from tests.ranks import Command, commands, end_commands, start_functions
from tests.runs import last_step, metrics, tiny_config
from tests.synthetic import make_shards

_LIMIT_S = 300
_BURNERS = 4


def stop_for(ranks: list[Command], seconds: float) -> None:
    """Stop one rank after the other for some seconds."""
    for rank in ranks:
        rank.signal(signal.SIGSTOP)
        time.sleep(seconds)
        rank.signal(signal.SIGCONT)
        time.sleep(seconds / 4)


def compute(ready: str, done: str, limit_s: float) -> None:
    """Compute in Python, which keeps the watching thread waiting for the interpreter."""
    from pretrain.ranks import dist
    from pretrain.ranks.watch import Watch

    ranks = dist.start(60, 1)
    with Watch(ranks, limit_s):
        Path(f"{ready}{ranks.rank}").touch()
        while not Path(done).exists():
            sum(range(10_000))
    dist.leave()


def test_busy_ranks_and_stops_shorter_than_the_limit_are_no_alarm(tmp_path):
    """Four processes beside two ranks for the whole limit, then stops of half of it."""
    ready, done, limit_s = tmp_path / "ready", tmp_path / "done", 1.6
    ranks = start_functions(compute, [[str(ready), str(done), limit_s]] * 2, tmp_path / "logs")
    try:
        until = time.monotonic() + _LIMIT_S
        while not all(Path(f"{ready}{rank}").exists() for rank in range(2)):
            assert time.monotonic() < until, ranks[0].said
            time.sleep(0.02)
        with busy(_BURNERS):
            time.sleep(1.1 * limit_s)
        stop_for(ranks, limit_s / 2)
        done.touch()
        assert [r.code(_LIMIT_S) for r in ranks] == [0, 0], [r.said for r in ranks]
    finally:
        end_commands(ranks)
    assert not any(" ends: " in r.said for r in ranks)


@pytest.mark.long
def test_a_loaded_run_with_the_default_signs_of_life_is_no_alarm(tmp_path):
    """Steps, evaluations and checkpoints beside four busy processes for three times the limit;
    each rank is stopped for three quarters of it."""
    shards = make_shards(tmp_path, heldout=0.5)
    config = tiny_config(
        shards, tmp_path / "run", run__epochs=10**5, run__max_steps=10**6,
        evaluation__every_steps=5, evaluation__max_cells=1000, checkpoint__every_steps=5,
        batch__tokens_per_step=4096, model__num_layers=3, model__hidden_size=384,
        model__num_heads=6, model__intermediate_size=4096,
    )  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml())
    limit_s = config.run.heartbeat_s
    with commands([["--config", str(path)]] * 2, tmp_path / "logs") as ranks:
        until = time.monotonic() + _LIMIT_S
        while last_step(config.run.out) < 2:
            assert time.monotonic() < until, ranks[0].said
            time.sleep(0.1)
        with busy(_BURNERS):
            time.sleep(3 * limit_s)
            stop_for(ranks, 0.75 * limit_s)
            before = last_step(config.run.out)
            until = time.monotonic() + _LIMIT_S
            while last_step(config.run.out) <= before:
                assert all(r.process.is_alive() for r in ranks), [r.said for r in ranks]
                assert time.monotonic() < until
                time.sleep(0.1)
        ranks[0].signal(signal.SIGTERM)
        assert [r.code(_LIMIT_S) for r in ranks] == [75, 75], [r.said for r in ranks]
    assert not any("sign of life" in r.said for r in ranks)
    assert metrics(config.run.out, "heldout") and metrics(config.run.out, "checkpoint")
