"""Held-out loss at fixed masks, beside what can be guessed by counting alone."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data_prep.shards import ShardSet
from pretrain import dist
from pretrain.arithmetic import Arithmetic, MaskedRows, arithmetic_tables, describe
from pretrain.baselines import ARITHMETIC, BASELINE_NAMES, Baselines, RankBaselines
from pretrain.config import RunConfig
from pretrain.data import MicroBatch, StepDataset
from pretrain.dist import Ranks
from pretrain.masking import EVALUATION_MASKING, NO_LABEL
from pretrain.metrics import RunLog
from pretrain.record import is_run_folder

logger = logging.getLogger(__name__)

TOP_GUESSES = 10
RANK_DECILES = 10
EVALUATION_SEED = 0
# Not the run's budget: it would change which cells the first N of the plan are.
EVALUATION_TOKENS = 16_384
_SCORES = ("loss", "accuracy", "top10")
BEYOND = f"beyond_{ARITHMETIC}"
_CURVES = ("rank_decile", "bucket", "dataset")
# A line for each of the data sets with the most hidden genes, and one for all others together.
MOST_DATASETS = 50
OTHER_DATASETS = "all other data sets"
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
        self._datasets = CellDatasets(shards)
        self.without_arithmetic = ""
        self.baselines = self._score_baselines(self._count(shards, config, quarantine))
        if next(iter(self.baselines.values()))["genes"] == 0:
            raise ValueError(f"{shards.name}: no held-out cell can be read; copy the shards again")

    def _count(self, shards: ShardSet, config: RunConfig, quarantine: bool) -> Baselines:
        """Return the baselines; say which one the vocabulary does not allow."""
        cells, out = config.evaluation.baseline_cells, config.run.out
        by_rank = RankBaselines(shards, cells, quarantine)
        if not shards.vocabulary.has_medians:
            self.without_arithmetic = (
                "the vocabulary has no medians (all are the same number): there is no arithmetic "
                "baseline, and what a model learns beyond counting is not known"
            )
            logger.warning("%s: %s", shards.name, self.without_arithmetic)
            return Baselines(by_rank, None)
        # A new run's folder has to stay empty until nothing can be refused any more.
        fallback = out if is_run_folder(out) else None
        tables = dist.first_rank_first(
            self._ranks, lambda: arithmetic_tables(shards, cells, quarantine, fallback)
        )
        logger.info("%s", describe(tables))
        return Baselines(by_rank, Arithmetic(tables, shards.vocabulary))

    def _batches(self) -> Iterator[tuple[int, MicroBatch]]:
        """Yield (number of the bucket, micro-batch of this rank)."""
        for step in range(self._num_steps):
            for micro in self._dataset[step].micro_batches:
                yield self._lengths.index(micro.input_ids.shape[1]), micro

    def _no_sums(self) -> _Sums:
        return _Sums(len(self._lengths), len(self._datasets.names))

    def _score_baselines(self, baselines: Baselines) -> dict[str, dict[str, Any]]:
        sums = {name: self._no_sums() for name in baselines.names}
        for bucket, micro in self._batches():
            hidden = _Hidden.of(micro, self._datasets)
            scores = baselines.scores(_masked_rows(micro, hidden.labels), hidden.ranks)
            for name, total in sums.items():
                total.add(bucket, hidden, *scores[name])
        return {name: self._result(total) for name, total in sums.items()}

    def run(
        self, model: torch.nn.Module, on_batch: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        """Return the scores of a model; its mode is restored. `on_batch`: called after each.

        ``loss`` (nats), ``accuracy`` (top-1) and ``top10`` are means over all hidden genes of all
        ranks; each also with ``_by_rank_decile`` (a list, None where no gene is hidden),
        ``_by_bucket`` (by padded length, as text) and ``_by_dataset`` (by name); so has ``genes``,
        how many are hidden.
        """
        was_training = model.training
        model.eval()
        sums = self._no_sums()
        with torch.no_grad():
            for bucket, micro in self._batches():
                losses, places = model(*to_device(micro, self._ranks.device))
                hidden = _Hidden.of(micro, self._datasets)
                scores = (t.cpu().numpy()[hidden.is_real] for t in (losses, places))
                sums.add(bucket, hidden, *scores)
                on_batch()
        model.train(was_training)
        return self._result(sums)

    def _result(self, sums: _Sums) -> dict[str, Any]:
        """Return the means over all ranks of the sums of this one."""
        total = sums.over_ranks(self._ranks)
        overall = _scores(total.cells.sum(axis=(0, 1)))
        by_decile = [_scores(row) for row in total.cells.sum(axis=0)]
        rows = zip(map(str, self._lengths), total.cells.sum(axis=1), strict=True)
        by_bucket = {length: _scores(row) for length, row in rows if row[0]}
        by_dataset = {k: _scores(row) for k, row in total.by_dataset(self._datasets.names).items()}
        result: dict[str, Any] = dict(overall)
        for name in overall:
            result[f"{name}_by_rank_decile"] = [scores[name] for scores in by_decile]
            result[f"{name}_by_bucket"] = {k: scores[name] for k, scores in by_bucket.items()}
            result[f"{name}_by_dataset"] = {k: scores[name] for k, scores in by_dataset.items()}
        return result


class CellDatasets:
    """Which data set each held-out cell belongs to; its blocks are read when first asked for."""

    def __init__(self, shards: ShardSet) -> None:
        self._shards = shards
        # Format 1 of the shards lists sources only.
        listed = shards.manifest.get("datasets") or shards.manifest["sources"]
        self.names = [*dict.fromkeys(str(d["name"]) for d in listed), OTHER_DATASETS]
        self._number_of = {name: i for i, name in enumerate(self.names)}
        self._first_cells = np.asarray(shards.index["first_cell"])
        self._blocks: dict[int, np.ndarray] = {}

    def of(self, cells: np.ndarray) -> np.ndarray:
        """Return int64 [cells], numbers of their data sets in `names`."""
        numbers = np.searchsorted(self._first_cells, cells, side="right") - 1
        found = np.empty(len(cells), np.int64)
        for number in np.unique(numbers).tolist():
            if number not in self._blocks:
                column = self._shards.read_block(number).batch.column("dataset").to_pylist()
                other = len(self.names) - 1
                block = [self._number_of.get(name, other) for name in column]
                self._blocks[number] = np.array(block, np.int32)
            mine = numbers == number
            found[mine] = self._blocks[number][cells[mine] - self._first_cells[number]]
        return found


@dataclass(frozen=True)
class _Hidden:
    """The hidden genes of a micro-batch: labels, relative ranks, numbers of data sets, all [H].

    `is_real` bool [M]: which places of the micro-batch they are at.
    """

    is_real: np.ndarray
    labels: np.ndarray
    ranks: np.ndarray
    datasets: np.ndarray

    @staticmethod
    def of(micro: MicroBatch, datasets: CellDatasets) -> _Hidden:
        is_real = micro.labels.numpy() != NO_LABEL
        rows = micro.masked_places.numpy()[is_real] // micro.input_ids.shape[1]
        labels, ranks = micro.labels.numpy()[is_real], micro.relative_ranks.numpy()[is_real]
        return _Hidden(is_real, labels, ranks, datasets.of(micro.cells[rows]))


def _masked_rows(micro: MicroBatch, labels: np.ndarray) -> MaskedRows:
    inputs, real = micro.input_ids.numpy(), micro.attention_mask
    lengths = np.full(len(inputs), inputs.shape[1]) if real is None else real.numpy().sum(axis=1)
    return MaskedRows(inputs, lengths.astype(np.int64), labels)


class _Sums:
    """Sums over hidden genes: how many, and their scores.

    ``cells`` float64 [buckets, deciles, 1 + scores], ``datasets`` float64 [data sets, 1 + scores].
    """

    def __init__(self, num_buckets: int, num_datasets: int) -> None:
        self.cells = np.zeros((num_buckets, RANK_DECILES, 1 + len(_SCORES)))
        self.datasets = np.zeros((num_datasets, 1 + len(_SCORES)))

    def add(self, bucket: int, hidden: _Hidden, losses: np.ndarray, places: np.ndarray) -> None:
        decile = np.minimum((hidden.ranks * RANK_DECILES).astype(np.int64), RANK_DECILES - 1)
        columns = (np.ones(len(losses)), losses, places == 0, places < TOP_GUESSES)
        for number, column in enumerate(columns):
            self.cells[bucket, :, number] += np.bincount(decile, column, RANK_DECILES)
            self.datasets[:, number] += np.bincount(hidden.datasets, column, len(self.datasets))

    def over_ranks(self, ranks: Ranks) -> _Sums:
        """Return the sums of all ranks."""
        flat = np.concatenate([self.cells.ravel(), self.datasets.ravel()])
        summed = np.array(dist.sum_over_ranks(flat.tolist(), ranks.device))
        total = _Sums(len(self.cells), len(self.datasets))
        total.cells[:] = summed[: self.cells.size].reshape(self.cells.shape)
        total.datasets[:] = summed[self.cells.size :].reshape(self.datasets.shape)
        return total

    def by_dataset(self, names: list[str]) -> dict[str, np.ndarray]:
        """Return the rows of the data sets with the most hidden genes, and the rest in one."""
        found = dict(zip(names, self.datasets, strict=True))
        other = found.pop(OTHER_DATASETS).copy()
        ordered = sorted(found, key=lambda name: -found[name][0])
        kept = {name for name in ordered[:MOST_DATASETS] if found[name][0]}
        for name in ordered[MOST_DATASETS:]:
            other += found[name]
        rows = {name: row for name, row in found.items() if name in kept}
        return rows | ({OTHER_DATASETS: other} if other[0] else {})


def to_device(micro: MicroBatch, device: torch.device) -> tuple:
    """Return the arguments of the model's forward, on a device."""
    mask = micro.attention_mask
    return (
        micro.input_ids.to(device, non_blocking=True),
        None if mask is None else mask.to(device, non_blocking=True),
        micro.masked_places.to(device, non_blocking=True),
        micro.labels.to(device, non_blocking=True),
    )


def _scores(sums: np.ndarray) -> dict[str, Any]:
    """Return the number of hidden genes and the mean scores of a row of sums; None without any."""
    count = int(sums[0])
    means = [float(value) / count if count else None for value in sums[1:]]
    return {"genes": count, **dict(zip(_SCORES, means, strict=True))}


def heldout_record(
    result: dict[str, Any], evaluation: HeldoutEvaluation, remark: str | None = None
) -> dict[str, Any]:
    """Return what is kept of an evaluation: the model's scores, each baseline's beside them.

    ``masked_accuracy`` is top-1. A baseline's scores are ``baseline_NAME`` (loss),
    ``baseline_NAME_accuracy``, ``baseline_NAME_top10``; of its curves only the losses are kept.
    ``beyond_arithmetic``, with the same curves: loss of that baseline - loss of the model.
    """
    curves = [f"{score}_by_{what}" for score in _SCORES for what in _CURVES]
    record = {"loss": result["loss"], "masked_accuracy": result["accuracy"]}
    record |= {name: result[name] for name in ("top10", *curves)}
    for name, baseline in evaluation.baselines.items():
        record[f"baseline_{name}"] = baseline["loss"]
        for part in ("accuracy", "top10", *(f"loss_by_{what}" for what in _CURVES)):
            record[f"baseline_{name}_{part}"] = baseline[part]
    record |= _beyond_arithmetic(result, evaluation.baselines.get(ARITHMETIC))
    record |= {name: result[name] for name in ("genes", "genes_by_bucket", "genes_by_dataset")}
    record["cells"] = evaluation.num_cells
    if evaluation.without_arithmetic:
        record["without_arithmetic"] = evaluation.without_arithmetic
    return record | ({"remark": remark} if remark else {})


def _beyond_arithmetic(result: dict[str, Any], arithmetic: dict[str, Any] | None) -> dict[str, Any]:
    """Return by how many nats a model's loss is below the arithmetic line, with the curves."""
    if arithmetic is None:
        return {}

    def below(line: float | None, loss: float | None) -> float | None:
        return None if line is None or loss is None else line - loss

    deciles = zip(arithmetic["loss_by_rank_decile"], result["loss_by_rank_decile"], strict=True)
    beyond: dict[str, Any] = {
        BEYOND: below(arithmetic["loss"], result["loss"]),
        f"{BEYOND}_by_rank_decile": [below(*pair) for pair in deciles],
    }
    for what in ("bucket", "dataset"):
        lines = arithmetic[f"loss_by_{what}"]
        losses = result[f"loss_by_{what}"]
        beyond[f"{BEYOND}_by_{what}"] = {k: below(lines[k], losses[k]) for k in lines}
    return beyond


def score_rows(record: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return (name, loss, nats beyond arithmetic, top-1, top-10) of the model and each baseline.

    "-": not recorded, as top-10 in older runs, or lost. A baseline that the record does not have
    has no row.
    """
    line = record.get(f"baseline_{ARITHMETIC}")
    keys = [("this model", "loss", "masked_accuracy", "top10")]
    for name in BASELINE_NAMES:
        key = f"baseline_{name}"
        if key in record:
            keys.append((name.replace("_", " "), key, f"{key}_accuracy", f"{key}_top10"))
    rows = []
    for name, loss_key, *shares in keys:
        loss = record.get(loss_key)
        beyond = None if line is None or loss is None else line - loss
        shown = (format_score(record.get(k), ".2%") for k in shares)
        rows.append((name, format_score(loss, ".4f"), format_score(beyond, "+.4f"), *shown))
    return rows


def arithmetic_sentence(record: dict[str, Any]) -> str:
    """Return what a record says of a model beside counting, for its card and its page."""
    if "without_arithmetic" in record:
        return f"Beside counting: {record['without_arithmetic']}."
    beyond = record.get(BEYOND)
    if beyond is None:
        return "How far the model is from counting was not recorded."
    if beyond <= 0:
        return (
            f"The loss is {-beyond:.4f} nats above what counting tells (arithmetic: the medians of "
            "the visible neighbours): no biology can be seen in it."
        )
    return (
        f"The loss is {beyond:.4f} nats below what counting tells (arithmetic: the medians of the "
        "visible neighbours): so much the model has learned beyond it."
    )


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
    line = evaluation.baselines.get(ARITHMETIC)
    beyond = f"beyond arithmetic {line['loss'] - result['loss']:+.4f}  " if line else ""
    return (
        f"step {step}/{steps}  held-out loss {result['loss']:.4f}  {beyond}"
        f"top-1 {result['accuracy']:.2%}  top-10 {result['top10']:.2%}  "
        f"({evaluation.num_cells} cells; baselines: {beside})"
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
    evaluation: HeldoutEvaluation,
) -> None:
    """Say and record an evaluation, with a remark if the curve calls for one.

    Parameters
    ----------
    history
        (step, loss) of the evaluations before; this one is appended.
    """
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
    bar, best, known, unknown = _bar(baselines)
    is_below = [loss < bar for loss in losses]
    if is_below[-1] and not any(is_below[:-1]):
        return logging.INFO, (
            f"step {step}: held-out loss {losses[-1]:.4f} is below {best} for the first time, by "
            f"{bar - losses[-1]:.4f}; {known}"
        )
    warnings = []
    is_due = [at >= expected_by * total_steps for at, _ in history]
    if not any(is_below) and is_due[-1] and not any(is_due[:-1]):
        warnings.append(
            f"after {step / total_steps:.0%} of the steps the held-out loss {losses[-1]:.4f} has "
            f"not been below {best}: {unknown}. Look at "
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


def _bar(baselines: dict[str, float]) -> tuple[float, str, str, str]:
    """Return the loss to be below, its name, what a loss below it says, and what one above."""
    if ARITHMETIC in baselines:
        bar = baselines[ARITHMETIC]
        return (
            bar,
            f"counting ({ARITHMETIC}, {bar:.4f})",
            "from here on the model knows more than medians and frequencies tell",
            "the model has learned less than counting tells, without learning",
        )
    name, bar = min(baselines.items(), key=lambda item: item[1])
    return (
        bar,
        f"the best baseline ({name}, {bar:.4f})",
        "from here on the model uses more than a gene's own rank",
        "the model knows no more than each gene's rank",
    )


def _is_diverging(losses: list[float]) -> bool:
    return len(losses) > 0 and losses[-1] > min(losses) * (1 + _TOLERANCE)
