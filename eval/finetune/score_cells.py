"""Cell classification: fine-tune an encoder, beside the baselines and its random-weights twin."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from data_prep.files import require_new
from data_prep.genes.vocabulary import Vocabulary
from data_prep.sources.source_spec import SourceOptions, content_sha256
from data_prep.version import VERSION
from eval.cells.read_cells import CellSet, encode_file
from eval.finetune.classifier import (
    Classifier,
    Head,
    Target,
    save_classifier,
)
from eval.finetune.progress import Unfinished
from eval.finetune.results import (
    FINE_TUNED,
    FROZEN,
    PRETRAINED,
    RANDOM,
    RESULTS_FORMAT,
    remarks,
    summarise,
    training_record,
    write_results,
)
from eval.finetune.settings import FinetuneOptions, FinetuneSettings
from eval.finetune.training import finetune
from eval.options import choose_device
from eval.owning import owning
from eval.scores.baselines import (
    CELL_STATE,
    CORPUS_SVD,
    predict_baselines,
    predict_from_embedding,
)
from eval.scores.metrics import score_classes
from eval.scores.splits import (
    limit_per_class,
    repeated_cells,
    split_cells,
    validation_cells,
)
from pretrain.cell_states.cell_state import CellState, reduced
from pretrain.cell_states.frozen_states import embed_cells
from pretrain.counting.corpus_svd import CorpusSvd
from pretrain.export.model_folder import (
    folder_cell_state,
    load_exported,
    model_digest,
    random_twin,
)
from pretrain.model.architectures import Encoder, Network, encoder_of
from pretrain.ranks.dist import Ranks

logger = logging.getLogger(__name__)

FEWEST_CELLS_OF_CLASS = 5
# What the record of a saved head keeps of its scores.
_OF_HEAD = ("task", "label", "cells", "split", "model", "summary")
NO_VALUE = ["", "nan", "None", "NA", "unlabelled"]


@dataclass(frozen=True)
class _Problem:
    """Labelled cells, and how they are learnt; the target's groups are the donors.

    `svd` and `state` are the model folder's, where it has them.
    """

    vocabulary: Vocabulary
    cells: CellSet
    target: Target
    settings: FinetuneSettings
    ranks: Ranks | None
    unfinished: Unfinished
    svd: CorpusSvd | None
    state: CellState | None

    def finetuned(
        self, encoder: Encoder, train: np.ndarray, seed: int, name: str, state: CellState | None
    ) -> Classifier:
        """Return a classifier of training cells; some of them decide when to stop, if asked to.

        `name` tells this training's progress from that of the others; `state` is what it may read.
        """
        validation = None
        if self.settings.patience:
            train, held = self.divided(train, seed)
            validation = self._examples(held)
        return finetune(
            encoder, self.vocabulary, *self._examples(train), self.settings, seed, validation,
            self.unfinished.training(name), self.ranks,
            state,
        )  # fmt: skip

    def divided(self, train: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return cells to fit and cells for early stopping; ValueError if these are too few."""
        try:
            return validation_cells(train, self.target.labels, self.target.groups, seed)
        except ValueError as few:
            raise ValueError(
                f"--patience {self.settings.patience}: early stopping is judged by 15 % of the "
                f"training cells, and of {len(train):,} there are only {few}; leave it out"
            ) from few

    def predict(
        self, encoder: Encoder, train: np.ndarray, test: np.ndarray, seed: int, weights: str
    ) -> tuple[dict[str, np.ndarray], dict[str, dict]]:
        """Return predictions of linear layers on the frozen encoder, and of the fine-tuned one.

        With them comes the record of the fine-tuning. The axes of a random twin's cell state are
        those of the training cells.
        """
        used = np.concatenate([train, test])
        tokens = self._tokens(used)
        means = embed_cells(
            tokens, encoder, self.vocabulary, layer=0, token_budget=self.settings.token_budget,
            device=self.settings.device, bf16=self.settings.bf16,
        )  # fmt: skip
        predictions = {f"{FROZEN}, {weights}": self._from_states(means, train, used, seed)}
        state = self.state
        if state:
            if weights != PRETRAINED:
                state = reduced(state.svd, tokens[: len(train)], means[: len(train)])
            states = state.of_means(tokens, means)
            predictions[f"{CELL_STATE}, {weights}"] = self._from_states(states, train, used, seed)
        classifier = self.finetuned(encoder, train, seed, f"seed-{seed}, {weights}", state)
        probabilities = classifier.predict_cells(self._tokens(test), self.target.head.name)
        name = f"{FINE_TUNED}, {weights}"
        predictions[name] = probabilities.argmax(axis=1)
        return predictions, {name: training_record(classifier)}

    def of_corpus_svd(self, train: np.ndarray, test: np.ndarray, seed: int) -> np.ndarray:
        """Return predictions from the corpus SVD that the model folder holds."""
        assert self.svd
        used = np.concatenate([train, test])
        return self._from_states(self.svd.embed_cells(self._tokens(used)), train, used, seed)

    def _from_states(
        self, states: np.ndarray, train: np.ndarray, used: np.ndarray, seed: int
    ) -> np.ndarray:
        """Predict the cells of `used` behind `train`, which it begins with, from their states."""
        places = np.arange(len(used))
        fitted, rest = places[: len(train)], places[len(train) :]
        return predict_from_embedding(states, self.target.labels[used], fitted, rest, seed)

    def _tokens(self, cells: np.ndarray) -> list[np.ndarray]:
        return [self.cells.tokens[i] for i in cells]

    def _examples(self, cells: np.ndarray) -> tuple[list[np.ndarray], list[Target]]:
        return self._tokens(cells), [self.target.of_cells(cells)]


@owning("finetune")
def finetune_cells(
    cells: Path,
    model_folder: Path,
    label: str,
    out: Path,
    options: FinetuneOptions = FinetuneOptions(),
    reading: SourceOptions = SourceOptions(),
    ranks: Ranks | None = None,
) -> dict:
    """Write and return the scores of a fine-tuned encoder beside its baselines.

    A killed run that is started again with the same settings goes on: seeds that are done are
    read, and the training that it was in continues after its last epoch, to the same bits.

    Every seed has its own split, drawn cells, head and random twin; all contenders of a seed see
    the same cells.

    Parameters
    ----------
    ranks
        Of `pretrain.ranks.dist.start`: training is divided over them, and the first one writes.

    Raises
    ------
    ValueError
        Missing columns, fewer than two classes, fewer than three seeds, or `out` or `save_head` is
        not empty.
    """
    if options.seeds < 3:
        raise ValueError(f"--seeds {options.seeds}: at least 3, or there is no interval to report")
    save_head, donor = options.save_head, options.donor
    for folder in (out, save_head):
        if folder is not None:
            require_new(folder)
    device = ranks.device.type if ranks else choose_device(options.device)
    limits = (options.max_train_per_class, options.max_test_per_class)
    network, vocabulary = load_exported(model_folder, options.vocabulary)
    is_first = ranks is None or ranks.is_first
    state = folder_cell_state(model_folder, vocabulary)
    identity = {
        "cells": content_sha256(cells),
        "model": model_digest(model_folder, vocabulary),
        **_what_decides(label, options, reading, state is not None),
    }
    unfinished = Unfinished(out, identity, writes=is_first)
    columns = tuple(c for c in dict.fromkeys([*reading.columns, label, donor]) if c)
    encoded = encode_file(cells, vocabulary, replace(reading, columns=columns))
    labelled, dropped = _labelled(encoded, label, donor)
    problem = _Problem(
        vocabulary, labelled, _target(labelled, label, donor),
        replace(options.settings, device=device), ranks, unfinished,
        CorpusSvd.found_in(model_folder, vocabulary), state,
    )  # fmt: skip
    _require_enough_to_stop(problem, options.seeds, limits)
    per_seed = [
        unfinished.seed(seed, partial(_score_seed, problem, network, seed, limits))
        for seed in range(options.seeds)
    ]
    labels = problem.target.labels
    results = {
        "format": RESULTS_FORMAT,
        "geneloom": VERSION,
        "kind": "cells",
        "task": f"{label} of {cells.name}",
        "label": label,
        "classes": list(problem.target.head.classes),
        "cells": len(labels),
        "dropped": dropped,
        "split": f"by {donor}" if donor else "stratified by class, cells of a donor on both sides",
        "model": str(model_folder.name),
        "vocabulary_sha256": vocabulary.sha256,
        "settings": asdict(problem.settings),
        "donor": donor,
        "max_train_per_class": limits[0],
        "max_test_per_class": limits[1],
        "summary": summarise(per_seed),
        "remarks": remarks(per_seed, CORPUS_SVD),
        "seeds": per_seed,
    }
    if save_head is not None:
        every = limit_per_class(np.arange(len(labels)), labels, limits[0], 0)
        classifier = problem.finetuned(encoder_of(network), every, 0, "head", state)
        if is_first:
            save_classifier(classifier, save_head, {k: results[k] for k in _OF_HEAD})
    if is_first:
        write_results(out, results)
        unfinished.remove()
    return results


def _what_decides(
    label: str, options: FinetuneOptions, reading: SourceOptions, has_state: bool
) -> dict:
    """Return the settings that decide the scores, but for the number of seeds."""
    return {
        "options": repr(reading),
        "columns": [label, options.donor],
        "settings": options.settings.deciding()
        | options.settings.of_training_on_cells
        | options.settings.reading(has_state)
        | {"device": "cpu"},  # wherever it is computed
        "limits": (options.max_train_per_class, options.max_test_per_class),
    }


def _target(cells: CellSet, label: str, donor: str | None) -> Target:
    donors = cells.metadata[donor].to_numpy(dtype=str) if donor else None
    classes = sorted(set(cells.metadata[label]))
    labels = np.array([classes.index(v) for v in cells.metadata[label]])
    return Target(Head(label, "cells", tuple(classes)), labels, donors)


def _split(
    problem: _Problem, seed: int, most_per_class: tuple[int | None, int | None]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the training and test cells of a seed."""
    labels = problem.target.labels
    train, test = split_cells(labels, problem.target.groups, seed)
    return (
        limit_per_class(train, labels, most_per_class[0], seed),
        limit_per_class(test, labels, most_per_class[1], seed),
    )


def _require_enough_to_stop(
    problem: _Problem, seeds: int, most_per_class: tuple[int | None, int | None]
) -> None:
    """Raise ValueError, before anything is trained, if some seed has too few validation cells."""
    for seed in range(seeds) if problem.settings.patience else ():
        problem.divided(_split(problem, seed, most_per_class)[0], seed)


def _score_seed(
    problem: _Problem,
    network: Network,
    seed: int,
    most_per_class: tuple[int | None, int | None],
) -> dict:
    """Return the scores of all contenders on the split of one seed."""
    labels = problem.target.labels
    train, test = _split(problem, seed, most_per_class)
    started = time.perf_counter()
    predictions = predict_baselines(problem.cells.counts, labels, train, test, seed)
    if problem.svd:
        predictions[CORPUS_SVD] = problem.of_corpus_svd(train, test, seed)
    trainings: dict[str, dict] = {}
    for weights, encoder in (
        (PRETRAINED, encoder_of(network)),
        (RANDOM, encoder_of(random_twin(network, seed))),
    ):
        found, trained = problem.predict(encoder, train, test, seed, weights)
        predictions, trainings = predictions | found, trainings | trained
    classes = list(problem.target.head.classes)
    scores = {n: score_classes(labels[test], p, classes) for n, p in predictions.items()}
    logger.info(
        "seed %d: macro-F1 %s (%.0f s)", seed,
        ", ".join(f"{s['macro_f1']:.3f} {n}" for n, s in scores.items()),
        time.perf_counter() - started,
    )  # fmt: skip
    return {
        "seed": seed,
        "train_cells": len(train),
        "test_cells": len(test),
        "scores": scores,
        "trainings": trainings,
    }


def _labelled(cell_set: CellSet, label: str, donor: str | None) -> tuple[CellSet, dict[str, int]]:
    """Return the cells that can be classified, and how many were dropped for which reason."""
    values = cell_set.metadata[label]
    unlabelled = values.isin(NO_VALUE).to_numpy()
    no_donor = np.zeros(len(values), dtype=bool)
    if donor:
        no_donor = cell_set.metadata[donor].isin(NO_VALUE).to_numpy() & ~unlabelled
    unlabelled |= no_donor
    counts = values[~unlabelled].value_counts()
    rare = ~unlabelled & values.map(counts.to_dict()).fillna(0).lt(FEWEST_CELLS_OF_CLASS).to_numpy()
    empty = ~cell_set.has_genes & ~unlabelled & ~rare
    # A cell that is in the file twice would be on both sides of a split.
    left_out = unlabelled | rare | empty
    copies = np.zeros(len(values), dtype=bool)
    copies[~left_out] = repeated_cells(cell_set.counts[np.flatnonzero(~left_out)])
    keep = np.flatnonzero(~(left_out | copies))
    if values.iloc[keep].nunique() < 2:
        raise ValueError(
            f"column '{label}': fewer than two classes with at least {FEWEST_CELLS_OF_CLASS} "
            f"cells; it holds {values.value_counts().head(5).to_dict()}"
        )
    dropped = {
        "no label": int((unlabelled & ~no_donor).sum()),
        "no donor": int(no_donor.sum()),
        f"class below {FEWEST_CELLS_OF_CLASS} cells": int(rare.sum()),
        "no gene of the vocabulary": int(empty.sum()),
        "exactly the counts of another cell": int(copies.sum()),
    }
    return cell_set.subset(keep), {k: v for k, v in dropped.items() if v}
