"""Held-out loss at fixed masks, beside what can be guessed from the rank alone."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from data_prep.shards import ShardSet
from pretrain import dist
from pretrain.baselines import BASELINE_NAMES, RankBaselines
from pretrain.config import MaskingConfig, RunConfig
from pretrain.data import MicroBatch, StepDataset
from pretrain.dist import Ranks
from pretrain.masking import NO_LABEL
from pretrain.metrics import RunLog

logger = logging.getLogger(__name__)

TOP_GUESSES = 10
RANK_DECILES = 10
# Evaluation always hides 15 % with one seed, whatever the run trains with: curves stay comparable.
# All of them become <mask>: under 80/10/10 a tenth of the answers can be copied from the input.
# That was worth 0.75 nats to a 6-layer model, and no baseline blind to the cell can do it.
EVALUATION_MASKING = MaskingConfig(mask_share=1.0, random_share=0.0)
EVALUATION_SEED = 0
# Not the run's budget: it would change which cells the first N of the plan are.
EVALUATION_TOKENS = 16_384
_SCORES = ("loss", "accuracy", "top10")
# A held-out loss this far above the lowest one is no noise: cells and masks are always the same.
_TOLERANCE = 0.02


class HeldoutEvaluation:
    """The same held-out cells and masks each time; the baselines are computed once.

    Every rank evaluates its share of every batch.
    """

    def __init__(self, shards: ShardSet, config: RunConfig, ranks: Ranks) -> None:
        self._ranks = ranks
        quarantine = config.data.on_damage == "quarantine"
        self._dataset = StepDataset(
            shards,
            "heldout",
            EVALUATION_SEED,
            max(EVALUATION_TOKENS, shards.bucket_lengths("heldout")[-1]),
            config.batch.tokens_per_micro_batch,
            EVALUATION_MASKING,
            ranks.rank,
            ranks.world_size,
            quarantine=quarantine,
        )
        plan, cells, steps = self._dataset.plan, 0, 0
        while cells < min(config.evaluation.max_cells, plan.num_cells):
            cells += plan.step(steps).num_cells
            steps += 1
        self._num_steps, self.num_cells = steps, cells
        self._lengths = shards.bucket_lengths("heldout")
        self.expect_below_baseline_by = config.evaluation.expect_below_baseline_by
        self.baselines = self._score_baselines(
            RankBaselines(shards, config.evaluation.baseline_cells, quarantine)
        )
        if next(iter(self.baselines.values()))["genes"] == 0:
            raise ValueError(f"{shards.name}: no held-out cell can be read; copy the shards again")

    def _batches(self) -> Iterator[tuple[int, MicroBatch]]:
        """Yield (number of the bucket, micro-batch of this rank)."""
        for step in range(self._num_steps):
            for micro in self._dataset[step].micro_batches:
                yield self._lengths.index(micro.input_ids.shape[1]), micro

    def _no_sums(self) -> np.ndarray:
        """Return zeros [buckets, deciles, hidden genes and scores]."""
        return np.zeros((len(self._lengths), RANK_DECILES, 1 + len(_SCORES)))

    def _score_baselines(self, baselines: RankBaselines) -> dict[str, dict[str, Any]]:
        sums = {name: self._no_sums() for name in baselines.log_probabilities}
        for bucket, micro in self._batches():
            hidden = micro.labels.numpy() != NO_LABEL
            labels, ranks = micro.labels.numpy()[hidden], micro.relative_ranks.numpy()[hidden]
            losses, places = baselines.losses(labels, ranks), baselines.places(labels, ranks)
            for name, total in sums.items():
                total[bucket] += _by_decile(losses[name], places[name], ranks)
        return {name: self._result(total) for name, total in sums.items()}

    def run(
        self, model: torch.nn.Module, on_batch: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        """Return the scores of a model; its mode is restored. `on_batch`: called after each.

        ``loss`` (nats), ``accuracy`` (top-1) and ``top10`` are means over all hidden genes of all
        ranks; each also with ``_by_rank_decile`` (a list, None where no gene is hidden) and
        ``_by_bucket`` (by padded length, as text); so has ``genes``, how many are hidden.
        """
        was_training = model.training
        model.eval()
        sums = self._no_sums()
        with torch.no_grad():
            for bucket, micro in self._batches():
                losses, places = model(*to_device(micro, self._ranks.device))
                hidden = micro.labels.numpy() != NO_LABEL
                ranks = micro.relative_ranks.numpy()[hidden]
                scores = losses.cpu().numpy()[hidden], places.cpu().numpy()[hidden]
                sums[bucket] += _by_decile(*scores, ranks)
                on_batch()
        model.train(was_training)
        return self._result(sums)

    def _result(self, sums: np.ndarray) -> dict[str, Any]:
        """Return the means over all ranks of the sums of this one."""
        flat = dist.sum_over_ranks(sums.ravel().tolist(), self._ranks.device)
        total = np.array(flat).reshape(sums.shape)
        overall = _scores(total.sum(axis=(0, 1)))
        by_decile = [_scores(row) for row in total.sum(axis=0)]
        rows = zip(map(str, self._lengths), total.sum(axis=1), strict=True)
        by_bucket = {length: _scores(row) for length, row in rows if row[0]}
        result: dict[str, Any] = dict(overall)
        for name in overall:
            result[f"{name}_by_rank_decile"] = [scores[name] for scores in by_decile]
            result[f"{name}_by_bucket"] = {k: scores[name] for k, scores in by_bucket.items()}
        return result


def to_device(micro: MicroBatch, device: torch.device) -> tuple:
    """Return the arguments of the model's forward, on a device."""
    mask = micro.attention_mask
    return (
        micro.input_ids.to(device, non_blocking=True),
        None if mask is None else mask.to(device, non_blocking=True),
        micro.masked_places.to(device, non_blocking=True),
        micro.labels.to(device, non_blocking=True),
    )


def _by_decile(losses: np.ndarray, places: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Return [deciles, hidden genes and scores], sums over hidden genes."""
    decile = np.minimum((ranks * RANK_DECILES).astype(np.int64), RANK_DECILES - 1)
    columns = (np.ones(len(ranks)), losses, places == 0, places < TOP_GUESSES)
    return np.stack([np.bincount(decile, w, RANK_DECILES) for w in columns], axis=1)


def _scores(sums: np.ndarray) -> dict[str, Any]:
    """Return the number of hidden genes and the mean scores of a row of sums; None without any."""
    count = int(sums[0])
    means = [float(value) / count if count else None for value in sums[1:]]
    return {"genes": count, **dict(zip(_SCORES, means, strict=True))}


class NothingHeldOut:
    """Stands for the evaluation where no cell is held out."""

    def run(self, *_: object) -> dict[str, Any]:
        return {}


Heldout = HeldoutEvaluation | NothingHeldOut


def heldout_evaluation(shards: ShardSet, config: RunConfig, ranks: Ranks) -> Heldout:
    """Return the evaluation of held-out cells; where there are none that is said, once."""
    if shards.extents("heldout"):
        return HeldoutEvaluation(shards, config, ranks)
    if ranks.is_first:
        logger.warning(
            "%s: no cell is held out (prepared with --heldout 0): nothing is evaluated, and no "
            "score says what is learnt", shards.name,
        )  # fmt: skip
    return NothingHeldOut()


def heldout_record(
    result: dict[str, Any], evaluation: HeldoutEvaluation, remark: str | None = None
) -> dict[str, Any]:
    """Return what is kept of an evaluation: the model's scores, each baseline's beside them.

    ``masked_accuracy`` is top-1. A baseline's scores are ``baseline_NAME`` (loss),
    ``baseline_NAME_accuracy``, ``baseline_NAME_top10``; of its curves only the losses are kept.
    """
    curves = [f"{score}_by_{what}" for score in _SCORES for what in ("rank_decile", "bucket")]
    record = {"loss": result["loss"], "masked_accuracy": result["accuracy"]}
    record |= {name: result[name] for name in ("top10", *curves)}
    for name, baseline in evaluation.baselines.items():
        record[f"baseline_{name}"] = baseline["loss"]
        for part in ("accuracy", "top10", "loss_by_rank_decile", "loss_by_bucket"):
            record[f"baseline_{name}_{part}"] = baseline[part]
    record |= {name: result[name] for name in ("genes", "genes_by_bucket")}
    record["cells"] = evaluation.num_cells
    return record | ({"remark": remark} if remark else {})


def score_rows(record: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return (name, loss, top-1, top-10) of the model and each baseline, for a table.

    "-": not recorded, as top-10 in older runs, or lost.
    """
    keys = [("this model", "loss", "masked_accuracy", "top10")]
    for name in BASELINE_NAMES:
        key = f"baseline_{name}"
        keys.append((name.replace("_", " "), key, f"{key}_accuracy", f"{key}_top10"))
    return [
        (
            name,
            format_score(record.get(loss), ".4f"),
            *(format_score(record.get(k), ".2%") for k in shares),
        )
        for name, loss, *shares in keys
    ]


def format_score(value: float | None, how: str) -> str:
    """Return a number as text; "-" for one that is not known."""
    return "-" if value is None else format(value, how)


def heldout_line(
    step: int, steps: int, result: dict[str, Any], evaluation: HeldoutEvaluation
) -> str:
    """Return one line for people: loss, top-1 and top-10, the baselines' in the same order."""
    beside = "  ".join(
        f"{name} {b['loss']:.4f} / {b['accuracy']:.2%} / {b['top10']:.2%}"
        for name, b in evaluation.baselines.items()
    )
    return (
        f"step {step}/{steps}  held-out loss {result['loss']:.4f}  top-1 {result['accuracy']:.2%}  "
        f"top-10 {result['top10']:.2%}  ({evaluation.num_cells} cells; baselines: {beside})"
    )


def heldout_history(records: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """Return (step, loss) of the evaluations among a run's records; a lost number is infinite."""
    heldout = (m for m in records if m["kind"] == "heldout")
    return [(m["step"], math.inf if m["loss"] is None else m["loss"]) for m in heldout]


def log_heldout(
    log: RunLog,
    history: list[tuple[int, float]],
    step: int,
    steps: int,
    result: dict[str, Any],
    evaluation: Heldout,
) -> None:
    """Say and record an evaluation, with a remark if the curve calls for one.

    Parameters
    ----------
    history
        (step, loss) of the evaluations before; this one is appended.
    """
    if isinstance(evaluation, NothingHeldOut):
        return
    history.append((step, result["loss"]))
    bars = {name: b["loss"] for name, b in evaluation.baselines.items()}
    remark = curve_remark(history, bars, steps, evaluation.expect_below_baseline_by)
    log.write("heldout", step, heldout_record(result, evaluation, remark[1] if remark else None))
    logger.info("%s", heldout_line(step, steps, result, evaluation))
    if remark:
        logger.log(*remark)


def curve_remark(
    history: list[tuple[int, float]],
    baselines: dict[str, float],
    total_steps: int,
    expected_by: float,
) -> tuple[int, str] | None:
    """Return (level of logging, text) if the last evaluation begins something; else None.

    What goes on is not repeated, so the remark is a function of the curve alone and a resumed run
    makes the same ones.

    Parameters
    ----------
    history
        (step, held-out loss) of all evaluations, in order; at least one.
    baselines
        Held-out losses to be beaten.
    expected_by
        Share of `total_steps` after which a loss that was never below them is warned about.
    """
    step = history[-1][0]
    losses = [loss if math.isfinite(loss) else math.inf for _, loss in history]
    name, bar = min(baselines.items(), key=lambda item: item[1])
    best = f"the best baseline ({name}, {bar:.4f})"
    is_below = [loss < bar for loss in losses]
    if is_below[-1] and not any(is_below[:-1]):
        return logging.INFO, (
            f"step {step}: held-out loss {losses[-1]:.4f} is below {best} for the first time, by "
            f"{bar - losses[-1]:.4f}; from here on the model uses more than a gene's own rank"
        )
    warnings = []
    is_due = [at >= expected_by * total_steps for at, _ in history]
    if not any(is_below) and is_due[-1] and not any(is_due[:-1]):
        warnings.append(
            f"after {step / total_steps:.0%} of the steps the held-out loss {losses[-1]:.4f} has "
            f"not been below {best}: the model knows no more than each gene's rank. Look at "
            "optim.learning_rate, optim.warmup_steps and the number of training cells"
        )
    if not is_below[-1] and any(is_below[-2:]):
        warnings.append(f"the held-out loss has risen to {losses[-1]:.4f}, above {best} again")
    if _is_diverging(losses) and not _is_diverging(losses[:-1]):
        lowest = min(range(len(losses)), key=losses.__getitem__)
        warnings.append(
            f"the held-out loss {losses[-1]:.4f} is {losses[-1] / losses[lowest] - 1:.1%} above "
            f"its lowest ({losses[lowest]:.4f} in step {history[lowest][0]}): the run diverges or "
            "overfits"
        )
    return (logging.WARNING, f"step {step}: " + "; ".join(warnings)) if warnings else None


def _is_diverging(losses: list[float]) -> bool:
    return len(losses) > 0 and losses[-1] > min(losses) * (1 + _TOLERANCE)
