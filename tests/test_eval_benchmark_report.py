"""The page and the console table of a benchmark: every number from the results, no network."""

from __future__ import annotations

import copy
import io
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image
from rich.console import Console

from tests.benchmark_results import CELLS, GENES, INTEGRATION, make_results, make_task
from tests.test_data_prep_page import Reader

LEAKY = CELLS | {("shuffled labels", "control"): 0.6}
HURT = CELLS | {("fine-tuned", "model"): 0.6}


def three_kinds(models: list[str]) -> dict[str, Any]:
    """Return results of a gene task, a cell task whose control fails, and an integration."""
    return make_results(
        models,
        [
            make_task("genes_of_one_class", "genes", GENES, models, 1),
            make_task("leaky_cells", "cells", LEAKY, models, 2),
            make_task("batches", "integration", INTEGRATION, models, 3),
        ],
    )


# Some twenty figures, each as SVG and PNG, take five seconds: drawn once for all tests.
@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    from eval.benchmark.report.page import write_report

    results = three_kinds(["a"])
    folder = tmp_path_factory.mktemp("page")
    path = write_report(results, folder)
    assert path == folder / "report.html"
    return results, folder, path.read_text()


def summary_of(task: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in task["summary"] if row["name"] == name)


def test_the_overview_has_the_numbers_of_the_results(written):
    from eval.benchmark.report.overview import format_mean

    results, _, html = written
    rows = Reader(html).table("task")
    assert len(rows) == 3
    genes, leaky, batches = results["tasks"]
    mean = format_mean(summary_of(genes, "fine-tuned, a")["scores"]["auroc"])
    assert rows[0]["pretrained"].startswith(mean)
    twin = format_mean(summary_of(genes, "fine-tuned, a with random weights")["scores"]["auroc"])
    assert rows[0]["random weights"] == twin
    assert "▲ helps" in rows[0]["did pretraining help?"]
    assert rows[0]["published (context)"] == "0.91 ± 0.02Fig. 2"
    assert "▼ loses" in rows[1]["against the best baseline"]
    assert "logistic regression (L2)" in rows[1]["best baseline"]
    assert "control failed" in rows[1]["task"]
    assert "zero-shot" in rows[2]["pretrained"], "what integration is about"
    assert batches["verdicts"][0]["holm_word"] in rows[2]["did pretraining help?"]


def test_every_contender_is_in_its_tasks_table(written):
    from eval.benchmark.report.overview import format_mean

    results, _, html = written
    tables = [t for t in Reader(html).tables if t[0][0] == "contender"]
    for task, table in zip(results["tasks"], tables, strict=True):
        expected = [
            re.sub(", a$", "", r["name"].replace(", a with random", ", random"))
            for r in task["summary"]
        ]
        assert [row[0] for row in table[1:]] == expected, "best first"
        headlines = [format_mean(r["scores"][task["headline"]]) for r in task["summary"]]
        assert [row[1] for row in table[1:]] == headlines


def test_a_failed_control_is_prominent_and_does_not_count(written):
    from eval.benchmark.report.overview import conclusions

    results, _, html = written
    top = html[: html.index("<table")]
    assert 'role="alert"' in top
    assert '<a href="#leaky_cells">' in top[top.index('role="alert"') :]
    assert "1 of 4 controls are not at chance; 0.2 would be by accident" in top
    found = conclusions(results)
    assert [c["tested"] for c in found] == [2, 2]
    assert [c["control_failed"] for c in found] == [1, 1]


def test_what_was_skipped_is_said_with_its_reason(written):
    _, _, html = written
    assert "SCP1303.h5ad is not in the data folder" in html
    assert "scVI did not run: the package scvi-tools is not installed" in html


def test_the_page_needs_nothing_else(written):
    _, _, html = written
    page = Reader(html)
    assert not re.search(r"(src|href)=\"(?!data:image/svg\+xml;base64,|#)", html)
    assert not re.search(r"url\(|@import", html)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    targets = {attrs["href"].removeprefix("#") for tag, attrs in page.tags if tag == "a"}
    assert targets <= set(page.ids)
    assert {"genes_of_one_class", "leaky_cells", "batches"} <= targets


def test_every_figure_is_a_file_too(written):
    _, folder, html = written
    names = {p.stem for p in (folder / "plots").glob("*.svg")}
    cells = ("scores", "confusion", "calibration", "classes", "few_shot")
    assert names == {
        "all_overview", "genes_of_one_class_scores", "genes_of_one_class_roc",
        *(f"leaky_cells_{f}" for f in cells),
        *(f"batches_{f}" for f in ("scores", "umap_labels", "umap_batches")),
        *(f"{task}_training" for task in ("genes_of_one_class", "leaky_cells", "batches")),
    }  # fmt: skip
    assert html.count("<img ") == len(names)
    for name in names:
        ElementTree.parse(folder / "plots" / f"{name}.svg")
        with Image.open(folder / "plots" / f"{name}.png") as image:
            assert min(image.size) > 300


def test_genes_furthest_from_their_class_come_first(written):
    results, _, html = written
    genes = results["tasks"][0]["details"]["predictions"]["fine-tuned, a"]
    wrong = max(genes, key=lambda g: abs(g["label"] - g["probability"]))
    rows = Reader(html).table("gene")
    assert len(rows) == 10
    assert rows[0]["gene"] == f"{wrong['symbol']} ({wrong['gene']})"
    assert rows[0]["class"] == ("positive" if wrong["label"] else "negative")


def small(results: dict[str, Any]) -> dict[str, Any]:
    """Return results with fewer contenders and no details: quick to draw."""
    changed = copy.deepcopy(results)
    for task in changed["tasks"]:
        task["details"] = {}
        for outcome in task["outcomes"]:
            outcome["details"] = {}
    return changed


def test_several_models_are_compared(tmp_path):
    from eval.benchmark.report.overview import format_mean
    from eval.benchmark.report.page import write_report

    models = ["a", "b"]
    task = make_task("genes_of_one_class", "genes", GENES, models, 1)
    html = write_report(small(make_results(models, [task])), tmp_path).read_text()
    page = Reader(html)
    (fine_tuned,) = [r for r in page.table("same contender") if r["same contender"] == "fine-tuned"]
    for model in models:
        row = summary_of(task, f"fine-tuned, {model}")
        assert fine_tuned[model] == format_mean(row["scores"]["auroc"])
    (pair,) = [r for r in page.table("question") if r["question"] == "models"]
    assert (pair["contender"], pair["against"]) == ("fine-tuned, a", "fine-tuned, b")
    assert pair["verdict"] == "▲ wins"
    assert "Against b it won 1 of 1 task, lost 0 and tied 0." in html


def test_names_and_reasons_are_escaped_and_gaps_shown(tmp_path):
    from eval.benchmark.report.page import write_report

    results = small(make_results(["a"], [make_task("pairs", "cells", HURT, ["a"], 1, folds=1)]))
    task = results["tasks"][0]
    task["title"] = "<script>alert(1)</script>"
    for outcome in task["outcomes"]:
        outcome["scores"]["ece"] = None
    for row in task["summary"]:
        row["scores"]["ece"] = {"mean": None, "low": None, "high": None, "folds": 0}
    html = write_report(results, tmp_path).read_text()
    assert "<script" not in html
    assert {r["calibration error"] for r in Reader(html).table("contender")} == {"-"}
    assert "? not tested" in Reader(html).table("task")[0]["did pretraining help?"]


def test_a_benchmark_without_results(tmp_path):
    from eval.benchmark.report.page import write_report

    html = write_report(make_results(["a"], []), tmp_path).read_text()
    assert "No task tested it." in html
    assert "SCP1303.h5ad" in html
    assert list((tmp_path / "plots").iterdir()) == []
    with pytest.raises(ValueError, match="no such folder"):
        write_report(make_results(["a"], []), tmp_path / "absent")


def test_bins_of_few_cells_are_left_out_of_calibration():
    from eval.benchmark.report.plots import _pooled_bins, outcomes_of

    task = make_task("pairs", "cells", CELLS, ["a"], 1, folds=2)
    row = summary_of(task, "fine-tuned, a")
    pairs = [(0.95, 0.9, 30), (0.91, 0.6, 10), (0.15, 0.0, 12)]
    for outcome in outcomes_of(task, row):
        outcome["details"]["calibration"] = [
            {"confidence": c, "accuracy": a, "cells": n} for c, a, n in pairs
        ]
    (low, high) = _pooled_bins(task, row).tolist()
    assert low == pytest.approx([0.15, 0.0]), "24 cells of two folds"
    assert high == pytest.approx([0.94, 0.825]), "weighed by cells"
    for outcome in outcomes_of(task, row)[:1]:
        outcome["details"]["calibration"] = []
    assert len(_pooled_bins(task, row)) == 1, "12 cells are too few"


def test_conclusions_in_words():
    from eval.benchmark.report.overview import conclusions

    tasks = [
        make_task("helped", "genes", GENES, ["a"], 1),
        make_task("hurt", "cells", HURT, ["a"], 2),
        make_task("untested", "genes", GENES, ["a"], 3, folds=2),
    ]
    pretraining, baselines = conclusions(make_results(["a"], tasks))
    assert pretraining["sentence"] == (
        "Pretraining helped in 1 of 2 tasks, hurt in 1; no difference was seen in 0."
    )
    assert (
        baselines["sentence"] == "Against the best baseline it won 1 of 2 tasks, lost 1 and tied 0."
    )
    assert pretraining["others"] == [
        "frozen embedding: helped in 2 of 2 tasks, hurt in 0",
        "input embeddings: helped in 1 of 1 task, hurt in 0",
    ]
    only = make_results(["a"], tasks[2:])
    assert conclusions(only)[0]["sentence"] == "Whether pretraining helped was not tested."


def test_the_console_has_one_line_a_task():
    from eval.benchmark.report.overview import overview_rows
    from eval.benchmark.report.page import print_results

    results = three_kinds(["a"])
    console = Console(width=120, file=io.StringIO())
    print_results(results, console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    for task in results["tasks"]:
        (line,) = [li for li in lines if li.strip().startswith(task["name"])]
        row = next(r for r in overview_rows(results) if r["task"]["name"] == task["name"])
        assert f"{row['main']['scores'][task['headline']]['mean']:.3f}" in line
        assert row["pretraining"]["holm_word"] in line
    assert "control failed, not counted: leaky_cells" in lines
    assert any(li.startswith("skipped: chaffin") for li in lines)


def test_correcting_twice_changes_nothing():
    from eval.benchmark.contest.verdicts import holm

    tasks = three_kinds(["a"])["tasks"]
    assert holm(tasks) == tasks
