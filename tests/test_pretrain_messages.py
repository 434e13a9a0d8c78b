"""Files that cannot be read or written, and edited ones: one line each, and what to do."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from data_prep.errors import said_of
from tests.ranks import commands, run_new_ranks
from tests.runs import tiny_config
from tests.test_pretrain_faults import small_disk, words


def test_a_folder_that_may_only_be_read_is_refused_in_one_line(trained, shards, tmp_path):
    (tmp_path / "out").mkdir()
    config = tiny_config(shards, tmp_path / "disk" / "run")
    command = words(tiny_config(shards, tmp_path / "out" / "run"), "--resume")
    with small_disk(tmp_path / "disk", 64):
        shutil.copytree(trained, config.run.out)
        remount = ["mount", "-o", "remount,ro", "tmpfs", str(tmp_path / "disk")]
        subprocess.run(remount, check=True)
        with commands([[*command, f"run.out={config.run.out}"]], tmp_path / "logs") as ranks:
            assert ranks[0].code() == 2, ranks[0].said
    lines = [line for line in ranks[0].said.splitlines() if line.startswith("error")]
    assert len(lines) == 1 and "Traceback" not in ranks[0].said, ranks[0].said
    assert lines[0].startswith(f"error: {config.run.out}: ")
    assert "the file system is mounted for reading alone; mount it for writing, or " in lines[0]


def log_into_a_folder(run: Path) -> str:
    from pretrain.measure.metrics import RunLog

    try:
        RunLog(run, 0)
    except OSError as error:
        return str(error)
    return "written"


def test_a_folder_in_place_of_a_file_is_named(trained, tmp_path):
    from pretrain.checkpoints import checkpoint

    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    said = run_new_ranks(1, log_into_a_folder, tmp_path / "run")[0]
    assert said == (
        f"{tmp_path}/run/metrics.jsonl: cannot be written (Is a directory); make room, or see to "
        "the file system, and go on with --resume"
    )
    with pytest.raises(OSError) as caught:
        (tmp_path / "run" / "metrics.jsonl").read_text()
    assert said_of(caught.value) == (
        f"{tmp_path}/run/metrics.jsonl: is a folder, where a file is expected; move it away"
    )
    run = Path(shutil.copytree(trained, tmp_path / "other"))
    record = run / "checkpoints" / "step-00000010" / "checkpoint.json"
    record.unlink()
    record.mkdir()
    last = checkpoint.newest(run)
    assert last is not None and last.step == 5


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_act", "gelu", "activation is 'gelu', the checkpoint was trained with 'relu'"),
        ("num_hidden_layers", 1, "num_layers is 1, the checkpoint was trained with 2"),
        ("num_attention_heads", 4, "num_heads is 4, the checkpoint was trained with 2"),
        ("vocab_size", 99, "bert.bert.embeddings.word_embeddings.weight has 3,168 numbers"),
    ],
)
def test_an_edited_model_config_is_refused_by_export(key, value, message, trained, tmp_path):
    from pretrain.export.model_folder import export
    from pretrain.export.to_deepspeed import export_deepspeed

    run = Path(shutil.copytree(trained, tmp_path / "run"))
    path = run / "model_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    for function in (export, export_deepspeed):
        with pytest.raises(ValueError, match="does not fit the weights of step 10") as caught:
            function(run, tmp_path / "model")
        assert message in str(caught.value)
        assert not (tmp_path / "model").exists()
