"""One self-contained page about a run: its curves, UMAP, scores beside baselines, what was run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anndata
import jinja2
import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from data_prep.drawing import new_figure
from data_prep.files import complete_file
from data_prep.inspection.tables import padding_share
from eval.cells.embed import OBSM_KEY
from eval.drawing.figures import as_image, style
from eval.drawing.tables import (
    about_results,
    best_first,
    format_interval,
    format_steps,
    score_names,
)
from eval.finetune.results import RESULTS_NAME
from eval.report.run_figures import run_figures
from eval.report.score_figures import curves_image, score_figure
from pretrain.checkpoints import checkpoint
from pretrain.counting.baselines import ARITHMETIC, BASELINE_NAMES
from pretrain.measure.heldout import BEYOND, arithmetic_sentence, format_score, score_rows
from pretrain.measure.metrics import read_metrics

_TEMPLATE = Path(__file__).with_name("run_page.html")
_MAX_UMAP_CELLS = 20_000


def write_report(
    run: Path,
    out: Path,
    score_folders: list[Path],
    embedding: Path | None,
    color: str | None,
    commands: Path | None,
    step: checkpoint.Which = None,
) -> str:
    """Write the page and return its path as text.

    Parameters
    ----------
    run
        Run folder of ``geneloom pretrain``.
    score_folders
        Folders of ``geneloom finetune``.
    embedding, color
        File of ``geneloom embed`` and the column of obs that colours its UMAP.
    commands
        Text shown under "what was run"; None: the command that the run recorded.
    step
        As if the run had ended with this checkpoint, or with the best; None: all of it.

    Raises
    ------
    ValueError
        A folder is not what it should be, or the column does not exist.
    """
    if not out.parent.is_dir():
        raise ValueError(f"{out}: the folder {out.parent} does not exist")
    metrics = read_metrics(run, None if step is None else checkpoint.find(run, step).step)
    if not metrics:
        raise ValueError(f"{run}: no metrics.jsonl with records; expected a run folder")
    environment = json.loads((run / "env.json").read_text())
    manifest = json.loads((run / "shards_manifest.json").read_text())
    heldout = [m for m in metrics if m["kind"] == "heldout"]
    page = _render(
        name=run.resolve().name,
        is_run=True,
        figures=run_figures(metrics),
        remarks=[m["remark"] for m in heldout if "remark" in m],
        heldout=heldout[-1] if heldout else None,
        heldout_scores=score_rows(heldout[-1]) if heldout else [],
        beside_counting=arithmetic_sentence(heldout[-1]) if heldout else "",
        buckets=_bucket_rows(heldout[-1]) if heldout else [],
        datasets=_dataset_rows(heldout[-1]) if heldout else [],
        last=next((m for m in reversed(metrics) if m["kind"] == "train"), None),
        umap_figure=_umap_figure(embedding, color) if embedding else None,
        embedding=embedding.name if embedding else None,
        color=color,
        tasks=[_task(folder) for folder in score_folders],
        environment=environment,
        commands=commands.read_text() if commands else environment["command"],
        config=(run / "config.yaml").read_text(),
        sources=manifest["sources"],
        padding=padding_share(manifest["buckets"]),
    )
    with complete_file(out) as aside:
        aside.write_text(page)
    return str(out)


def scores_page(folder: Path) -> str:
    """Return the page of one folder of ``geneloom finetune``, without a run beside it."""
    return _render(name=folder.resolve().name, is_run=False, tasks=[_task(folder)])


def _render(**content: Any) -> str:
    template = jinja2.Environment(autoescape=True).from_string(_TEMPLATE.read_text())
    return template.render(**content)


def _task(folder: Path) -> dict:
    """Return what the page shows of one fine-tuning, the best contender first."""
    path = folder / RESULTS_NAME
    if not path.exists():
        raise ValueError(f"{folder}: no {RESULTS_NAME}; expected a folder of `geneloom finetune`")
    results = json.loads(path.read_text())
    summary, names = results["summary"], score_names(results["summary"])
    ordered = best_first(summary)
    rows = [
        (n, [*(format_interval(summary[n][k]) for k in names), format_steps(summary[n])])
        for n in ordered
    ]
    by_class = [
        (c, [f"{summary[n]['f1_by_class'].get(c, float('nan')):.3f}" for n in ordered])
        for c in results["classes"]
    ]
    return results | {
        "rows": rows,
        "ordered": ordered,
        "by_class": by_class,
        "about": about_results(results),
        "remarks": results.get("remarks", []),  # older results have none
        "columns": [*names.values(), "steps"],
        "figure": score_figure(summary),
        "curves": curves_image(_trainings(results)),
    }


def _trainings(results: dict) -> dict[str, list[dict]]:
    """Return contender -> the records of its trainings; of older results nothing."""
    found: dict[str, list[dict]] = {}
    for fold in results["seeds"]:
        for name, record in fold.get("trainings", {}).items():
            found.setdefault(name, []).append(record)
    return found


def _bucket_rows(heldout: dict) -> list[list[str]]:
    """Return what the page shows of each length bucket, the shortest first; older runs: nothing."""
    beside = [f"baseline_{name}" for name in BASELINE_NAMES if f"baseline_{name}" in heldout]
    curves = ["loss", *(f"{name}_loss" for name in beside), "accuracy", "top10"]
    rows = []
    for length in sorted(heldout.get("loss_by_bucket", {}), key=int):
        values = [heldout[f"{curve}_by_bucket"][length] for curve in curves]
        scores = [format_score(v, ".4f") for v in values[:-2]]
        scores += [format_score(v, ".2%") for v in values[-2:]]
        rows.append([f"{int(length):,}", f"{heldout['genes_by_bucket'][length]:,}", *scores])
    return rows


def _dataset_rows(heldout: dict) -> list[list[str]]:
    """Return what the page shows of each data set: the model, nats beyond arithmetic, that line."""
    lines = heldout.get(f"baseline_{ARITHMETIC}_loss_by_dataset", {})
    beyond = heldout.get(f"{BEYOND}_by_dataset", {})
    return [
        [
            name,
            f"{heldout['genes_by_dataset'][name]:,}",
            format_score(loss, ".4f"),
            format_score(lines.get(name), ".4f"),
            format_score(beyond.get(name), "+.4f"),
        ]
        for name, loss in heldout.get("loss_by_dataset", {}).items()
    ]


def _umap_figure(path: Path, color: str | None) -> str:
    import scanpy

    data = anndata.read_h5ad(path)
    if OBSM_KEY not in data.obsm:
        raise ValueError(f"{path}: no obsm['{OBSM_KEY}']; expected a file of `geneloom embed`")
    if color is not None and color not in data.obs:
        raise ValueError(f"{path}: obs has no column '{color}'; it has {list(data.obs.columns)}")
    embedded = np.flatnonzero(np.isfinite(data.obsm[OBSM_KEY]).all(axis=1))
    if len(embedded) > _MAX_UMAP_CELLS:
        embedded = np.random.default_rng(0).choice(embedded, _MAX_UMAP_CELLS, replace=False)
    obs = pd.DataFrame(index=data.obs_names[embedded])
    small = anndata.AnnData(data.obsm[OBSM_KEY][embedded], obs=obs)
    scanpy.pp.neighbors(small, use_rep="X", random_state=0)
    scanpy.tl.umap(small, random_state=0)
    groups = data.obs[color].astype(str).to_numpy()[embedded] if color else np.full(small.n_obs, "")
    with style():
        return as_image(_draw_groups(small.obsm["X_umap"], groups))


def _draw_groups(places: np.ndarray, groups: np.ndarray) -> Figure:
    names = np.unique(groups)
    lines = -(-len(names) // 2) if names[0] else 0
    figure = new_figure(3.8 + 0.2 * lines)
    axes = figure.subplots()
    palette = matplotlib.colormaps["tab20"]
    for number, name in enumerate(names):
        points = places[groups == name]
        axes.scatter(*points.T, s=6, lw=0, color=palette(number % 20), label=name)
    axes.set(xticks=[], yticks=[])
    if lines:
        figure.legend(loc="outside lower center", ncols=2, markerscale=2)
    return figure
