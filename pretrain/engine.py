"""The model inside DeepSpeed: it is built or restored here, and computes one exact training step.

`pretrain.train` makes one `Engine` per run and calls `dry_pass` once, then `forward_backward` and
`step` in every training step.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable

import torch

from data_prep.hashing import stream_key
from data_prep.shards.reader import ShardSet
from pretrain.batches.forward_arguments import device_arguments, to_device
from pretrain.batches.step_batch import MicroBatch, RankStep
from pretrain.checkpoints import zero_state
from pretrain.checkpoints.checkpoint import Checkpoint
from pretrain.config import RunConfig
from pretrain.counting.arithmetic_prior import ArithmeticPrior, objective_prior
from pretrain.device import Computing, compiled_so_far
from pretrain.ds_config import zero_stage
from pretrain.measure.step_loss import StepLoss, norm_read_once
from pretrain.measure.step_profile import mark
from pretrain.model.counted_start import start_counted
from pretrain.model.masked_gene_model import MaskedGeneModel, build_model
from pretrain.optim import (
    StageZeroClipper,
    build_optimizer,
    learning_rates_at,
    set_learning_rate,
    state_bytes,
)
from pretrain.optimizer.muon import MuonBesideAdamW
from pretrain.ranks import dist
from pretrain.ranks.dist import Ranks
from pretrain.start.warm_start import log_start, start_weights

logger = logging.getLogger(__name__)


class Engine:
    """A model with its optimizer under one ZeRO stage.

    `ds_config` is the configuration that DeepSpeed received. `init` is the record of the weights
    that training started from (`pretrain.start.warm_start`, `pretrain.model.counted_start`), None
    if they were random. `prior` is the arithmetic prior that is added to the logits, or None.

    Parameters
    ----------
    last
        The checkpoint to continue from, or None.
    """

    def __init__(
        self,
        config: RunConfig,
        ds_config: dict,
        shards: ShardSet,
        ranks: Ranks,
        last: Checkpoint | None,
    ) -> None:
        self._config, self._ranks = config, ranks
        torch.use_deterministic_algorithms(config.run.deterministic)
        self.ds_config, self.stage = ds_config, zero_stage(ds_config)
        self.prior = objective_prior(config, shards, last, ranks)
        model = build_model(config.model, shards.vocabulary, config.run.seed, self.prior)
        self.num_parameters = sum(p.numel() for p in model.parameters())
        # The record lacks this key in checkpoints of versions that knew only random initial
        # weights.
        self.init = last.record.get("init") if last else None
        if last:
            zero_state.load_weights(model, last.reader())
        elif config.model.init_from:
            self.init = start_weights(
                model, shards.vocabulary, config.model, config.objective.prior
            )
            if ranks.is_first:
                log_start(self.init)
        elif config.model.init_genes == "counted":
            quarantine = config.data.on_damage == "quarantine"
            parts = config.model
            if self.prior:  # the prior already contains the frequency
                left = [p for p in parts.counted if p != "frequency"]
                parts = parts.model_copy(update={"counted": left})
            self.init = start_counted(model, shards, parts, quarantine, ranks)
        self._clipper: StageZeroClipper | None = None
        self._loss: StepLoss | None = None
        self._is_compiled, self._compiled = False, (0, 0.0)
        self.deepspeed = self._initialise(model, ds_config)
        dist.limit_waiting(config.run.collective_timeout_s)
        self._optimizer = zero_state.torch_optimizer(self.deepspeed, self.stage)
        if isinstance(self._optimizer, MuonBesideAdamW):
            self._deal_matrices(self._optimizer)
        if last:
            zero_state.restore_training_state(
                self.deepspeed, self.stage, ranks.rank, last.reader(), last.updates
            )

    @property
    def start(self) -> tuple[dict | None, ArithmeticPrior | None]:
        """Return what training started from besides random weights: `init` and `prior`."""
        return self.init, self.prior

    def _initialise(self, model: MaskedGeneModel, ds_config: dict):
        import deepspeed

        optimizer = build_optimizer(model, self._config.optim)
        # This counts the float32 weights and moments of all ranks together.
        self.state_bytes = state_bytes(optimizer)
        if self.stage == 0:
            self._clipper = StageZeroClipper(optimizer, self._config.optim.max_grad_norm)
        dist.forget_earlier_runs()
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
        engine.train()
        return engine

    def _deal_matrices(self, optimizer: MuonBesideAdamW) -> None:
        """Tell Muon which parts of the weight matrices ZeRO keeps on which rank."""
        is_replicated = self.stage == 0
        rank = 0 if is_replicated else self._ranks.rank
        optimizer.deal(
            zero_state.vectors_of_kind(self.deepspeed, self.stage, "muon"),
            zero_state.owned_fragments(self.deepspeed, self.stage, rank),
            self._ranks,
            is_replicated,
        )

    def compile_for(self, chosen: Computing, shapes: set[tuple[int, int]]) -> None:
        """Compile the layers for training, if `chosen` says so.

        Without packing, only micro-batches of the given shapes (rows, length) are compiled.
        """
        self._is_compiled = chosen.compile != "off"
        if self._is_compiled:
            sizes = None if chosen.packed else shapes
            self.deepspeed.module.compile_layers(chosen.compile, sizes)

    def log_compiling(self) -> None:
        """Log how many graphs were compiled so far, if there are new ones since the last call."""
        if self._is_compiled and (found := compiled_so_far()) != self._compiled:
            logger.info("compiled %d graphs so far, in %.1f s", *found)
            self._compiled = found

    def dry_pass(self, heaviest: MicroBatch) -> None:
        """Compute the largest micro-batch once with weight zero, to test whether it fits in memory.

        The gradients of this pass are exact zeros, so they do not change the first training step.
        """
        try:
            # Torch would allocate the moments in the first step, and they must fit into memory as
            # well.
            zero_state.ensure_moments(self.deepspeed, self.stage)
            # The gradients of this pass are kept, and CUDA graphs would overwrite them in the first
            # step.
            with self.deepspeed.module.without_graphs():
                losses, _, *of_cells = self.deepspeed(*to_device(heaviest, self._ranks.device))
                total = sum((part.sum() for part in of_cells), losses.sum())
                self.deepspeed.backward(total, scale_wrt_gas=False)
        except torch.OutOfMemoryError as error:
            rows, length = heaviest.input_ids.shape
            raise ValueError(
                f"batch.tokens_per_micro_batch={self._config.batch.tokens_per_micro_batch}: a "
                f"micro-batch of {rows} cells x {length} tokens does not fit into the memory of "
                f"{self._ranks.device}; lower it (the same sums in another order; with "
                "dropout another sample of its noise), or choose "
                "model.activation_checkpointing=true or another run.deepspeed"
            ) from error

    def forward_backward(
        self,
        data: RankStep,
        step: int,
        masked: int,
        scored_cells: int = 0,
        on_passed: Callable[[str], None] = lambda _: None,
    ) -> StepLoss:
        """Accumulate the gradients of the exact objective, and return the losses of the step.

        The objective is the mean loss over the global batch. The loss sum of each micro-batch is
        divided by the number of hidden genes in the global batch, and its sum over cells by the
        number of scored cells; the factor world_size undoes DeepSpeed's mean over ranks.

        Parameters
        ----------
        masked, scored_cells
            Number of hidden genes, and of cells that have a loss, in the global batch over all
            ranks. The one whose objective has weight 0 is not read.
        on_passed
            Called after each micro-batch with its name.
        """
        # The dropout seed is a function of (seed, step, rank), so no random state has to be saved.
        torch.manual_seed(stream_key(self._config.run.seed, "dropout", step, self._ranks.rank))
        device, world_size = self._ranks.device, self._ranks.world_size
        objective = self._config.objective
        loss_sum, hit_sum, cell_sum = (torch.zeros((), device=device) for _ in range(3))
        own = []
        for arguments in device_arguments(data, device):
            with mark("forward"):
                losses, places, *of_cells = self.deepspeed(*arguments)
            total = losses.sum()
            weighted = total * (objective.gene_weight * world_size / masked)
            for part in of_cells:  # zero or one tensor of cell losses
                cell_total = part.sum()
                weighted = weighted + cell_total * (
                    objective.cell_weight * world_size / scored_cells
                )
                cell_sum += cell_total.detach()
            with mark("backward"):
                self.deepspeed.backward(weighted, scale_wrt_gas=False)
            loss_sum += total.detach()
            hit_sum += (places == 0).sum()
            own.append(tuple(part.detach() for part in (losses, *of_cells)))
            on_passed(f"micro-batch {len(own)} of {len(data.micro_batches)}")
        sums = torch.stack([part.double() for part in (loss_sum, hit_sum, cell_sum)])
        with mark("communication"):
            dist.sum_in_place(sums)
        self._loss = StepLoss(sums, own)
        return self._loss

    def step(self, step: int, total_steps: int) -> tuple[dict[str, float], float]:
        """Apply the gradients; return (learning rates, the global gradient norm before clipping).

        Nothing is applied if the norm or the loss is not finite: DeepSpeed skips the step, or the
        clipper raises. This is the only place of a step where the host waits for the device; the
        value of the loss is known after it.
        """
        rates = learning_rates_at(step, total_steps, self._config.optim)
        set_learning_rate(self._optimizer, **rates)
        assert self._loss is not None
        if self._clipper:
            self._clipper.loss = self._loss
        with (
            mark("optimizer"),
            norm_read_once(self.deepspeed.optimizer, self._loss),
            contextlib.suppress(FloatingPointError),  # the caller checks the norm
        ):
            self.deepspeed.step()
        if self._clipper:
            # The clipper leaves refused gradients in place; DeepSpeed clears those that it refuses.
            self._optimizer.zero_grad()
            return rates, self._clipper.last_norm
        return rates, float(self.deepspeed.get_global_grad_norm() or 0.0)
