"""``--json``: every command that prints a table prints the same as JSON, and nothing beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.core import TyperGroup
from typer.testing import CliRunner

from data_prep.shards.reader import ShardSet
from docs.generate import command
from launch.cli import VERBS, build_app
from pretrain.settings.model_settings import ModelConfig
from tests.perturb_results import names, noise, write_screen
from tests.synthetic import make_shards

# Others print a sentence, a path, or nothing.
TABLES = {
    "prepare", "check", "inspect", "verify", "pretrain", "plan", "runs", "finetune cells",
    "finetune genes", "benchmark", "simulate", "perturb-report", "doctor", "probe", "saturate",
}  # fmt: skip


def leaves(verb: str) -> dict[str, Any]:
    found: Any = command(verb)
    if isinstance(found, TyperGroup):
        return {f"{verb} {name}": inner for name, inner in found.commands.items()}
    return {verb: found}


def test_commands_with_tables_have_it():
    every = {n: c for verb in VERBS if verb != "launch" for n, c in leaves(verb).items()}
    with_json = {name for name, c in every.items() if any("--json" in p.opts for p in c.params)}
    assert with_json == TABLES


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Cells, shards, a model of random weights, and a screen."""
    from pretrain.model.masked_gene_model import build_model

    folder = tmp_path_factory.mktemp("json")
    shards = ShardSet(make_shards(folder, num_cells=60))
    small = ModelConfig(num_layers=1, hidden_size=16, num_heads=2, intermediate_size=16)
    build_model(small, shards.vocabulary, 0).bert.save_pretrained(folder / "model")
    shards.vocabulary.save(folder / "model" / "vocabulary.json")
    values, donors = noise(np.random.default_rng(3), 40, 4, 5, 0.1)
    write_screen(folder / "screen", values, donors, names(40))
    return folder


VOCAB = ("--vocab", "shards/vocabulary.json")


@pytest.mark.parametrize(
    ("line", "keys"),
    [
        (("check", "cells.h5ad", *VOCAB), {"sources", "datasets", "problems"}),
        (("prepare", "cells.h5ad", *VOCAB, "--out", "more"), {"fingerprint", "buckets"}),
        (("inspect", "shards"), {"fingerprint", "buckets"}),
        (("inspect", "shards", "--shuffle"), {"mixing", "read_amplification"}),
        (("pretrain", "--config", "tiny", "--dry-run", "data.shards=shards", "run.out=r",
          "optim.warmup_steps=1"), {"settings", "steps", "weights"}),
        (("plan", "--config", "tiny"), {"hours", "memory"}),
        (("simulate", "--out", "sim", "--cells", "40", "--genes", "30", "--tfs", "3", "--types",
          "2", "--perturb", "none"), {"moments"}),
        (("perturb-report", "screen", "--out", "report"), {"warnings", "genes"}),
        (("finetune", "cells", "cells.h5ad", "--model", "model", "--label", "cell_type",
          "--epochs", "1", "--steps", "1", "--out", "scores"), {"summary", "seeds", "format"}),
    ],
    ids=lambda x: "-".join(x[:3]) if isinstance(x, tuple) else "",
)  # fmt: skip
def test_output_is_json_and_nothing_else(home, line, keys, monkeypatch):
    monkeypatch.chdir(home)
    done = CliRunner().invoke(build_app(line[0]), [*line, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert keys <= json.loads(done.stdout).keys()


def test_problems_of_verify(home, monkeypatch):
    monkeypatch.chdir(home)
    clean = CliRunner().invoke(build_app("verify"), ["verify", "shards", "--json"])
    assert (clean.exit_code, json.loads(clean.stdout)) == (0, [])
    tar = next((home / "shards").glob("*.tar"))
    content = tar.read_bytes()
    tar.write_bytes(content[:600] + b"x" + content[601:])
    damaged = CliRunner().invoke(build_app("verify"), ["verify", "shards", "--json"])
    tar.write_bytes(content)
    assert damaged.exit_code == 2
    assert {problem["shard"] for problem in json.loads(damaged.stdout)} == {tar.name}


def test_list_of_tasks():
    done = CliRunner().invoke(build_app("benchmark"), ["benchmark", "--list", "--json"])
    tasks = json.loads(done.stdout)
    assert {"name", "missing", "recipe"} <= tasks[0].keys()
    assert any(not task["missing"] for task in tasks), "the quick suite's cells are installed"


def test_json_of_a_run_is_its_metrics(home, monkeypatch):
    monkeypatch.chdir(home)
    line = ["pretrain", "--config", "tiny", "data.shards=shards", "run.out=r", "--json"]
    error = CliRunner().invoke(build_app("pretrain"), line).exception
    assert isinstance(error, ValueError) and "belongs to --dry-run" in str(error)
    assert not Path("r").exists()
