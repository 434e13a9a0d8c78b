"""What a contender scored, and where it is kept, so that a killed benchmark goes on."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from data_prep.files import complete_file

logger = logging.getLogger(__name__)

# model: pretrained weights · twin: the same with random weights · baseline: knows nothing of
# pretraining · control: what must lie at chance (shuffled labels).
Role = Literal["model", "twin", "baseline", "control"]


@dataclass(frozen=True)
class Outcome:
    """The scores of one contender in one fold.

    Attributes
    ----------
    contender
        What stands in the table, without the model's name: ``fine-tuned``, ``frozen embedding``,
        ``logistic regression``.
    model
        Name of the model for the roles ``model`` and ``twin``.
    fold
        Position in the list of folds (gene tasks: seed x folds + fold; cell tasks: seed). Outcomes
        of one fold saw the same training and test examples: they are compared in pairs.
    scores
        Score name -> value; None where it is not defined.
    seconds
        Wall time of training and predicting.
    details
        Small JSON values for the task's page (confusion matrix, F1 of classes, curves).
    """

    contender: str
    role: Role
    model: str | None
    fold: int
    scores: dict[str, float | None]
    seconds: float
    details: dict[str, Any] = field(default_factory=dict)

    def without(self, *names: str) -> Outcome:
        """Return the outcome without some details, which stay in the store only."""
        return replace(self, details={k: v for k, v in self.details.items() if k not in names})


@dataclass(frozen=True)
class TaskRun:
    """What a task's kind returns: everything that `results.json` holds about it but the verdicts.

    Attributes
    ----------
    cells, classes
        Cells used, and the classes in the order of confusion matrices.
    split
        One sentence: what stays whole, how many folds and seeds.
    headline
        The score by which contenders are ordered and compared; larger is better.
    chance
        The headline's value for guessing; None where there is none (integration).
    excluded
        Reason -> count of cells or genes that were left out.
    outcomes
        Every contender in every fold. A model is judged by the first of these that a task has:
        ``zero-shot``, ``ridge on input embedding``, ``fine-tuned``.
    details
        JSON values for the task's page that belong to no single contender; each is optional.
        ``test_share``: share of all examples that one fold scores (0.2 where it is missing); it
        corrects intervals for folds that overlap (`eval.benchmark.contest.verdicts`). Where folds
        are subsamples that are scored whole, it is the subsample's share, such as 0.8. By contender
        (keys: `compare.display_name`): ``roc``: [false positive rate, true positive rate] points;
        ``intervals_over_genes``: ``{"mean", "low", "high"}``; ``predictions``: rows with ``gene``,
        ``label`` (0 or 1), ``probability`` (of 1, out of fold), ``cells`` and perhaps ``symbol``;
        ``few_shot``: shots -> ``{"mean", "low", "high"}``; ``umap``: [[x, y], ...], with the lists
        ``labels`` and ``batches`` beside it. ``skipped``: contender -> why it did not run. In
        details of outcomes: ``confusion`` (int [classes, classes], rows are the truth),
        ``f1_by_class``, ``calibration`` (bins with ``confidence``, ``accuracy``, ``cells``), of
        controls ``chance`` where it differs between folds, and of fine-tuned contenders
        ``training`` (`eval.finetune.results.training_record`).
    """

    cells: int
    classes: list[str]
    split: str
    headline: str
    chance: float | None
    excluded: dict[str, int]
    outcomes: list[Outcome]
    details: dict[str, Any] = field(default_factory=dict)


class Store:
    """Outcomes in a folder, one JSON file each, named by a hash of everything that decides them."""

    def __init__(
        self,
        folder: Path,
        base: dict[str, Any],
        done: Callable[[str, float], None] | None = None,
        writes: bool = True,
    ) -> None:
        """Take `base` (the task, its size) as part of every key; `done` counts units.

        Of several ranks only one `writes`.
        """
        self._folder, self._base, self._writes = folder, base, writes
        self._done = done or (lambda name, seconds: None)
        folder.mkdir(parents=True, exist_ok=True)

    def outcome(self, key: dict[str, Any], compute: Callable[[], Outcome]) -> Outcome:
        """Return the stored outcome of `key`, or compute and store it.

        `key` holds whatever decides the result beside the store's base: contender, model digest,
        settings, fold. It has to be JSON.
        """
        whole = json.dumps(self._base | key, sort_keys=True)
        path = self._folder / f"{hashlib.sha256(whole.encode()).hexdigest()[:24]}.json"
        if path.exists():
            outcome = Outcome(**json.loads(path.read_text())["outcome"])
            self._done(outcome.contender, 0.0)
            return outcome
        started = time.perf_counter()
        outcome = compute()
        if self._writes:
            with complete_file(path) as aside:
                aside.write_text(json.dumps({"key": json.loads(whole), "outcome": asdict(outcome)}))
        self._done(outcome.contender, time.perf_counter() - started)
        return outcome
