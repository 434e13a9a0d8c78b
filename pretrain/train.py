"""The pretraining loop, read from top to bottom."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader

from data_prep.hashing import stream_key
from data_prep.shards import ShardSet
from pretrain import checkpoint, dist, zero_state
from pretrain.config import RunConfig
from pretrain.data import EpochPlan, RankStep, StepDataset
from pretrain.dist import Ranks
from pretrain.ds_config import derive_ds_config, zero_stage
from pretrain.evaluate import HeldoutEvaluation, to_device
from pretrain.metrics import Meter, RunLog, console_line
from pretrain.model import MaskedGeneModel, build_model
from pretrain.optim import (
    StageZeroClipper,
    build_optimizer,
    learning_rate_at,
    require_reachable_peak,
    set_learning_rate,
)
from pretrain.record import run_record, write_run_files
from pretrain.resume import agreed_start

logger = logging.getLogger(__name__)


@dataclass
class RunSummary:
    """What a run did; `stopped` is True when a signal ended it early."""

    first_step: int
    last_step: int
    total_steps: int
    losses: list[float] = field(default_factory=list)
    cells_seen: int = 0
    heldout: dict[str, Any] = field(default_factory=dict)
    stopped: bool = False


class _StopRequest:
    """Remembers SIGTERM, SIGINT and SIGUSR1; the ranks agree on it in the next step."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._ask)

    def _ask(self, number: int, _frame: object) -> None:
        if not self.asked:
            logger.warning("signal %s: stopping after this step", signal.Signals(number).name)
        self.asked = True

    def close(self) -> None:
        """Ignore SIGUSR1 from now on: asked again while it exits, a process would die of it."""
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def total_steps(config: RunConfig, plan: EpochPlan) -> int:
    """Return how many optimizer steps a run has."""
    steps = config.run.epochs * plan.steps_per_epoch
    return steps if config.run.max_steps is None else min(steps, config.run.max_steps)


def train(config: RunConfig, resume: bool = False, allow_changes: bool = False) -> RunSummary:
    """Pretrain on this process's share of every batch, and return what was done.

    Called by every rank. Between two lines of the log: read, forward, backward, agree, step.

    Parameters
    ----------
    resume
        Go on from the newest complete checkpoint of ``config.run.out``.
    allow_changes
        Resume although the recipe changed.

    Raises
    ------
    ValueError
        Wrong settings or data, before anything is written.
    FloatingPointError
        Loss or gradient norm is not finite; nothing was saved after it.
    """
    ds_config = derive_ds_config(config)
    stage = zero_stage(ds_config)
    shards = ShardSet(config.data.shards)
    plan = EpochPlan(shards, "train", config.run.seed, config.batch.tokens_per_step)
    steps = total_steps(config, plan)
    require_reachable_peak(config.optim, steps)
    stop = _StopRequest()
    ranks = dist.start(config.run.collective_timeout_s, config.run.threads)
    last = agreed_start(config, shards, steps, resume, allow_changes, ranks)
    first_step = last.step if last else 0
    # Reads shards and may refuse them: before anything is written.
    heldout = HeldoutEvaluation(shards, config, ranks)
    model = build_model(config.model, shards.vocabulary, config.run.seed)
    if last:
        zero_state.load_weights(model, last.reader())
    engine, clipper = _initialise(model, config, ds_config)
    dist.limit_waiting(config.run.collective_timeout_s)
    if last:
        reader = last.reader()
        zero_state.restore_training_state(engine, stage, ranks.rank, reader, first_step)
    record = run_record(config, shards, ranks.world_size, stage)
    log = None
    if ranks.is_first:
        write_run_files(config, ds_config, shards)
        log = RunLog(config.run.out, first_step)
        logger.info(
            "%d of %d steps done; epoch: %d steps, %d cells; %d parameters; %d ranks, ZeRO %d, %s",
            first_step, steps, plan.steps_per_epoch, plan.num_cells,
            sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters()),
            ranks.world_size, stage, config.run.precision,
        )  # fmt: skip
    optimizer = zero_state.torch_optimizer(engine, stage)
    meter = Meter(ranks.world_size, steps)
    summary = RunSummary(first_step, first_step, steps)

    def evaluate(step: int) -> None:
        summary.heldout = heldout.run(engine)
        if log:
            _log_heldout(log, step, steps, summary.heldout, heldout)

    def save(step: int) -> None:
        content = record | {"step": step, "heldout": summary.heldout}
        checkpoint.save(config.run.out, engine, stage, ranks, content, config.checkpoint.keep)

    for step, data, wait_s in _rank_steps(config, shards, ranks, first_step, steps):
        started = time.perf_counter()
        rate = learning_rate_at(step, steps, config.optim)
        set_learning_rate(optimizer, rate)
        _seed_dropout(config.run.seed, step, ranks.rank)
        counts = _agree(data, stop.asked, ranks)
        loss, hits = _forward_backward(engine, data, counts["masked"], ranks)
        _require_finite(loss / counts["masked"], "loss", step)
        engine.step()
        norm = clipper.last_norm if clipper else float(engine.get_global_grad_norm() or 0.0)
        _require_finite(norm, "gradient norm", step)
        done = step + 1
        summary.last_step = done
        summary.losses.append(loss / counts["masked"])
        summary.cells_seen += int(counts["cells"])
        meter.add(counts, loss, hits, wait_s, time.perf_counter() - started + wait_s)
        if done % config.run.log_every_steps == 0 or done == steps:
            values = meter.close_window(done) | {"grad_norm": norm, "learning_rate": rate}
            values["epoch"] = done / plan.steps_per_epoch
            if log:
                log.write("train", done, values)
                logger.info(console_line(done, steps, values))
        summary.stopped = bool(counts["stop"]) and done < steps
        if done % config.evaluation.every_steps == 0 or done == steps:
            evaluate(done)
        if done % config.checkpoint.every_steps == 0 or done == steps or summary.stopped:
            save(done)
        if summary.stopped:
            logger.warning("stopped at step %d of %d; continue with --resume", done, steps)
            break
    if log:
        log.close()
    stop.close()
    return summary


def _initialise(model: MaskedGeneModel, config: RunConfig, ds_config: dict):
    """Return (DeepSpeed engine, gradient clipper at stage 0)."""
    import deepspeed

    optimizer = build_optimizer(model, config.optim)
    clipper = None
    if zero_stage(ds_config) == 0:
        clipper = StageZeroClipper(optimizer, config.optim.max_grad_norm)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    engine.train()
    return engine, clipper


def _rank_steps(
    config: RunConfig, shards: ShardSet, ranks: Ranks, first: int, steps: int
) -> Iterator[tuple[int, RankStep, float]]:
    """Yield (step, what this rank computes in it, seconds waited for it)."""
    dataset = StepDataset(
        shards,
        "train",
        config.run.seed,
        config.batch.tokens_per_step,
        config.batch.tokens_per_micro_batch,
        config.masking,
        ranks.rank,
        ranks.world_size,
        steps,
    )
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=range(first, steps),
        num_workers=config.data.num_workers,
        pin_memory=ranks.device.type == "cuda",
        worker_init_fn=_ignore_signals,
    )
    batches = iter(loader)
    for step in range(first, steps):
        started = time.perf_counter()
        data = next(batches)
        yield step, data, time.perf_counter() - started


def _ignore_signals(_worker: int) -> None:
    """Leave stopping to the rank: a signal to the whole process group must not end its loader."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def _seed_dropout(seed: int, step: int, rank: int) -> None:
    """Make dropout a function of (seed, step, rank), so that nothing has to be saved for it."""
    torch.manual_seed(stream_key(seed, "dropout", step, rank))


def _agree(data: RankStep, stop_asked: bool, ranks: Ranks) -> dict[str, float]:
    """Return the sums over ranks of what the step holds, and whether any rank wants to stop."""
    names = ("masked", "tokens", "padded_tokens", "cells", "stop")
    values = [data.masked, data.tokens, data.padded_tokens, data.cells, float(stop_asked)]
    return dict(zip(names, dist.sum_over_ranks(values, ranks.device), strict=True))


def _forward_backward(engine, data: RankStep, masked: float, ranks: Ranks) -> tuple[float, float]:
    """Accumulate gradients of the exact objective; return (loss sum, hits) over all ranks.

    Each micro-batch counts with its sum of losses over the hidden genes of the whole global step;
    the factor world_size undoes DeepSpeed's mean over ranks.
    """
    loss_sum = torch.zeros((), device=ranks.device)
    hit_sum = torch.zeros((), device=ranks.device)
    for micro in data.micro_batches:
        losses, hits = engine(*to_device(micro, ranks.device))
        total = losses.sum()
        engine.backward(total * (ranks.world_size / masked), scale_wrt_gas=False)
        loss_sum += total.detach()
        hit_sum += hits.sum()
    loss, hits = dist.sum_over_ranks([float(loss_sum), float(hit_sum)], ranks.device)
    return loss, hits


def _require_finite(value: float, what: str, step: int) -> None:
    if not math.isfinite(value):
        raise FloatingPointError(
            f"{what} is {value} in step {step + 1}: stopped before anything was saved. Lower "
            "optim.learning_rate or raise optim.warmup_steps, and --resume from the last checkpoint"
        )


def _log_heldout(
    log: RunLog, step: int, steps: int, result: dict[str, Any], heldout: HeldoutEvaluation
) -> None:
    values = {"loss": result["loss"], "masked_accuracy": result["accuracy"]}
    values |= {f"baseline_{n}": b["loss"] for n, b in heldout.baselines.items()}
    values |= {f"baseline_{n}_accuracy": b["accuracy"] for n, b in heldout.baselines.items()}
    values["loss_by_rank_decile"] = result["loss_by_rank_decile"]
    values["cells"] = heldout.num_cells
    log.write("heldout", step, values)
    beside = "  ".join(f"{n} {b['loss']:.4f}" for n, b in heldout.baselines.items())
    logger.info(
        "step %d/%d  held-out loss %.4f  acc %.2f%%  (%d cells; baselines: %s)",
        step, steps, result["loss"], 100 * result["accuracy"], heldout.num_cells, beside,
    )  # fmt: skip
