"""What a benchmark found, as sentences and one row a task: for the page and the console."""

from __future__ import annotations

from typing import Any

from eval.benchmark.contest.verdicts import control_state, count_words, state_of

SYMBOLS = {"better": "▲", "worse": "▼", "neither": "=", "not_tested": "?"}
# Contenders of a model that have a place in the overview, beside its main one.
FROZEN = "frozen embedding"
_SCORE_LABELS = {
    "auroc": "AUROC", "auprc": "AUPRC", "auroc_occurrence": "AUROC of occurrences",
    "macro_f1": "macro-F1", "ece": "calibration error", "ari": "ARI", "nmi": "NMI",
    "ilisi": "iLISI", "kbet": "kBET", "avg_bio": "AvgBIO", "l2": "L2",
}  # fmt: skip


def score_label(score: str) -> str:
    """Return a score's name for readers."""
    return _SCORE_LABELS.get(score, score.replace("_", " "))


def format_mean(score: dict[str, Any] | None) -> str:
    """Return ``0.914 ± 0.021`` (95 % half-width), without it for one fold, "-" for no value."""
    if score is None or score["mean"] is None:
        return "-"
    if score["high"] is None:
        return f"{score['mean']:.3f}"
    return f"{score['mean']:.3f} ± {score['high'] - score['mean']:.3f}"


def format_difference(verdict: dict[str, Any]) -> str:
    """Return ``+0.052 (+0.010 to +0.094)``: the difference and its 95 % interval."""
    if verdict["difference"] is None:
        return "-"
    if verdict["low"] is None:
        return f"{verdict['difference']:+.3f}"
    return f"{verdict['difference']:+.3f} ({verdict['low']:+.3f} to {verdict['high']:+.3f})"


def format_p(p: float | None) -> str:
    """Return ``p = 0.03``, or ``p < 0.001``."""
    if p is None:
        return "p unknown"
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def overview_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row for each task and model, in the order of the tasks.

    Each has ``task`` (the task itself), ``model`` (its name), ``score`` (label of the headline),
    ``main``, ``frozen``, ``twin`` and ``baseline`` (rows of the task's summary, or None), the
    verdicts ``pretraining``, ``frozen_pretraining`` and ``baselines`` (or None), and ``control``
    (see `compare.control_state`).
    """
    rows = []
    for task in results["tasks"]:
        summary = {(r["contender"], r["role"], r["model"]): r for r in task["summary"]}
        baseline = next((r for r in task["summary"] if r["role"] == "baseline"), None)
        for model in (m["name"] for m in results["models"]):
            main = main_of(task, model)
            rows.append(
                {
                    "task": task, "model": model, "score": score_label(task["headline"]),
                    "main": summary.get((main, "model", model)),
                    "frozen": summary.get((FROZEN, "model", model)),
                    "twin": summary.get((main, "twin", model)),
                    "baseline": baseline,
                    "pretraining": verdict_of(task, "pretraining", model, main),
                    "frozen_pretraining": verdict_of(task, "pretraining", model, FROZEN),
                    "baselines": verdict_of(task, "baselines", model, main),
                    "control": control_state(task),
                }
            )  # fmt: skip
    return rows


def main_of(task: dict[str, Any], model: str) -> str | None:
    """Return the contender that stands for a model in the task's verdicts, if there is one."""
    names = [v["contender"] for v in task["verdicts"] if v["main"] and v["model"] == model]
    return names[0] if names else None


def verdict_of(
    task: dict[str, Any], question: str, model: str, contender: str | None
) -> dict[str, Any] | None:
    """Return the task's verdict on one contender of a model, if there is one."""
    wanted = (question, model, contender)
    found = (v for v in task["verdicts"] if (v["question"], v["model"], v["contender"]) == wanted)
    return next(found, None)


def conclusions(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what the counts say: one sentence for each question about main contenders.

    Each has ``question``, ``model``, ``sentence``, the counts of `compare.count_words`, and
    ``others``: the same of the model's other contenders (pretraining only), a text each.
    """
    found, others = [], []
    for count in count_words(results["tasks"]):
        tested = count["better"] + count["worse"] + count["neither"]
        if not count["main"]:
            if tested:
                others.append((count["model"], _other(count, tested)))
            continue
        sentence = _SENTENCES[count["question"]](count, tested) if tested else _untested(count)
        found.append(count | {"sentence": sentence, "tested": tested, "others": []})
    for conclusion in found:
        if conclusion["question"] == "pretraining":
            conclusion["others"] = [text for m, text in others if m == conclusion["model"]]
    return found


def positive_controls(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what each positive control says: ``name``, ``held``, and ``sentence``.

    It holds if its model, which is pretrained on a world that pretraining can learn, is better than
    the same with random weights, and better than the best baseline. There is one of each in a
    suite, so that no p is corrected. Results from before there were any have none.
    """
    found = []
    for task in results.get("positive_controls", []):
        (model,) = {v["model"] for v in task["verdicts"] if v["main"]}
        main = main_of(task, model)
        asked = [verdict_of(task, q, model, main) for q in ("pretraining", "baselines")]
        states = [state_of(v, "word") if v else "not_tested" for v in asked]
        rows = {(r["contender"], r["role"]): r for r in task["summary"]}
        best = next(r for r in task["summary"] if r["role"] == "baseline")
        own, twin = rows[main, "model"], rows[main, "twin"]
        shown = [f"{r['scores'][task['headline']]['mean']:.3f}" for r in (own, twin, best)]
        held = states == ["better", "better"]
        sentence = (
            f"{'held' if held else 'FAILED'}: in simulated cells a model that is pretrained on "
            f"them has {score_label(task['headline'])} {shown[0]}; random weights {shown[1]}, "
            f"{best['name']} {shown[2]}. "
        )
        if held:
            sentence += "So this suite sees it where pretraining pays."
        else:
            sentence += (
                "So where this suite sees no difference, or no win, that says nothing: the "
                "instrument may be at fault."
            )
        found.append({"name": task["name"], "held": held, "sentence": sentence})
    return found


def _pretraining(count: dict[str, Any], tested: int) -> str:
    if not count["better"] and not count["worse"]:
        return f"No difference from pretraining was seen in {_tasks(tested)}."
    return (
        f"Pretraining helped in {count['better']} of {_tasks(tested)}, hurt in {count['worse']}; "
        f"no difference was seen in {count['neither']}."
    )


def _other(count: dict[str, Any], tested: int) -> str:
    return (
        f"{count['contender']}: helped in {count['better']} of {_tasks(tested)}, "
        f"hurt in {count['worse']}"
    )


def _against(count: dict[str, Any], tested: int) -> str:
    other = count["against_model"] if count["question"] == "models" else "the best baseline"
    return (
        f"Against {other} it won {count['better']} of {_tasks(tested)}, "
        f"lost {count['worse']} and tied {count['neither']}."
    )


_SENTENCES = {"pretraining": _pretraining, "baselines": _against, "models": _against}


def _untested(count: dict[str, Any]) -> str:
    what = {
        "pretraining": "Whether pretraining helped",
        "baselines": "How it does against baselines",
    }
    return f"{what.get(count['question'], 'How it does against the other model')} was not tested."


def _tasks(count: int) -> str:
    return f"{count} task{'' if count == 1 else 's'}"
