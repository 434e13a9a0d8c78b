"""A suite as a whole, on planted truths: what is perfect comes first, what is constant last."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from data_prep.genes.vocabulary import Vocabulary
from eval.benchmark.task_file import SUITES, all_tasks, missing_files, read_task
from pretrain.settings.model_settings import ModelConfig
from tests.ranks import start_geneloom
from tests.synthetic import make_cells

if TYPE_CHECKING:
    from transformers import BertForMaskedLM

ROOT = Path(__file__).resolve().parent.parent
GENELOOM = (sys.executable, "-c", "from launch.cli import main; main()")
_GENES = 120
_TASK = """
title: planted classes of genes
kind: genes
labels: labels.tsv
positive: "yes"
negative: "no"
cells: {files: [cells.h5ad], recipe: made by this test}
sizes:
  quick: {max_cells: 24, seeds: 1, epochs: 2, batch_cells: 4, learning_rate: 1.0e-2}
"""


def write_model(folder: Path, vocabulary: Vocabulary, embeddings: np.ndarray | None) -> Path:
    """Write a model whose layers pass the given input embeddings on unchanged; None: all zeros."""
    import torch

    from pretrain.model.masked_gene_model import build_model

    config = ModelConfig(
        num_layers=2, hidden_size=16, num_heads=2, intermediate_size=16,
        hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    network: BertForMaskedLM = build_model(config, vocabulary, 0).bert
    with torch.no_grad():
        for name, weight in network.bert.named_parameters():
            is_scale = name.endswith("LayerNorm.weight")
            weight.fill_(1.0 if is_scale and embeddings is not None else 0.0)
        if embeddings is not None:
            network.bert.embeddings.word_embeddings.weight.copy_(torch.from_numpy(embeddings))
    network.save_pretrained(folder)
    vocabulary.save(folder / "vocabulary.json")
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Path]:
    """Cells, random labels of genes, and models that know all of them, or nothing."""
    folder = tmp_path_factory.mktemp("world")
    cells = make_cells(40, _GENES)
    cells.write_h5ad(folder / "cells.h5ad")
    genes = tuple(cells.var_names)
    vocabulary = Vocabulary(genes, np.ones(_GENES), {"<pad>": 0, "<mask>": 1}, 128)
    rng = np.random.default_rng(3)
    is_positive = rng.permutation(np.arange(_GENES) % 2 == 0)
    rows = [f"{g}\t{'yes' if p else 'no'}" for g, p in zip(genes, is_positive, strict=True)]
    (folder / "labels.tsv").write_text("ensembl_id\tlabel\n" + "\n".join(rows) + "\n")
    (folder / "planted.yaml").write_text(_TASK)
    embeddings = rng.normal(size=(vocabulary.num_tokens, 16)).astype(np.float32)
    embeddings[2:, 0] = np.where(is_positive, 3.0, -3.0)
    return {
        "folder": folder,
        "task": folder / "planted.yaml",
        "perfect": write_model(folder / "perfect", vocabulary, embeddings),
        "constant": write_model(folder / "constant", vocabulary, None),
    }


def run(world: dict[str, Path], out: Path, *models: str, **changes) -> dict:
    from eval.benchmark.run import run_benchmark

    settings = {"data": world["folder"], "names": ["planted"], "own": [world["task"]]} | changes
    return run_benchmark([world[m] for m in models], "quick", out, **settings)


def scores_of(results: dict) -> list[tuple]:
    return [
        (o["contender"], o["role"], o["model"], o["fold"], o["scores"])
        for t in results["tasks"]
        for o in t["outcomes"]
    ]


@pytest.fixture(scope="module")
def planted(world, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("out") / "report"
    return out, run(world, out, "perfect", "constant")


def test_a_perfect_model_is_first_and_a_constant_one_last(planted):
    _, results = planted
    (task,) = results["tasks"]
    rows = {r["name"]: r["scores"]["auroc"]["mean"] for r in task["summary"]}
    assert task["summary"][0]["model"] == "perfect"
    assert task["summary"][0]["role"] == "model"
    for contender in ("fine-tuned", "frozen embedding", "input embeddings"):
        assert rows[f"{contender}, perfect"] > 0.95, contender
        assert rows[f"{contender}, constant"] == pytest.approx(0.5, abs=1e-9), contender
    words = {
        (v["question"], v["model"]): v["word"]
        for v in task["verdicts"]
        if v["main"] and v["question"] in ("pretraining", "baselines")
    }
    assert words["pretraining", "perfect"] == "helps"
    assert words["baselines", "perfect"] == "wins"
    assert words["pretraining", "constant"] != "helps"
    assert words["baselines", "constant"] != "wins"


def test_shuffled_labels_give_chance(planted):
    _, results = planted
    (task,) = results["tasks"]
    controls = [v for v in task["verdicts"] if v["question"] == "control"]
    assert controls
    assert {v["word"] for v in controls} == {"at chance"}
    for row in task["summary"]:
        if row["role"] == "control":
            assert abs(row["scores"]["auroc"]["mean"] - 0.5) < 0.15


@pytest.mark.long
def test_another_seed_gives_other_numbers(planted, world, tmp_path):
    _, results = planted
    expected = [s for s in scores_of(results) if s[2] != "constant"]
    other = run(world, tmp_path / "other", "perfect", seed=1)
    assert len(scores_of(other)) == len(expected)
    assert scores_of(other) != expected


@pytest.mark.long
def test_a_killed_benchmark_goes_on(planted, world, tmp_path):
    """Same seed, same numbers, which do not depend on the models beside it."""
    from eval.benchmark.run import RESULTS_NAME

    _, results = planted
    out, log = tmp_path / "killed", tmp_path / "log"
    command = [
        "benchmark", "--suite", "quick", "--model", str(world["perfect"]), "--data",
        str(world["folder"]), "--device", "cpu", "--task", "planted", "--task-file",
        str(world["task"]), "--out", str(out),
    ]  # fmt: skip
    process = start_geneloom(command, log)
    deadline = time.monotonic() + 120
    while len(list((out / "units").glob("*.json"))) < 3:
        assert process.process.is_alive(), f"it was to be killed on its way:\n{process.said}"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.process.join(10)
    done = {p: p.stat().st_mtime_ns for p in (out / "units").glob("*.json")}
    assert done
    again = start_geneloom(command, log)
    assert again.code() == 0, again.said
    assert {p: p.stat().st_mtime_ns for p in done} == done, "what is done is not done again"
    written = json.loads((out / RESULTS_NAME).read_text())
    assert scores_of(written) == [s for s in scores_of(results) if s[2] != "constant"]
    assert (out / "report.html").exists()


def test_a_folder_of_another_benchmark_is_refused(planted, world, tmp_path):
    out, _ = planted
    with pytest.raises(ValueError, match="holds a benchmark with other models"):
        run(world, out, "perfect")
    (tmp_path / "something").write_text("")
    with pytest.raises(ValueError, match="holds no benchmark"):
        run(world, tmp_path, "perfect")


def test_a_task_that_fails_leaves_the_others(world, tmp_path):
    small = _TASK.replace(
        "max_cells: 24, seeds: 1, epochs: 2", "max_cells: 10, seeds: 1, epochs: 1"
    )
    assert small != _TASK
    small += "folds: 3\n"
    files = [tmp_path / "small.yaml", tmp_path / "broken.yaml"]
    files[0].write_text(small)
    files[1].write_text(small.replace('"yes"', '"perhaps"'))
    (tmp_path / "labels.tsv").write_text((world["folder"] / "labels.tsv").read_text())
    results = run(
        world, tmp_path / "out", "constant", names=["small", "broken"], own=files
    )  # fmt: skip
    assert [t["name"] for t in results["tasks"]] == ["small"]
    (skipped,) = results["skipped"]
    assert skipped["failed"]
    assert "perhaps" in skipped["reason"]


def test_every_declared_task_is_complete():
    from eval.benchmark.run import KINDS, choose_tasks

    tasks = all_tasks()
    kinds = {t.kind for t in tasks.values()}
    everywhere = {"genes", "cells", "integration", "annotation", "context", "attention"}
    assert kinds <= set(KINDS)
    for suite in SUITES:
        assert {t.kind for t in choose_tasks(suite, [], [])} >= everywhere, suite
    for task in choose_tasks("quick", [], []):
        assert not missing_files(task, None), f"{task.name}: the quick suite needs no file"
    for task in tasks.values():
        assert task.sizes, task.name
        assert len(task.cells.recipe) > 20, task.name
        if "paper" in task.sizes:
            assert task.applications, task.name


def test_wrong_names_and_tasks_are_named(tmp_path, world):
    from eval.benchmark.run import choose_tasks

    with pytest.raises(ValueError, match="--task nothing: no such task"):
        choose_tasks("quick", ["nothing"], [])
    with pytest.raises(ValueError, match="suite paper does not have it, only quick"):
        choose_tasks("paper", ["planted"], [world["task"]])
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(_TASK.replace("labels:", "lables:"))
    with pytest.raises(ValueError, match=r"wrong.yaml: is no task: .*lables"):
        read_task(wrong)
    with pytest.raises(ValueError, match="there are no data for any"):
        run(world, tmp_path / "out", "constant", data=tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_file_and_a_column_are_a_task(world, tmp_path):
    from eval.benchmark.material.gene_labels import read_labels
    from eval.benchmark.own_task import own_task
    from eval.benchmark.run import choose_tasks

    cells = world["folder"] / "cells.h5ad"
    table = tmp_path / "my genes.csv"
    rows = (world["folder"] / "labels.tsv").read_text().splitlines()[1:]
    genes = [row.split("\t") for row in rows]
    table.write_text("gene,group\n" + "\n".join(f"{g},{x}" for g, x in genes[:-1]) + "\n")
    task = own_task(cells, "group", table)
    found = read_labels(task, world["folder"])
    positive = {g for g, x in genes[:-1] if x == task.positive}
    assert {g for g, y in zip(found.ids, found.labels, strict=True) if y} == positive
    assert len(positive) < len(found.ids) / 2, "the smaller class is looked for"
    assert not missing_files(task, world["folder"])
    for suite in SUITES:
        assert choose_tasks(suite, [], [task]) == [task], "none of the supplied ones"
    of_cells = own_task(cells, "cell_type", group="donor")
    assert (of_cells.kind, of_cells.label, of_cells.group) == ("cells", "cell_type", "donor")
    assert own_task(cells, "cell_type", batch="donor").kind == "integration"
    for arguments, message in (
        ((cells, "nothing", table), "--label nothing: .*columns .*gene.*group"),
        ((cells, "gene", table), "classes .* two are told apart"),
        ((tmp_path / "no.h5ad", "cell_type"), "--cells .*no such file"),
        ((cells, "group", table, "donor"), "folds are over genes"),
    ):
        with pytest.raises(ValueError, match=message):
            own_task(*arguments)


def test_one_class_of_genes_among_all_others(world, tmp_path):
    """A table of three classes: as `--positive` says; a gene of two classes is no example."""
    from eval.benchmark.material.gene_labels import read_labels
    from eval.benchmark.own_task import own_task

    cells, table = world["folder"] / "cells.h5ad", tmp_path / "three.csv"
    genes = [row.split("\t")[0] for row in (world["folder"] / "labels.tsv").read_text().split("\n")]
    kinds = dict(zip(genes[1:41], ["core", "near", "far", ""] * 10, strict=True))
    rows = [*kinds.items(), (genes[1], "far")]
    table.write_text("gene,kind\n" + "\n".join(f"{g},{k}" for g, k in rows) + "\n")
    task = own_task(cells, "kind", table, positive="near")
    assert (task.positive, task.negative) == ("near", "all others")
    found = read_labels(task, world["folder"])
    labels = dict(zip(found.ids, found.labels.tolist(), strict=True))
    # The first gene is in two classes, but in neither of the two that are told apart.
    assert labels == {g: int(k == "near") for g, k in kinds.items() if k}
    assert found.excluded["no label"] == 10 and found.excluded["repeated"] == 1
    core = read_labels(own_task(cells, "kind", table, positive="core"), world["folder"])
    assert genes[1] not in core.ids and core.excluded["ambiguous"] == 1
    both = table.with_name("two.csv")
    both.write_text("gene,kind\n" + "\n".join(f"{g},{k}" for g, k in rows if k in ("near", "")))
    for arguments, message in (
        ({"genes": table}, "kind has 3 classes .* name one with --positive"),
        ({"genes": table, "positive": "fat"}, "--positive fat: column kind of .* has"),
        ({"positive": "near"}, "--positive near: is a class of --genes"),
        ({"genes": both, "positive": "near"}, "kind has 1 classes"),
    ):
        with pytest.raises(ValueError, match=message):
            own_task(cells, "kind", **arguments)


@pytest.mark.long
def test_a_column_of_cells_is_benchmarked_by_the_command(world, tmp_path):
    from typer.testing import CliRunner

    from launch.cli import build_app

    command = [
        "benchmark", "--model", str(world["perfect"]), "--cells",
        str(world["folder"] / "cells.h5ad"), "--label", "cell_type", "--device", "cpu",
    ]  # fmt: skip
    done = CliRunner().invoke(build_app("benchmark"), [*command, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.exception
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [t["name"] for t in results["tasks"]] == ["cells_cell_type"] and not results["skipped"]
    refused = CliRunner().invoke(build_app("benchmark"), [*command[:5], "--out", "out"])
    assert "--cells and --label" in str(refused.exception)


def test_progress_says_the_time_left(capsys, monkeypatch):
    """Without a terminal a line now and then; what an earlier call had done costs nothing."""
    from eval.benchmark import cli

    monkeypatch.setattr(cli, "_LINE_EVERY_S", -1.0)
    with cli._Shown() as shown:
        shown.plan(5)
        shown.task("Cells")
        for seconds in (0.0, 60.0, 120.0):
            shown.unit(seconds)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "Cells: 0 of 5 trainings and fits"
    assert said[1] == "Cells: 1 of 5 trainings and fits"
    assert said[2:] == [
        "Cells: 2 of 5 trainings and fits, about 3 min left",
        "Cells: 3 of 5 trainings and fits, about 3 min left",
    ]


def test_wrong_words_for_a_task_of_ones_own(tmp_path):
    from tests.test_cli import geneloom

    for words, said in (
        ([], "--model and --out: a benchmark needs both"),
        (["--suite", "huge"], "--suite huge: must be one of"),
        (["--list", "--label", "x"], "--cells and --label: a task of your own needs both"),
        (["--list", "--counts", "raw"], "are of --cells alone"),
        (["--list", "--cells", "c.h5ad", "--label", "x", "--data", "."], "of the supplied tasks"),
    ):
        done = geneloom("benchmark", *words, cwd=tmp_path)
        assert done.returncode == 2 and said in done.stderr, done.stderr
    listed = json.loads(geneloom("benchmark", "--list", "--json", cwd=tmp_path).stdout)
    assert {t["kind"] for t in listed} > {"cells", "genes", "integration"}
    assert all(t["missing"] and t["recipe"] for t in listed if t["name"] == "pbmc3k_cell_types")


def test_list_shows_what_is_missing():
    done = subprocess.run(
        [*GENELOOM, "benchmark", "--list"], cwd=ROOT,
        env=os.environ | {"COLUMNS": "80"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name, task in all_tasks().items():
        assert name in done.stdout, "names stay whole at 80 columns"
        for missing in missing_files(task, None):
            assert missing.split("/")[-1] in done.stdout.replace("\n", "")
