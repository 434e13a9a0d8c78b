"""Positive controls: a world and a model that a benchmark makes itself, and what they say."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from eval.benchmark.task_file import all_tasks, missing_files, read_task
from tests.benchmark_results import GENES, make_task
from tests.test_eval_benchmark import run, world  # noqa: F401  a fixture

CONTROL = "simulated_opposed_targets"
_WORLD = {
    "simulate": {
        "cells": 120, "genes": 60, "tfs": 4, "types": 16, "donors": 1, "batches": 1, "depth": 200,
        "wiring": "opposed", "program_share": 0.9, "switch_level": 2.5, "mean_effect": 3.0,
        "basal_sd": 0.3,
    },
    "config": "geneloom_tiny",
    "pretrain": {
        "model.num_layers": 1, "model.hidden_size": 16, "model.num_heads": 2,
        "model.intermediate_size": 16, "batch.tokens_per_step": 512, "optim.warmup_steps": 1,
        "run.max_steps": 2, "run.threads": 1,
    },
}  # fmt: skip


def write_control(folder: Path, **changes) -> Path:
    """Write a small positive control as a task file."""
    task = yaml.safe_load(
        (Path(all_tasks.__globals__["TASKS_FOLDER"]) / f"{CONTROL}.yaml").read_text()
    )
    size = {"max_cells": 40, "seeds": 3, "max_perturbed": 4, "max_cells_per_gene": 12}
    task |= {"own_world": _WORLD | changes, "sizes": {"quick": size}, "min_targets": 2}
    path = folder / "control.yaml"
    path.write_text(yaml.safe_dump(task))
    return path


@pytest.fixture(scope="module")
def controlled(world, tmp_path_factory):  # noqa: F811
    """A benchmark with a positive control, run twice in its folder."""
    folder = tmp_path_factory.mktemp("controlled")
    both = {"names": ["planted", "control"], "own": [world["task"], write_control(folder)]}
    first = run(world, folder / "report", "perfect", **both)
    return folder / "report", first, both


def test_a_control_has_its_own_model_and_stands_apart(controlled):
    out, results, _ = controlled
    (task,) = results["tasks"]
    (control,) = results["positive_controls"]
    assert (task["name"], control["name"]) == ("planted", "control")
    assert {o["model"] for o in task["outcomes"]} == {"perfect", None}
    assert {o["model"] for o in control["outcomes"]} == {"model of the simulated cells", None}
    assert [v["question"] for v in control["verdicts"]] == ["pretraining", "baselines", "control"]
    assert [m["name"] for m in results["models"]] == ["perfect"]
    # What is asked of the user's model is not corrected for the control.
    verdict = next(v for v in task["verdicts"] if v["question"] == "pretraining" and v["main"])
    assert verdict["holm_p"] == verdict["p"]
    assert json.loads((out / "results.json").read_text())["positive_controls"] == [control]


def test_a_world_is_made_once(controlled, world):  # noqa: F811
    out, first, both = controlled
    files = {p: p.stat().st_mtime_ns for p in (out / "worlds").rglob("*") if p.is_file()}
    again = run(world, out, "perfect", **both)
    found = {p: p.stat().st_mtime_ns for p in (out / "worlds").rglob("*") if p.is_file()}
    assert found == files
    assert again["positive_controls"][0]["outcomes"] == first["positive_controls"][0]["outcomes"]


@pytest.mark.long
def test_a_world_that_was_half_made_is_finished(controlled, tmp_path):
    """Killed after the training and before the export: nothing is trained anew, weights agree."""
    import shutil

    from eval.benchmark.own_world import make_world, world_folder

    out, _, both = controlled
    declared = read_task(both["own"][1]).own_world
    shutil.copytree(world_folder(declared, out / "worlds"), tmp_path / "world")
    whole = make_world(declared, tmp_path / "world").digest
    shutil.rmtree(tmp_path / "world" / "model")
    before = (tmp_path / "world" / "run" / "metrics.jsonl").read_bytes()
    assert make_world(declared, tmp_path / "world").digest == whole
    assert (tmp_path / "world" / "run" / "metrics.jsonl").read_bytes() == before


def test_another_declaration_is_another_world(controlled, tmp_path):
    from eval.benchmark.own_world import world_folder

    out, _, both = controlled
    declared = read_task(both["own"][1]).own_world
    assert world_folder(declared, out / "worlds").is_dir()
    other = read_task(write_control(tmp_path, heldout=0.2)).own_world
    assert not world_folder(other, out / "worlds").exists()


def test_a_world_that_cannot_be_trained_leaves_the_other_tasks(world, tmp_path):  # noqa: F811
    broken = write_control(tmp_path, pretrain={"run.max_steps": -1})
    results = run(
        world, tmp_path / "report", "perfect", names=["planted", "control"],
        own=[world["task"], broken],
    )  # fmt: skip
    (skipped,) = results["skipped"]
    assert skipped["name"] == "control" and skipped["failed"]
    assert "run.max_steps" in skipped["reason"]
    assert [t["name"] for t in results["tasks"]] == ["planted"]
    assert not results["positive_controls"] and not (tmp_path / "report" / "worlds").exists()


def test_a_control_alone_is_no_benchmark(world, tmp_path):  # noqa: F811
    """Where no file of any task is there, a control that needs none does not hide it."""
    with pytest.raises(ValueError, match="no data for any"):
        run(world, tmp_path / "report", "perfect", data=tmp_path, names=[],
            own=[world["task"], write_control(tmp_path)])  # fmt: skip


def found_with(means: dict[tuple[str, str], float], older: bool = False) -> dict:
    control = make_task("control", "genes", means, ["its model"], seed=0, folds=8)
    task = make_task("mine", "genes", GENES, ["mine"], seed=1)
    models = [{"name": "mine", "parameters": 100, "record": None}]
    results = {
        "format": "geneloom-benchmark/1", "suite": "standard", "seed": 0, "bf16": False,
        "device": "cpu", "command": "geneloom benchmark", "environment": {}, "models": models,
        "tasks": [task], "skipped": [],
    }  # fmt: skip
    return results if older else results | {"positive_controls": [control]}


_HOLDS = {
    ("zero-shot", "model"): 0.87, ("zero-shot", "twin"): 0.5, ("correlation", "baseline"): 0.6,
    ("partial correlation", "baseline"): 0.75, ("shuffled targets", "control"): 0.5,
}  # fmt: skip


@pytest.mark.parametrize("lost", [None, ("zero-shot", "twin"), ("correlation", "baseline")])
def test_what_a_control_says(lost, tmp_path, capsys):
    """It holds where its model beats random weights and every baseline, and else says loudly."""
    from eval.benchmark.contest.verdicts import holm
    from eval.benchmark.report.overview import positive_controls
    from eval.benchmark.report.page import benchmark_page, print_results

    results = found_with(_HOLDS | ({lost: 0.87} if lost else {}))
    results |= {part: holm(results[part]) for part in ("tasks", "positive_controls")}
    (found,) = positive_controls(results)
    assert found["held"] == (lost is None)
    page = " ".join(benchmark_page(results, tmp_path).split())
    print_results(copy.deepcopy(results))
    printed = " ".join(capsys.readouterr().out.split())
    said = "held: in simulated cells" if lost is None else "FAILED: in simulated cells"
    assert f"Positive control</a> {said}" in page.replace("</b>", "")
    assert f"positive control {said}" in printed
    assert ('role="alert"' in page) == (lost is not None)
    assert "1 task<" in page and "Did pretraining help? Standard suite, 1 task" in page


def test_results_from_before_controls_are_shown(tmp_path):
    from eval.benchmark.contest.verdicts import holm
    from eval.benchmark.report.page import benchmark_page

    results = found_with(_HOLDS, older=True)
    results["tasks"] = holm(results["tasks"])
    assert "ositive control" not in benchmark_page(results, tmp_path)


def test_the_standard_suite_has_a_control_that_needs_no_data():
    task = all_tasks()[CONTROL]
    assert task.own_world and "standard" in task.sizes
    assert missing_files(task, None) == []


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_positive_control_holds(world, tmp_path, seed):  # noqa: F811
    """A small model that is pretrained on the network's cells beats every baseline on 60 cells."""
    from eval.benchmark.report.overview import positive_controls
    from eval.benchmark.run import run_benchmark

    results = run_benchmark(
        [world["constant"]], "standard", tmp_path / "report", names=[CONTROL], seed=seed
    )
    (found,) = positive_controls(results)
    assert found["held"], found["sentence"]
    (task,) = results["positive_controls"]
    means = {r["name"]: r["scores"]["auroc"]["mean"] for r in task["summary"]}
    assert means.pop("zero-shot, model of the simulated cells") > 0.8
    assert np.max(list(means.values())) < 0.8
