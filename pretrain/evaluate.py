"""Held-out loss at fixed masks, beside what can be guessed from the rank alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from data_prep.shards import ShardSet
from pretrain import dist
from pretrain.baselines import RankBaselines
from pretrain.config import MaskingConfig, RunConfig
from pretrain.data import NO_LABEL, MicroBatch, StepDataset
from pretrain.dist import Ranks

RANK_DECILES = 10
# Evaluation always hides 15 % with one seed, whatever the run trains with: curves stay comparable.
# All of them become <mask>: under 80/10/10 a tenth of the answers can be copied from the input.
# That was worth 0.75 nats to a 6-layer model, and no baseline blind to the cell can do it.
EVALUATION_MASKING = MaskingConfig(mask_share=1.0, random_share=0.0)
EVALUATION_SEED = 0
# Not the run's budget: it would change which cells the first N of the plan are.
EVALUATION_TOKENS = 16_384


@dataclass(frozen=True)
class _Sums:
    """Sums over hidden genes: count and loss by decile of relative rank [10], hits."""

    count: np.ndarray
    loss: np.ndarray
    hits: float


class HeldoutEvaluation:
    """The same held-out cells and masks each time; the baselines are computed once.

    Every rank evaluates its share of every batch.
    """

    def __init__(self, shards: ShardSet, config: RunConfig, ranks: Ranks) -> None:
        self._ranks = ranks
        self._dataset = StepDataset(
            shards,
            "heldout",
            EVALUATION_SEED,
            max(EVALUATION_TOKENS, shards.bucket_lengths("heldout")[-1]),
            config.batch.tokens_per_micro_batch,
            EVALUATION_MASKING,
            ranks.rank,
            ranks.world_size,
            num_steps=0,
        )
        plan, cells, steps = self._dataset.plan, 0, 0
        while cells < min(config.evaluation.max_cells, plan.num_cells):
            cells += len(plan.step(steps).cells)
            steps += 1
        self._num_steps, self.num_cells = steps, cells
        self.baselines = self._baseline_losses(
            RankBaselines(shards, config.evaluation.baseline_cells)
        )

    def _batches(self):
        for step in range(self._num_steps):
            yield from self._dataset[step].micro_batches

    def _baseline_losses(self, baselines: RankBaselines) -> dict[str, dict]:
        names = list(baselines.log_probabilities)
        sums = {n: [] for n in names}
        for micro in self._batches():
            hidden = micro.labels.numpy() != NO_LABEL
            labels, ranks = micro.labels.numpy()[hidden], micro.relative_ranks.numpy()[hidden]
            losses, hits = baselines.losses(labels, ranks), baselines.hits(labels, ranks)
            for n in names:
                sums[n].append(_by_decile(losses[n], hits[n], ranks))
        return {n: self._reduce(sums[n]) for n in names}

    def _reduce(self, parts: list[_Sums]) -> dict:
        flat = [sum(p.hits for p in parts)]
        flat += sum((p.count for p in parts), np.zeros(RANK_DECILES)).tolist()
        flat += sum((p.loss for p in parts), np.zeros(RANK_DECILES)).tolist()
        total = dist.sum_over_ranks(flat, self._ranks.device)
        count = np.array(total[1 : 1 + RANK_DECILES])
        loss = np.array(total[1 + RANK_DECILES :])
        return {
            "loss": float(loss.sum() / count.sum()),
            "accuracy": total[0] / float(count.sum()),
            "loss_by_rank_decile": (loss / np.maximum(count, 1)).tolist(),
        }

    def run(self, model: torch.nn.Module) -> dict:
        """Return loss, accuracy and loss by rank decile of a model; its mode is restored."""
        was_training = model.training
        model.eval()
        parts = []
        with torch.no_grad():
            for micro in self._batches():
                losses, hits = model(*to_device(micro, self._ranks.device))
                hidden = micro.labels.numpy() != NO_LABEL
                ranks = micro.relative_ranks.numpy()[hidden]
                scores = losses.cpu().numpy()[hidden], hits.cpu().numpy()[hidden]
                parts.append(_by_decile(*scores, ranks))
        model.train(was_training)
        return self._reduce(parts)


def to_device(micro: MicroBatch, device: torch.device) -> tuple:
    """Return the arguments of the model's forward, on a device."""
    mask = micro.attention_mask
    return (
        micro.input_ids.to(device, non_blocking=True),
        None if mask is None else mask.to(device, non_blocking=True),
        micro.masked_places.to(device, non_blocking=True),
        micro.labels.to(device, non_blocking=True),
    )


def _by_decile(losses: np.ndarray, hits: np.ndarray, ranks: np.ndarray) -> _Sums:
    decile = np.minimum((ranks * RANK_DECILES).astype(np.int64), RANK_DECILES - 1)
    return _Sums(
        np.bincount(decile, minlength=RANK_DECILES).astype(np.float64),
        np.bincount(decile, weights=losses, minlength=RANK_DECILES),
        float(hits.sum()),
    )
