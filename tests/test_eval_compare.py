"""Verdicts of the benchmark: known cases, overlapping folds by simulation, corrections by hand."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from eval.benchmark.outcome import Outcome, TaskRun

pytestmark = pytest.mark.quick

# Scores of folds, by contender, role and model.
Scores = Mapping[tuple, list]
FOLDS = 5


def task_run(scores: Scores, chance: float | None = 0.5, **details: object) -> TaskRun:
    """Return a task whose only score is ``auroc``; a list holds one value for each fold."""
    outcomes = [
        Outcome(contender, role, model, fold, {"auroc": value}, seconds=1.0 + fold)
        for (contender, role, model), values in scores.items()
        for fold, value in enumerate(values)
    ]
    return TaskRun(100, ["a", "b"], "five folds", "auroc", chance, {}, outcomes, details)


def verdict(run: TaskRun, question: str, contender: str = "fine-tuned", model: str = "m") -> dict:
    from eval.benchmark.contest.verdicts import verdicts

    (found,) = [
        v
        for v in verdicts(run, ["m", "other"])
        if (v["question"], v["contender"], v["model"]) == (question, contender, model)
    ]
    return found


def near(center: float, seed: int) -> list[float]:
    return (center + np.random.default_rng(seed).normal(0, 0.01, FOLDS)).tolist()


def test_without_overlap_it_is_students_test():
    from scipy import stats

    from eval.benchmark.contest.verdicts import corrected_interval

    values = np.array([0.1, 0.3, 0.2, -0.1])
    found = corrected_interval(values, ratio=0.0)
    expected = stats.ttest_1samp(values, 0.0)
    low, high = expected.confidence_interval(0.95)
    assert found["p"] == pytest.approx(expected.pvalue)
    assert [found["low"], found["high"]] == pytest.approx([low, high])


def test_the_correction_by_hand():
    """Differences 1, 2, 3: variance 1; three folds of a fifth: error sqrt(1/3 + 1/4)."""
    from scipy import stats

    from eval.benchmark.contest.verdicts import corrected_interval

    found = corrected_interval(np.array([1.0, 2.0, 3.0]), ratio=0.25)
    error = np.sqrt(1 / 3 + 1 / 4)
    assert found["mean"] == 2.0
    assert found["high"] - 2.0 == pytest.approx(4.302653 * error, rel=1e-6)
    assert found["p"] == pytest.approx(2 * stats.t.sf(2 / error, 2))
    scores = {("fine-tuned", "model", "m"): [1.0, 2.0, 3.0], ("lr", "baseline", None): [0.0] * 3}
    default = verdict(task_run(scores), "baselines")
    half = verdict(task_run(scores, test_share=0.5), "baselines")
    assert default["high"] == pytest.approx(found["high"]), "a fifth is the default"
    assert half["high"] - 2.0 == pytest.approx(4.302653 * np.sqrt(1 / 3 + 1), rel=1e-6)


def test_overlapping_folds_do_not_make_differences_real():
    """Two scores that are equally good: the naive test cries wolf, the corrected one hardly ever.

    A fold's score is a mean over its test examples; the folds share the examples.
    """
    from eval.benchmark.contest.verdicts import corrected_interval

    rng = np.random.default_rng(0)
    trials, examples, folds, share = 400, 100, 15, 0.2
    false_alarms = {"naive": 0, "corrected": 0}
    for _ in range(trials):
        difference = rng.normal(size=examples)
        drawn = [rng.choice(examples, int(share * examples), replace=False) for _ in range(folds)]
        values = np.array([difference[d].mean() for d in drawn])
        ratios = {"naive": 0.0, "corrected": share / (1 - share)}
        for name, ratio in ratios.items():
            false_alarms[name] += corrected_interval(values, ratio)["p"] < 0.05
    assert false_alarms["corrected"] / trials < 2 * 0.05
    assert false_alarms["naive"] / trials > 3 * 0.05


@pytest.mark.parametrize("folds", [5, 15])
def test_an_equal_seldom_loses_to_the_best_of_eight_baselines(folds):
    """Noise that folds share by a fifth, as the correction for overlap takes it."""
    found = [p_of_best(seed, folds) for seed in range(800)]
    rates = {name: np.mean([p[name] <= 0.05 for p in found if p["behind"]]) for name in P_OF}
    behind = np.mean([p["behind"] for p in found])
    wins = np.mean([p["alone"] <= 0.05 for p in found if not p["behind"]])
    assert rates["alone"] * behind > 0.08
    assert 0 < rates["largest"] * behind + wins * (1 - behind) <= 0.05
    assert all(p["largest"] <= p["bonferroni"] + 1e-12 for p in found if p["behind"])


P_OF = ("alone", "largest", "bonferroni")


def p_of_best(seed: int, folds: int, ahead: float = 0.0, shared: float = 0.0) -> dict:
    """Return p against the best of eight baselines: by itself, by the largest t, by Bonferroni.

    `ahead`: by how much all baselines are better; `shared`: of a fold's noise, by all of them.
    """
    from eval.benchmark.contest.best_of_many import LargestT
    from eval.benchmark.contest.verdicts import corrected_interval

    rng = np.random.default_rng(seed)
    noise = np.sqrt(0.2) * rng.normal(size=(9, 1)) + np.sqrt(0.8) * rng.normal(size=(9, folds))
    noise[1:] = np.sqrt(1 - shared) * noise[1:] + np.sqrt(shared) * rng.normal(size=folds) + ahead
    differences = (noise[0] - noise[1:]).T
    best = differences.mean(axis=0).argmin()
    alone = corrected_interval(differences[:, best], 0.25)
    t = -alone["mean"] / np.sqrt((1 / folds + 0.25) * differences[:, best].var(ddof=1))
    largest = 2 * LargestT(differences, draws=100).tail(t) if t > 0 else alone["p"]
    return {
        "alone": alone["p"], "largest": min(1, largest), "bonferroni": min(1, 8 * alone["p"]),
        "behind": t > 0,
    }  # fmt: skip


@pytest.mark.parametrize(("folds", "ahead"), [(5, 2.5), (15, 1.5)])
def test_a_loss_is_seen_more_often_than_by_bonferroni(folds, ahead):
    found = [p_of_best(seed, folds, ahead, shared=0.5) for seed in range(200)]
    power = {name: np.mean([p[name] <= 0.05 for p in found]) for name in P_OF}
    assert power["alone"] >= power["largest"] >= power["bonferroni"] + 0.03, power


def test_the_largest_t_by_cases_that_are_known():
    """One baseline, the same one several times, unrelated ones; and all signs of fifteen folds."""
    from scipy import stats

    from eval.benchmark.contest.best_of_many import LargestT

    rng = np.random.default_rng(0)
    one = rng.normal(size=(5, 1))
    for t in (0.5, 2.0, 9.0):
        expected = stats.t.sf(t, 4)
        assert LargestT(one).tail(t) == pytest.approx(expected)
        assert LargestT(np.repeat(one, 7, axis=1)).tail(t) == pytest.approx(expected)
        gaps = np.concatenate([one, np.full((5, 2), np.nan)], axis=1)
        assert LargestT(gaps).tail(t) == pytest.approx(min(1, 3 * expected))
    assert LargestT(np.concatenate([one, 0 * one], axis=1)).critical(0.025) == pytest.approx(
        stats.t.isf(0.025, 4)
    )
    differences = rng.normal(size=(15, 1)) + rng.normal(size=(15, 8))
    largest = LargestT(differences)
    assert largest.tail(largest.critical(0.025)) == pytest.approx(0.025, rel=0.02)
    signs = rng.choice([-1.0, 1.0], (20_000, 15))
    means = signs @ differences / 15
    spread = np.sqrt(((differences**2).mean(axis=0) - means**2) / 14)
    flipped = (means / spread).max(axis=1)
    for tail in (0.1, 0.025):
        assert (flipped >= largest.critical(tail)).mean() == pytest.approx(tail, rel=0.25)


@pytest.mark.parametrize("folds", [5, 15])
def test_word_and_interval_agree(folds):
    from eval.benchmark.contest.verdicts import corrected_interval

    rng = np.random.default_rng(3)
    for center in np.linspace(-3, 0.5, 12):
        differences = rng.normal(center, 1, size=(folds, 1)) + rng.normal(0, 0.5, size=(folds, 6))
        best = differences.mean(axis=0).argmin()
        found = corrected_interval(differences[:, best], 0.25, differences)
        assert (found["p"] <= 0.05 and found["mean"] < 0) == (found["high"] < 0)


def test_losses_alone_are_corrected_for_the_choice():
    def against_three(gap: list[float]) -> dict:
        lr = near(0.7, 1)
        own = [a + g for a, g in zip(lr, gap, strict=True)]
        others = {("svm", "baseline", None): [x - 0.2 for x in lr],
                  ("pca", "baseline", None): [x - 0.3 for x in lr]}  # fmt: skip
        scores = {("fine-tuned", "model", "m"): own, ("lr", "baseline", None): lr}
        alone = verdict(task_run(scores), "baselines")
        return {"three": verdict(task_run(scores | others), "baselines"), "alone": alone}

    gap = np.array([0.02, 0.05, 0.03, 0.06, 0.04])
    worse, better = against_three((-gap).tolist()), against_three(gap.tolist())
    assert worse["three"]["against"] == "lr"
    assert worse["alone"]["p"] < worse["three"]["p"] <= 3 * worse["alone"]["p"]
    assert worse["three"]["high"] > worse["alone"]["high"]
    assert worse["three"]["low"] == worse["alone"]["low"]
    for kept in ("difference", "low", "p", "word"):
        assert better["three"][kept] == better["alone"][kept], kept


def test_a_perfect_model_wins_and_a_constant_one_loses():
    from eval.benchmark.contest.verdicts import summarise

    run = task_run(
        {
            ("fine-tuned", "model", "m"): [1.0] * FOLDS,
            ("fine-tuned", "twin", "m"): near(0.6, 1),
            ("fine-tuned", "model", "other"): [0.5] * FOLDS,
            ("fine-tuned", "twin", "other"): near(0.6, 2),
            ("logistic regression", "baseline", None): near(0.8, 3),
            ("majority", "baseline", None): [0.5] * FOLDS,
            ("shuffled labels", "control", None): near(0.5, 4),
        }
    )
    assert verdict(run, "pretraining")["word"] == "helps"
    assert verdict(run, "pretraining", model="other")["word"] == "hurts"
    assert verdict(run, "baselines")["word"] == "wins"
    assert verdict(run, "baselines")["against"] == "logistic regression"
    assert verdict(run, "baselines", model="other")["word"] == "loses"
    pair = verdict(run, "models")
    assert (pair["word"], pair["against"], pair["against_model"]) == (
        "wins", "fine-tuned, other", "other"
    )  # fmt: skip
    assert pair["difference"] == 0.5
    names = [row["name"] for row in summarise(run)]
    assert names[:2] == ["fine-tuned, m", "logistic regression"]


def test_equal_scores_are_no_difference():
    run = task_run(
        {
            ("fine-tuned", "model", "m"): near(0.7, 1),
            ("fine-tuned", "twin", "m"): near(0.7, 1),
            ("random forest", "baseline", None): near(0.7, 2),
        }
    )
    twin = verdict(run, "pretraining")
    assert (twin["word"], twin["p"], twin["difference"]) == ("no difference seen", 1.0, 0.0)
    assert verdict(run, "baselines")["word"] == "tie"


def test_folds_without_a_score_are_dropped_in_pairs():
    from eval.benchmark.contest.verdicts import summarise

    run = task_run(
        {
            ("fine-tuned", "model", "m"): [0.9, None, 0.8, 0.7, float("nan")],
            ("fine-tuned", "twin", "m"): [0.5, 0.9, None, 0.4, 0.9],
        }
    )
    found = verdict(run, "pretraining")
    assert found["folds"] == 2
    assert found["difference"] == pytest.approx(0.35)
    assert found["word"] == "not tested", "two folds do not tell the spread"
    row = next(r for r in summarise(run) if r["role"] == "model")
    assert row["folds"] == 5
    assert row["scores"]["auroc"]["folds"] == 3
    assert row["scores"]["auroc"]["mean"] == pytest.approx(0.8)
    assert row["seconds"] == 3.0


def test_a_single_fold_has_no_interval():
    from eval.benchmark.contest.verdicts import summarise

    run = task_run({("fine-tuned", "model", "m"): [0.9], ("lr", "baseline", None): [0.1]})
    assert summarise(run)[0]["scores"]["auroc"] == {
        "mean": 0.9, "low": None, "high": None, "folds": 1
    }  # fmt: skip
    found = verdict(run, "baselines")
    assert (found["difference"], found["low"], found["p"]) == (0.8, None, None)
    assert found["word"] == "not tested"


def test_a_score_that_is_never_defined():
    from eval.benchmark.contest.verdicts import summarise

    run = task_run(
        {
            ("fine-tuned", "model", "m"): near(0.7, 1),
            ("broken", "baseline", None): [None] * FOLDS,
            ("lr", "baseline", None): near(0.6, 2),
        }
    )
    assert verdict(run, "baselines")["against"] == "lr"
    assert summarise(run)[-1]["name"] == "broken"


def test_embeddings_without_training_stand_for_a_model_in_integration():
    from eval.benchmark.contest.verdicts import verdicts

    scores = {("fine-tuned", "model", "m"): near(0.9, 1), ("zero-shot", "model", "m"): near(0.4, 2)}
    run = task_run(scores | {("PCA", "baseline", None): near(0.6, 3)}, chance=None)
    found = verdict(run, "baselines", "zero-shot")
    assert (found["word"], found["main"]) == ("loses", True)
    assert not any(v["question"] == "control" for v in verdicts(run, ["m"]))


@pytest.mark.parametrize(
    ("center", "word", "state"),
    [(0.5, "at chance", "held"), (0.7, "above chance", "failed"), (0.3, "below chance", "failed")],
)
def test_controls_have_to_lie_at_chance(center: float, word: str, state: str):
    from eval.benchmark.contest.verdicts import control_state, verdicts

    run = task_run({("shuffled labels", "control", None): near(center, 5)})
    found = verdicts(run, [])
    assert [v["word"] for v in found] == [word]
    assert control_state({"verdicts": found}) == state


def test_chance_may_differ_between_folds():
    """A guess's macro-F1 depends on what is guessed: controls keep the chance of their fold."""
    from eval.benchmark.contest.verdicts import verdicts

    run = task_run({("shuffled labels", "control", None): near(0.3, 5)})
    assert [v["word"] for v in verdicts(run, [])] == ["below chance"]
    for number, outcome in enumerate(run.outcomes):
        outcome.details["chance"] = 0.29 + 0.005 * number
    (found,) = verdicts(run, [])
    scores = [o.scores["auroc"] for o in run.outcomes]
    assert found["difference"] == pytest.approx(np.mean(scores) - 0.3)
    assert found["word"] == "at chance"


def test_a_test_share_has_to_be_one():
    from eval.benchmark.contest.verdicts import summarise

    run = task_run({("fine-tuned", "model", "m"): near(0.5, 1)}, test_share=1.0)
    with pytest.raises(ValueError, match="test_share"):
        summarise(run)


def tasks_with(values: list[float | None], **changes: object) -> list[dict]:
    """Return tasks with one verdict each, of these p."""
    base = {
        "question": "pretraining", "model": "m", "contender": "fine-tuned", "main": True,
        "against": "fine-tuned, m with random weights", "against_model": "m", "folds": 5,
        "difference": 0.1, "low": None, "high": None,
    } | changes  # fmt: skip
    words = [
        "not tested" if p is None else "helps" if p < 0.05 else "no difference seen" for p in values
    ]
    return [{"verdicts": [base | {"p": p, "word": w}]} for p, w in zip(values, words, strict=True)]


def test_holm_over_tasks():
    from statsmodels.stats.multitest import multipletests

    from eval.benchmark.contest.verdicts import count_words, holm

    values = [0.04, 0.001, None, 0.013, 0.9, 0.02]
    tasks = tasks_with(values)
    out = holm(tasks)
    tested = [p for p in values if p is not None]
    expected = multipletests(tested, method="holm")[1]
    found = [v["holm_p"] for t in out for v in t["verdicts"]]
    assert found[2] is None
    assert [p for p in found if p is not None] == pytest.approx(expected)
    words = [v["holm_word"] for t in out for v in t["verdicts"]]
    assert words == ["no difference seen", "helps", "not tested", *["no difference seen"] * 3]
    assert "holm_p" not in tasks[0]["verdicts"][0], "the given ones stay as they are"
    (count,) = count_words(out)
    assert (count["better"], count["worse"], count["neither"], count["not_tested"]) == (1, 0, 4, 1)


def test_questions_are_corrected_each_for_itself():
    from eval.benchmark.contest.verdicts import holm

    first, second = tasks_with([0.03])[0], tasks_with([0.04], question="baselines")[0]
    third = tasks_with([0.02], contender="frozen embedding", main=False)[0]
    renamed = tasks_with([0.01], contender="zero-shot")[0]
    out = holm([{"verdicts": [t["verdicts"][0] for t in (first, second, third)]}, renamed])
    found = [v["holm_p"] for t in out for v in t["verdicts"]]
    assert found == pytest.approx([0.03, 0.04, 0.02, 0.02]), "main contenders are one family"


def test_tasks_with_a_failed_control_do_not_count():
    from eval.benchmark.contest.verdicts import count_words, holm

    tasks = tasks_with([0.001, 0.001])
    tasks[0]["verdicts"] += tasks_with([0.01], question="control", against="chance")[0]["verdicts"]
    tasks[0]["verdicts"][1] |= {"word": "above chance", "contender": "shuffled labels"}
    (count,) = count_words(holm(tasks))
    assert (count["better"], count["control_failed"]) == (1, 1)
