"""``geneloom report`` of every stage: the right page, complete in itself, at two widths."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data_prep.running.stages import stage_of
from eval.report.any_folder import write_stage_report
from tests.benchmark_results import full_results
from tests.browser import CHROMIUM, NO_CHROMIUM, WIDTHS, look
from tests.perturb_results import names, noise, write_screen
from tests.synthetic import make_shards
from tests.test_cli import geneloom
from tests.test_data_prep_page import Reader
from tests.test_eval_report import heldout_record, run_folder, train_record

STAGES = ("prepare", "pretrain", "finetune", "perturb", "benchmark")


def write_scores(folder: Path) -> None:
    """Write results as `geneloom finetune` does, of classifiers that guess well and badly."""
    from eval.finetune.results import summarise
    from eval.scores.metrics import score_classes

    rng = np.random.default_rng(0)
    classes = [f"cell type {i} with a name that is long" for i in range(8)]
    per_seed = []
    for seed in range(3):
        labels = rng.integers(0, 8, 120)
        scores = {}
        for name, right in (("fine-tuned, pretrained", 0.8), ("logistic regression", 0.9)):
            guesses = rng.random((120, 8))
            guesses[np.arange(120), labels] += right
            scores[name] = score_classes(labels, guesses.argmax(axis=1), classes)
        curve = [[step, 2.0 * 0.9**step] for step in range(10, 310, 10)]
        training = {"steps": 300, "kept_step": 300, "curve": curve, "validation": curve[::5]}
        per_seed.append(
            {"seed": seed, "train_cells": 480, "test_cells": 120, "scores": scores,
             "trainings": {"fine-tuned, pretrained": training}}
        )  # fmt: skip
    results = {
        "task": "cell_type of cells.h5ad", "label": "cell_type", "classes": classes, "cells": 600,
        "dropped": {}, "split": "by donor", "model": "model", "vocabulary_sha256": "ab" * 32,
        "settings": {"epochs": 5, "learning_rate": 2e-4}, "max_train_per_class": None,
        "summary": summarise(per_seed), "seeds": per_seed,
    }  # fmt: skip
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(results))


# In the other tier all of them, at both widths.
_IN_A_WINDOW = {("pretrain", 390), ("benchmark", 1280)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A folder of each stage, under the stage's name."""
    home = tmp_path_factory.mktemp("stages")
    make_shards(home).rename(home / "prepare")
    run = run_folder(
        home / "pretrain",
        [*(train_record(s, 900.0) for s in range(10, 90, 10)), heldout_record(80, 6.5)],
    )
    (run / "env.json").write_text(
        json.dumps(
            json.loads((run / "env.json").read_text())
            | {"command": "geneloom pretrain " + " ".join(f"optim.beta{i}=0.9" for i in range(40))}
        )
    )
    write_scores(home / "finetune")
    values, donors = noise(np.random.default_rng(3), 80, 4, 5, 0.1)
    write_screen(home / "perturb", values, donors, names(80))
    (home / "benchmark").mkdir()
    # Three of seven tasks; all of them are drawn by the tests of a benchmark's page.
    results = full_results(["model-a", "model-b"])
    results["tasks"] = results["tasks"][1:6:2]
    (home / "benchmark" / "results.json").write_text(json.dumps(results))
    return home


@pytest.fixture(scope="module")
def pages(folders) -> dict[str, Path]:
    """The page of each stage, where the command puts it."""
    return {
        stage: Path(write_stage_report(folders / stage, None, [], None, None, None))
        for stage in STAGES
    }


@pytest.mark.parametrize("stage", STAGES)
def test_the_stage_is_told_by_the_files(folders, stage):
    assert stage_of(folders / stage)[0] == stage


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("prepare", "Length and padding"),
        ("pretrain", "held out"),
        ("finetune", "Classification: cell_type of cells.h5ad"),
        ("perturb", "In silico deletion"),
        ("benchmark", "Did pretraining help?"),
    ],
)
def test_the_page_is_that_of_the_stage_and_needs_no_other_file(folders, pages, stage, words):
    html = pages[stage].read_text()
    assert words in html
    assert pages[stage] == folders / stage / "report.html"
    for tag, attributes in Reader(html).tags:
        source = attributes.get("src", "data:") or ""
        assert source.startswith("data:"), f"{stage}: <{tag}> {source[:80]}"
        assert tag not in ("link", "iframe"), stage


def test_scores_alone_show_their_table(pages):
    page = Reader(pages["finetune"].read_text())
    shown = [row["classifier"] for row in page.table("classifier")]
    assert shown == ["logistic regression", "fine-tuned, pretrained"]
    assert "Pretraining" not in pages["finetune"].read_text()


@pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)
@pytest.mark.parametrize(
    ("stage", "width"),
    [
        pytest.param(s, w, marks=[] if (s, w) in _IN_A_WINDOW else pytest.mark.long)
        for s in STAGES
        for w in WIDTHS
    ],
)
def test_the_page_fits_into_a_window(pages, stage, width, tmp_path):
    """Only boxes scroll sideways, never the page; every figure is drawn."""
    seen = look(pages[stage], width, tmp_path)
    assert seen == {"window": width, "page": width, "broken": 0}


@pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)
def test_a_page_that_does_not_fit_is_found(tmp_path):
    page = tmp_path / "wide.html"
    page.write_text('<!doctype html><p style="width: 700px">wide</p><img src="data:image/png,x">')
    seen = look(page, 390, tmp_path)
    assert seen["page"] >= 700 and seen["broken"] == 1


def test_what_cannot_be_reported_on(folders, tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        write_stage_report(tmp_path / "absent", None, [], None, None, None)
    with pytest.raises(ValueError, match="nothing to report on; expected"):
        write_stage_report(tmp_path, None, [], None, None, None)
    with pytest.raises(ValueError, match="belong to a pretraining's page"):
        write_stage_report(folders / "perturb", None, [tmp_path], None, None, None)
    with pytest.raises(ValueError, match="does not exist"):
        write_stage_report(folders / "finetune", tmp_path / "no" / "r.html", [], None, None, None)
    assert not list(tmp_path.iterdir())


def test_command(folders, tmp_path):
    done = geneloom("report", folders / "prepare", "--out", "corpus.html", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "corpus.html\n"), done.stderr
    assert (tmp_path / "corpus.html").exists()
