"""Verdicts: did pretraining help, does a model beat the baselines, and do the controls hold.

Contenders of one task share their folds, so they are compared by their differences in each fold.
Folds are no independent samples: their training examples overlap, and repeated ones share test
examples too. So a mean's variance is ``(1 / folds + test / train) * variance`` (Nadeau & Bengio,
Machine Learning 52, 2003), and p over tasks are corrected by Holm (1979).

Simulated differences that are none, called real at p < 0.05 by the plain t-test and by this one:
15 random fifths 35 % and 5 %, five times five folds 42 % and 4 %, one time five folds 5 % and 1 %.
The best of several baselines is ahead of an equal by chance: losses to it are corrected for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from eval.benchmark.contest.best_of_many import LargestT
from eval.benchmark.outcome import Outcome, Role, TaskRun
from eval.scores.metrics import CONFIDENCE

# What stands for a model, decided before any score is seen: the first of these that a task has.
# Embeddings without training are what integration is about; elsewhere it is the trained model.
ZERO_SHOT = "zero-shot"
# Measured shifts of expression are predicted by a linear map from a gene's embedding.
RIDGE = "ridge on input embedding"
FINE_TUNED = "fine-tuned"
MAIN_CONTENDERS = (ZERO_SHOT, RIDGE, FINE_TUNED)
# Fewer paired folds say nothing about the spread.
FEWEST_FOLDS = 3
NOT_TESTED = "not tested"
# Question -> words for: better, worse, neither.
WORDS = {
    "pretraining": ("helps", "hurts", "no difference seen"),
    "baselines": ("wins", "loses", "tie"),
    "models": ("wins", "loses", "tie"),
    "control": ("above chance", "below chance", "at chance"),
}
# What a verdict's word says of the model, in the order of `WORDS`.
STATES = ("better", "worse", "neither", "not_tested")
_TEST_SHARE = 0.2
_NO_SPREAD = 1e-12  # differences of equal scores differ by rounding only

Contender = tuple[str, Role, str | None]


def display_name(contender: str, role: str, model: str | None) -> str:
    """Return a contender's name in tables, and as a key of ``TaskRun.details``.

    ``fine-tuned, NAME``, ``fine-tuned, NAME with random weights``, ``logistic regression``.
    """
    if model is None:
        return contender
    return f"{contender}, {model}" + (" with random weights" if role == "twin" else "")


def main_contender(run: TaskRun) -> str:
    """Return the contender that stands for a model in this task: see `MAIN_CONTENDERS`."""
    present = {o.contender for o in run.outcomes if o.role == "model"}
    return next((name for name in MAIN_CONTENDERS if name in present), MAIN_CONTENDERS[-1])


def overlap_ratio(run: TaskRun) -> float:
    """Return test examples / training examples of a fold, from ``details["test_share"]``.

    Raises
    ------
    ValueError
        The share is not between 0 and 1.
    """
    share = run.details.get("test_share", _TEST_SHARE)
    if not 0 < share < 1:
        raise ValueError(f"details['test_share'] is {share}; give the share, between 0 and 1")
    return share / (1 - share)


def corrected_interval(
    values: np.ndarray, ratio: float, best_of: np.ndarray | None = None
) -> dict[str, Any]:
    """Return mean, 95 % interval and p of "the mean is 0", by the corrected resampled t-test.

    Parameters
    ----------
    values
        float64 [folds]; NaN folds do not count.
    ratio
        Test examples / training examples; 0 gives Student's test.
    best_of
        float64 [folds, baselines]: the values are the differences from the best of these. Among
        equals the best one is ahead by chance, so that a negative mean has the p of the largest t
        of all (`eval.benchmark.contest.best_of_many`), and the interval's upper end lies as much
        further off. Being ahead of the best is harder already: p and the lower end stay.

    Returns
    -------
    dict
        ``mean``, ``low``, ``high``, ``p`` (None where fewer folds than needed are known: one for
        the mean, two for the others) and ``folds``, those that are known. Values that are all
        equal have no spread to test by: p is 1 if they are 0, else 0.
    """
    known = values[np.isfinite(values)]
    found: dict[str, Any] = dict.fromkeys(("mean", "low", "high", "p")) | {"folds": len(known)}
    if len(known):
        found["mean"] = float(known.mean())
    if len(known) < 2:
        return found
    mean = float(known.mean())
    error = float(np.sqrt((1 / len(known) + ratio) * known.var(ddof=1)))
    if error < _NO_SPREAD:
        return found | {"low": mean, "high": mean, "p": float(abs(mean) < _NO_SPREAD)}
    freedom = len(known) - 1
    tail = (1 - CONFIDENCE) / 2
    down = up = float(stats.t.isf(tail, freedom)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, freedom))
    if best_of is not None and best_of.shape[1] > 1:
        largest = LargestT(best_of[np.isfinite(values)])
        up = largest.critical(tail) * error
        if mean < 0:
            p = min(1.0, 2 * largest.tail(-mean / error))
    return found | {"low": mean - down, "high": mean + up, "p": p}


def summarise(run: TaskRun) -> list[dict[str, Any]]:
    """Return every contender's scores over folds, the best mean headline first.

    Each has ``contender``, ``role``, ``model``, ``name`` (see `display_name`), ``folds``,
    ``seconds`` (mean of a fold), ``steps`` (fewest and most optimizer steps of a fold's training;
    None where nothing was trained) and ``scores``: score -> ``mean``, ``low``, ``high`` (corrected
    95 % interval; None for a single fold) and ``folds``, those in which the score is defined.
    """
    ratio = overlap_ratio(run)
    rows = []
    for key in _contenders(run):
        outcomes = _outcomes(run, key)
        scores = {}
        for score in dict.fromkeys(s for o in outcomes for s in o.scores):
            interval = corrected_interval(_values(outcomes, score), ratio)
            scores[score] = {k: interval[k] for k in ("mean", "low", "high", "folds")}
        steps = [o.details["training"]["steps"] for o in outcomes if "training" in o.details]
        rows.append(
            {
                "contender": key[0], "role": key[1], "model": key[2], "name": display_name(*key),
                "folds": len(outcomes),
                "seconds": float(np.mean([o.seconds for o in outcomes])),
                "steps": [min(steps), max(steps)] if steps else None,
                "scores": scores,
            }
        )  # fmt: skip
    return sorted(rows, key=lambda r: -_headline(r, run.headline))


def verdicts(run: TaskRun, models: list[str]) -> list[dict[str, Any]]:
    """Return what the task's outcomes say about each model, and whether its controls hold.

    Parameters
    ----------
    models
        Names of the models, in the order of the page.

    Returns
    -------
    list of dict
        ``question`` is ``pretraining`` (each contender against the same with random weights),
        ``baselines`` (the main contender against the best baseline, best by its mean on the test
        examples; `corrected_interval` makes up for having chosen it),
        ``models`` (main contenders, each pair once) or ``control`` (shuffled labels against
        chance). Then ``model``, ``contender``, ``against`` (a display name, or ``chance``),
        ``against_model``, ``main`` (is it the main contender?), ``folds`` (both scores known),
        ``difference`` (headline, the model's minus the other's), ``low``, ``high``, ``p`` and
        ``word``, which is ``not tested`` with fewer than `FEWEST_FOLDS` folds.
    """
    found = []
    main = main_contender(run)
    rows = {(r["contender"], r["role"], r["model"]): r for r in summarise(run)}
    baselines = [k for k, r in rows.items() if k[1] == "baseline" and _known(r, run.headline)]
    for model in models:
        own: Contender = (main, "model", model)
        for key in rows:
            twin: Contender = (key[0], "twin", model)
            if key[1:] == own[1:] and twin in rows:
                found.append(_compare(run, "pretraining", key, twin))
        if own in rows and baselines:
            found.append(_compare(run, "baselines", own, baselines[0], baselines))
    for number, first in enumerate(models):
        for second in models[number + 1 :]:
            one: Contender = (main, "model", first)
            other: Contender = (main, "model", second)
            if one in rows and other in rows:
                found.append(_compare(run, "models", one, other))
    if run.chance is not None:
        found += [_compare(run, "control", key, run.chance) for key in rows if key[1] == "control"]
    return found


def holm(tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the tasks with ``holm_p`` and ``holm_word`` in each of their ``verdicts``.

    One family is one question about one contender of one model (against one other model, where
    models are compared), over all tasks in which it was tested. Controls stay as they are: their
    correction would hide what they are there to show.
    """
    out = [task | {"verdicts": [dict(v) for v in task["verdicts"]]} for task in tasks]
    families: dict[tuple, list[dict]] = {}
    for verdict in (v for task in out for v in task["verdicts"]):
        verdict |= {"holm_p": verdict["p"], "holm_word": verdict["word"]}
        if verdict["question"] != "control" and verdict["word"] != NOT_TESTED:
            families.setdefault(_family(verdict), []).append(verdict)
    for family in families.values():
        family.sort(key=lambda v: v["p"])
        adjusted = 0.0
        for smaller, verdict in enumerate(family):
            adjusted = max(adjusted, min(1.0, (len(family) - smaller) * verdict["p"]))
            word = _word(verdict["question"], verdict["difference"], adjusted, verdict["folds"])
            verdict |= {"holm_p": adjusted, "holm_word": word}
    return out


def state_of(verdict: dict[str, Any], word: str = "holm_word") -> str:
    """Return ``better``, ``worse``, ``neither`` or ``not_tested``, after Holm's correction.

    `word` is the field that is read: ``word`` is that of the task alone.
    """
    words = (*WORDS[verdict["question"]], NOT_TESTED)
    return STATES[words.index(verdict[word])]


def control_state(task: dict[str, Any]) -> str:
    """Return ``failed``, ``held``, ``not tested`` or ``none`` for a task with its verdicts."""
    words = [v["word"] for v in task["verdicts"] if v["question"] == "control"]
    if any(w in WORDS["control"][:2] for w in words):
        return "failed"
    if not words:
        return "none"
    return NOT_TESTED if NOT_TESTED in words else "held"


def count_words(tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return how often each question came out how, over tasks that went through `holm`.

    Tasks whose control failed are counted apart: their numbers are not to be trusted.

    Returns
    -------
    list of dict
        ``question``, ``model``, ``contender`` ("" for the main one, which is called differently in
        different tasks), ``main``, ``against_model`` and the counts ``better``, ``worse``,
        ``neither``, ``not_tested`` and ``control_failed``. Questions about the main contenders
        come first.
    """
    counts: dict[tuple, dict[str, Any]] = {}
    for task in tasks:
        failed = control_state(task) == "failed"
        for verdict in task["verdicts"]:
            question = verdict["question"]
            if question == "control":
                continue
            row = counts.setdefault(
                _family(verdict),
                {k: verdict[k] for k in ("question", "model", "main")}
                | {"contender": "" if verdict["main"] else verdict["contender"]}
                | {"against_model": verdict["against_model"]}
                | dict.fromkeys((*STATES, "control_failed"), 0),
            )
            row["control_failed" if failed else state_of(verdict)] += 1
    return sorted(counts.values(), key=lambda row: not row["main"])


def _contenders(run: TaskRun) -> list[Contender]:
    return list(dict.fromkeys((o.contender, o.role, o.model) for o in run.outcomes))


def _values(outcomes: list[Outcome], score: str) -> np.ndarray:
    """Return float64 [outcomes], NaN where a score is not defined."""
    return np.array([o.scores.get(score) for o in outcomes], dtype=np.float64)


def _outcomes(run: TaskRun, key: Contender) -> list[Outcome]:
    return [o for o in run.outcomes if (o.contender, o.role, o.model) == key]


def _by_fold(run: TaskRun, key: Contender) -> dict[int, float]:
    outcomes = _outcomes(run, key)
    values = _values(outcomes, run.headline)
    return {o.fold: v for o, v in zip(outcomes, values, strict=True)}


def mean_of(row: dict[str, Any], score: str) -> float | None:
    """Return a row's mean score; None if it is undefined, or the contender does not have it."""
    return row["scores"].get(score, {"mean": None})["mean"]


def _known(row: dict, headline: str) -> bool:
    return mean_of(row, headline) is not None


def _headline(row: dict, headline: str) -> float:
    mean = mean_of(row, headline)
    return -np.inf if mean is None else mean


def _compare(
    run: TaskRun,
    question: str,
    first: Contender,
    second: Contender | float,
    best_of: Sequence[Contender] = (),
) -> dict:
    """Return one verdict, against a contender or chance (that of each fold, where it is kept).

    `best_of`: the second was chosen out of these for its score.
    """
    own = _by_fold(run, first)
    if isinstance(second, tuple):
        other, against = _by_fold(run, second), display_name(*second)
        against_model = second[2]
    else:
        other = {o.fold: o.details.get("chance", second) for o in _outcomes(run, first)}
        against, against_model = "chance", None
    folds = sorted(own.keys() & other.keys())
    differences = np.array([own[f] - other[f] for f in folds], dtype=np.float64)
    rivals = [_by_fold(run, other) for other in best_of]
    all_differences = np.array(
        [[own[f] - rival.get(f, np.nan) for rival in rivals] for f in folds], dtype=np.float64
    )
    interval = corrected_interval(
        differences, overlap_ratio(run), all_differences if rivals and folds else None
    )
    return {
        "question": question, "model": first[2], "contender": first[0],
        "against": against, "against_model": against_model,
        "main": first[0] == main_contender(run), "folds": interval["folds"],
        "difference": interval["mean"], "low": interval["low"], "high": interval["high"],
        "p": interval["p"],
        "word": _word(question, interval["mean"], interval["p"], interval["folds"]),
    }  # fmt: skip


def _word(question: str, difference: float | None, p: float | None, folds: int) -> str:
    if difference is None or p is None or folds < FEWEST_FOLDS:
        return NOT_TESTED
    better, worse, neither = WORDS[question]
    if p > 1 - CONFIDENCE:
        return neither
    return better if difference > 0 else worse


def _family(verdict: dict) -> tuple:
    # The main contender has one family, whatever it is called in a task.
    contender = "" if verdict["main"] else verdict["contender"]
    return verdict["question"], verdict["model"], contender, verdict["against_model"]
