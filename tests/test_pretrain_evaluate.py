"""Held-out scores against a count by hand, on one and two ranks; what is said about the curve."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from pretrain.counting.baselines import BASELINE_NAMES, RANK_BINS, RankBaselines
from tests.ranks import run_ranks
from tests.runs import metrics, require_same_state, run_training, tiny_config
from tests.synthetic import make_shards

BASELINES = BASELINE_NAMES
BASELINE_CELLS = 50


class Hidden(NamedTuple):
    """A hidden gene: padded length, place in its cell, the cell's length, token, all logits."""

    length: int
    rank: int
    cell_length: int
    label: int
    logits: np.ndarray


def scores_of_a_new_model(shards: Path, out: Path) -> dict[str, Any]:
    """Evaluate on this rank; beside the record, every hidden gene of the rank as a row."""
    import torch

    from data_prep.shards.reader import ShardSet
    from pretrain.measure.heldout import HeldoutEvaluation, heldout_line, heldout_record
    from pretrain.model.masked_gene_model import build_model
    from pretrain.ranks import dist

    config = tiny_config(
        shards, out, evaluation__max_cells=1000, evaluation__baseline_cells=BASELINE_CELLS
    )
    ranks = dist.start(60, 1)
    opened = ShardSet(shards)
    evaluation = HeldoutEvaluation(opened, config, ranks)
    model = build_model(config.model, opened.vocabulary, seed=0).train()
    with torch.no_grad():
        # Logits that differ: a new model's are nearly equal.
        model.bert.cls.predictions.bias.normal_(generator=torch.Generator().manual_seed(0))
    result = evaluation.run(model)
    assert model.training
    rows = []
    for _, micro in evaluation._batches():
        length = micro.input_ids.shape[1]
        real = micro.attention_mask
        sizes = [length] * len(micro.input_ids) if real is None else real.sum(dim=1).tolist()
        with torch.no_grad():
            logits = model.eval().bert(micro.input_ids, real).logits.flatten(0, 1).double()
        for place, label in zip(micro.masked_places.tolist(), micro.labels.tolist(), strict=True):
            if label >= 0:
                row, rank = divmod(place, length)
                rows.append(Hidden(length, rank, sizes[row], label, logits[place].numpy()))
    dist.leave()
    return {
        "record": heldout_record(result, evaluation, "a remark"),
        "line": heldout_line(7, 9, result, evaluation),
        "rows": rows,
        "num_tokens": opened.vocabulary.num_tokens,
    }


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """As many cells held out as trained on: enough hidden genes for some to be guessed."""
    return make_shards(tmp_path_factory.mktemp("shards"), heldout=0.5)


@pytest.fixture(scope="module")
def one_rank(shards, tmp_path_factory) -> dict[str, Any]:
    return run_ranks(1, scores_of_a_new_model, shards, tmp_path_factory.mktemp("one"))[0]


def by_hand(rows: list[Hidden], table: np.ndarray | None = None) -> list[dict[str, float]]:
    """Return length, decile, loss and place of each; given a table by rank, of its guesses."""

    scored = []
    for gene in rows:
        guess = gene.logits - np.log(np.exp(gene.logits).sum())
        if table is not None:
            guess = table[gene.rank * RANK_BINS // gene.cell_length]
        own = guess[gene.label]
        scored.append(
            {"length": gene.length, "decile": gene.rank * 10 // gene.cell_length, "loss": -own,
             "place": int((guess > own).sum())}
        )  # fmt: skip
    return scored


def test_scores_are_those_counted_by_hand(one_rank):
    record, scored = one_rank["record"], by_hand(one_rank["rows"])
    assert record["genes"] == len(scored) > 100
    assert record["loss"] == pytest.approx(np.mean([s["loss"] for s in scored]), rel=1e-5)
    assert record["masked_accuracy"] == np.mean([s["place"] == 0 for s in scored])
    assert record["top10"] == np.mean([s["place"] < 10 for s in scored])
    assert 0 < record["masked_accuracy"] < record["top10"] < 0.5
    for length, loss in record["loss_by_bucket"].items():
        mine = [s for s in scored if s["length"] == int(length)]
        assert loss == pytest.approx(np.mean([s["loss"] for s in mine]), rel=1e-5)
        assert record["top10_by_bucket"][length] == np.mean([s["place"] < 10 for s in mine])
    for decile, loss in enumerate(record["loss_by_rank_decile"]):
        mine = [s for s in scored if s["decile"] == decile]
        assert loss == pytest.approx(np.mean([s["loss"] for s in mine]), rel=1e-5)
        first = np.mean([s["place"] == 0 for s in mine])
        assert record["accuracy_by_rank_decile"][decile] == first


@pytest.mark.parametrize("name", ["unigram", "unigram_by_rank", "mean_rank"])
def test_baselines_are_scored_like_the_model(name, one_rank, shards):
    from data_prep.shards.reader import ShardSet

    record = one_rank["record"]
    table = RankBaselines(ShardSet(shards), BASELINE_CELLS).log_probabilities[name]
    scored = by_hand(one_rank["rows"], table)
    assert record[f"baseline_{name}"] == pytest.approx(np.mean([s["loss"] for s in scored]))
    assert record[f"baseline_{name}_accuracy"] == np.mean([s["place"] == 0 for s in scored])
    assert record[f"baseline_{name}_top10"] == np.mean([s["place"] < 10 for s in scored])
    for length, loss in record[f"baseline_{name}_loss_by_bucket"].items():
        mine = [s["loss"] for s in scored if s["length"] == int(length)]
        assert loss == pytest.approx(np.mean(mine))
    for decile, loss in enumerate(record[f"baseline_{name}_loss_by_rank_decile"]):
        mine = [s["loss"] for s in scored if s["decile"] == decile]
        assert loss == pytest.approx(np.mean(mine))


@pytest.mark.parametrize("curve", ["", *(f"baseline_{name}_" for name in BASELINES)])
def test_buckets_weigh_to_the_whole(curve, one_rank):
    record = one_rank["record"]
    whole = record[curve.rstrip("_") or "loss"]
    losses, genes = record[f"{curve}loss_by_bucket"], record["genes_by_bucket"]
    assert len(losses) > 2
    assert losses.keys() == genes.keys()
    weighed = sum(losses[k] * genes[k] for k in losses) / record["genes"]
    assert weighed == pytest.approx(whole, rel=1e-6)


def test_two_ranks_give_the_record_of_one(one_rank, shards, tmp_path):
    results = run_ranks(2, scores_of_a_new_model, shards, tmp_path)
    assert sum(len(r["rows"]) for r in results) == len(one_rank["rows"])
    assert min(len(r["rows"]) for r in results) > 0
    for result in results:
        assert list(flat(result["record"])) == list(flat(one_rank["record"]))
        for (key, got), want in zip(
            flat(result["record"]).items(), flat(one_rank["record"]).values(), strict=True
        ):
            assert got == (want if isinstance(want, str) else pytest.approx(want, rel=1e-6)), key


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Return the leaves of a record by their path."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, part in items for k, v in flat(part, f"{name}/{key}").items()}
    return {name: value}


def test_the_line_has_every_number_with_its_neighbours(one_rank):
    line, record = one_rank["line"], one_rank["record"]
    assert line.startswith("step 7/9  held-out loss ")
    for key in ("loss", *(f"baseline_{n}" for n in BASELINES)):
        assert f"{record[key]:.4f}" in line
    for key in ("masked_accuracy", "top10", *(f"baseline_{n}_top10" for n in BASELINES)):
        assert f"{record[key]:.2%}" in line


def test_tensorboard_and_file_hold_every_number(one_rank, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from pretrain.measure.metrics import RunLog, read_metrics

    log = RunLog(tmp_path, 0)
    record = one_rank["record"] | {"lost": math.nan, "curve": [1.5, None, math.inf]}
    log.write("heldout", 7, record)
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = events.Tags()["scalars"]
    first = min(record["loss_by_bucket"], key=int)
    for tag, value in {
        "heldout/loss": record["loss"],
        "heldout/top10": record["top10"],
        "heldout/baseline_mean_rank_top10": record["baseline_mean_rank_top10"],
        f"heldout/loss_by_bucket/{int(first):04d}": record["loss_by_bucket"][first],
        "heldout/loss_by_rank_decile/1": record["loss_by_rank_decile"][0],
        "heldout/loss_by_rank_decile/10": record["loss_by_rank_decile"][9],
        "heldout/curve/1": 1.5,
    }.items():
        (event,) = events.Scalars(tag)
        assert event.step == 7
        assert event.value == pytest.approx(value, rel=1e-6)
    assert not {"heldout/lost", "heldout/curve/2", "heldout/curve/3", "heldout/remark"} & set(tags)
    (written,) = read_metrics(tmp_path)
    assert written["curve"] == [1.5, None, None]
    assert written["remark"] == "a remark"
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


BARS = {"unigram": 7.0, "mean_rank": 6.5, "unigram_by_rank": 6.0}


def remarks_of(
    losses: list[float], total_steps: int = 100, bars: dict[str, float] = BARS
) -> dict[int, tuple[int, str]]:
    """Return the remarks of a run that evaluates every 10 steps, by step."""

    from pretrain.measure.loss_curve import curve_remark

    history = [(10 * (i + 1), loss) for i, loss in enumerate(losses)]
    found = {history[i][0]: curve_remark(history[: i + 1], bars, total_steps, 0.25)
             for i in range(len(history))}  # fmt: skip
    return {step: remark for step, remark in found.items() if remark}


def test_the_first_loss_below_all_baselines_is_said_once():
    remarks = remarks_of([6.8, 6.2, 5.9, 5.8, 5.7])
    assert remarks.keys() == {30}
    level, text = remarks[30]
    assert level == logging.INFO
    for part in ("step 30", "5.9000", "unigram_by_rank, 6.0000", "by 0.1000"):
        assert part in text


def test_a_loss_that_stays_above_is_warned_about_once():
    """30 is the first evaluation after a quarter of 100 steps; equal is not below."""
    remarks = remarks_of([6.8, 6.2, 6.1, 6.05, 6.0])
    assert remarks.keys() == {30}
    level, text = remarks[30]
    assert level == logging.WARNING
    for part in ("30%", "6.1000", "unigram_by_rank, 6.0000", "optim.warmup_steps"):
        assert part in text
    late = remarks_of([6.8, 6.2, 6.1, 5.9], total_steps=100)
    assert [level for level, _ in late.values()] == [logging.WARNING, logging.INFO]
    assert remarks_of([6.8, 6.2, 6.1], total_steps=1000) == {}


def test_rising_above_the_baselines_again_is_warned_about_each_time():
    remarks = remarks_of([5.99, 6.01, 6.02, 5.98, 6.05])
    assert remarks.keys() == {10, 20, 50}
    assert [remarks[s][0] for s in (20, 50)] == [logging.WARNING] * 2
    assert "risen to 6.0500, above the best baseline (unigram_by_rank, 6.0000)" in remarks[50][1]


def test_the_bar_is_the_arithmetic_line_where_there_is_one():
    """Below all guesses by rank is not below counting."""
    bars = BARS | {"no_repeat": 5.0, "arithmetic": 4.0}
    remarks = remarks_of([6.8, 5.9, 4.5, 3.75, 4.01], bars=bars)
    assert remarks.keys() == {30, 40, 50}
    assert remarks[30][0] == logging.WARNING
    assert "4.5000 has not been below counting (arithmetic, 4.0000)" in remarks[30][1]
    assert "learned less than counting" in remarks[30][1]
    level, text = remarks[40]
    assert level == logging.INFO
    for part in ("below counting (arithmetic, 4.0000) for the first time", "by 0.2500", "medians"):
        assert part in text
    assert "above counting (arithmetic, 4.0000) again" in remarks[50][1]


def test_divergence_is_warned_about_when_it_begins():
    """2 % above the lowest, not the last; 5.09 is within."""
    remarks = remarks_of([5.5, 5.0, 5.09, 5.11, 5.2, 5.05, 5.3])
    assert remarks.keys() == {10, 40, 70}
    level, text = remarks[40]
    assert level == logging.WARNING
    assert "2.2% above its lowest (5.0000 in step 20)" in text
    both = remarks_of([5.0, 6.5])[20][1]
    assert "risen to 6.5000" in both
    assert "30.0% above" in both


def test_a_lost_number_is_a_loss_above_everything():
    remarks = remarks_of([5.5, math.nan, 5.4])
    assert remarks.keys() == {10, 20}
    assert "risen" in remarks[20][1]
    assert "above its lowest (5.5000 in step 10)" in remarks[20][1]
    assert remarks_of([math.nan, math.nan, math.nan]).keys() == {30}


def test_a_resumed_run_repeats_no_remark(tmp_path):
    from pretrain.measure.loss_curve import curve_remark, heldout_history
    from pretrain.measure.metrics import RunLog, read_metrics

    log = RunLog(tmp_path, 0)
    for step, loss in ((10, 6.5), (20, math.nan), (30, 5.9), (40, 5.8)):
        log.write("heldout", step, {"loss": loss})
        log.write("train", step, {"loss": 1.0})
    log.close()
    RunLog(tmp_path, 30).close()
    history = heldout_history(read_metrics(tmp_path))
    assert history == [(10, 6.5), (20, math.inf), (30, 5.9)]
    assert curve_remark([*history, (40, 5.8)], BARS, 100, 0.25) is None


def test_an_evaluation_at_the_start_changes_nothing(shards, one_rank, tmp_path):
    """It is of the first weights; a run that goes on has none."""
    changes = {"run__max_steps": 2, "evaluation__max_cells": 1000, "optim__warmup_steps": 1}
    at_start = {"evaluation__at_start": True}
    plain = tiny_config(shards, tmp_path / "plain", **changes)
    looked = tiny_config(shards, tmp_path / "looked", **changes | at_start)
    losses = [run_ranks(1, run_training, config)[0][0].losses for config in (plain, looked)]
    assert losses[0] == losses[1]
    require_same_state(plain.run.out, looked.run.out)
    before, after = metrics(looked.run.out, "heldout")
    assert (before["step"], after["step"]) == (0, 2)
    assert after["loss"] == metrics(plain.run.out, "heldout")[0]["loss"]
    assert abs(before["loss"] - math.log(one_rank["num_tokens"])) < 0.05, "a new model knows none"
    run_ranks(1, run_training, looked, True)
    assert [m["step"] for m in metrics(looked.run.out, "heldout")] == [0, 2]
