"""Power cuts, signals, another world size, torn checkpoints: the run goes on as if nothing was."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pretrain import checkpoint
from tests.ranks import run_ranks
from tests.runs import run_training, tiny_config

ROOT = Path(__file__).resolve().parent.parent
_LIMIT_S = 90


def wait_until(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + _LIMIT_S
    while not condition():
        assert process.poll() is None, "the run ended by itself"
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.02)


def start_command(config, *arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    """Start ``geneloom [launch local --ranks N] pretrain`` as a user would."""
    path = config.run.out.parent / f"{config.run.out.name}.yaml"
    path.write_text(config.to_yaml())
    command = [sys.executable, "-m", "launch.cli", *launcher, "pretrain", "--config", str(path)]
    code = "import sys; from launch.cli import main; sys.argv[0] = 'geneloom'; main()"
    command = [sys.executable, "-c", code, *command[3:], *arguments]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def final_weights(run: Path) -> dict[str, np.ndarray]:
    last = checkpoint.newest(run)
    assert last is not None
    reader = last.reader()
    return {n: reader.read("weight", n, 0, reader.numel(n)).numpy() for n in reader.names}


def test_kill_9_and_resume_is_bit_exact(shards, tmp_path):
    settings = {"run__max_steps": 150, "checkpoint__every_steps": 7, "model__hidden_dropout": 0.1}
    whole = tiny_config(shards, tmp_path / "whole", **settings)
    _, weights = run_ranks(1, run_training, whole)[0]

    cut = tiny_config(shards, tmp_path / "cut", **settings)
    rng = np.random.default_rng(int(time.time()))
    kills = []
    for attempt in range(3):
        arguments = ["--resume"] if checkpoint_exists(cut.run.out) else []
        process = start_command(cut, *arguments)
        saved = len(kills) and kills[-1]
        target = int(saved) + int(rng.integers(8, 16))
        wait_until(lambda at=target: last_step(cut.run.out) >= at, process)
        time.sleep(float(rng.uniform(0, 0.2)))
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills.append(last_step(cut.run.out))
        assert kills[-1] < 150, f"attempt {attempt} came too late: {kills}"
    process = start_command(cut, "--resume")
    output, _ = process.communicate(timeout=_LIMIT_S)
    assert process.returncode == 0, output
    for name, weight in weights.items():
        np.testing.assert_array_equal(final_weights(cut.run.out)[name], weight, err_msg=name)
    steps = [m["step"] for m in metrics(cut.run.out, "train")]
    assert steps == list(range(1, 151)), f"each step is logged once after kills at {kills}"
    losses = [m["loss"] for m in metrics(cut.run.out, "train")]
    assert losses == [m["loss"] for m in metrics(whole.run.out, "train")]


def metrics(run: Path, kind: str) -> list[dict]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # the line that was being written
    return [r for r in records if r["kind"] == kind]


def last_step(run: Path) -> int:
    records = metrics(run, "train")
    return records[-1]["step"] if records else 0


def checkpoint_exists(run: Path) -> bool:
    return (run / "checkpoints" / "latest").exists()


def test_signal_through_the_launcher_saves_and_exits_75(shards, tmp_path):
    config = tiny_config(shards, tmp_path / "run", run__max_steps=2000, run__epochs=500)
    process = start_command(config, launcher=("launch", "local", "--ranks", "2"))
    wait_until(lambda: last_step(config.run.out) >= 3, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=_LIMIT_S)
    assert process.returncode == 75, output
    last = checkpoint.newest(config.run.out)
    assert last is not None
    assert last.step == last_step(config.run.out)
    assert "continue with --resume" in output
    assert (config.run.out / "checkpoints" / "latest").read_text().strip() == last.folder.name


@pytest.mark.parametrize(
    ("ranks", "stages"), [((2, 1), (1, 1)), ((1, 2), (3, 3)), ((2, 2), (0, 2))]
)
def test_resume_at_another_world_size_or_stage(ranks, stages, shards, tmp_path):
    whole = tiny_config(shards, tmp_path / "whole", run__deepspeed="zero1")
    reference, _ = run_ranks(1, run_training, whole)[0]
    out = tmp_path / "run"
    first = tiny_config(shards, out, run__deepspeed=f"zero{stages[0]}", checkpoint__keep=5)
    run_ranks(ranks[0], run_training, first)
    for file in (out / "checkpoints" / "step-00000010").iterdir():
        file.unlink()
    second = tiny_config(shards, out, run__deepspeed=f"zero{stages[1]}", checkpoint__keep=5)
    resumed, _ = run_ranks(ranks[1], run_training, second, True)[0]
    assert resumed.first_step == 5
    np.testing.assert_allclose(resumed.losses, reference.losses[5:], rtol=1e-5)


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    run_ranks(1, run_training, tiny_config(shards, out))
    return out


def copied(run: Path, to: Path) -> Path:
    import shutil

    return Path(shutil.copytree(run, to / "run"))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(_truncate, "bytes instead of"), (_flip, "another SHA-256"), (Path.unlink, "is missing")],
)
def test_torn_checkpoint_is_skipped_loudly(damage, reason, finished, tmp_path, caplog):
    run = copied(finished, tmp_path)
    damage(run / "checkpoints" / "step-00000010" / "rank-00000.safetensors")
    last = checkpoint.newest(run)
    assert last is not None
    assert last.step == 5
    assert "step-00000010 is skipped" in caplog.text
    assert reason in caplog.text
    record = run / "checkpoints" / "step-00000005" / "checkpoint.json"
    record.write_text(record.read_text().replace('"step": 5', '"step": 6'))
    with pytest.raises(ValueError, match="none of 2 checkpoints is complete"):
        checkpoint.newest(run)


def test_torn_checkpoints_do_not_crowd_out_good_ones(shards, finished, tmp_path):
    run = copied(finished, tmp_path)
    _flip(run / "checkpoints" / "step-00000010" / "rank-00000.safetensors")
    config = tiny_config(shards, run, checkpoint__every_steps=1, checkpoint__keep=2)
    run_ranks(1, run_training, config, True)
    names = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert names == ["latest", "step-00000009", "step-00000010", "torn-step-00000010"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"optim__learning_rate": 1e-3, "model__num_layers": 3},
            "resume: the recipe changed: model.num_layers: 2 -> 3; optim.learning_rate: 0.005 -> "
            "0.001; .*--allow-changes",
        ),
        (
            {"batch__tokens_per_step": 2048},
            "resume: the recipe changed: batch.tokens_per_step: 1024 -> 2048",
        ),
    ],
)
def test_changed_recipe_is_refused_by_name(change, message, shards, finished, tmp_path):
    run = copied(finished, tmp_path)
    config = tiny_config(shards, run, **change)
    with pytest.raises(AssertionError, match=f"ValueError: {message}"):
        run_ranks(1, run_training, config, True)


def test_other_shards_are_refused(shards, finished, tmp_path):
    from tests.synthetic import make_shards

    run = copied(finished, tmp_path)
    other = make_shards(tmp_path, seed=9)
    with pytest.raises(AssertionError, match="checkpoint was trained on vocabulary"):
        run_ranks(1, run_training, tiny_config(other, run), True)


def test_run_folder_is_not_overwritten_nor_invented(shards, finished, tmp_path):
    with pytest.raises(AssertionError, match="add --resume"):
        run_ranks(1, run_training, tiny_config(shards, finished))
    with pytest.raises(AssertionError, match="there is no checkpoint"):
        run_ranks(1, run_training, tiny_config(shards, tmp_path / "new"), True)
    assert not (tmp_path / "new").exists()
