"""Signals, dead and stopped ranks, numbers that are none, full disks: what all ranks do then."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest

from data_prep.files import file_sha256
from data_prep.shards.reader import ShardSet
from pretrain.config import RunConfig
from pretrain.ds_config import derive_ds_config
from tests.ranks import Command, commands, end_commands, run_ranks, start_functions
from tests.runs import (
    console,
    final_state,
    last_step,
    metrics,
    rank_processes,
    require_same_state,
    run_training,
    start_command,
    tiny_config,
)
from tests.selection import selected
from tests.synthetic import make_shards

if TYPE_CHECKING:
    import torch

    from pretrain.batches.step_batch import MicroBatch
    from pretrain.batches.step_dataset import StepDataset
    from pretrain.engine import Engine

# Of a run that is to start, on a machine that does a lot beside it.
_LIMIT_S = 120
# What was promised for the ranks that are left when one dies.
_END_S = 30
_RESUMABLE = 75
_BUSY = {
    "model__num_layers": 3,
    "model__hidden_size": 384,
    "model__intermediate_size": 1536,
    "model__num_heads": 6,
}


def endless(shards: Path, out: Path, **changes) -> RunConfig:
    """Return a run that somebody has to end."""
    settings = {"run__epochs": 10**5, "run__max_steps": 10**6, "checkpoint__every_steps": 10**5}
    return tiny_config(shards, out, **(settings | {"run__heartbeat_s": 3} | changes))


def words(config: RunConfig, *more: str) -> list[str]:
    """Return the arguments of ``geneloom pretrain`` for a run."""
    path = config.run.out.with_name(f"{config.run.out.name}.yaml")
    path.write_text(config.to_yaml())
    return ["--config", str(path), *more]


@contextlib.contextmanager
def running(
    config: RunConfig, num_ranks: int, *more: str, steps: int = 3
) -> Iterator[list[Command]]:
    """Start ranks without a launcher; give them when they have trained some steps."""
    with commands([words(config, *more)] * num_ranks, config.run.out.parent / "logs") as ranks:
        wait_until(lambda: last_step(config.run.out) >= steps, ranks)
        yield ranks


def wait_until(
    condition: Callable[[], bool], ranks: list[Command], look_every_s: float = 0.02
) -> None:
    deadline = time.monotonic() + _LIMIT_S
    while not condition():
        for rank in ranks:
            assert rank.process.is_alive(), f"the run ended by itself:\n{rank.said}"
        assert time.monotonic() < deadline, ranks[0].said
        time.sleep(look_every_s)


def is_being_written(run: Path) -> bool:
    return any((run / "checkpoints").glob(".step-*.partial"))


def require_saved(config: RunConfig) -> None:
    """Assert that the last step is in a complete checkpoint, and nothing half-written is left."""
    from pretrain.checkpoints import checkpoint

    last = checkpoint.newest(config.run.out)
    assert last is not None
    assert last.step == last_step(config.run.out)
    folder = config.run.out / "checkpoints"
    assert (folder / "latest").read_text().strip() == last.folder.name
    assert not list(folder.glob(".*"))


# Signals


@pytest.mark.parametrize(
    ("number", "rank"), [(signal.SIGTERM, 1), (signal.SIGUSR1, 0), (signal.SIGINT, 1)]
)
def test_signal_to_one_rank_stops_all_after_a_checkpoint(number, rank, shards, tmp_path):
    config = endless(shards, tmp_path / "run")
    with running(config, 2) as ranks:
        ranks[rank].signal(number)
        assert [r.code() for r in ranks] == [_RESUMABLE] * 2, ranks[0].said
    require_saved(config)
    said = [r.said for r in ranks]
    assert f"signal {signal.Signals(number).name}" in said[rank]
    assert "signal" not in said[1 - rank]
    assert "continue with --resume" in said[0]
    assert "continue with --resume" not in said[1]
    assert "sign of life" not in said[0] + said[1]
    assert "Traceback" not in said[0] + said[1]


@contextlib.contextmanager
def launched(config: RunConfig, num_ranks: int) -> Iterator[subprocess.Popen]:
    """Start ``geneloom launch local``; give it when it has trained three steps."""
    process = start_command(config, ranks=num_ranks)
    try:
        deadline = time.monotonic() + _LIMIT_S
        while last_step(config.run.out) < 3:
            assert process.poll() is None, console(config)
            assert time.monotonic() < deadline, console(config)
            time.sleep(0.02)
        yield process
    finally:
        for relative in family(process.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                relative.kill()


def family(pid: int) -> list[psutil.Process]:
    """Return a process and all it has started."""
    try:
        process = psutil.Process(pid)
        return [*process.children(recursive=True), process]
    except psutil.NoSuchProcess:
        return []


@pytest.mark.long
@pytest.mark.parametrize(
    ("number", "rank"),
    [
        (signal.SIGTERM, 1),
        pytest.param(signal.SIGINT, None, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, None, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 0, marks=pytest.mark.slow),
    ],
)
def test_signal_to_the_launcher_or_a_rank_below_it(number, rank, shards, tmp_path):
    config = endless(shards, tmp_path / "run")
    with launched(config, 2) as process:
        if rank is None:
            process.send_signal(number)
        else:
            rank_processes(process.pid, "pretrain")[rank].send_signal(number)
        assert process.wait(_LIMIT_S) == _RESUMABLE, console(config)
    require_saved(config)
    assert "sign of life" not in console(config)


def test_signal_during_evaluation(tmp_path):
    shards = make_shards(tmp_path, heldout=0.8)
    config = endless(
        shards, tmp_path / "run", evaluation__every_steps=4, evaluation__max_cells=1000,
        batch__tokens_per_micro_batch=64, **_BUSY,
    )  # fmt: skip
    with running(config, 2) as ranks:
        wait_until(lambda: last_step(config.run.out) >= 4, ranks)
        asked = time.time()
        ranks[1].signal(signal.SIGTERM)
        assert [r.code() for r in ranks] == [_RESUMABLE] * 2, ranks[0].said
    heldout = metrics(config.run.out, "heldout")
    assert [m["step"] for m in heldout] == [4]
    assert asked < heldout[0]["time"], "the signal came after the evaluation"
    assert last_step(config.run.out) == 5
    require_saved(config)


def test_signals_during_checkpoints(shards, tmp_path):
    config = endless(shards, tmp_path / "run", checkpoint__every_steps=1, **_BUSY)
    with running(config, 2, steps=1) as ranks:
        wait_until(lambda: is_being_written(config.run.out), ranks, look_every_s=0.002)
        ranks[1].signal(signal.SIGTERM)
        wait_until(lambda: "signal SIGTERM" in ranks[1].said, ranks)
        # And again and again until they are gone: nothing may be cut short.
        numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP]
        while any(r.process.is_alive() for r in ranks):
            for rank in ranks:
                with contextlib.suppress(ProcessLookupError):
                    rank.signal(numbers[0])
            numbers = numbers[1:] + numbers[:1]
            time.sleep(0.01)
        assert [r.code() for r in ranks] == [_RESUMABLE] * 2, ranks[0].said
    require_saved(config)


# Ranks that die or stand still


@pytest.mark.parametrize(
    ("number", "num_ranks", "rank", "heartbeat_s"),
    [
        (signal.SIGKILL, 2, 1, 3),
        (signal.SIGKILL, 3, 0, 3),
        (signal.SIGSTOP, 2, 1, 3),
        pytest.param(signal.SIGSTOP, 3, 0, 3, marks=pytest.mark.long),
        pytest.param(signal.SIGKILL, 3, 2, 20, marks=pytest.mark.long),
        pytest.param(signal.SIGKILL, 2, 0, 20, marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, 3, 1, 20, marks=pytest.mark.slow),
    ],
)
def test_a_lost_rank_ends_the_others_by_name(
    number, num_ranks, rank, heartbeat_s, shards, tmp_path
):
    config = endless(shards, tmp_path / "run", run__heartbeat_s=heartbeat_s)
    with running(config, num_ranks) as ranks:
        ranks[rank].signal(number)
        lost, others = ranks[rank], ranks[:rank] + ranks[rank + 1 :]
        started = time.monotonic()
        assert [r.code(_END_S) for r in others] == [1] * len(others)
        assert time.monotonic() - started < _END_S
        for other in others:
            assert other.said.count(" ends: ") == 1, other.said
            assert f" ends: rank {rank} " in other.said
            assert "--resume" in other.said
        assert rank > 0 or "rank 0 (which all ranks talk through)" in others[-1].said
        if number == signal.SIGSTOP:
            assert lost.process.is_alive()


def freeze_as_soon_as_watched() -> None:
    from pretrain.ranks import dist
    from pretrain.ranks.watch import Watch

    ranks = dist.start(60, threads=1)
    with Watch(ranks, 2.0):
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(60)


def test_a_rank_that_is_frozen_before_its_first_round_is_missed(tmp_path):
    """Its thread has not said anything yet: what is said while ranks meet counts."""
    ranks = start_functions(freeze_as_soon_as_watched, [(), ()], tmp_path / "logs")
    try:
        assert ranks[0].code(_END_S) == 1, ranks[0].said
        assert " ends: rank 1 gave no sign of life for " in ranks[0].said
    finally:
        end_commands(ranks)


@pytest.mark.long
@pytest.mark.parametrize(
    ("number", "rank"),
    [
        (signal.SIGKILL, 1),
        pytest.param(signal.SIGKILL, 0, marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, 2, marks=pytest.mark.slow),
    ],
)
def test_a_lost_rank_below_the_launcher_leaves_no_orphans(number, rank, shards, tmp_path):
    config = endless(shards, tmp_path / "run")
    with launched(config, 3) as process:
        everybody = family(process.pid)
        rank_processes(process.pid, "pretrain")[rank].send_signal(number)
        # DeepSpeed's launcher gives a rank that stands still 30 s more.
        limit_s = _END_S if number == signal.SIGKILL else 2 * _END_S + 15
        assert process.wait(limit_s) not in (0, _RESUMABLE), console(config)
        _, alive = psutil.wait_procs(everybody, timeout=20)
        assert not alive
    assert f"attempt 1 ended: rank {rank} on " in console(config)


def test_without_watching_a_hung_collective_ends_in_time(shards, tmp_path):
    config = endless(shards, tmp_path / "run", run__heartbeat_s=0, run__collective_timeout_s=5)
    with running(config, 2) as ranks:
        ranks[1].signal(signal.SIGSTOP)
        assert ranks[0].code(_END_S) == 1
        assert "a collective failed, another rank is gone or stands still" in ranks[0].said
        assert "Traceback" not in ranks[0].said


def watch_again_and_again(times: int) -> int:
    from pretrain.ranks import dist
    from pretrain.ranks.watch import Watch

    ranks = dist.start(60, 1)
    for number in range(times):
        with Watch(ranks, 0.5):
            # Each time another rank comes last.
            time.sleep(0.02 * ((ranks.rank + number) % ranks.world_size))
    dist.leave()
    return times


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_leave_without_a_false_alarm(num_ranks):
    assert run_ranks(num_ranks, watch_again_and_again, 15) == [15] * num_ranks


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ten_runs_and_ten_stops_end_quietly(num_ranks, shards, tmp_path):
    for number in range(20):
        is_stopped = number % 2 == 1
        make = endless if is_stopped else tiny_config
        config = make(shards, tmp_path / f"run{number}", run__heartbeat_s=1)
        with commands([words(config)] * num_ranks, tmp_path / "logs") as ranks:
            if is_stopped:
                wait_until(lambda run=config.run.out: last_step(run) > 0, ranks)
                ranks[number % num_ranks].signal(signal.SIGTERM)
            assert [r.code() for r in ranks] == [_RESUMABLE * is_stopped] * num_ranks
            for rank in ranks:
                assert "sign of life" not in rank.said
                assert "gone" not in rank.said
                assert "failed" not in rank.said


@pytest.mark.parametrize(
    ("num_ranks", "rank"), [(2, 1), pytest.param(3, 0, marks=pytest.mark.slow)]
)
def test_a_rank_that_fails_alone_tells_the_others(num_ranks, rank, shards, tmp_path):
    good = endless(shards, tmp_path / "run")
    copy = Path(shutil.copytree(shards, tmp_path / "damaged"))
    tar = copy / ShardSet(copy).manifest["shards"][0]["name"]
    data = bytearray(tar.read_bytes())
    data[len(data) // 3] ^= 4
    tar.write_bytes(data)
    path = tmp_path / "damaged.yaml"
    path.write_text(endless(copy, tmp_path / "run").to_yaml())
    arguments = [words(good)] * num_ranks
    arguments[rank] = ["--config", str(path)]
    with commands(arguments, tmp_path / "logs") as ranks:
        codes = [r.code() for r in ranks]
        said = [r.said for r in ranks]
    assert codes == [2 if r == rank else 1 for r in range(num_ranks)], said
    prefix = "error" if rank == 0 else f"error on rank {rank}"
    assert f"{prefix}: {tar}" in said[rank]
    assert " ends: " not in said[rank]
    for other in range(num_ranks):
        if other != rank:
            assert f"rank {other} ends: rank {rank} failed: DamagedBlock: {tar}" in said[other]


@pytest.mark.slow  # half a second is little on a machine under load
def test_long_steps_evaluations_and_checkpoints_are_no_failure(tmp_path):
    shards = make_shards(tmp_path, heldout=0.5)
    limit_s = 0.5
    large = _BUSY | {"model__intermediate_size": 10_000}
    config = tiny_config(
        shards, tmp_path / "run", run__max_steps=4, run__heartbeat_s=limit_s,
        evaluation__every_steps=2, evaluation__max_cells=1000, checkpoint__every_steps=2,
        batch__tokens_per_step=4096, run__deepspeed="zero0", **large,
    )  # fmt: skip
    with commands([words(config)] * 2, tmp_path / "logs") as ranks:
        assert [r.code() for r in ranks] == [0, 0], ranks[0].said
        assert not any("sign of life" in r.said for r in ranks)
    train, heldout, written = (
        {m["step"]: m for m in metrics(config.run.out, kind)}
        for kind in ("train", "heldout", "checkpoint")
    )
    assert train[2]["time"] - train[1]["time"] > limit_s
    assert heldout[2]["time"] - train[2]["time"] > limit_s
    assert written[4]["written_s"] > limit_s


# Numbers that are none

_STEP = 5
_EMBEDDING = "bert.bert.embeddings.word_embeddings.weight"
_HEAD_NORM = "bert.cls.predictions.transform.LayerNorm"


def dataset_of(config: RunConfig, rank: int, world_size: int) -> StepDataset:
    from pretrain.batches.step_dataset import StepDataset

    return StepDataset(
        ShardSet(config.data.shards), "train", config.run.seed, config.batch.tokens_per_step,
        config.batch.tokens_per_micro_batch, config.masking, rank, world_size,
    )  # fmt: skip


@pytest.fixture(scope="module")
def half_way(shards, tmp_path_factory) -> Path:
    """A run of two ranks that ended after step 5 of 10."""
    out = tmp_path_factory.mktemp("half_way") / "run"
    run_ranks(2, run_training, tiny_config(shards, out))
    shutil.rmtree(out / "checkpoints" / "step-00000010")
    return out


def with_weights(run: Path, to: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Copy a run whose newest checkpoint gets other weights, given as tensors by name, flat."""
    from safetensors.torch import save_file

    from pretrain.checkpoints import checkpoint
    from pretrain.checkpoints.zero_state import KINDS

    shutil.copytree(run, to)
    last = checkpoint.newest(to)
    assert last is not None
    reader = last.reader()
    tensors = {
        kind: {n: reader.read(kind, n, 0, reader.numel(n)) for n in reader.names} for kind in KINDS
    }
    change(tensors["weight"])
    names = dict.fromkeys(reader.names, 0)
    record = {k: v for k, v in last.record.items() if k not in ("format", "record_sha256")}
    for file in record["files"][1:]:
        (last.folder / file["name"]).unlink()
    path = last.folder / record["files"][0]["name"]
    flat = {f"{kind}/{name}": t for kind in KINDS for name, t in tensors[kind].items()}
    save_file(flat, path, metadata={"starts": json.dumps(names)})
    file = {"name": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
    checkpoint.write_record(last.folder, record | {"files": [file]})
    return to


def step_of_two_ranks(config: RunConfig) -> list[list[MicroBatch]]:
    return [dataset_of(config, rank, 2)[_STEP].micro_batches for rank in (0, 1)]


def cells_with(gene: int, micro_batches: list[MicroBatch]) -> list[int]:
    """Return the numbers of the cells that show a gene, or hide it."""
    found = []
    for micro in micro_batches:
        shows = (micro.input_ids == gene).any(dim=1).numpy()
        shows[micro.masked_places[micro.labels == gene] // micro.input_ids.shape[1]] = True
        found += micro.cells[shows].tolist()
    return found


def gene_of_few_cells(config: RunConfig) -> tuple[int, list[int]]:
    """Return a token that only rank 1 has, and in which cells."""
    other, own = step_of_two_ranks(config)
    for gene in genes(config):
        cells = cells_with(gene, own)
        if 1 < len(cells) < 5 and not cells_with(gene, other):
            return gene, cells
    raise AssertionError("no such gene: other cells, please")


def absent_gene(config: RunConfig) -> int:
    ranks = step_of_two_ranks(config)
    return next(g for g in genes(config) if not any(cells_with(g, rank) for rank in ranks))


def genes(config: RunConfig) -> range:
    vocabulary = ShardSet(config.data.shards).vocabulary
    return range(vocabulary.first_gene_token, vocabulary.num_tokens)


def poison(weights: dict[str, torch.Tensor], gene: int) -> None:
    """Make cells that show or hide a gene have no finite loss, and others no finite gradient.

    The head's last number is always 1, the gene's weight there minus infinity. Where the gene is
    not shown its probability is 0 and all is well; but 0 x infinity is met on the way back.
    """
    weights[f"{_HEAD_NORM}.weight"][-1] = 0
    weights[f"{_HEAD_NORM}.bias"][-1] = 1
    width = len(weights[f"{_HEAD_NORM}.bias"])
    weights[_EMBEDDING][(gene + 1) * width - 1] = -math.inf


def overflow(weights: dict[str, torch.Tensor]) -> None:
    """Make gradients of about 1e25: they are finite and the losses are, their squares are not."""
    weights[f"{_HEAD_NORM}.weight"] *= 1e25
    weights[f"{_HEAD_NORM}.bias"] *= 1e25
    weights[_EMBEDDING] *= 1e-25


def test_loss_that_is_no_number_names_its_cells(half_way, shards, tmp_path):
    config = tiny_config(shards, tmp_path / "run")
    gene, cells = gene_of_few_cells(config)
    with_weights(half_way, config.run.out, partial(poison, gene=gene))
    before = final_state(config.run.out)
    with commands([words(config, "--resume")] * 2, tmp_path / "logs") as ranks:
        assert [r.code() for r in ranks] == [1, 1], ranks[0].said
        said = [r.said for r in ranks]
    opened = ShardSet(shards)
    ids = [c for b in opened.iter_blocks("train") for c in b.batch.column("cell_id").to_pylist()]
    named = ", ".join(f"{cell} = {ids[cell]}" for cell in cells)
    assert said[0].count("\nerror: ") == 1
    assert (
        f"error: NotFinite: loss is nan in step {_STEP + 1}: stopped before the optimizer's step, "
        f"nothing was changed or saved. rank 1: {len(cells)} cells ({named}). " in said[0]
    ), said[0]
    assert "error" not in said[1] and " ends: " not in said[1], said[1]
    (path,) = config.run.out.glob("not-finite-*")
    assert path.name == "not-finite-step-00000006-rank-00001.npz"
    require_dumped(path, dataset_of(config, 1, 2)[_STEP].micro_batches, cells)
    assert [p.name for p in (config.run.out / "checkpoints").glob("step-*")] == ["step-00000005"]
    same_arrays(final_state(config.run.out), before)


def require_dumped(path: Path, micro_batches: list[MicroBatch], cells: list[int]) -> None:
    """Assert that a dump holds these cells, what was shown and hidden of them, and bad losses."""
    found = []
    with np.load(path, allow_pickle=False) as dump:
        for number, micro in enumerate(micro_batches):
            if f"micro{number}/cells" not in dump:
                continue
            part = {name: dump[f"micro{number}/{name}"] for name in DUMPED}
            found += part["cells"].tolist()
            rows = [micro.cells.tolist().index(cell) for cell in part["cells"]]
            np.testing.assert_array_equal(part["input_ids"], micro.input_ids.numpy()[rows])
            flat = np.array(rows)[part["row"]] * micro.input_ids.shape[1] + part["place"]
            labels = dict(zip(micro.masked_places.tolist(), micro.labels.tolist(), strict=False))
            assert part["label"].tolist() == [labels[f] for f in flat.tolist()]
            for row in range(len(rows)):
                assert not np.isfinite(part["loss"][part["row"] == row]).all()
    assert found == cells


DUMPED = ("cells", "input_ids", "row", "place", "label", "loss")


def same_arrays(state: dict[str, dict], expected: dict[str, dict]) -> None:
    for kind, arrays in expected.items():
        for name, values in arrays.items():
            np.testing.assert_array_equal(state[kind][name], values, err_msg=f"{kind}/{name}")


@pytest.mark.parametrize("deepspeed", ["zero0", "zero1"])
def test_gradient_that_is_not_finite_stops_the_run(deepspeed, half_way, shards, tmp_path):
    config = tiny_config(shards, tmp_path / "run", run__deepspeed=deepspeed)
    with_weights(half_way, config.run.out, overflow)
    before = final_state(config.run.out)
    with commands([words(config, "--resume")] * 2, tmp_path / "logs") as ranks:
        assert [r.code() for r in ranks] == [1, 1], ranks[0].said
        said = [r.said for r in ranks]
    assert (
        "error: NotFinite: gradient norm is inf in step 6: stopped before the optimizer's step, "
        "nothing was changed or saved. The loss of every cell is finite. " in said[0]
    ), said[0]
    assert "error" not in said[1] and " ends: " not in said[1], said[1]
    dumps = sorted(config.run.out.glob("not-finite-step-00000006-*.npz"))
    assert len(dumps) == 2
    for rank, path in enumerate(dumps):
        with np.load(path, allow_pickle=False) as dump:
            cells = [c for name in dump if name.endswith("/cells") for c in dump[name].tolist()]
        micro_batches = dataset_of(config, rank, 2)[_STEP].micro_batches
        assert cells == [c for m in micro_batches for c in m.cells.tolist() if c >= 0]
    assert [p.name for p in (config.run.out / "checkpoints").glob("step-*")] == ["step-00000005"]
    same_arrays(final_state(config.run.out), before)


@dataclass(frozen=True)
class Attempt:
    """A step whose gradients are not finite."""

    fault: str
    deepspeed: str
    precision: str


_STAGES = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
# ZeRO 3 takes squares in float64: there they do not overflow.
_ATTEMPTS = [
    *(Attempt("poison", stage, "fp32") for stage in _STAGES),
    *(Attempt("overflow", stage, "fp32") for stage in (*_STAGES[:3], "zero2_offload")),
    *(Attempt("poison", stage, "bf16") for stage in ("zero0", "zero1", "zero3")),
    Attempt("overflow", "zero1", "bf16"),
    *(Attempt("none", stage, "fp32") for stage in ("zero0", "zero1", "zero3_offload")),
]
# Each fault at a stage with DeepSpeed's own norm and at one without, and all stages once.
_SHORT_ATTEMPTS = [
    Attempt("poison", "zero0", "fp32"), Attempt("poison", "zero3", "fp32"),
    Attempt("overflow", "zero0", "fp32"), Attempt("overflow", "zero2", "fp32"),
    Attempt("poison", "zero1", "bf16"), Attempt("none", "zero1", "fp32"),
]  # fmt: skip


def try_steps(configs: list[RunConfig]) -> list[dict[str, Any]]:
    """Take the step after the newest checkpoint of each run; return what came of it."""
    import torch

    from pretrain.checkpoints import checkpoint
    from pretrain.engine import Engine
    from pretrain.ranks import dist

    ranks = dist.start(60, 1)
    results = []
    for config in configs:
        shards, last = ShardSet(config.data.shards), checkpoint.newest(config.run.out)
        engine = Engine(config, derive_ds_config(config), shards, ranks, last)
        data = dataset_of(config, ranks.rank, ranks.world_size)[_STEP]
        masked = dist.count_over_ranks({"masked": data.masked})["masked"]
        loss = engine.forward_backward(data, _STEP, masked)
        before = live_state(engine, ranks.rank)
        _, norm = engine.step(_STEP, 10)
        after = live_state(engine, ranks.rank)
        changed = [
            k
            for k in before
            if not torch.equal(before[k].view(torch.int8), after[k].view(torch.int8))
        ]
        results.append({"loss": loss.loss, "norm": norm, "changed": changed})
    dist.leave()
    return results


def live_state(engine: Engine, rank: int) -> dict[str, torch.Tensor]:
    """Return copies of what a rank holds: its weights, master weights and moments."""
    from pretrain.checkpoints.zero_state import owned_fragments

    tensors = {
        f"{kind}/{fragment.name}": tensor
        for fragment in owned_fragments(engine.deepspeed, engine.stage, rank)
        for kind, tensor in fragment.tensors.items()
    }
    for name, parameter in engine.deepspeed.module.named_parameters():
        tensors[name] = getattr(parameter, "ds_tensor", parameter)
    return {name: tensor.detach().clone().view(-1) for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def tried(half_way, shards, tmp_path_factory, request) -> dict[Attempt, list[dict[str, Any]]]:
    """What came of each attempt, on both ranks: starting them costs more than the steps."""
    folder = tmp_path_factory.mktemp("tried")
    test = "test_gradients_that_are_not_finite_change_nothing"
    attempts = [p["attempt"] for p in selected(request, test)]
    configs = []
    for attempt in attempts:
        config = tiny_config(
            shards, folder / f"{attempt.fault}-{attempt.deepspeed}-{attempt.precision}",
            run__deepspeed=attempt.deepspeed, run__precision=attempt.precision,
        )  # fmt: skip
        changes = {"overflow": overflow, "poison": partial(poison, gene=absent_gene(config))}
        with_weights(half_way, config.run.out, changes.get(attempt.fault, lambda _: None))
        configs.append(config)
    of_ranks = run_ranks(2, try_steps, configs)
    return {a: [results[i] for results in of_ranks] for i, a in enumerate(attempts)}


@pytest.mark.parametrize(
    "attempt",
    [
        pytest.param(
            a,
            id=f"{a.fault}-{a.deepspeed}-{a.precision}",
            marks=[] if a in _SHORT_ATTEMPTS else pytest.mark.long,
        )
        for a in _ATTEMPTS
    ],
)
def test_gradients_that_are_not_finite_change_nothing(attempt, tried):
    for result in tried[attempt]:
        assert math.isfinite(result["loss"])
        assert math.isfinite(result["norm"]) == (attempt.fault == "none")
        # So that this can fail: without a fault everything changes.
        assert len(result["changed"]) > 10 if attempt.fault == "none" else not result["changed"]


# Disks


@contextlib.contextmanager
def small_disk(folder: Path, mib: float) -> Iterator[Callable[[float], None]]:
    """Mount a small file system; give a function that sets its size."""
    folder.mkdir()

    def mount(*options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
        subprocess.run(command, check=True, capture_output=True)

    try:
        mount(f"size={int(mib * 2**20)}")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small file system needs root")
    try:
        yield lambda size: mount("remount", f"size={int(size * 2**20)}")
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def checkpoint_mib(config: RunConfig) -> float:
    """Return what one checkpoint needs."""
    from pretrain.checkpoints.zero_state import BYTES_PER_PARAMETER
    from pretrain.model.masked_gene_model import build_model

    model = build_model(config.model, ShardSet(config.data.shards).vocabulary, 0)
    return sum(p.numel() for p in model.parameters()) * BYTES_PER_PARAMETER / 2**20


_WRITING = {"checkpoint__every_steps": 2, "checkpoint__keep": 50, "run__max_steps": 40}


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory) -> Path:
    """A run of two ranks with many checkpoints."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    run_ranks(2, run_training, tiny_config(shards, out, **_WRITING))
    return out


def cut_files_off(rank: Command) -> None:
    """Let the system refuse a process's large writes from now on, as a quota does."""
    resource.prlimit(rank.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_write_that_fails_half_way_leaves_nothing(rank, undisturbed, shards, tmp_path):
    from pretrain.checkpoints import checkpoint

    config = tiny_config(shards, tmp_path / "run", **_WRITING)
    with running(config, 2) as ranks:
        cut_files_off(ranks[rank])
        assert [r.code() for r in ranks] == [1, 1], ranks[0].said
        said = [r.said for r in ranks]
    last = checkpoint.newest(config.run.out)
    assert last is not None
    assert f"{last.folder.name} is complete. Make room" in said[0]
    assert "File too large" in said[0]
    assert said[0].count("\nerror: ") == 1
    assert "error" not in said[1] and " ends: " not in said[1], said[1]
    assert not list((config.run.out / "checkpoints").glob(".*"))
    assert all(checkpoint.damage(f) is None for f in (config.run.out / "checkpoints").glob("step*"))
    run_ranks(2, run_training, config, True)
    require_same_state(config.run.out, undisturbed)


def test_stopping_without_the_checkpoint_is_no_success(shards, tmp_path):
    config = endless(shards, tmp_path / "run")
    with running(config, 2) as ranks:
        cut_files_off(ranks[1])
        ranks[0].signal(signal.SIGTERM)
        assert [r.code() for r in ranks] == [1, 1], ranks[0].said
        assert "a checkpoint could not be written" in ranks[0].said
        assert "there is none before" in ranks[0].said
    assert not list((config.run.out / "checkpoints").iterdir())


def test_old_checkpoint_stays_until_the_new_one_is_complete(shards, tmp_path):
    config = tiny_config(shards, tmp_path / "disk" / "run", checkpoint__keep=1)
    need = checkpoint_mib(config)
    with small_disk(tmp_path / "disk", 1.9 * need) as resize:
        with commands([words(config)], tmp_path / "logs") as ranks:
            assert ranks[0].code() == 1
            assert "step-00000005 is complete. Make room" in ranks[0].said
        resize(3 * need)
        run_ranks(1, run_training, config, True)
        names = {p.name for p in (config.run.out / "checkpoints").iterdir()}
        assert names == {"step-00000010", "latest"}


def stand_still_outside(limit_s: float) -> None:
    """Rank 1 waits for what never comes, alive; the others for rank 1."""
    from pretrain.ranks import dist
    from pretrain.ranks.watch import Watch

    ranks = dist.start(60, 1)
    with Watch(ranks, 1, limit_s) as watch:
        watch.progress(6)
        if ranks.rank == 1 or ranks.world_size == 1:
            threading.Event().wait(_LIMIT_S)
        dist.wait_for_all()


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_a_rank_that_does_not_get_on_is_named_with_its_stack(num_ranks, tmp_path):
    ranks = start_functions(stand_still_outside, [[1]] * num_ranks, tmp_path)
    try:
        assert [r.code() for r in ranks] == [1] * num_ranks, ranks[0].said
    finally:
        end_commands(ranks)
    said = "".join(r.said for r in ranks)
    culprit = min(1, num_ranks - 1)
    assert re.search(rf"rank {culprit} in step 7: .*; its threads:\n", said), said
    assert "stand_still_outside" in said
    if num_ranks > 1:
        assert said.count(" ends: no step was finished for 1 s: rank 1 in step 7: ") == num_ranks
        assert said.count("in a collective, called from pretrain/ranks/dist.py") == num_ranks - 1


def wait_as_for_a_device(limit_s: float, timeout_s: int) -> None:
    """Rank 1 stands still before a point that the others have passed. They wait for a collective
    with it as ranks wait for a GPU: no frame of theirs is in one; without a limit in one, until it
    is given up."""
    import torch

    from pretrain.ranks import dist
    from pretrain.ranks.watch import Watch

    ranks = dist.start(timeout_s, 1)
    with Watch(ranks, 1, limit_s) as watch:
        watch.progress(6)
        if ranks.rank == 1:
            threading.Event().wait(_LIMIT_S)
        watch.passed("its counts")
        if not limit_s:
            dist.sum_in_place(torch.zeros(1))
        handle = torch.distributed.all_reduce(torch.zeros(1), async_op=True)
        assert handle is not None
        while not handle.is_completed():
            time.sleep(0.01)
        handle.wait()


@pytest.mark.parametrize("way", ["stall", "given up"])
def test_who_stopped_is_named_where_nobody_is_seen_in_a_collective(way, tmp_path):
    """By the time of the step, and when the collective of the others was given up first."""
    arguments = {"stall": [1, 60], "given up": [0, 2]}[way]
    ranks = start_functions(wait_as_for_a_device, [arguments] * 3, tmp_path)
    try:
        assert [r.code() for r in ranks] == [1] * 3, ranks[0].said
    finally:
        end_commands(ranks)
    ends = [line for r in ranks for line in r.said.splitlines() if " ends: " in line]
    said = re.compile(r"rank (\d) has come to the step's cells of step 7 at \d\d:\d\d:\d\d, and")
    assert {number for line in ends for number in said.findall(line)} == {"1"}, ends
    named = {"stall": "no step was finished for 1 s: rank 1 in ", "given up": "gone or stands"}
    assert any(named[way] in line for line in ends), ends
    for innocent in ("rank 0 in step", "rank 2 in step"):
        assert not any(f" {innocent}" in line.partition(" ends: ")[2] for line in ends), ends
