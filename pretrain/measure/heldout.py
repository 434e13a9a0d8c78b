"""Evaluate a model on held-out cells with fixed masks, beside baselines that only count.

`heldout_evaluation` scores the baselines once per run, `HeldoutEvaluation.run` scores the model,
and `log_heldout` logs the result, with a remark on the curve of held-out losses.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data_prep.shards.reader import ShardSet
from pretrain.batches.forward_arguments import device_arguments
from pretrain.batches.pinned_memory import Staging
from pretrain.batches.step_batch import MicroBatch, RankStep
from pretrain.batches.step_dataset import StepDataset, steps_in_background
from pretrain.config import ObjectiveConfig, RunConfig
from pretrain.counting.arithmetic import (
    Arithmetic,
    MaskedRows,
    arithmetic_tables,
    describe,
    of_all_cells,
)
from pretrain.counting.baselines import (
    ARITHMETIC,
    BASELINE_NAMES,
    Baselines,
    RankBaselines,
)
from pretrain.measure.heldout_sums import (
    CELL_LOSS,
    CURVES,
    SCORES,
    CellDatasets,
    HeldoutSums,
)
from pretrain.measure.loss_curve import curve_remark
from pretrain.measure.metrics import RunLog
from pretrain.objective.cell_objective import CellTargets
from pretrain.objective.masking import EVALUATION_MASKING, NO_LABEL
from pretrain.ranks import dist
from pretrain.ranks.dist import Ranks
from pretrain.run_folder.run_record import is_run_folder

logger = logging.getLogger(__name__)

EVALUATION_SEED = 0
# The run's token budget is not used: it would change which cells are the first N of the plan.
EVALUATION_TOKENS = 16_384
BEYOND = f"beyond_{ARITHMETIC}"
UNIGRAM = "unigram"


class HeldoutEvaluation:
    """Evaluates the same held-out cells and masks each time; the baselines are computed once.

    Every rank evaluates its share of every batch. `packs` is True if the model takes packed cells.
    With `later` the baselines are computed at the first evaluation, not before the first step.
    """

    def __init__(
        self,
        shards: ShardSet,
        config: RunConfig,
        ranks: Ranks,
        packs: bool = False,
        later: bool = False,
    ) -> None:
        self._ranks, self._shards, self._config = ranks, shards, config
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
            staging=Staging(ranks.device) if ranks.device.type == "cuda" else None,
            quarantine=quarantine,
            packs=packs,
            # Genes are scored whatever the training objective is, so that the losses of all runs
            # compare.
            objective=ObjectiveConfig(cell_weight=config.objective.cell_weight),
        )
        plan, cells, steps = self._dataset.plan, 0, 0
        while cells < min(config.evaluation.max_cells, plan.num_cells):
            cells += plan.step(steps).num_cells
            steps += 1
        self._num_steps, self.num_cells = steps, cells
        self._cells = np.sort(np.concatenate([plan.cells(plan.step(i)) for i in range(steps)]))
        # The last scores of each cell, by name of a column.
        self.of_cells: dict[str, np.ndarray] = {}
        self._lengths = shards.bucket_lengths("heldout")
        self.expect_below_baseline_by = config.evaluation.expect_below_baseline_by
        self.asks_genes = config.objective.gene_weight > 0
        self.prior = config.objective.prior
        self._datasets = CellDatasets(shards)
        self.without_arithmetic = ""
        self.baselines: dict[str, Any] = {}
        if not later:
            self._compute_baselines()

    def _compute_baselines(self) -> None:
        self.baselines = self._score_baselines(self._count())
        if next(iter(self.baselines.values()))["genes"] == 0:
            name = self._shards.name
            raise ValueError(f"{name}: no held-out cell can be read; copy the shards again")

    def _count(self) -> Baselines:
        """Return the baselines; warn if the vocabulary does not allow the arithmetic baseline."""
        shards, config = self._shards, self._config
        quarantine = config.data.on_damage == "quarantine"
        cells, out = config.evaluation.baseline_cells, config.run.out
        by_rank = RankBaselines(shards, cells, set() if quarantine else None)
        if not shards.vocabulary.has_medians:
            self.without_arithmetic = (
                "the vocabulary has no medians (all are the same number): there is no arithmetic "
                "baseline, and what a model learns beyond counting is not known"
            )
            logger.warning("%s: %s", shards.name, self.without_arithmetic)
            return Baselines(by_rank, None)
        # The folder of a new run must stay empty until all settings and data have been accepted.
        fallback = out if is_run_folder(out) else None
        # The tables of the prior are used here, so that the corpus is read once for both.
        is_by_fold = config.objective.prior != "none"
        tables = dist.first_rank_first(
            self._ranks,
            lambda: arithmetic_tables(shards, cells, quarantine, fallback, is_by_fold),
        )
        if is_by_fold:
            tables = of_all_cells(tables)
        logger.info("%s", describe(tables))
        return Baselines(by_rank, Arithmetic(tables, shards.vocabulary))

    def _steps(self) -> Iterator[tuple[int, RankStep]]:
        """Yield (bucket number, this rank's step); on a GPU a thread prepares the steps."""
        threads = 1 if self._ranks.device.type == "cuda" else 0
        for data in steps_in_background(self._dataset, 0, self._num_steps, threads):
            yield self._lengths.index(data.length), data

    def _batches(self) -> Iterator[tuple[int, MicroBatch]]:
        """Yield (bucket number, micro-batch of this rank)."""
        for bucket, data in self._steps():
            for micro in data.micro_batches:
                yield bucket, micro

    def _no_sums(self) -> HeldoutSums:
        return HeldoutSums(len(self._lengths), len(self._datasets.names), self._cells)

    def _score_baselines(self, baselines: Baselines) -> dict[str, dict[str, Any]]:
        sums = {name: self._no_sums() for name in baselines.names}
        for bucket, micro in self._batches():
            hidden = _Hidden.of(micro, self._datasets)
            scores = baselines.scores(_masked_rows(micro, hidden.labels), hidden.ranks)
            for name, total in sums.items():
                total.add(bucket, hidden.ranks, hidden.datasets, hidden.cells, *scores[name])
            if micro.targets:
                # The other baselines use the rank of each hidden gene, which the mean of a cell
                # does not contain.
                sums[UNIGRAM].add_cells(hidden.means_of_cells(micro.targets, scores[UNIGRAM][0]))
        found = {name: self._result(total) for name, total in sums.items()}
        self.of_cells = {f"baseline_{n}": total.losses_of_cells() for n, total in sums.items()}
        return found

    def run(
        self, model: torch.nn.Module, on_batch: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        """Return the scores of a model, and restore its mode; `on_batch` is called in each pass.

        ``loss`` (nats), ``accuracy`` (top-1) and ``top10`` are means over all hidden genes of all
        ranks; each also exists with ``_by_rank_decile`` (a list, None where no gene is hidden),
        ``_by_bucket`` (by padded length, as text) and ``_by_dataset`` (by name), and so does
        ``genes``, the number of hidden genes. With a cell objective there is also ``cell_loss``, in
        nats, the mean over cells.
        """
        if not self.baselines:
            self._compute_baselines()
        was_training = model.training
        model.eval()
        sums, last = self._no_sums(), None
        with torch.no_grad():
            for bucket, data in self._steps():
                passes = zip(
                    data.micro_batches, device_arguments(data, self._ranks.device), strict=True
                )
                for micro, arguments in passes:
                    scored = _OnItsWay(model(*arguments))
                    # While the device computes this micro-batch, the host adds up the scores of the
                    # previous one.
                    if last:
                        self._add(sums, *last)
                    last = bucket, micro, scored
                    on_batch()
            if last:
                self._add(sums, *last)
        model.train(was_training)
        result = self._result(sums)
        genes = sums.by_cell[0].astype(np.int64)
        first = {"cell": sums.numbers, "genes": genes, "loss": sums.losses_of_cells()}
        self.of_cells = first | {k: v for k, v in self.of_cells.items() if k not in first}
        return result

    def _add(self, sums: HeldoutSums, bucket: int, micro: MicroBatch, scored: _OnItsWay) -> None:
        losses, places, *of_cells = scored.numbers()
        hidden = _Hidden.of(micro, self._datasets)
        scores = (part[hidden.is_real] for part in (losses, places))
        sums.add(bucket, hidden.ranks, hidden.datasets, hidden.cells, *scores)
        if micro.targets:
            sums.add_cells(of_cells[0][micro.targets.scored_rows.numpy()])

    def _result(self, sums: HeldoutSums) -> dict[str, Any]:
        """Return the mean scores over all ranks; the sums are replaced by those over all ranks."""
        sums.replace(dist.sum_over_ranks(sums.flat(), self._ranks.device))
        return sums.means([str(length) for length in self._lengths], self._datasets.names)


@dataclass(frozen=True)
class _Hidden:
    """The hidden genes of a micro-batch: labels, relative ranks, data sets and cells, all [H].

    `is_real` bool [M] tells which of the micro-batch's hidden-gene entries are not filler.
    """

    is_real: np.ndarray
    labels: np.ndarray
    ranks: np.ndarray
    datasets: np.ndarray
    cells: np.ndarray

    @staticmethod
    def of(micro: MicroBatch, datasets: CellDatasets) -> _Hidden:
        is_real = micro.labels.numpy() != NO_LABEL
        rows = micro.masked_places.numpy()[is_real] // micro.input_ids.shape[1]
        labels, ranks = micro.labels.numpy()[is_real], micro.relative_ranks.numpy()[is_real]
        cells = micro.cells[rows]
        return _Hidden(is_real, labels, ranks, datasets.of(cells), cells)

    def means_of_cells(self, targets: CellTargets, losses: np.ndarray) -> np.ndarray:
        """Return the mean loss of each scored cell, from the losses [H] of its hidden genes."""
        is_asked = targets.genes_H.numpy()[self.is_real] != NO_LABEL
        rows = targets.rows_H.numpy()[self.is_real][is_asked]
        _, cells, counts = np.unique(rows, return_inverse=True, return_counts=True)
        return np.bincount(cells, losses[is_asked]) / counts


def _masked_rows(micro: MicroBatch, labels: np.ndarray) -> MaskedRows:
    inputs, real = micro.input_ids.numpy(), micro.attention_mask
    lengths = np.full(len(inputs), inputs.shape[1]) if real is None else real.numpy().sum(axis=1)
    return MaskedRows(inputs, lengths.astype(np.int64), labels)


class _OnItsWay:
    """Tensors whose copy from the device starts as soon as they are computed."""

    def __init__(self, tensors: tuple[torch.Tensor, ...]) -> None:
        self._tensors, self._event = list(tensors), None
        if tensors[0].is_cuda:
            self._tensors = [
                torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
                for x in tensors
            ]
            self._event = torch.cuda.Event()
            self._event.record()

    def numbers(self) -> list[np.ndarray]:
        """Wait for the copies and return them as numpy arrays."""
        if self._event:
            self._event.synchronize()
        return [x.numpy() for x in self._tensors]


class NothingHeldOut:
    """Replaces the evaluation in runs without held-out cells."""

    def run(self, *_: object) -> dict[str, Any]:
        return {}


Heldout = HeldoutEvaluation | NothingHeldOut


def heldout_evaluation(
    shards: ShardSet,
    config: RunConfig,
    ranks: Ranks,
    packs: bool = False,
    later: bool = False,
) -> Heldout:
    """Return the evaluation of held-out cells; warn once if there are no held-out cells."""
    if shards.extents("heldout"):
        return HeldoutEvaluation(shards, config, ranks, packs, later)
    if ranks.is_first:
        logger.warning(
            "%s: no cell is held out (prepared with --heldout 0): nothing is evaluated, and no "
            "score says what is learnt", shards.name,
        )  # fmt: skip
    return NothingHeldOut()


def heldout_record(
    result: dict[str, Any], evaluation: HeldoutEvaluation, remark: str | None = None
) -> dict[str, Any]:
    """Return the record of an evaluation: the scores of the model and of each baseline.

    ``masked_accuracy`` is top-1. The scores of a baseline are ``baseline_NAME`` (loss),
    ``baseline_NAME_accuracy`` and ``baseline_NAME_top10``; of its curves only the losses are
    stored. ``beyond_arithmetic``, with the same curves, is the loss of that baseline minus the loss
    of the model. ``cell_loss`` and ``baseline_unigram_cell_loss`` exist with a cell objective.
    """
    curves = [f"{score}_by_{what}" for score in SCORES for what in CURVES]
    record = {"loss": result["loss"], "masked_accuracy": result["accuracy"]}
    record |= {name: result[name] for name in ("top10", *curves)}
    if CELL_LOSS in result:
        record[CELL_LOSS] = result[CELL_LOSS]
        record[f"baseline_{UNIGRAM}_{CELL_LOSS}"] = evaluation.baselines[UNIGRAM][CELL_LOSS]
    for name, baseline in evaluation.baselines.items():
        record[f"baseline_{name}"] = baseline["loss"]
        for part in ("accuracy", "top10", *(f"loss_by_{what}" for what in CURVES)):
            record[f"baseline_{name}_{part}"] = baseline[part]
    record |= _beyond_arithmetic(result, evaluation.baselines.get(ARITHMETIC))
    record |= {name: result[name] for name in ("genes", "genes_by_bucket", "genes_by_dataset")}
    record["cells"] = evaluation.num_cells
    if evaluation.without_arithmetic:
        record["without_arithmetic"] = evaluation.without_arithmetic
    if evaluation.prior != "none":
        record["prior"] = evaluation.prior
    return record | ({"remark": remark} if remark else {})


def _beyond_arithmetic(result: dict[str, Any], arithmetic: dict[str, Any] | None) -> dict[str, Any]:
    """Return by how many nats a model's loss is below the arithmetic baseline, with the curves."""
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

    "-" means not recorded (as top-10 in older runs) or not finite. A baseline that is not in the
    record has no row.
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
    """Return a sentence that compares the model with counting, for its model card and its page."""
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
    began = ""
    if "prior" in record:
        began = " Its head adds to arithmetic (objective.prior): at its first step it stood there."
    return (
        f"The loss is {beyond:.4f} nats below what counting tells (arithmetic: the medians of the "
        f"visible neighbours): so much the model has learned beyond it.{began}"
    )


def format_score(value: float | None, how: str) -> str:
    """Return a number as text, or "-" if it is not known."""
    return "-" if value is None else format(value, how)


def heldout_line(
    step: int, steps: int, result: dict[str, Any], evaluation: HeldoutEvaluation
) -> str:
    """Return one console line: loss, top-1 and top-10 of the model, then those of the baselines."""
    beside = "  ".join(
        f"{name} {b['loss']:.4f} / {b['accuracy']:.2%} / {b['top10']:.2%}"
        for name, b in evaluation.baselines.items()
    )
    line = evaluation.baselines.get(ARITHMETIC)
    beyond = f"beyond arithmetic {line['loss'] - result['loss']:+.4f}  " if line else ""
    if CELL_LOSS in result:
        guess = evaluation.baselines[UNIGRAM][CELL_LOSS]
        beyond += f"cell loss {result[CELL_LOSS]:.4f} ({UNIGRAM} {guess:.4f})  "
    return (
        f"step {step}/{steps}  held-out loss {result['loss']:.4f}  {beyond}"
        f"top-1 {result['accuracy']:.2%}  top-10 {result['top10']:.2%}  "
        f"({evaluation.num_cells} cells; baselines: {beside})"
    )


def log_heldout(
    log: RunLog,
    history: list[tuple[int, float]],
    step: int,
    steps: int,
    result: dict[str, Any],
    evaluation: Heldout,
) -> None:
    """Log and record an evaluation, with a remark if the curve calls for one.

    Parameters
    ----------
    history
        (step, loss) of the earlier evaluations; this one is appended.
    """
    if isinstance(evaluation, NothingHeldOut):
        return
    history.append((step, result["loss"]))
    bars = {name: b["loss"] for name, b in evaluation.baselines.items()}
    # If training does not use the loss of single genes, this loss says nothing about the run.
    remark = None
    if evaluation.asks_genes:
        remark = curve_remark(history, bars, steps, evaluation.expect_below_baseline_by)
    log.write_heldout_cells(step, evaluation.of_cells)
    log.write("heldout", step, heldout_record(result, evaluation, remark[1] if remark else None))
    logger.info("%s", heldout_line(step, steps, result, evaluation))
    if remark:
        logger.log(*remark)
