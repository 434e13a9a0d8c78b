"""What a launch writes and publishes tells no secrets; what runs is what is installed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import psutil
import pytest
import yaml

from launch.attempts.rank import remove_secrets, take_secrets, write_secrets
from launch.ways.commands import app
from tests.kubernetes_schema import SCHEMAS
from tests.ranks import end_commands, start_geneloom
from tests.runs import rank_processes

ROOT = Path(__file__).resolve().parent.parent
# Nothing that is written may contain it.
CANARY = "canary7f3a"
_SHADOWS = ("pretrain", "data_prep", "launch", "eval", "deepspeed", "torch", "numpy", "json")


def leaks(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and CANARY.encode() in p.read_bytes()]


def test_a_batch_file_holds_no_value_of_the_environment(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("GENELOOM_TEST_SECRET", CANARY)
    out, log = tmp_path / "run", tmp_path / "log"
    words = ["launch", "slurm", "--time", "1:00:00", "--env", f"API_KEY={CANARY}",
             "--env", f"PLACE={CANARY}", "--env", "NCCL_DEBUG=INFO"]  # fmt: skip
    pretrain = ["pretrain", "--config", "tiny", f"data.shards={shards}", f"run.out={out}"]
    # There is no queue here: it says so after the files are written.
    start_geneloom([*words, *pretrain], log).code()
    folder = out / "launch"
    assert "launch.attempts.rank" in (folder / "job.sbatch").read_text()
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["environment"]["NCCL_DEBUG"] == "INFO"
    assert leaks(out) == []
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir()} == {0o600}


def test_a_model_folder_tells_nothing_of_where_it_was_made(trained, tmp_path):
    from pretrain.export.model_folder import export

    run = Path(shutil.copytree(trained, tmp_path / "run"))
    env = json.loads((run / "env.json").read_text())
    env["command"] = f"geneloom pretrain run.out=/home/{CANARY}/run"
    env["machine"] = CANARY
    (run / "env.json").write_text(json.dumps(env))
    export(run, tmp_path / "model")
    record = json.loads((tmp_path / "model" / "geneloom.json").read_text())
    assert record["environment"]["versions"] == env["versions"]
    assert leaks(tmp_path / "model") == []
    assert str(tmp_path).encode() not in b"".join(
        p.read_bytes() for p in (tmp_path / "model").iterdir()
    )


def shadowed(folder: Path) -> Path:
    """Return a folder with files that are named as our modules, and as others'."""
    folder.mkdir()
    for name in _SHADOWS:
        text = f"open({str(folder / 'it_ran')!r}, 'a').write({name!r})\nraise SystemExit(0)\n"
        (folder / f"{name}.py").write_text(text)
    return folder


def test_ranks_have_the_variables_and_no_module_of_the_working_folder(shards, tmp_path):
    """Two MPI ranks that prepare data, started where the user's own ``data_prep.py`` lies.

    What they get of ``--env`` and of DeepSpeed's file is in their environment, and nowhere else.
    """
    here = shadowed(tmp_path / "here")
    (here / ".deepspeed_env").write_text(f"# mine\nHF_TOKEN={CANARY}-file\nNCCL_DEBUG=INFO\n")
    words = ["launch", "mpi", "--ranks", "2", "--device", "cpu", "--env", f"API_KEY={CANARY}",
             "--env", "NCCL_DEBUG=WARN", "--env", "HOME", "prepare", shards.parent / "cells.h5ad",
             "--vocab", shards / "vocabulary.json", "--out", tmp_path / "out"]  # fmt: skip
    process = start_geneloom(words, tmp_path / "log", here)
    found: list[dict[str, str]] = []
    try:
        while process.process.is_alive() and not found:
            with contextlib.suppress(psutil.Error):
                found = [r.environ() for r in rank_processes(process.pid, "data_prep")]
            time.sleep(0.01)
        assert process.code() == 0, process.said
    finally:
        end_commands([process])
    assert found[0]["API_KEY"] == CANARY
    assert found[0]["HF_TOKEN"] == f"{CANARY}-file"
    assert found[0]["NCCL_DEBUG"] == "WARN", "an option outranks the file"
    assert "launch: for every rank: API_KEY, HF_TOKEN, HOME, " in process.said
    assert found[0]["OMP_WAIT_POLICY"] == "PASSIVE"
    assert "OMP_WAIT_POLICY" not in process.said, "the command's own default, not the user's"
    assert CANARY not in process.said
    settings = json.loads((tmp_path / "out/launch/attempt_1/settings.json").read_text())
    assert settings["environment"]["NCCL_DEBUG"] == "WARN"
    assert leaks(tmp_path / "out") == []
    assert (tmp_path / "out" / "manifest.json").exists()
    assert not (here / "it_ran").exists()


def test_secrets_vanish_when_they_were_read(shards, tmp_path):
    """Also where the command is killed at once: then nobody is left who could tidy up."""
    words = ["launch", "mpi", "--ranks", "2", "--device", "cpu", "--env", f"API_KEY={CANARY}",
             "prepare", shards.parent / "cells.h5ad", "--vocab", shards / "vocabulary.json",
             "--out", tmp_path / "out"]  # fmt: skip
    process = start_geneloom(words, tmp_path / "log")
    attempt = tmp_path / "out" / "launch" / "attempt_1"
    try:
        while not any(attempt.glob("secret_*.json")):
            assert process.process.is_alive(), process.said
            time.sleep(0.002)
        modes = {stat.S_IMODE(p.stat().st_mode) for p in attempt.glob("secret_*.json")}
        assert modes <= {0o600}
        while len(list(attempt.glob("rank_*.log"))) < 2:
            assert process.process.is_alive(), process.said
            time.sleep(0.002)
        process.signal(signal.SIGKILL)
        process.process.join(60)
    finally:
        end_commands([process])
    assert leaks(tmp_path / "out") == []
    settings = json.loads((attempt / "settings.json").read_text())
    assert "API_KEY" in settings["secrets"] and "API_KEY" not in settings["environment"]


def test_a_rank_reads_its_secrets_once_and_leftovers_are_removed(tmp_path):
    attempt = tmp_path / "launch" / "attempt_1"
    attempt.mkdir(parents=True)
    write_secrets(attempt, 3, {})
    assert not any(attempt.iterdir())
    write_secrets(attempt, 3, {"API_KEY": CANARY})
    assert take_secrets(attempt, 1, ["API_KEY"]) == {"API_KEY": CANARY}
    with pytest.raises(FileNotFoundError):
        take_secrets(attempt, 1, ["API_KEY"])
    settings = {"device": "cpu", "nodes": 1, "environment": {}, "secrets": ["API_KEY"]}
    (attempt / "settings.json").write_text(json.dumps(settings))
    done = subprocess.run(
        [sys.executable, "-m", "launch.attempts.rank", str(attempt), "data_prep"],
        cwd=ROOT, env={**os.environ, "RANK": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and "rank 1 of this attempt was started before" in done.stderr
    remove_secrets(tmp_path / "launch")
    assert leaks(tmp_path) == []


@pytest.mark.parametrize("kind", ["pytorchjob", "mpijob"])
def test_a_manifest_has_secrets_in_a_secret_alone(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["geneloom"])
    path = tmp_path / "job.yaml"
    words = ["--kind", kind, "--image", "i", "--claim", "runs:/runs", "--env", "NCCL_DEBUG=INFO",
             "--manifest", str(path)]  # fmt: skip
    pretrain = ["pretrain", "--config", "tiny", "data.shards=/s", "run.out=/runs/a"]

    def manifests(*more: str) -> list[dict]:
        path.unlink(missing_ok=True)
        app([*("kubernetes", *words, *more, *pretrain)], standalone_mode=False)
        assert capsys.readouterr().out == path.read_text()
        found = list(yaml.safe_load_all(path.read_text()))
        for one in found:
            schema = SCHEMAS[one["apiVersion"], one["kind"]]
            jsonschema.Draft202012Validator(schema).validate(one)
        return found

    secret, job = manifests("--env", f"API_KEY={CANARY}")
    assert secret["kind"] == "Secret" and secret["stringData"] == {"API_KEY": CANARY}
    assert CANARY not in json.dumps(job)
    reference = {"name": secret["metadata"]["name"], "key": "API_KEY"}
    assert json.dumps({"secretKeyRef": reference}) in json.dumps(job)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert ("--env" in json.dumps(job)) == (kind == "mpijob")
    # One of the cluster: neither this shell nor the manifest has the value.
    (job,) = manifests("--secret", "mine", "--env", "API_KEY")
    assert json.dumps({"secretKeyRef": {"name": "mine", "key": "API_KEY"}}) in json.dumps(job)
    assert {"name": "NCCL_DEBUG", "value": "INFO"} in _first_container(job)["env"]
    with pytest.raises(ValueError, match="give `--env API_KEY` without its value"):
        manifests("--secret", "mine", "--env", f"API_KEY={CANARY}")
    assert not path.exists()


def _first_container(job: dict) -> dict:
    replicas = next(v for k, v in job["spec"].items() if k.endswith("ReplicaSpecs"))
    return next(iter(replicas.values()))["template"]["spec"]["containers"][0]


@pytest.mark.long
def test_training_is_not_that_of_the_working_folder(shards, tmp_path):
    here = shadowed(tmp_path / "here")
    words = ["launch", "local", "--ranks", "2", "--device", "cpu", "pretrain", "--config", "tiny",
             f"data.shards={shards}", f"run.out={tmp_path / 'run'}", "run.max_steps=4",
             "optim.warmup_steps=1"]  # fmt: skip
    process = start_geneloom(words, tmp_path / "log", here)
    try:
        assert process.code() == 0, process.said
    finally:
        end_commands([process])
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert not (here / "it_ran").exists()
