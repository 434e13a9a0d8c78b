"""A benchmark on the console, and as one self-contained page: the answer first, then tasks."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_prep.files import complete_file
from eval.benchmark.contest.verdicts import STATES, control_state, holm, state_of
from eval.benchmark.report.overview import (
    SYMBOLS,
    conclusions,
    format_difference,
    format_mean,
    format_p,
    overview_rows,
    positive_controls,
    score_label,
)
from eval.benchmark.report.plots import (
    STATE_COLOURS,
    f1_by_class,
    overview_plot,
    short_name,
    shown_contenders,
    task_plots,
)
from eval.drawing.page import page_template
from eval.drawing.plot import (
    DARK_COLOURS,
    ROLE_COLOURS,
    ROLE_NAMES,
    Plot,
    as_png,
    as_svg,
    benchmark_style,
)
from eval.drawing.tables import format_steps
from eval.scores.metrics import CONFIDENCE

REPORT_NAME, PLOTS_FOLDER = "report.html", "plots"
_TEMPLATE = Path(__file__).with_name("page.html")
_MOST_WRONG_GENES = 10
_STYLES = {"better": "green", "worse": "red", "neither": "default", "not_tested": "yellow"}
_QUESTIONS = {
    "pretraining": "Did pretraining help?",
    "baselines": "Does it beat the baselines?",
    "models": "Which model is better?",
    "control": "Do the controls lie at chance?",
}


def write_report(results: dict[str, Any], out: Path) -> Path:
    """Write the page and its figures into a folder, and return the page's path.

    Parameters
    ----------
    results
        Content of ``results.json``. Verdicts are corrected for the number of tasks here, whether
        or not they were before.
    out
        Existing folder: gets ``report.html``, and ``plots/<task>_<figure>.png`` and ``.svg``.

    Raises
    ------
    ValueError
        The folder does not exist.
    """
    if not out.is_dir():
        raise ValueError(f"{out}: no such folder; make it first")
    folder = out / PLOTS_FOLDER
    folder.mkdir(exist_ok=True)
    page = benchmark_page(results, folder)
    path = out / REPORT_NAME
    with complete_file(path) as aside:
        aside.write_text(page)
    return path


def benchmark_page(results: dict[str, Any], folder: Path | None) -> str:
    """Return the page; its figures are also written into a folder, if one is given."""
    controls = holm(results.get("positive_controls", []))
    results = results | {"tasks": holm(results["tasks"]), "positive_controls": controls}
    models = [m["name"] for m in results["models"]]
    rows = overview_rows(results)
    shown = [(t, models) for t in results["tasks"]] + [(t, _models_of(t)) for t in controls]
    with benchmark_style():
        overview = _shown(overview_plot(results), "all", folder) if results["tasks"] else None
        figures = {
            t["name"]: [_shown(p, t["name"], folder) for p in task_plots(t, names)]
            for t, names in shown
        }
    return page_template(_TEMPLATE).render(
        results=results,
        models=models,
        about=json.dumps({k: results[k] for k in ("models", "environment")}, indent=1),
        answers=_answers(results),
        rows=[_overview_row(row, models) for row in rows],
        has_frozen=any(row["frozen"] for row in rows),
        controls=_controls(results),
        failed=[t for t in results["tasks"] if control_state(t) == "failed"],
        overview=overview,
        positive_controls=positive_controls(results),
        tasks=[_task(task, names, figures[task["name"]]) for task, names in shown],
        role_colours=ROLE_COLOURS,
        role_names=ROLE_NAMES,
        dark_colours=DARK_COLOURS,
        state_colours=STATE_COLOURS,
    )


def print_results(results: dict[str, Any], console: Console | None = None) -> None:
    """Print one line for each task and model, what was skipped, and the conclusions."""
    console = console or Console()
    several = len(results["models"]) > 1
    title = f"{results['suite']} suite, mean over folds; verdicts at 95 %, corrected for all tasks"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("task", no_wrap=True)
    if several:
        table.add_column("model", no_wrap=True)
    table.add_column("model's score" if several else "model", min_width=5)
    table.add_column("random weights", min_width=7)
    table.add_column("pretraining", min_width=20)
    # Last, since what a console has no room for is cut off at the right.
    table.add_column("best baseline", no_wrap=True, min_width=40)
    for row in overview_rows(results):
        names = [row["task"]["name"], *([row["model"]] if several else [])]
        means = [_mean(row["task"], row[part]) for part in ("main", "twin", "baseline")]
        baseline = _word(row["baselines"])
        if row["baseline"]:
            baseline += Text(f"  {means[-1]} {row['baseline']['contender']}")
        table.add_row(*names, *means[:2], _word(row["pretraining"]), baseline)
    if results["tasks"]:
        console.print(table)
    failed = [t["name"] for t in results["tasks"] if control_state(t) == "failed"]
    if failed:
        console.print(f"control failed, not counted: {', '.join(failed)}", style="bold red")
    for skipped in results["skipped"]:
        console.print(f"skipped: {skipped['name']}: {skipped['reason']}", highlight=False)
    for task in results["tasks"]:
        for remark in task.get("remarks", []):
            console.print(f"{task['name']}: {remark}", highlight=False)
    for control in positive_controls(results):
        style = None if control["held"] else "bold red"
        console.print(f"positive control {control['sentence']}", style=style, highlight=False)
    for conclusion in conclusions(results):
        console.print(f"{conclusion['model']}: {conclusion['sentence']}", highlight=False)


def _models_of(task: dict[str, Any]) -> list[str]:
    """Return the models of a positive control: its own."""
    return list(dict.fromkeys(r["model"] for r in task["outcomes"] if r["role"] == "model"))


def _mean(task: dict[str, Any], summary: dict[str, Any] | None) -> str:
    score = summary["scores"].get(task["headline"]) if summary else None
    return "-" if score is None or score["mean"] is None else f"{score['mean']:.3f}"


def _word(verdict: dict[str, Any] | None) -> Text:
    if verdict is None:
        return Text("-")
    state = state_of(verdict)
    return Text(f"{SYMBOLS[state]} {verdict['holm_word']}", style=_STYLES[state])


def _shown(plot: Plot, task: str, folder: Path | None) -> dict[str, str]:
    """Return what the page needs of a figure, and write it into the folder, if there is one."""
    svg = as_svg(plot.figure)
    if folder:
        (folder / f"{task}_{plot.name}.svg").write_text(svg)
        (folder / f"{task}_{plot.name}.png").write_bytes(as_png(plot.figure))
    source = "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
    width = round(96 * plot.figure.get_size_inches()[0])
    return {"name": plot.name, "caption": plot.caption, "source": source, "width": f"{width}px"}


def _answers(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return, for each model, its sentences with the counts behind them as shares of a bar."""
    found = conclusions(results)
    answers = []
    for model in results["models"]:
        mine = [c for c in found if c["model"] == model["name"]]
        for answer in mine:
            answer["bar"] = [(s, answer[s]) for s in STATES if answer[s]]
            answer["title"] = _QUESTIONS[answer["question"]]
        answers.append({"model": model, "answers": mine})
    return answers


def _controls(results: dict[str, Any]) -> dict[str, float]:
    """Return how many controls were tested, are not at chance, and would not be by accident."""
    found = [v for t in results["tasks"] for v in t["verdicts"] if v["question"] == "control"]
    states = [state_of(v) for v in found if state_of(v) != "not_tested"]
    failed = sum(s != "neither" for s in states)
    return {"tested": len(states), "failed": failed, "expected": (1 - CONFIDENCE) * len(states)}


def _overview_row(row: dict[str, Any], models: list[str]) -> dict[str, Any]:
    task = row["task"]
    shown = {"row": row, "task": task, "model": row["model"], "score": row["score"]}
    for part in ("main", "frozen", "twin", "baseline"):
        summary = row[part]
        score = summary["scores"].get(task["headline"]) if summary else None
        shown[part] = format_mean(score)
        shown[f"{part}_name"] = summary["contender"] if summary else ""
    for question in ("pretraining", "frozen_pretraining", "baselines"):
        shown[question] = _verdict(row[question], models)
    return shown


def _verdict(verdict: dict[str, Any] | None, models: list[str]) -> dict[str, Any] | None:
    """Return a verdict as texts."""
    if verdict is None:
        return None
    state = state_of(verdict)
    if verdict["question"] == "control" and state in ("better", "worse"):
        state, symbol = "worse", "✖"
    else:
        symbol = SYMBOLS[state]
    return verdict | {
        "state": state,
        "symbol": symbol,
        "title": _QUESTIONS[verdict["question"]],
        "text": format_difference(verdict),
        "p_text": format_p(verdict["p"]),
        "holm_text": format_p(verdict["holm_p"]),
        "is_softened": verdict["word"] != verdict["holm_word"],
        "against_text": short_name(verdict["against"], models),
    }


def _task(task: dict[str, Any], models: list[str], figures: list[dict[str, str]]) -> dict[str, Any]:
    """Return what the page shows of one task."""
    scores = list(dict.fromkeys(s for row in task["summary"] for s in row["scores"]))
    scores.sort(key=lambda s: s != task["headline"])
    over_genes = task["details"].get("intervals_over_genes", {})
    table = [
        {
            "name": short_name(row["name"], models),
            "role": row["role"],
            "values": [format_mean(row["scores"].get(s)) for s in scores],
            "over_genes": _range(over_genes.get(row["name"])),
            "folds": row["folds"],
            "steps": format_steps(row),
            "seconds": f"{row['seconds']:.1f}",
        }
        for row in task["summary"]
    ]
    return task | {
        "score_names": [score_label(s) for s in scores],
        "table": table,
        "has_intervals_over_genes": bool(over_genes),
        "verdict_rows": [_verdict(v, models) for v in task["verdicts"]],
        "control": control_state(task),
        "figures": figures,
        "remarks": task.get("remarks", []),  # older results have none
        "side_by_side": _side_by_side(task, models) if len(models) > 1 else [],
        "wrong_genes": _wrong_genes(task, models),
        "skipped": task["details"].get("skipped", {}),
        "class_names": [short_name(r["name"], models) for r in shown_contenders(task, models)],
        "class_rows": _class_rows(task, models),
    }


def _range(interval: dict[str, float] | None) -> str:
    return f"{interval['low']:.3f} to {interval['high']:.3f}" if interval else "-"


def _side_by_side(task: dict[str, Any], models: list[str]) -> list[tuple[str, list[str]]]:
    """Return contender -> the headline of each model, where every model has the contender."""
    by_key = {(r["contender"], r["role"], r["model"]): r for r in task["summary"]}
    kinds = dict.fromkeys((c, role) for c, role, m in by_key if role in ("model", "twin") and m)
    rows = []
    for contender, role in kinds:
        found = [by_key.get((contender, role, m)) for m in models]
        if all(found):
            values = [format_mean(r["scores"].get(task["headline"])) for r in found if r]
            rows.append((contender + (", random weights" if role == "twin" else ""), values))
    return rows


def _wrong_genes(task: dict[str, Any], models: list[str]) -> list[tuple[str, list[dict[str, str]]]]:
    """Return contender -> genes whose prediction out of fold is furthest from their class."""
    found = []
    for name, genes in task["details"].get("predictions", {}).items():
        rows = sorted(genes, key=lambda g: -abs(g["label"] - g["probability"]))
        shown = [_wrong_gene(g, task["classes"]) for g in rows[:_MOST_WRONG_GENES]]
        found.append((short_name(name, models), shown))
    return found


def _wrong_gene(gene: dict[str, Any], classes: list[str]) -> dict[str, str]:
    symbol = gene.get("symbol") or ""
    return {
        "gene": f"{symbol} ({gene['gene']})" if symbol else gene["gene"],
        "label": classes[gene["label"]],
        "probability": f"{gene['probability']:.3f}",
        "cells": f"{gene['cells']:,.0f}",
    }


def _class_rows(task: dict[str, Any], models: list[str]) -> list[tuple[str, list[str]]]:
    """Return class -> F1 of the contenders that are shown."""
    columns = [f1_by_class(task, row) for row in shown_contenders(task, models)]
    if not any(columns):
        return []
    return [
        (c, [f"{column[c]:.3f}" if c in column else "-" for column in columns])
        for c in task["classes"]
    ]
