"""Search hyper-parameters within the training cells; the test split is never used."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from data_prep.genes.vocabulary import Vocabulary
from data_prep.hashing import stream_key
from eval.finetune.classifier import Classifier, Target
from eval.finetune.progress import identity_of
from eval.finetune.settings import SEARCHED, FinetuneSettings
from eval.finetune.training import finetune
from eval.scores.splits import too_few_to_stop_by
from pretrain.cell_states.cell_state import CellState
from pretrain.model.architectures import Encoder

logger = logging.getLogger(__name__)

Score = Callable[[Classifier, list[np.ndarray], list[Target]], float]
_INNER_FOLDS = 4
# These are the ranges of Geneformer's own search: learning rate log-uniform, weight decay uniform,
# dropout up to 0.7.
_LEARNING_RATE = (1e-6, 1e-3)
_WEIGHT_DECAY = (0.0, 0.3)
_DROPOUT = (0.0, 0.7)
# Of a dozen layers the lowest then moves at least a two-thousandth as fast as the top one.
_LAYER_DECAY = (0.5, 1.0)


def macro_f1(classifier: Classifier, tokens: list[np.ndarray], targets: list[Target]) -> float:
    """Return the mean macro-F1 over heads; a gene's class is that of its mean over cells."""
    scores = []
    for target in targets:
        name, labels = target.head.name, target.labels
        if target.head.kind == "cells":
            probabilities = classifier.predict_cells(tokens, name)
            known = (labels >= 0) & ~np.isnan(probabilities[:, 0])
            truth, probabilities = labels[known], probabilities[known]
        else:
            found = classifier.predict_genes(tokens, name, labels >= 0)
            genes, row = np.unique(found.token, return_inverse=True)
            probabilities = np.zeros((len(genes), found.probabilities.shape[1]))
            # A gene's sum over cells has the same largest class as its mean.
            np.add.at(probabilities, row, found.probabilities)
            truth = labels[genes]
        present = np.unique(truth)
        predicted = probabilities.argmax(axis=1)
        scores.append(f1_score(truth, predicted, labels=present, average="macro", zero_division=0))
    return float(np.mean(scores))


def search(
    encoder: Encoder,
    vocabulary: Vocabulary,
    tokens: list[np.ndarray],
    targets: list[Target],
    settings: FinetuneSettings,
    seed: int,
    trials: int,
    groups: np.ndarray | None = None,
    folder: Path | None = None,
    score: Score = macro_f1,
    state: CellState | None = None,
) -> FinetuneSettings:
    """Return the settings with the best score on an inner validation split of the training cells.

    Learning rate and its decay by layer, weight decay, frozen layers, dropout and epochs are
    searched (epochs at most those of `settings`, which are the first trial). All trials use the
    same inner split, a quarter for validation: cells by group or stratified by class; for heads of
    genes, genes. Where these are too few to stop early by, no trial does.

    Parameters
    ----------
    tokens, targets
        Training cells only, as for `finetune`.
    groups
        str [cells], e.g. donors; no group is on both sides. None: cells are divided by class.
    folder
        Folder for finished trials (and the progress of the current one), from which a killed search
        continues with the same result. None: they are kept in memory.
    score
        (classifier, validation cells, their targets) -> number, larger is better.
    state
        As in `eval.finetune.training.finetune`.

    Raises
    ------
    ValueError
        There are no trials or fewer than two groups, a class is too small to be divided, `folder`
        contains another search, or every trial diverged.
    """
    if trials < 1:
        raise ValueError(f"search: trials={trials}, at least 1")
    train, held_out = inner_split(tokens, targets, groups, seed)
    if settings.patience and (few := too_few_to_stop_by(held_out[1][0].labels)):
        logger.info("search: no trial stops early: %s", few)
        settings = replace(settings, patience=0)
    space = _space(encoder, settings)
    key = identity_of(encoder, vocabulary, settings, seed, [train, held_out], state)
    study = _open_study(folder, f"{key} {' '.join(space)}")
    while (number := _num_finished(study)) < trials:
        # Each trial has its own sampler, so that a search that continues after a kill draws the
        # same values.
        sampler_seed = stream_key(seed, "search", number) % 2**32
        study.sampler = optuna.samplers.TPESampler(seed=sampler_seed)
        if number == 0:
            study.enqueue_trial(_inside(space, settings))
        trial = study.ask(space)
        place = folder / f"trial-{number:04d}" if folder else None
        chosen = replace(settings, **trial.params)
        try:
            classifier = finetune(
                encoder, vocabulary, *train, chosen, seed,
                validation=held_out if chosen.patience else None, folder=place, state=state,
            )  # fmt: skip
        except FloatingPointError as error:
            logger.info("search: trial %d of %d diverged (%s)", number + 1, trials, error)
            study.tell(trial, state=TrialState.FAIL)
        else:
            value = score(classifier, *held_out)
            logger.info("search: trial %d of %d scores %.4f", number + 1, trials, value)
            study.tell(trial, value)
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)
    if not study.get_trials(states=(TrialState.COMPLETE,)):
        raise ValueError(f"search: all {trials} trials diverged; give other settings")
    return replace(settings, **study.best_params)


def inner_split(
    tokens: list[np.ndarray], targets: list[Target], groups: np.ndarray | None, seed: int
) -> tuple[tuple[list[np.ndarray], list[Target]], tuple[list[np.ndarray], list[Target]]]:
    """Return (training, validation) cells with their targets, a quarter of them for validation.

    Cells are divided if there is a head of cells or if there are groups. The genes of a head of
    genes are always divided, because a gene seen in training says nothing about others.
    """
    of_cells = [t for t in targets if t.head.kind == "cells"]
    inner = held_out = np.arange(len(tokens))
    if of_cells or groups is not None:
        classes = of_cells[0].labels if of_cells else np.zeros(len(tokens), dtype=np.int64)
        inner, held_out = _divide(classes, groups, seed, "cells")
    train_targets, held_out_targets = [], []
    for target in targets:
        left, right = target.of_cells(inner), target.of_cells(held_out)
        if target.head.kind == "genes":
            genes = np.flatnonzero(target.labels >= 0)
            kept, apart = _divide(target.labels[genes], None, seed, f"genes of {target.head.name}")
            left, right = (replace(target, labels=target.labels.copy()) for _ in range(2))
            left.labels[genes[apart]] = right.labels[genes[kept]] = -1
        train_targets.append(left)
        held_out_targets.append(right)
    return (
        ([tokens[i] for i in inner], train_targets),
        ([tokens[i] for i in held_out], held_out_targets),
    )


def _divide(
    classes: np.ndarray, groups: np.ndarray | None, seed: int, what: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of three quarters and of one quarter, divided by group or by class."""
    if groups is None:
        largest = int(np.unique(classes, return_counts=True)[1].max())
        if largest < 2:
            raise ValueError(f"search: the {len(classes)} {what} are too few to be divided")
        folds = StratifiedKFold(min(_INNER_FOLDS, largest), shuffle=True, random_state=seed)
    else:
        num_groups = len(np.unique(groups))
        if num_groups < 2:
            raise ValueError("search: groups: at least two are needed to hold one out; give None")
        folds = StratifiedGroupKFold(min(_INNER_FOLDS, num_groups), shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # The warning says that a class has fewer members than there are folds.
        warnings.simplefilter("ignore", UserWarning)
        inner, held_out = next(iter(folds.split(np.zeros(len(classes)), classes, groups)))
    return inner, held_out


def _space(encoder: Encoder, settings: FinetuneSettings) -> dict[str, BaseDistribution]:
    # Adapters need at least one layer that is not frozen.
    most_frozen = encoder.config.num_hidden_layers - (1 if settings.lora_rank else 0)
    found: dict[str, BaseDistribution] = {
        "learning_rate": FloatDistribution(*_LEARNING_RATE, log=True),
        "weight_decay": FloatDistribution(*_WEIGHT_DECAY),
        "freeze_layers": IntDistribution(0, most_frozen),
        "dropout": FloatDistribution(*_DROPOUT),
        "epochs": IntDistribution(1, settings.epochs),
        "layer_decay": FloatDistribution(*_LAYER_DECAY),
    }
    assert tuple(found) == SEARCHED, "keys of stored outcomes name what is searched"
    return found


def _inside(space: dict[str, Any], settings: FinetuneSettings) -> dict[str, float]:
    """Return the given settings, moved to the border of the search space if they lie outside."""
    return {k: min(max(getattr(settings, k), d.low), d.high) for k, d in space.items()}


def _num_finished(study: optuna.Study) -> int:
    """Return how many trials have ended; a killed trial stays `RUNNING` and is repeated."""
    return len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.FAIL)))


def _open_study(folder: Path | None, key: str) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage: BaseStorage = InMemoryStorage()
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        storage = JournalStorage(JournalFileBackend(str(folder / "search.journal")))
    study = optuna.create_study(
        storage=storage, study_name="search", direction="maximize", load_if_exists=True
    )
    if study.user_attrs.setdefault("key", key) != key:
        raise ValueError(
            f"{folder}: holds another search (other cells, labels, model, settings or seed); give "
            "another folder, or delete it"
        )
    study.set_user_attr("key", key)
    return study
