"""The pretraining loop; `train` and `_Run.loop` can be read from top to bottom.

`train` joins the ranks, opens the shards, finds the checkpoint to start from and builds the engine.
`_Run.loop` then runs the training steps: it computes the micro-batches of this rank, applies the
gradients, and logs, evaluates and saves a checkpoint when each is due.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator

from data_prep.running.owner import Owner
from data_prep.shards.reader import ShardSet
from pretrain import device
from pretrain.batches.pinned_memory import Staging
from pretrain.batches.step_batch import RankStep
from pretrain.batches.step_dataset import StepDataset, steps_in_background
from pretrain.checkpoints.checkpoint import Checkpoint, Which
from pretrain.checkpoints.publish import Publisher
from pretrain.config import RunConfig
from pretrain.device import Computing
from pretrain.ds_config import derive_ds_config
from pretrain.engine import Engine
from pretrain.measure.heldout import Heldout, heldout_evaluation, log_heldout
from pretrain.measure.loss_curve import heldout_history
from pretrain.measure.metrics import RunLog, console_line, meter_of, read_metrics
from pretrain.measure.not_finite import Skips, stop_not_finite
from pretrain.measure.step_loss import StepLoss
from pretrain.measure.step_profile import mark, profiled
from pretrain.optim import require_reachable_peak
from pretrain.ranks import dist
from pretrain.ranks.dist import Ranks
from pretrain.ranks.same_world import agreed_world
from pretrain.ranks.watch import Watch
from pretrain.run_folder.ended import recorded_end
from pretrain.run_folder.run_record import run_record, step_record, write_run_files
from pretrain.start.resume import Resume, agreed_start
from pretrain.stop import StopRequest
from pretrain.summary import RunSummary

logger = logging.getLogger(__name__)


def train(
    config: RunConfig, resume: Resume = False, allow_changes: bool = False, profile: int = 0,
    from_step: Which = None,
) -> RunSummary:  # fmt: skip
    """Run the pretraining loop on this rank; every rank calls this function.

    Parameters
    ----------
    resume
        Continue from the newest complete checkpoint of ``config.run.out``. With "if-saved", start
        from the beginning if the run ended before its first checkpoint.
    allow_changes
        Resume even if the recipe or the shards changed.
    profile
        Number of steps to profile, see `pretrain.measure.step_profile`.
    from_step
        Resume from the checkpoint of this step instead of the newest; later ones are set aside.

    Raises
    ------
    ValueError
        Settings or data are wrong, or the ranks differ. Nothing has been written then.
    NotFinite
        The loss or the gradient norm is not finite; nothing was saved after that step.
    CheckpointFailed
        A checkpoint could not be written.
    """
    config = device.with_precision(config, device.capability_here())
    ds_config = derive_ds_config(config)  # first, because it may refuse the settings
    with StopRequest() as stop:
        ranks = dist.start(config.run.collective_timeout_s, config.run.threads)
        with (
            Watch(ranks, config.run.heartbeat_s, config.run.stall_limit_s) as watch,
            Owner(config.run.out, "pretrain") as owner,
        ):
            shards = agreed_world(config, ds_config, ranks)
            dataset, chosen = _dataset(config, shards, ranks)
            steps = config.run.total_steps(dataset.plan.steps_per_epoch)
            require_reachable_peak(config.optim, steps)
            start = resume, from_step
            last = agreed_start(config, shards, steps, start, allow_changes, ranks, owner)
            # This reads shards and may refuse them, so it comes before anything is written.
            # A run that goes on was accepted before, and trains first.
            heldout = heldout_evaluation(shards, config, ranks, chosen.packed, bool(last))
            engine = Engine(config, ds_config, shards, ranks, last)
            engine.compile_for(chosen, dataset.full_shapes())
            run = _Run(config, shards, dataset, engine, heldout, ranks, steps, last, owner, chosen)
            with recorded_end(config.run.out, ranks, run.summary, owner):
                try:
                    run.loop(stop, watch, profile)
                finally:
                    run.publisher.let_finish()
    return run.summary


def _dataset(config: RunConfig, shards: ShardSet, ranks: Ranks) -> tuple[StepDataset, Computing]:
    """Return the dataset of this rank, and the kernels and precision that it computes with."""
    batch = config.batch
    staging = Staging(ranks.device) if ranks.device.type == "cuda" else None
    dataset = StepDataset(
        shards, "train", config.run.seed, batch.tokens_per_step, batch.tokens_per_micro_batch,
        config.masking, ranks.rank, ranks.world_size,
        quarantine=config.data.on_damage == "quarantine", objective=config.objective,
        staging=staging,
    )  # fmt: skip
    capability = device.capability_of(ranks.device)
    chosen = device.computing(config, ranks.device, capability, dataset.most_micro_batches())
    device.use(chosen, ranks.is_first)
    dataset.packs = chosen.packed
    return dataset, chosen


class _Run:
    """The training loop of one started run on one rank, and the files that the loop writes."""

    def __init__(
        self,
        config: RunConfig,
        shards: ShardSet,
        dataset: StepDataset,
        engine: Engine,
        heldout: Heldout,
        ranks: Ranks,
        steps: int,
        last: Checkpoint | None,
        owner: Owner,
        chosen: Computing,
    ) -> None:
        self._config, self._shards, self._dataset = config, shards, dataset
        self._engine, self._heldout, self._ranks, self._steps = engine, heldout, ranks, steps
        first = last.step if last else 0
        self.summary = RunSummary(first, first, steps)
        if last:
            self.summary.cells_seen = last.record["cells_seen"]
            self.summary.cells_digest = int(last.record["cells_digest"], 16)
            self.summary.cells_quarantined = last.record["cells_quarantined"]
        self._skips, self._evaluated = Skips(config.run, last), -1
        self._record = run_record(
            config, shards, ranks.world_size, engine.stage, *engine.start, chosen.record
        )
        self.publisher = Publisher(
            config.run.out, ranks, config.checkpoint, engine.state_bytes,
            config.run.collective_timeout_s, owner,
        )  # fmt: skip
        self._meter = meter_of(config, shards.vocabulary.num_tokens, ranks.world_size, steps)
        self._history: list[tuple[int, float]] = []
        self._log: RunLog | None = None
        if ranks.is_first:
            write_run_files(config, engine.ds_config, shards, *engine.start)
            self._history = heldout_history(read_metrics(config.run.out, first))
            self._log = RunLog(config.run.out, first, owner)

    def loop(self, stop: StopRequest, watch: Watch, profile: int) -> None:
        """Train from the first step to the last, or until the run is asked to stop."""
        config, summary, plan = self._config, self.summary, self._dataset.plan
        first, steps = summary.first_step, self._steps
        logger.info(
            "%d of %d steps done; epoch: %d steps, %d cells; %d parameters; %d ranks, ZeRO %d, "
            "%s%s",
            first, steps, plan.steps_per_epoch, plan.num_cells, self._engine.num_parameters,
            self._ranks.world_size, self._engine.stage, config.run.precision,
            ", packed" if self._record["computing"]["packed"] else "",
        )  # fmt: skip
        if first < steps:
            self._engine.dry_pass(self._dataset.heaviest_micro_batch())
        if config.evaluation.at_start and not first:
            self._evaluate(0, watch)
        batches = profiled(self._steps_with_waits(), profile, config.run.out, self._ranks)
        for step, data, wait_s in batches:
            started = time.perf_counter()
            watch.progress(step)
            counts = self._agree(data, stop.was_asked())
            watch.passed("its counts")
            masked, scored = counts["masked"], counts["scored"]
            loss = self._engine.forward_backward(data, step, masked, scored, watch.passed)
            # The optimizer applies nothing if the loss or the gradient norm is not finite.
            rates, norm = self._engine.step(step, steps)
            skipped = self._is_skipped(loss.loss + loss.cell_loss, "loss", step, data, loss)
            skipped = skipped or self._is_skipped(norm, "gradient norm", step, data, loss)
            watch.passed("its optimizer's step")
            done = summary.last_step = step + 1
            summary.add(counts, loss, skipped)
            seconds = time.perf_counter() - started + wait_s
            if not skipped:
                self._meter.add(counts, data.length, *loss.sums, wait_s, seconds)
            if (done % config.run.log_every_steps == 0 or done == steps) and self._meter.has_steps:
                self._log_window(done, {"grad_norm": norm} | rates)
            summary.stopped = bool(counts["stop"]) and done < steps
            if done % config.evaluation.every_steps == 0 or done == steps:
                self._evaluate(done, watch)
            if done % config.checkpoint.every_steps == 0 or done == steps or summary.stopped:
                self._save(done)
                watch.passed("its checkpoint")
            if summary.stopped:
                break
        self.publisher.close()
        self._log_checkpoints()
        if summary.stopped:
            done = summary.last_step
            logger.info("stopped at step %d of %d; continue with --resume", done, steps)
        if self._log:
            self._log.close()

    def _steps_with_waits(self) -> Iterator[tuple[int, RankStep, float]]:
        """Yield (step, the rank's micro-batches of this step, seconds waited for them)."""
        threads = self._config.data.num_workers
        batches = steps_in_background(self._dataset, self.summary.first_step, self._steps, threads)
        started = time.perf_counter()
        for data in batches:
            yield data.step, data, time.perf_counter() - started
            started = time.perf_counter()

    @mark("communication")
    def _agree(self, data: RankStep, stop_asked: bool) -> dict[str, int]:
        """Return the counts of the step summed over ranks, and how many ranks were asked to stop.

        Raises
        ------
        CheckpointFailed
            Raised on all ranks if one of them could not write its part of the last checkpoint.
        """
        counts = dist.count_over_ranks(
            {
                "masked": data.masked,
                "scored": data.scored_cells,
                "tokens": data.tokens,
                "padded_tokens": data.padded_tokens,
                "cells": data.cells,
                "digest": data.cells_digest,
                "quarantined": data.quarantined,
                "stop": int(stop_asked),
                "failed": int(self.publisher.has_failed),
            }
        )
        if counts["failed"]:
            self.publisher.stop_if_failed()
        # If all cells of the step are quarantined, the count is 0, and the step changes the weights
        # by momentum and weight decay alone.
        return counts | {k: max(counts[k], 1) for k in ("masked", "scored")}

    def _is_skipped(
        self, value: float, what: str, step: int, data: RankStep, loss: StepLoss
    ) -> bool:
        """Return whether the update of this step is skipped because `value` is not finite.

        It raises NotFinite instead if the settings allow no further skipped step.
        """
        if math.isfinite(value):
            return False
        problem = f"{what} is {value}"
        if not self._skips.may_skip(step):
            self.publisher.close()  # the checkpoint being written was made of good steps
            stop_not_finite(
                problem, step, data, loss.own, self._config.run.out, self._shards, self._ranks,
                self._skips,
            )  # fmt: skip
        said = self._skips.skip(problem, step, data, loss.own, self._shards, self._ranks)
        if self._log:
            self._log.write("skipped", step + 1, said)
        return True

    def _log_window(self, done: int, values: dict[str, float]) -> None:
        values = self._meter.close_window(done) | values
        values["epoch"] = done / self._dataset.plan.steps_per_epoch
        self._log_checkpoints()
        self._engine.log_compiling()
        if self._log:
            counted = self.summary.cells_record() | {"skipped_steps": len(self._skips.steps)}
            self._log.write("train", done, values | counted)
            logger.info(console_line(done, self._steps, values))

    def _evaluate(self, done: int, watch: Watch) -> None:
        self._evaluated = done
        result = self.summary.heldout = self._heldout.run(self._engine.deepspeed, watch.progress)
        if self._log:
            log_heldout(self._log, self._history, done, self._steps, result, self._heldout)

    def _save(self, done: int) -> None:
        heldout = self.summary.heldout.get("loss") if self._evaluated == done else None
        seed, per_epoch = self._config.run.seed, self._dataset.plan.steps_per_epoch
        at = step_record(done, seed, per_epoch, heldout) | self._skips.record(done)
        content = self._record | self.summary.cells_record() | at
        self.publisher.save(self._engine.deepspeed, self._engine.stage, content)

    def _log_checkpoints(self) -> None:
        """Write the checkpoints that were finished since the last call to the metrics file."""
        for values in self.publisher.take_finished():
            if self._log:
                self._log.write("checkpoint", int(values["step"]), values)
