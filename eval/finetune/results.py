"""What `geneloom finetune` says of cells and of genes: scores over folds, curves, remarks."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.files import complete_file
from eval.scores.baselines import CELL_STATE
from eval.scores.metrics import mean_and_interval

if TYPE_CHECKING:
    from eval.finetune.classifier import Classifier

logger = logging.getLogger(__name__)

RESULTS_NAME = "results.json"
RESULTS_FORMAT = "geneloom-finetune/1"
PRETRAINED, RANDOM = "pretrained", "random weights"
FINE_TUNED, FROZEN = "fine-tuned", "frozen embedding"
# What a score may lose by fine-tuning before the training is called failed.
_LESS = 0.01
_MOST_POINTS = 60


def training_record(classifier: Classifier) -> dict[str, Any]:
    """Return what is kept of a training, as JSON.

    Returns
    -------
    dict
        ``reads``: what its head read: ``cell state`` or ``mean``, of genes ``gene state``;
        ``steps`` that were done, ``kept_step``, whose weights were kept (the last, but for early
        stopping; 0: those of the probe), ``curve``: [step, mean training loss of the steps since
        the point before], and ``validation``: [step, loss] after each epoch, empty without
        validation cells, and of step 0 where the probe may be kept.
    """
    losses, history = classifier.losses, classifier.history
    group = max(1, -(-len(losses) // _MOST_POINTS))
    stretches = [losses[i : i + group] for i in range(0, len(losses), group)]
    ends = [min(i + group, len(losses)) for i in range(0, len(losses), group)]
    each = len(losses) // max(1, len(history))
    validation = [
        [each * h["epoch"], _short(h["validation_loss"])] for h in history if "validation_loss" in h
    ]
    if classifier.start_loss is not None:
        validation.insert(0, [0, _short(classifier.start_loss)])
    kept = len(losses)
    if classifier.settings.patience and validation:
        kept = min(validation, key=lambda point: (not np.isfinite(point[1]), point[1]))[0]
    return {
        "reads": _reads(classifier),
        "steps": len(losses),
        "kept_step": kept,
        "curve": [[e, _short(float(np.mean(s)))] for e, s in zip(ends, stretches, strict=True)],
        "validation": validation,
    }


def _reads(classifier: Classifier) -> str:
    if all(head.kind == "genes" for head in classifier.heads):
        return "gene state"
    return CELL_STATE if classifier.reader else "mean"


def summarise(
    per_seed: list[dict],
    scores: tuple[str, ...] = ("macro_f1", "balanced_accuracy", "accuracy"),
    interval: Callable[[list[float]], dict[str, float]] = mean_and_interval,
) -> dict[str, dict]:
    """Return contender -> score -> mean and 95 % half-width; F1 of classes as means.

    ``steps`` is [fewest, most] of its trainings, where it was trained.
    """
    summary: dict[str, dict] = {}
    for name in per_seed[0]["scores"]:
        found = [s["scores"][name] for s in per_seed]
        summary[name] = {key: interval([s[key] for s in found]) for key in scores}
        classes = {c for s in found for c in s["f1_by_class"]}
        summary[name]["f1_by_class"] = {
            c: float(np.mean([s["f1_by_class"].get(c, np.nan) for s in found]))
            for c in sorted(classes)
        }
        steps = [s["trainings"][name]["steps"] for s in per_seed if name in s.get("trainings", {})]
        if steps:
            summary[name]["steps"] = [min(steps), max(steps)]
    return summary


def remarks(
    per_seed: list[dict], svd: str, score: str = "macro_f1", label: str = "macro-F1"
) -> list[str]:
    """Return what a reader has to know before the scores.

    A training that did not train, and a model that is not above the corpus SVD.

    Parameters
    ----------
    svd
        The contender that is made of the corpus SVD; it may be absent.
    score, label
        The score that is looked at, and what readers call it.
    """

    def mean(name: str) -> float:
        return float(np.mean([s["scores"][name][score] for s in per_seed]))

    found = []
    for weights in (PRETRAINED, RANDOM):
        tuned = f"{FINE_TUNED}, {weights}"
        frozen = {n: f"{n}, {weights}" for n in (FROZEN, CELL_STATE)}
        there = {n: mean(f) for n, f in frozen.items() if f in per_seed[0]["scores"]}
        found += below_frozen(tuned, label, mean(tuned), there)
    if svd in per_seed[0]["scores"]:
        of_model = [n for n in per_seed[0]["scores"] if n.endswith(f", {PRETRAINED}")]
        best, of_svd = max(of_model, key=mean), mean(svd)
        if mean(best) <= of_svd:
            found.append(
                f"Nothing of the model is above the SVD of its corpus here: {label} "
                f"{of_svd:.3f} against {mean(best):.3f} ({best}). A table of gene loadings, which "
                "takes seconds to make, tells them as well"
            )
    return found


def below_frozen(name: str, label: str, tuned: float, frozen: dict[str, float]) -> list[str]:
    """Return a sentence if a training ended below a regression on its frozen encoder, else none.

    `frozen` holds scores by what was regressed on; a training began at one of them.
    """
    best = max(frozen, key=lambda features: frozen[features], default="")
    if not best or not tuned < frozen[best] - _LESS:
        return []
    own = f"its own frozen {best.removeprefix('frozen ')}"
    return [
        f"{name}: {label} {tuned:.3f} is below that of {own}, {frozen[best]:.3f}. "
        "That is a training that failed, and says nothing of the weights: more steps, a start at "
        "the probe, another learning rate, or another of --features"
    ]


def write_results(out: Path, results: dict[str, Any]) -> None:
    """Write results into a folder, which is made if it is not there, and say their remarks."""
    for remark in results["remarks"]:
        logger.warning("%s", remark)
    out.mkdir(parents=True, exist_ok=True)
    with complete_file(out / RESULTS_NAME) as aside:
        aside.write_text(json.dumps(results, indent=1) + "\n")


def _short(value: float) -> float:
    return float(f"{value:.6g}")
