"""Tables over genes, for kinds whose contenders order the same genes: ROC curves, intervals."""

from __future__ import annotations

from typing import Any

import numpy as np

from eval.benchmark.contest.contest import Contender, Results
from eval.benchmark.material.gene_labels import LabelledGenes
from eval.benchmark.outcome import Outcome
from eval.benchmark.scoring.gene_scores import (
    HEADLINE,
    interval,
    mean_by_gene,
    mean_roc,
    resample_genes,
    resampled_auroc,
)


def over_genes(
    results: Results[Any],
    detail: str,
    labels: np.ndarray,
    tested: list[np.ndarray],
    seed: int,
    main: Contender[Any] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return ROC curves, and intervals over genes, of every contender that is no control.

    Parameters
    ----------
    detail
        Name among an outcome's details: float [test genes], larger for class 1.
    labels
        int64 [genes], 0 or 1.
    tested
        int positions of the test genes of each fold.
    seed
        Of the resamples; they are the same for all contenders.
    main
        Each other contender's interval also says by how much this one's AUROC is larger.

    Returns
    -------
    tuple
        Both by display name: points of the curve, and ``mean``, ``low``, ``high`` and, with `main`,
        ``difference``.
    """
    values = {
        row: [np.array(o.details[detail]) for o in found]
        for row, found in results.of.items()
        if row.role != "control"
    }
    truth, weights = [labels[t] for t in tested], resample_genes(labels, seed)
    resampled = {row: resampled_auroc(labels, tested, v, weights) for row, v in values.items()}
    roc, intervals = {}, {}
    for row, found in values.items():
        roc[row.display_name] = mean_roc(truth, found)
        scores = np.array([o.scores[HEADLINE] for o in results.of[row]], dtype=np.float64)
        of_row: dict[str, Any] = {"mean": float(scores.mean())} | interval(resampled[row])
        if main is not None and row is not main:
            of_row["difference"] = interval(resampled[main] - resampled[row])
        intervals[row.display_name] = of_row
    return roc, intervals


def table_of_genes(
    outcomes: list[Outcome], tested: list[np.ndarray], genes: LabelledGenes
) -> list[dict[str, Any]]:
    """Return every gene's label and out-of-fold mean probability, the most probable first.

    ``cells`` is the mean number of cells that the gene was predicted in, over repetitions.
    """
    columns = {
        key: mean_by_gene(
            np.concatenate(tested),
            np.concatenate([o.details[key] for o in outcomes]),
            len(genes.ids),
        )
        for key in ("probability", "occurrences")
    }
    return [
        ({"symbol": genes.symbols[g]} if genes.symbols[g] else {})
        | {
            "gene": genes.ids[g],
            "label": int(genes.labels[g]),
            "probability": round(float(columns["probability"][g]), 4),
            "cells": round(float(columns["occurrences"][g]), 1),
        }
        for g in np.argsort(-columns["probability"], kind="stable")
    ]
