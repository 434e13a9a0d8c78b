"""What a frozen encoder knows of cells, beside what counting knows of them.

A few cells of each class get their labels, logistic regression predicts the others: once from the
model's frozen states, and once from each neighbour, with the same cells and the same classifier.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data_prep.genes.vocabulary import Vocabulary
from data_prep.shards.reader import ShardSet
from data_prep.sources.source_spec import SourceOptions
from eval.cells.read_cells import CellSet, encode_file
from eval.options import choose_device
from eval.probe.classify import PENALTY_C, predict_classes
from eval.probe.draws import Draw, Draws
from eval.probe.features import LAST, cell_features, frozen_features
from eval.probe.models import ProbedModel, open_probed
from eval.probe.settings import ProbeSettings
from eval.scores.baselines import CELL_STATE, CORPUS_SVD
from eval.scores.metrics import mean_and_interval, score_classes
from eval.scores.splits import repeated_cells
from pretrain.cell_states.cell_state import NUM_COUNTED, fit_cell_state, reduced
from pretrain.counting.corpus_svd import FILE_NAME, NUM_COMPONENTS, CorpusSvd, corpus_svd
from pretrain.export.model_folder import random_twin
from pretrain.model.architectures import encoder_of

logger = logging.getLogger(__name__)

FORMAT = "geneloom-probe/1"
RANDOM_PREFIX = "random weights, "
ABOVE, BELOW, NEITHER = "above", "below", "not told apart from"


@dataclass(frozen=True)
class Probe:
    """The result: `record` is what ``--json`` prints, see docs/formats.md."""

    record: dict[str, Any]

    @property
    def scores(self) -> pd.DataFrame:
        """One row per contender, step and number of labelled cells a class."""
        return pd.DataFrame(self.record["scores"])

    @property
    def verdicts(self) -> pd.DataFrame:
        """One row per contender of the model, step and number: its distance to the corpus SVD."""
        return pd.DataFrame(self.record["verdicts"])


def probe_cells(
    model: Path | str,
    cells: Path | str,
    label: str,
    settings: ProbeSettings = ProbeSettings(),
    options: SourceOptions = SourceOptions(),
) -> Probe:
    """Return how well frozen states of a model, and its neighbours, tell the classes of cells.

    Parameters
    ----------
    model
        Folder of ``geneloom export``, Geneformer's, or a run folder: all its checkpoints.
    cells
        h5ad with raw counts.
    label
        Column of obs.
    options
        Of the file; its columns are chosen here.

    Raises
    ------
    ValueError
        The folder holds no model, the file no counts or no such column, or fewer than two classes
        have enough cells.
    """
    settings, donor = replace(settings, device=choose_device(settings.device)), settings.donor
    probed = open_probed(Path(model), settings.vocabulary, settings.step)
    opened = None if settings.shards is None else _open_shards(settings.shards, probed)
    svd, missing = find_svd(probed, opened)
    state_svd = probed.state.svd if probed.state else opened and corpus_svd(opened, NUM_COUNTED)
    chosen, left_out = choose_cells(Path(cells), label, probed.vocabulary, settings, options)
    labels = chosen.metadata[label].to_numpy(dtype=str)
    donors = chosen.metadata[donor].to_numpy(dtype=str) if donor else None
    draws = Draws(labels, donors, settings.cells_a_class, settings.seeds)
    scores = _Scores(labels, draws)
    if svd:
        scores.add(CORPUS_SVD, "baseline", None, [svd.embed_cells(chosen.tokens)])
    if state_svd and state_svd.components.shape[1] > NUM_COMPONENTS:
        # Without the network: what its part of the cell state has to add to.
        name = f"{CORPUS_SVD}, {state_svd.components.shape[1]} components"
        scores.add(name, "baseline", None, [state_svd.embed_cells(chosen.tokens)])
    for name, features in cell_features(chosen.counts, chosen.tokens, probed.vocabulary).items():
        scores.add(name, "baseline", None, [features])
    for role, step, found in _encoded(probed, chosen.tokens, settings, opened, state_svd):
        for name in found[0]:
            prefix = RANDOM_PREFIX if role == "twin" else ""
            scores.add(prefix + name, role, step, [features[name] for features in found])
    return Probe(
        {
            "format": FORMAT,
            "model": probed.name,
            "vocabulary_sha256": probed.vocabulary.sha256,
            "steps": [step for step, _ in probed.loaders],
            "file": Path(cells).name,
            "label": label,
            "donor": donor,
            "cells": len(labels),
            "left_out": left_out,
            "seen": sorted({Path(cells).stem, Path(cells).name} & set(probed.sources)),
            "classes": {str(n): found for n, found in draws.classes.items()},
            "classes_left_out": {str(n): found for n, found in draws.left_out.items()},
            "seeds": settings.seeds,
            "random_models": settings.random_models,
            "penalty_c": PENALTY_C,
            "corpus_svd": svd.origin | {"components": svd.components.shape[1]} if svd else None,
            "corpus_svd_missing": missing,
            "scores": scores.rows,
            "verdicts": verdicts(scores.rows),
        }
    )


def main_contender(record: dict[str, Any]) -> str:
    """Return which of a model's contenders sentences are about; no score decides it."""
    has_states = any(row["contender"] == CELL_STATE for row in record["scores"])
    return CELL_STATE if has_states else LAST


def _open_shards(folder: Path, probed: ProbedModel) -> ShardSet:
    opened = ShardSet(folder, share=probed.share)
    if opened.vocabulary.sha256 != probed.vocabulary.sha256:
        raise ValueError(
            f"--shards {folder}: vocabulary {opened.vocabulary.sha256[:12]}, the model has "
            f"{probed.vocabulary.sha256[:12]}; give the shards it was pretrained on"
        )
    return opened


def find_svd(probed: ProbedModel, shards: ShardSet | None) -> tuple[CorpusSvd | None, str | None]:
    """Return the corpus SVD that belongs to a model, or None and why there is none."""
    if shards is not None:
        return corpus_svd(shards), None
    if found := CorpusSvd.found_in(probed.folder, probed.vocabulary):
        return found, None
    return None, (
        f"{probed.folder}: has no {FILE_NAME} (of an older version, or published elsewhere); "
        "give --shards, the folder of `geneloom prepare` that the model was pretrained on"
    )


def choose_cells(
    path: Path,
    label: str,
    vocabulary: Vocabulary,
    settings: ProbeSettings,
    options: SourceOptions,
) -> tuple[CellSet, dict[str, int]]:
    """Return the cells to probe with, and reason -> number of those that are left out.

    Raises
    ------
    ValueError
        As `encode_file`; or no cell is left.
    """
    asked = [label, *([settings.donor] if settings.donor else []), *settings.keep]
    columns = tuple(sorted(set(asked), key=asked.index))
    found = encode_file(path, vocabulary, replace(options, columns=columns))
    metadata = found.metadata
    kept = np.ones(len(metadata), dtype=bool)
    for column, value in settings.keep.items():
        kept &= metadata[column].to_numpy(dtype=str) == value
    labels = metadata[label].to_numpy(dtype=str)
    named = ~np.isin(labels, ("", "nan", "None"))
    again = repeated_cells(found.counts)
    reasons = {
        f"not {', '.join(f'{k}={v}' for k, v in settings.keep.items())}": ~kept,
        f"no {label}": kept & ~named,
        "no gene of the vocabulary": kept & named & ~found.has_genes,
        "exactly the counts of another cell": kept & named & found.has_genes & again,
    }
    usable = np.flatnonzero(kept & named & found.has_genes & ~again)
    if not len(usable):
        raise ValueError(f"{path}: no cell is left with a value in obs['{label}']")
    left_out = {reason: int(cells.sum()) for reason, cells in reasons.items() if cells.any()}
    if 0 < settings.max_cells < len(usable):
        left_out["not drawn (--max-cells)"] = len(usable) - settings.max_cells
        usable = _some_of_each(usable, labels[usable], settings.max_cells)
    return found.subset(usable), left_out


def _some_of_each(cells: np.ndarray, labels: np.ndarray, number: int) -> np.ndarray:
    """Return so many of `cells`, at random but for 200 of each class, or all it has.

    Of fewer cells than that all classes get the same number, or all they have.
    """
    order = np.random.default_rng(0).permutation(len(cells))
    place = np.zeros(len(cells), dtype=np.int64)
    for name in np.unique(labels):
        members = order[labels[order] == name]
        place[members] = np.arange(len(members))
    # One of each class in turn, up to 200: where there is no room for so many, the rare stay whole.
    first = order[np.argsort(np.minimum(place[order], 200), kind="stable")][:number]
    return np.sort(cells[first])


def _encoded(
    probed: ProbedModel,
    tokens: list[np.ndarray],
    settings: ProbeSettings,
    shards: ShardSet | None,
    state_svd: CorpusSvd | None,
) -> Iterator[tuple[str, int | None, list[dict[str, np.ndarray]]]]:
    """Yield (role, step, features of each model): the pretrained ones, then those of no training.

    One model is in memory at a time. A twin's cell state has its axes from the probed cells
    themselves, which is not to its disadvantage: no pretraining cells are needed for it.
    """
    how: dict[str, Any] = {
        "token_budget": settings.token_budget,
        "device": settings.device,
        "bf16": settings.bf16,
    }
    network = None
    for step, load in probed.loaders:
        logger.info("%s: encoding %s cells%s", probed.name, f"{len(tokens):,}", _at(step))
        network = load()
        state = probed.state
        if shards is not None:
            state = fit_cell_state(encoder_of(network), shards, **how)
        known = None if state is None else lambda means, state=state: state
        yield "model", step, [frozen_features(network, tokens, probed.vocabulary, known, **how)]
    twins = []
    for seed in range(settings.random_models):
        logger.info("%s: encoding %s cells, random weights", probed.name, f"{len(tokens):,}")
        assert network is not None
        twin = random_twin(network, seed)
        own = None if state_svd is None else lambda means: reduced(state_svd, tokens, means)
        twins.append(frozen_features(twin, tokens, probed.vocabulary, own, **how))
    yield "twin", None, twins


def _at(step: int | None) -> str:
    return "" if step is None else f", step {step:,}"


class _Scores:
    """Macro-F1 of each contender over all draws."""

    def __init__(self, labels: np.ndarray, draws: Draws) -> None:
        self._labels, self._draws = labels, draws
        self.rows: list[dict[str, Any]] = []

    def add(self, name: str, role: str, step: int | None, features: list[np.ndarray]) -> None:
        """Score a contender: `features` of one or several models, which the draws take in turn."""
        found: dict[int, list[float]] = {}
        for draw in self._draws:
            turn = features[draw.seed % len(features)]
            found.setdefault(draw.cells_a_class, []).append(self._macro_f1(turn, draw))
        for size, values in found.items():
            self.rows.append(
                {
                    "contender": name,
                    "role": role,
                    "step": step,
                    "width": features[0].shape[1],
                    "cells_a_class": size,
                    "macro_f1": mean_and_interval(values),
                    "draws": values,
                }
            )

    def _macro_f1(self, features: np.ndarray, draw: Draw) -> float:
        classes = self._draws.classes[draw.cells_a_class]
        predicted = predict_classes(features, self._labels, draw.train, draw.test)
        codes = np.searchsorted(classes, self._labels[draw.test])
        return score_classes(codes, np.searchsorted(classes, predicted), classes)["macro_f1"]


def verdicts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return where models stand to the corpus SVD: differences over the same draws, in words.

    "above" and "below": the interval of the difference excludes zero.
    """
    svd = {r["cells_a_class"]: r["draws"] for r in rows if r["contender"] == CORPUS_SVD}
    found = []
    for row in rows:
        if row["role"] == "baseline" or row["cells_a_class"] not in svd:
            continue
        beside = np.array(svd[row["cells_a_class"]])
        difference = mean_and_interval((np.array(row["draws"]) - beside).tolist())
        low = difference["mean"] - difference["half_width"]
        high = difference["mean"] + difference["half_width"]
        found.append(
            {k: row[k] for k in ("contender", "role", "step", "cells_a_class")}
            | {
                "difference": difference,
                "word": ABOVE if low > 0 else BELOW if high < 0 else NEITHER,
            }
        )
    return found
