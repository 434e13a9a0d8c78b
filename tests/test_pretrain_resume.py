"""A run goes on: at other world sizes and stages, past damage; or is refused, by name."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pretrain.config import RunConfig
from tests.ranks import run_ranks
from tests.runs import OFFLOAD, final_state, metrics, require_same_state, run_training, tiny_config
from tests.selection import selected
from tests.synthetic import make_shards


def copied(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to / "run"))


# --- other world sizes and stages ---

_SEGMENT_STEPS = 3


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory) -> Path:
    """Twelve steps of one rank."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    run_ranks(1, run_training, tiny_config(shards, out, run__max_steps=4 * _SEGMENT_STEPS))
    return out


def _chain(*files: str) -> list[tuple[int, str]]:
    """Return (ranks, DeepSpeed file) of four starts: 1, 2, 3 and again 1 rank."""
    return list(zip((1, 2, 3, 1), files, strict=True))


@pytest.mark.parametrize(
    "starts",
    [
        pytest.param(_chain("zero0", "zero2", "zero1", "zero3"), id="mixed"),
        pytest.param(_chain(*["zero3"] * 4), id="zero3", marks=pytest.mark.long),
    ]
    + [
        pytest.param(_chain(*[file] * 4), id=file, marks=pytest.mark.slow)
        for file in ("zero0", "zero1", "zero2", *OFFLOAD)
    ]
    + [
        pytest.param(_chain("zero1", file, "zero0", file), id=f"to-{file}", marks=pytest.mark.slow)
        for file in OFFLOAD
    ],
)
def test_resume_at_other_world_sizes_and_stages(starts, undisturbed, shards, tmp_path):
    out = tmp_path / "run"
    for number, (ranks, deepspeed) in enumerate(starts):
        config = tiny_config(
            shards, out, run__max_steps=len(starts) * _SEGMENT_STEPS, run__deepspeed=deepspeed,
            checkpoint__every_steps=_SEGMENT_STEPS, checkpoint__keep=9,
        )  # fmt: skip
        summary, _ = run_ranks(ranks, run_training, config, number > 0)[0]
        assert summary.first_step == number * _SEGMENT_STEPS
        # As if it had been cut off after its first checkpoint; what it logged after that stays.
        for later in sorted((out / "checkpoints").glob("step-*"))[number + 1 :]:
            shutil.rmtree(later)

    mine, theirs = metrics(out, "train"), metrics(undisturbed, "train")
    assert len(theirs) == len(starts) * _SEGMENT_STEPS
    for key in ("step", "cells_seen", "cells_digest"):
        assert [m[key] for m in mine] == [m[key] for m in theirs]
    np.testing.assert_allclose([m["loss"] for m in mine], [m["loss"] for m in theirs], rtol=1e-5)
    state, expected = final_state(out), final_state(undisturbed)
    for name, weights in expected["weight"].items():
        np.testing.assert_allclose(state["weight"][name], weights, atol=2e-5, err_msg=name)


# --- damage ---


@dataclass(frozen=True)
class Damage:
    """What happens to checkpoints 6 and 9 of a run; why 9 is skipped, None if it is not."""

    do: Callable[[Path, Path], object]
    reason: str | None


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _swap_folder(step_6: Path, step_9: Path) -> None:
    shutil.rmtree(step_9)
    shutil.copytree(step_6, step_9)


_RECORD, _LATEST = "checkpoint.json", "latest"
_RANK_0, _RANK_1 = "rank-00000.safetensors", "rank-00001.safetensors"
_DAMAGES = {
    "rank file truncated": Damage(
        lambda _, n: _truncate(n / _RANK_1), r"rank-00001\S+ has \d+ bytes instead of \d+"
    ),
    "rank file flipped": Damage(
        lambda _, n: _flip(n / _RANK_0), r"rank-00000\S+ has another SHA-256"
    ),
    "rank file deleted": Damage(lambda _, n: (n / _RANK_1).unlink(), r"rank-00001\S+ is missing"),
    "rank file emptied": Damage(
        lambda _, n: _empty(n / _RANK_0), r"rank-00000\S+ has 0 bytes instead of \d+"
    ),
    "rank file of another step": Damage(
        lambda s, n: shutil.copy(s / _RANK_1, n), r"rank-00001\S+ has another SHA-256"
    ),
    "rank files exchanged": Damage(
        lambda _, n: _exchange(n / _RANK_0, n / _RANK_1), r"rank-0000\d\S+ has"
    ),
    "record truncated": Damage(lambda _, n: _truncate(n / _RECORD), "json is not readable"),
    "record flipped": Damage(
        lambda _, n: _flip(n / _RECORD), "json (is not readable|has another SHA-256)"
    ),
    "record deleted": Damage(lambda _, n: (n / _RECORD).unlink(), "json is missing"),
    "record emptied": Damage(lambda _, n: _empty(n / _RECORD), "json is not readable"),
    "record of another step": Damage(
        lambda s, n: shutil.copy(s / _RECORD, n), "json is that of step 6"
    ),
    "folder of another step": Damage(_swap_folder, "json is that of step 6"),
    "latest deleted": Damage(lambda _, n: (n.parent / _LATEST).unlink(), None),
    "latest is nonsense": Damage(
        lambda _, n: (n.parent / _LATEST).write_bytes(b"\xff\x00step-?"), None
    ),
    "latest names no checkpoint": Damage(
        lambda _, n: (n.parent / _LATEST).write_text("step-00000007\n"), None
    ),
}


# One for each way in which a checkpoint is seen to be damaged.
_SHORT_DAMAGES = {
    "rank file truncated", "rank file flipped", "rank file deleted", "record flipped",
    "record of another step", "latest is nonsense",
}  # fmt: skip


def _exchange(path: Path, other: Path) -> None:
    aside = path.with_suffix(".aside")
    path.rename(aside)
    other.rename(path)
    aside.rename(other)


@dataclass(frozen=True)
class Resumed:
    """What one resumed run did, and what it said."""

    first_step: int
    losses: list[float]
    log: str


def _resume_all(configs: Sequence[RunConfig]) -> list[Resumed]:
    """Resume one run after the other on these ranks."""
    from pretrain.ranks import dist
    from pretrain.train import train

    results = []
    for config in configs:
        lines = _Lines()
        logging.getLogger("pretrain").addHandler(lines)
        summary = train(config, resume=True)
        logging.getLogger("pretrain").removeHandler(lines)
        results.append(Resumed(summary.first_step, summary.losses, "\n".join(lines.said)))
    dist.leave()
    return results


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def _two_rank_config(shards: Path, out: Path) -> RunConfig:
    return tiny_config(
        shards, out, run__deepspeed="zero2", model__hidden_dropout=0.1, checkpoint__every_steps=3,
        checkpoint__keep=3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def two_ranks(shards, tmp_path_factory) -> Path:
    """A run of two ranks, with checkpoints of steps 6, 9 and 10."""
    out = tmp_path_factory.mktemp("two_ranks") / "run"
    run_ranks(2, run_training, _two_rank_config(shards, out))
    return out


@pytest.fixture(scope="module")
def resumed(shards, two_ranks, tmp_path_factory, request) -> dict[str, tuple[Path, Resumed]]:
    """Run folder and result of every damage."""
    folder = tmp_path_factory.mktemp("damaged")
    runs = []
    names = [p["name"] for p in selected(request, "test_damage_costs_one_checkpoint_and_no_bit")]
    for name in names:
        damage = _DAMAGES[name]
        run = copied(two_ranks, folder / name.replace(" ", "_"))
        checkpoints = run / "checkpoints"
        shutil.rmtree(checkpoints / "step-00000010")
        (checkpoints / _LATEST).write_text("step-00000009\n")
        damage.do(checkpoints / "step-00000006", checkpoints / "step-00000009")
        runs.append(run)
    results = run_ranks(2, _resume_all, [_two_rank_config(shards, run) for run in runs])[0]
    return dict(zip(names, zip(runs, results, strict=True), strict=True))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in _SHORT_DAMAGES else pytest.mark.long)
        for name in _DAMAGES
    ],
)
def test_damage_costs_one_checkpoint_and_no_bit(name, two_ranks, resumed):
    run, result = resumed[name]
    reason = _DAMAGES[name].reason
    assert result.first_step == (6 if reason else 9)
    if reason:
        assert re.search(rf"checkpoint \S+step-00000009 is skipped: \S*{reason}", result.log)
    else:
        assert "is skipped" not in result.log
    assert result.losses == [m["loss"] for m in metrics(two_ranks, "train")][result.first_step :]
    require_same_state(run, two_ranks)
    names = sorted(p.name for p in (run / "checkpoints").iterdir())
    torn = ["torn-step-00000009"] if reason else []
    assert names == ["latest", "step-00000006", "step-00000009", "step-00000010", *torn]
    assert (run / "checkpoints" / _LATEST).read_text() == "step-00000010\n"


def test_no_checkpoint_is_complete(trained, tmp_path):
    from pretrain.checkpoints import checkpoint

    run = copied(trained, tmp_path)
    _flip(run / "checkpoints" / "step-00000010" / _RANK_0)
    record = run / "checkpoints" / "step-00000005" / _RECORD
    record.write_text(record.read_text().replace('"step": 5', '"step": 6'))
    with pytest.raises(ValueError, match="none of 2 checkpoints is complete"):
        checkpoint.newest(run)


def test_torn_checkpoints_do_not_crowd_out_good_ones(shards, trained, tmp_path):
    run = copied(trained, tmp_path)
    config = tiny_config(shards, run, checkpoint__every_steps=1, checkpoint__keep=2)
    # The same one twice: a disk that goes bad does not do it once.
    for _ in range(2):
        _flip(run / "checkpoints" / "step-00000010" / _RANK_0)
        run_ranks(1, run_training, config, True)
        names = sorted(p.name for p in (run / "checkpoints").iterdir())
        assert names == ["latest", "step-00000009", "step-00000010", "torn-step-00000010"]
    require_same_state(run, trained)


def test_a_start_finishes_what_the_one_before_left(shards, trained, tmp_path):
    """Killed after the last checkpoint got its name, before `latest` and old ones were done."""
    run = copied(trained, tmp_path)
    checkpoints = run / "checkpoints"
    shutil.copytree(checkpoints / "step-00000010", checkpoints / ".step-00000010.0a1b.partial")
    shutil.copytree(checkpoints / "step-00000005", checkpoints / ".step-00000003.trash")
    (checkpoints / ".latest.partial").write_text("step-000")
    (checkpoints / _LATEST).write_text("step-00000005\n")
    summary, _ = run_ranks(1, run_training, tiny_config(shards, run, checkpoint__keep=1), True)[0]
    assert summary.losses == []
    assert sorted(p.name for p in checkpoints.iterdir()) == ["latest", "step-00000010"]
    assert (checkpoints / _LATEST).read_text() == "step-00000010\n"


def test_a_line_that_was_torn_off_is_written_again(shards, trained, tmp_path):
    """A kill can leave half a line in metrics.jsonl, and lines of steps that are lost."""
    run = copied(trained, tmp_path)
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if json.loads(line)["step"] == 8)
    path.write_text("".join(lines[:at]) + lines[at][:40])
    shutil.rmtree(run / "checkpoints" / "step-00000010")
    run_ranks(1, run_training, tiny_config(shards, run), True)
    mine, theirs = metrics(run, "train"), metrics(trained, "train")
    assert [(m["step"], m["loss"]) for m in mine] == [(m["step"], m["loss"]) for m in theirs]


# --- refusals ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"optim__learning_rate": 1e-3, "model__num_layers": 3},
            "resume: the checkpoint holds another model: model.num_layers: 2 -> 3; give the old "
            "values",
        ),
        (
            {"optim__learning_rate": 1e-3, "batch__tokens_per_step": 2048},
            "resume: the recipe changed: batch.tokens_per_step: 1024 -> 2048; "
            "optim.learning_rate: 0.005 -> 0.001; .*--allow-changes",
        ),
    ],
)
def test_changed_recipe_is_refused_by_name(change, message, shards, trained, tmp_path):
    run = copied(trained, tmp_path)
    config = tiny_config(shards, run, **change)
    with pytest.raises(AssertionError, match=message):
        run_ranks(1, run_training, config, True)


def test_other_shards_are_refused(shards, trained, tmp_path):
    run = copied(trained, tmp_path)
    other = make_shards(tmp_path, seed=9)
    with pytest.raises(AssertionError, match="checkpoint was trained on vocabulary"):
        run_ranks(1, run_training, tiny_config(other, run), True)


def test_run_folder_is_not_overwritten_nor_invented(shards, trained, tmp_path):
    with pytest.raises(AssertionError, match="add --resume"):
        run_ranks(1, run_training, tiny_config(shards, trained))
    with pytest.raises(AssertionError, match="there is no checkpoint"):
        run_ranks(1, run_training, tiny_config(shards, tmp_path / "new"), True)
    assert not (tmp_path / "new").exists()


def test_restart_begins_again_only_what_was_begun(shards, trained, tmp_path):
    """Ended before its first checkpoint: from step 0; anything else in the folder: refused."""
    out = tmp_path / "run"
    (out / "launch").mkdir(parents=True)
    (out / "launch" / "command.sh").write_text("what started it")
    config = tiny_config(shards, out, run__max_steps=3, optim__warmup_steps=1)
    summary, _ = run_ranks(1, run_training, config, "if-saved")[0]
    assert (summary.first_step, summary.last_step) == (0, 3)
    shutil.rmtree(out / "checkpoints")
    with pytest.raises(AssertionError, match="there is no checkpoint"):
        run_ranks(1, run_training, config, True)
    summary, _ = run_ranks(1, run_training, config, "if-saved")[0]
    assert (summary.first_step, summary.last_step) == (0, 3)
    assert [m["step"] for m in metrics(out, "train")] == [1, 2, 3]
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("not a run")
    with pytest.raises(AssertionError, match="there is no checkpoint"):
        run_ranks(1, run_training, tiny_config(shards, other), "if-saved")
