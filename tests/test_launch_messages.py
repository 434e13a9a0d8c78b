"""What goes wrong around a run is said in one line, with what to do."""

from __future__ import annotations

import json
import runpy
import socket
import sys

from tests.ranks import commands, end_commands, start_functions, start_geneloom
from tests.runs import tiny_config
from tests.test_cli import geneloom
from tests.test_pretrain_faults import small_disk


def test_a_full_disk_is_named_and_ends_no_launcher_with_a_traceback(tmp_path):
    with small_disk(tmp_path / "disk", 1):
        free = (tmp_path / "disk" / "fill").open("wb", buffering=0)
        try:
            while free.write(b"0" * 4096) == 4096:
                pass
        except OSError:
            pass
        words = ["launch", "mpi", "--ranks", "1", "--device", "cpu", "--restarts", "3", "prepare",
                 tmp_path / "no.h5ad", "--out", tmp_path / "disk" / "out"]  # fmt: skip
        process = start_geneloom(words, tmp_path / "log")
        try:
            assert process.code() == 1, process.said
        finally:
            end_commands([process])
        free.close()
    assert f"the disk of {tmp_path / 'disk' / 'out'} is full (0.0 MiB free); make room there" in (
        process.said
    )
    assert "launch: starting again in 2 s" in process.said
    assert "Traceback" not in process.said


def run_with_error_file(words: list[str], path: str) -> None:
    import os

    from tests.ranks import run_command

    os.environ["TORCHELASTIC_ERROR_FILE"] = path
    run_command(words)


def test_a_port_in_use_is_named_and_torchrun_hears_the_reason(shards, tmp_path):
    config = tiny_config(shards, tmp_path / "run")
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml())
    error_file = tmp_path / "error.json"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (rank,) = start_functions(
            run_with_error_file, [[["--config", str(path)], str(error_file)]], tmp_path / "logs",
            port,
        )  # fmt: skip
        try:
            assert rank.code() == 2, rank.said
        finally:
            end_commands([rank])
    assert f"error: port {port}, at which the ranks are to meet, is in use" in rank.said
    assert "Traceback" not in rank.said
    assert f"port {port}" in json.loads(error_file.read_text())["message"]["message"]
    assert not config.run.out.exists()


def test_restart_from_the_beginning_clears_what_was_being_written(shards, tmp_path):
    config = tiny_config(shards, tmp_path / "run")
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml())
    left = config.run.out / "checkpoints" / ".step-00000005.abcd.partial"
    left.mkdir(parents=True)
    for name in ("config.yaml", "shards_manifest.json"):
        (config.run.out / name).write_text("{}")
    with commands([["--config", str(path), "--restart"]], tmp_path / "logs") as (rank,):
        assert rank.code() == 0, rank.said
    assert not left.exists()


def say_help(package: str) -> None:
    sys.argv = [f"eval.{package}", "--help"]
    runpy.run_module(f"eval.{package}", run_name="__main__", alter_sys=True)


def test_what_a_launcher_starts_on_each_rank_says_what_it_takes(tmp_path):
    """Without meeting the other ranks first: help is asked of one."""
    started = {
        p: start_functions(say_help, [(p,)], tmp_path / p)[0] for p in ("finetune", "perturb")
    }
    try:
        for package, rank in started.items():
            assert rank.code() == 0, rank.said
            assert "--model" in rank.said or package == "finetune", rank.said
        assert "cells" in started["finetune"].said and "genes" in started["finetune"].said
    finally:
        end_commands(list(started.values()))


def test_wrong_words_are_said_before_anything_starts(tmp_path):
    (tmp_path / "hosts").write_text("a slots=1\n")
    hosts = ["launch", "hostfile", "--hostfile", "hosts"]
    for words, said in (
        ([*hosts, "prepare", "x"], "prepare runs under MPI"),
        ([*hosts, "--launcher", "rsh", "pretrain"], "--launcher rsh: must be ssh or pdsh"),
        ([*hosts, "--device", "tpu", "pretrain"], "--device tpu: must be auto, cpu or gpu"),
        (["launch", "local", "--device", "tpu", "pretrain"], "--device tpu: must be"),
        (["launch", "local", "export"], "export"),
        (["doctor", "--folder", "absent"], "--folder absent: no such folder"),
    ):
        done = geneloom(*words, cwd=tmp_path)
        assert done.returncode == 2 and said in done.stderr, done.stderr
