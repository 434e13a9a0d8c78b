"""One self-contained page about a run: loss curve, UMAP, scores beside baselines, what was run."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import anndata
import jinja2
import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from data_prep.tables import padding_share
from eval.embed import OBSM_KEY
from eval.finetune.cells import RESULTS_NAME
from eval.tables import SCORE_NAMES, format_interval
from pretrain.metrics import read_metrics

_TEMPLATE = Path(__file__).parent / "report.html"
_BASELINE_COLOURS = {"unigram": "#999999", "unigram_by_rank": "#d95f02", "mean_rank": "#1b9e77"}
_MAX_UMAP_CELLS = 20_000


def write_report(
    run: Path,
    out: Path,
    score_folders: list[Path],
    embedding: Path | None,
    color: str | None,
    commands: Path | None,
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

    Raises
    ------
    ValueError
        A folder is not what it should be, or the column does not exist.
    """
    if not out.parent.is_dir():
        raise ValueError(f"{out}: the folder {out.parent} does not exist")
    metrics = read_metrics(run)
    if not metrics:
        raise ValueError(f"{run}: no metrics.jsonl with records; expected a run folder")
    environment = json.loads((run / "env.json").read_text())
    manifest = json.loads((run / "shards_manifest.json").read_text())
    page = (
        jinja2.Environment(autoescape=True)
        .from_string(_TEMPLATE.read_text())
        .render(
            run=run.name,
            loss_figure=_loss_figure(metrics),
            decile_figure=_decile_figure(metrics),
            heldout=next((m for m in reversed(metrics) if m["kind"] == "heldout"), None),
            last=next((m for m in reversed(metrics) if m["kind"] == "train"), None),
            umap_figure=_umap_figure(embedding, color) if embedding else None,
            embedding=embedding.name if embedding else None,
            color=color,
            tasks=[_task(folder) for folder in score_folders],
            score_names=SCORE_NAMES,
            environment=environment,
            commands=commands.read_text() if commands else environment["command"],
            config=(run / "config.yaml").read_text(),
            sources=manifest["sources"],
            padding=padding_share(manifest["buckets"]),
        )
    )
    aside = out.with_name(f".{out.name}.partial")
    aside.write_text(page)
    aside.replace(out)
    return str(out)


def _task(folder: Path) -> dict:
    """Return what the page shows of one fine-tuning, best macro-F1 first."""
    path = folder / RESULTS_NAME
    if not path.exists():
        raise ValueError(f"{folder}: no {RESULTS_NAME}; expected a folder of `geneloom finetune`")
    results = json.loads(path.read_text())
    summary = results["summary"]
    ordered = sorted(summary, key=lambda n: -summary[n]["macro_f1"]["mean"])
    rows = [(n, [format_interval(summary[n][k]) for k in SCORE_NAMES]) for n in ordered]
    by_class = [
        (c, [f"{summary[n]['f1_by_class'].get(c, float('nan')):.3f}" for n in ordered])
        for c in results["classes"]
    ]
    return results | {
        "rows": rows,
        "ordered": ordered,
        "by_class": by_class,
        "figure": _score_figure(summary, ordered),
    }


def _loss_figure(metrics: list[dict]) -> str:
    train = [m for m in metrics if m["kind"] == "train"]
    heldout = [m for m in metrics if m["kind"] == "heldout"]
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot([m["step"] for m in train], [m["loss"] for m in train], lw=1, label="train")
    axes.plot(
        [m["step"] for m in heldout], [m["loss"] for m in heldout], "o-", ms=3, label="held out"
    )
    for name, colour in _BASELINE_COLOURS.items():
        if heldout:
            value = heldout[-1][f"baseline_{name}"]
            axes.axhline(value, color=colour, ls="--", lw=1, label=name.replace("_", " "))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("cross-entropy of hidden genes (nats)")
    axes.legend(fontsize=8)
    return _svg(figure)


def _decile_figure(metrics: list[dict]) -> str | None:
    heldout = [m for m in metrics if m["kind"] == "heldout"]
    if not heldout:
        return None
    figure = Figure(figsize=(4.5, 3.6), layout="constrained")
    axes = figure.subplots()
    losses = heldout[-1]["loss_by_rank_decile"]
    axes.bar(np.arange(1, len(losses) + 1), losses, color="#7570b3")
    axes.set_xlabel("decile of rank (1: most characteristic genes)")
    axes.set_ylabel("held-out loss (nats)")
    return _svg(figure)


def _score_figure(summary: dict, ordered: list[str]) -> str:
    figure = Figure(figsize=(7, 0.5 + 0.4 * len(ordered)), layout="constrained")
    axes = figure.subplots()
    means = [summary[n]["macro_f1"]["mean"] for n in ordered]
    spread = [summary[n]["macro_f1"]["half_width"] for n in ordered]
    colours = ["#7570b3" if n.endswith(", pretrained") else "#bbbbbb" for n in ordered]
    axes.barh(ordered, means, xerr=spread, color=colours, capsize=3)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("macro-F1, mean and 95 % interval over seeds")
    return _svg(figure)


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
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    palette = matplotlib.colormaps["tab20"]
    for number, group in enumerate(np.unique(groups)):
        points = small.obsm["X_umap"][groups == group]
        axes.scatter(*points.T, s=6, lw=0, color=palette(number % 20), label=group)
    axes.set_xticks([])
    axes.set_yticks([])
    if color:
        axes.legend(fontsize=7, markerscale=2, loc="center left", bbox_to_anchor=(1, 0.5))
    return _svg(figure)


def _svg(figure: Figure) -> str:
    """Return a figure as the source of an <img>."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
