"""Ranks that differ in code, settings or shards are found before the first step, by name."""

from __future__ import annotations

import os
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from pretrain.config import RunConfig
from tests.ranks import run_ranks
from tests.runs import tiny_config

HOST = socket.gethostname()


def meet(configs: list[RunConfig], code: list[Path | None], skew_s: list[float]) -> Any:
    """Return what `agreed_world` says to this rank, and what it warns of."""
    import logging

    from data_prep import version
    from pretrain.ds_config import derive_ds_config
    from pretrain.ranks import dist, same_world

    class Said(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warnings.append(record.getMessage())

    warnings: list[str] = []
    ranks = dist.start(60, 1)
    config, root = configs[ranks.rank], code[ranks.rank]
    handler, digest, clock = Said(), same_world.code_digest, time.time
    same_world.logger.addHandler(handler)
    if root is not None:
        same_world.code_digest = lambda: version.code_digest(root)
    same_world.time.time = lambda: clock() + skew_s[ranks.rank]
    try:
        shards = same_world.agreed_world(config, derive_ds_config(config), ranks)
        said = shards.fingerprint
    except same_world.DifferentWorlds as error:
        said = str(error)
    finally:
        same_world.logger.removeHandler(handler)
        same_world.code_digest, same_world.time.time = digest, clock
        dist.leave()
    return said, warnings


def of_two(one: RunConfig, two: RunConfig, code: Path | None = None, skew_s: float = 0) -> Any:
    told = run_ranks(2, meet, [one, two], [None, code], [0.0, skew_s])
    assert told[0][0] == told[1][0]
    return told[0]


def test_equal_ranks_go_on_whatever_their_folders_are_called(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "copy")
    one, two = (tiny_config(folder, tmp_path / "run") for folder in (shards, tmp_path / "copy"))
    said, warnings = of_two(one, two)
    assert len(said) == 64 and not warnings


def test_other_settings_are_named_with_both_values(shards, tmp_path):
    one = tiny_config(shards, tmp_path / "run")
    two = tiny_config(shards, tmp_path / "run", run__seed=3, optim__max_grad_norm=2.0)
    said, _ = of_two(one, two)
    assert f"run.seed: 3 on {HOST} (rank 1), 0 on {HOST} (rank 0)" in said
    assert "optim.max_grad_norm: 2.0 on" in said
    assert "file of run.deepspeed.gradient_clipping: 2.0 on" in said
    assert not (tmp_path / "run").exists()


def test_other_cells_of_the_same_vocabulary_are_found(shards, tmp_path):
    from data_prep.prepare.options import PrepareOptions
    from data_prep.prepare.run import prepare
    from data_prep.shards.reader import ShardSet
    from data_prep.sources.source_spec import SourceOptions, source_at
    from tests.synthetic import make_cells

    make_cells(num_cells=90, seed=8).write_h5ad(tmp_path / "cells.h5ad")
    own = ShardSet(shards)
    options = PrepareOptions(heldout_share=0.1, block_cells=16)
    sources = [source_at(tmp_path / "cells.h5ad", SourceOptions())]
    prepare(sources, tmp_path / "shards", own.vocabulary, options)
    others = ShardSet(tmp_path / "shards")
    said, _ = of_two(*(tiny_config(s.folder, tmp_path / "run") for s in (own, others)))
    assert said.startswith(
        f"the ranks are not alike: shards: '{others.fingerprint[:12]}' on {HOST} (rank 1), "
        f"'{own.fingerprint[:12]}' on {HOST} (rank 0). "
    )
    said, _ = of_two(
        tiny_config(shards, tmp_path / "run"), tiny_config(tmp_path / "no", tmp_path / "run")
    )
    assert said.startswith(f"{HOST} (rank 1): ") and str(tmp_path / "no") in said


def test_other_code_is_found_and_a_clock_is_told(shards, tmp_path):
    from data_prep.version import code_digest

    root = Path(__file__).resolve().parent.parent
    for folder in ("data_prep", "pretrain"):
        shutil.copytree(root / folder, tmp_path / "code" / folder)
    changed = tmp_path / "code" / "pretrain" / "objective" / "masking.py"
    changed.write_text(changed.read_text() + "\n# one line more\n")
    config = tiny_config(shards, tmp_path / "run")
    said, _ = of_two(config, config, tmp_path / "code")
    there = code_digest(tmp_path / "code")
    assert f"code of the package: '{there}' on {HOST} (rank 1), '{code_digest()}' on" in said
    said, warnings = of_two(config, config, skew_s=3600)
    assert len(said) == 64
    assert len(warnings) == 1 and "the clocks of the hosts differ by 3600 s: " in warnings[0]


def test_interface_of_a_job(monkeypatch):
    """On this machine's own interfaces."""
    from data_prep.running.network import interface_of_job, interface_to, outer_interfaces

    outer = outer_interfaces()
    job = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"}
    assert "lo" not in outer and interface_of_job(job) is None
    assert interface_of_job(job | {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": HOST}) is None
    if len(outer) == 1:
        # Ranks elsewhere too, but the first host's name is loopback here: 127.0.1.1 of Debian.
        elsewhere = job | {"MASTER_ADDR": "127.0.1.1", "LOCAL_WORLD_SIZE": "1"}
        assert interface_of_job(elsewhere) == outer[0]
        assert interface_of_job(elsewhere | {"GLOO_SOCKET_IFNAME": "eth7"}) is None
    assert interface_to("no such host") is None


# Real hosts


@pytest.mark.long
@pytest.mark.parametrize("file_says", ["127.0.1.1", "nothing"])
def test_debians_hosts_file_does_not_break_plain_ranks(file_says, shards, tmp_path):
    """Two hosts whose own names are 127.0.1.1, ranks started by hand, as torchrun would."""
    import sys

    from tests.hosts import hosts, skip_without_hosts

    skip_without_hosts()
    config = tiny_config(shards, tmp_path / "run", run__heartbeat_s=5)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    with hosts(2, tmp_path / "hosts") as made:
        processes = []
        for rank, host in enumerate(made):
            table = Path("/etc/netns") / host.namespace / "hosts"
            if file_says == "127.0.1.1":
                table.write_text(f"127.0.0.1 localhost\n127.0.1.1 {host.name}\n")
            environment = os.environ | {
                "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": made[0].address, "MASTER_PORT": "29511", "OMP_NUM_THREADS": "1",
                "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(Path(__file__).resolve().parent.parent),
            }  # fmt: skip
            words = [sys.executable, "-m", "pretrain", "--config", str(tmp_path / "config.yaml")]
            log = tmp_path / f"rank-{rank}.log"
            processes.append((host.start(words, log, env=environment), log))
        for process, log in processes:
            assert process.wait(180) == 0, log.read_text()
