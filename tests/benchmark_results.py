"""Results of benchmarks that never ran: scores drawn around known truths, for pages and tables."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from eval.benchmark.outcome import Outcome, Role, TaskRun

# Contender and role -> mean headline.
Truth = dict[tuple[str, Role], float]
GENES: Truth = {
    ("fine-tuned", "model"): 0.88, ("frozen embedding", "model"): 0.82,
    ("input embeddings", "model"): 0.74, ("fine-tuned", "twin"): 0.66,
    ("frozen embedding", "twin"): 0.62, ("input embeddings", "twin"): 0.51,
    ("logistic regression, ranks", "baseline"): 0.74, ("random forest, ranks", "baseline"): 0.75,
    ("support vector machine, counts", "baseline"): 0.71,
    ("static features, random forest", "baseline"): 0.79, ("detection rate alone", "baseline"): 0.7,
    ("shuffled labels", "control"): 0.5, ("shuffled labels, static features", "control"): 0.5,
}  # fmt: skip
CELLS: Truth = {
    ("fine-tuned", "model"): 0.83, ("frozen embedding", "model"): 0.79,
    ("fine-tuned", "twin"): 0.8, ("frozen embedding", "twin"): 0.72,
    ("logistic regression (L2)", "baseline"): 0.9, ("random forest", "baseline"): 0.86,
    ("nearest centroid", "baseline"): 0.81, ("majority", "baseline"): 0.13,
    ("shuffled labels", "control"): 0.25, ("shuffled labels, regression", "control"): 0.25,
}  # fmt: skip
INTEGRATION: Truth = {
    ("zero-shot", "model"): 0.55, ("fine-tuned", "model"): 0.74, ("zero-shot", "twin"): 0.48,
    ("fine-tuned", "twin"): 0.6, ("PCA", "baseline"): 0.52, ("ComBat", "baseline"): 0.61,
    ("highly variable genes", "baseline"): 0.5, ("Harmony", "baseline"): 0.7,
}  # fmt: skip
PUBLISHED = {"what": "AUROC, fine-tuned", "value": 0.91, "spread": 0.02, "source": "Fig. 2"}
HEADLINES = {"genes": "auroc", "cells": "macro_f1", "integration": "overall"}
OTHER_SCORES = {
    "genes": ("auprc", "balanced_accuracy", "macro_f1", "auroc_occurrence"),
    "cells": ("balanced_accuracy", "accuracy", "auprc", "ece"),
    "integration": ("avg_bio", "ari", "nmi", "silhouette_label", "silhouette_batch", "ilisi",
                    "kbet", "graph_connectivity", "pcr_comparison"),
}  # fmt: skip


def make_task(
    name: str,
    kind: str,
    truth: Truth,
    models: list[str],
    seed: int,
    folds: int = 5,
    classes: tuple[str, ...] = ("B cell", "T cell", "monocyte", "NK cell"),
) -> dict[str, Any]:
    """Return one task of results.json, scored around `truth` (later models: 0.06 lower)."""
    from eval.benchmark.contest.verdicts import display_name, summarise, verdicts

    rng = np.random.default_rng(seed)
    drawn, outcomes = rng.normal(0, 0.012, folds), []
    for (contender, role), mean in truth.items():
        for model in models if role in ("model", "twin") else [None]:
            lower = 0.06 * models.index(model) if model and role == "model" else 0.0
            for fold in range(folds):
                value = float(np.clip(mean - lower + drawn[fold] + rng.normal(0, 0.015), 0, 1))
                scores: dict[str, float | None] = {HEADLINES[kind]: value}
                for score in OTHER_SCORES[kind]:
                    scores[score] = float(np.clip(value + rng.normal(-0.04, 0.03), 0, 1))
                if kind == "genes" and role == "baseline":
                    scores["auroc_occurrence"] = None
                seconds = {"model": 31.0, "twin": 30.0}.get(role, 1.5) * rng.uniform(0.8, 1.2)
                details = _cell_details(classes, value, rng) if kind == "cells" else {}
                if contender == "fine-tuned":
                    details |= {"training": _training(40 + fold)}
                outcomes.append(Outcome(contender, role, model, fold, scores, seconds, details))
    names = {display_name(o.contender, o.role, o.model): o for o in outcomes if o.role != "control"}
    run = TaskRun(
        2_638, list(classes) if kind == "cells" else ["negative", "positive"],
        f"{folds} folds, donors whole", HEADLINES[kind],
        {"genes": 0.5, "cells": 0.25, "integration": None}[kind],
        {"no label": 62, "not in the vocabulary of model-a": 5}, outcomes,
        _task_details(kind, names, models, rng),
    )  # fmt: skip
    found = {"summary": summarise(run), "verdicts": verdicts(run, models)}
    return {
        "name": name, "title": f"{name.replace('_', ' ').capitalize()}", "kind": kind,
        "applications": [f"application {seed}"],
        "published": [PUBLISHED] if kind == "genes" else [],
        "note": "Other cells than the paper's." if kind == "genes" else "",
        "pretrained_on": {"model": ["some_cells"]} if kind == "cells" else {},
        "recipe": "GEO accession, file, columns.", "size": {"seeds": 1, "epochs": 1},
        "seconds": 218.4,
    } | asdict(run) | found  # fmt: skip


def make_results(models: list[str], tasks: list[dict[str, Any]]) -> dict[str, Any]:
    """Return results.json around some tasks."""
    from eval.benchmark.contest.verdicts import holm

    about = [
        {
            "name": m, "folder": f"runs/{m}", "digest": "ab12" * 16,
            "vocabulary_sha256": "cd34" * 16, "parameters": 10_316_544,
            "record": {"source_run": "6l", "step": 12_000},
        }
        for m in models
    ]  # fmt: skip
    return {
        "format": "geneloom-benchmark/1", "suite": "standard", "seed": 0,
        "command": f"geneloom benchmark {' '.join(f'--model runs/{m}' for m in models)}",
        "environment": {"commit": "c0ffee", "dirty": False, "machine": "x86_64, 2 cores",
                        "versions": {"torch": "2.13.0", "transformers": "5.0"}, "gpus": []},
        "models": about, "tasks": holm(tasks),
        "skipped": [{"name": "chaffin", "title": "Cardiomyopathy",
                     "reason": "SCP1303.h5ad is not in the data folder"}],
    }  # fmt: skip


def full_results(models: list[str]) -> dict[str, Any]:
    """Return results of seven tasks: of each kind some, one with a failed control."""
    leaky = CELLS | {("shuffled labels", "control"): 0.6}
    equal = GENES | {("fine-tuned", "model"): 0.66, ("frozen embedding", "model"): 0.61}
    hurt = CELLS | {("fine-tuned", "model"): 0.6}
    many = tuple(f"type {i:02d} of a tissue" for i in range(14))
    return make_results(
        models,
        [
            make_task("tf_dosage", "genes", GENES, models, 1),
            make_task("notch1_centrality", "genes", equal, models, 2, folds=10),
            make_task("pbmc3k_annotation", "cells", CELLS, models, 3),
            make_task("covid_disease", "cells", hurt, models, 4, classes=("healthy", "COVID-19")),
            make_task("tissue_annotation", "cells", leaky, models, 5, classes=many),
            make_task("sc_mixology", "integration", INTEGRATION, models, 6),
            make_task("pbmc_batches", "integration", INTEGRATION, models, 7, folds=1),
        ],
    )


def _training(steps: int) -> dict[str, Any]:
    curve = [[step, 0.7 * 0.97**step] for step in range(1, steps + 1)]
    return {"steps": steps, "kept_step": steps, "curve": curve, "validation": curve[::10]}


def _cell_details(classes: tuple[str, ...], value: float, rng: np.random.Generator) -> dict:
    num = len(classes)
    confusion = np.full((num, num), round(100 * (1 - value) / num)) + np.diag(
        rng.integers(60, 140, num)
    )
    f1 = np.clip(value + rng.normal(0, 0.08, num), 0, 1)
    bins = [
        {"cells": int(rng.integers(5, 90)), "confidence": c, "accuracy": float(c**1.4 * 0.95)}
        for c in np.linspace(0.3, 0.97, 10).tolist()
    ]
    return {
        "confusion": confusion.tolist(),
        "f1_by_class": dict(zip(classes, f1.tolist(), strict=True)),
        "calibration": bins,
    }


def _task_details(
    kind: str, names: dict[str, Outcome], models: list[str], rng: np.random.Generator
) -> dict[str, Any]:
    from eval.benchmark.contest.verdicts import display_name

    if kind == "genes":
        grid = np.linspace(0, 1, 51)
        return {
            "roc": {
                n: np.column_stack([grid, grid ** (1 / (o.scores["auroc"] or 1) - 1)]).tolist()
                for n, o in names.items()
            },
            "intervals_over_genes": {n: {"mean": 0.85, "low": 0.8, "high": 0.9} for n in names},
            "predictions": {
                display_name("fine-tuned", "model", m): [
                    {"gene": f"ENSG{i:011d}", "symbol": f"GENE{i}", "label": int(i % 4 == 0),
                     "probability": float(rng.uniform()), "cells": float(rng.integers(1, 300))}
                    for i in range(60)
                ]
                for m in models
            },
        }  # fmt: skip
    if kind == "cells":
        curve = {"10": 0.5, "50": 0.7, "100": 0.8}
        return {
            "few_shot": {
                n: {s: {"mean": v - d, "low": v - d - 0.05, "high": v - d + 0.05}
                    for s, v in curve.items()}
                for d, n in enumerate_small(list(names)[:3])
            },
            "skipped": {"scVI": "the package scvi-tools is not installed"},
        }  # fmt: skip
    labels = rng.integers(0, 4, 300)
    batches = rng.integers(0, 2, 300)
    places = rng.normal(size=(300, 2)) + 4 * np.column_stack([labels % 2, labels // 2])
    return {
        "umap": {
            n: (places + (1 - (o.scores["overall"] or 0)) * 3 * batches[:, None]).round(2).tolist()
            for n, o in names.items()
        },
        "labels": [f"line {i}" for i in labels], "batches": [f"batch {i}" for i in batches],
        "test_share": 0.8,
    }  # fmt: skip


def enumerate_small(names: list[str]) -> list[tuple[float, str]]:
    """Return (0.0, first), (0.04, second), ...: so that curves do not lie on each other."""
    return [(0.04 * i, name) for i, name in enumerate(names)]
