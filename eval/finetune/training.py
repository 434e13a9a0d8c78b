"""Fine-tune an encoder with heads of cells, heads of genes, or several heads at once.

`finetune` checks the labels, makes the classifier and its examples, and runs the training loop in
`_Training`.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from data_prep.genes.vocabulary import Vocabulary
from data_prep.hashing import stream_key
from eval.finetune.classifier import (
    Classifier,
    FinetuneSettings,
    Target,
)
from eval.finetune.examples import (
    Examples,
    class_weights,
    gene_weights,
    learnable,
    require_fitting,
)
from eval.finetune.probe_start import heldout_loss, start_from_probe
from eval.finetune.progress import FinetuningProgress, identity_of, load_progress, save_progress
from pretrain.cell_states.cell_state import CellState
from pretrain.cell_states.frozen_states import length_batches
from pretrain.model.architectures import Encoder, layers_of
from pretrain.optim import StageZeroClipper, parameter_groups
from pretrain.ranks import dist
from pretrain.ranks.dist import Ranks

logger = logging.getLogger(__name__)

_MAX_GRAD_NORM = 1.0
# Cells of a step are computed together up to this many padded tokens. More do not make a CPU
# faster, and a single cell has neither padding nor a mask; a GPU takes what fits the token budget.
_CPU_PASS_TOKENS = 1024
_MAX_PADDING = 0.25
_DEEPSPEED_CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    # Ranks have different numbers of passes in a step, so gradients are summed over ranks in
    # step().
    "managed_gradient_accumulation": False,
    "gradient_clipping": 0.0,
    "zero_optimization": {"stage": 0},
    "zero_allow_untested_optimizer": True,
    "steps_per_print": 1_000_000_000,
}


def finetune(
    encoder: Encoder,
    vocabulary: Vocabulary,
    tokens: list[np.ndarray],
    targets: list[Target],
    settings: FinetuneSettings,
    seed: int,
    validation: tuple[list[np.ndarray], list[Target]] | None = None,
    folder: Path | None = None,
    ranks: Ranks | None = None,
    state: CellState | None = None,
) -> Classifier:
    """Return a trained classifier; `encoder` and torch's random state are not changed.

    For each head, the loss of a step is the weighted mean over the labelled items of all its cells
    (on all ranks; genes weigh as `eval.finetune.examples.gene_weights` says); the mean over heads
    follows. Each epoch has another order of cells, a function of (seed, epoch). A cell without a
    labelled item is not computed.

    Parameters
    ----------
    tokens
        Token ids of each training cell, including special tokens.
    targets
        One per head.
    validation
        Cells and targets (with the same heads) for the validation loss after each epoch.
    folder
        Folder for the progress after each epoch, from which a killed fine-tuning continues and ends
        with the same bits.
    ranks
        The result of `pretrain.ranks.dist.start`: the cells of each step are divided over ranks.
        None: this process alone.
    state
        Heads of cells may read cell states like this one, as `settings.features` say; None: they
        read means of the last layer.

    Raises
    ------
    ValueError
        Labels do not fit cells, vocabulary or heads; nothing is labelled; patience is set without
        validation; or `folder` contains another fine-tuning.
    FloatingPointError
        A gradient is not finite.
    """
    heads = tuple(t.head for t in targets)
    require_fitting(vocabulary, tokens, targets, "training cells")
    if validation is not None:
        require_fitting(vocabulary, *validation, "validation cells")
        if tuple(t.head for t in validation[1]) != heads:
            raise ValueError("validation: its heads are not those of the training, in their order")
    elif settings.patience:
        raise ValueError("patience: early stopping needs validation cells")
    devices = [torch.cuda.current_device()] if settings.device == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        if not settings.may_read_state or all(head.kind == "genes" for head in heads):
            state = None
        forced = state if settings.features == "state" else None
        classifier = Classifier(copy.deepcopy(encoder), vocabulary, heads, settings, forced)
        targets = learnable(vocabulary, tokens, targets)
        weights = class_weights(tokens, targets, settings)
        of_tokens = gene_weights(tokens, targets, settings)
        examples = Examples(tokens, targets, weights, settings.device, of_tokens)
        if not len(examples.active):
            raise ValueError("fine-tuning: no cell has a labelled item")
        if settings.start == "probe":
            _start_heads(classifier, examples, seed, None if forced else state, ranks)
        checks = None
        if validation is not None:
            kept = learnable(vocabulary, *validation)
            of_tokens = gene_weights(validation[0], kept, settings)
            checks = Examples(validation[0], kept, weights, settings.device, of_tokens)
            if settings.patience and not len(checks.active):
                raise ValueError("patience: no validation cell has a labelled item")
        key = ""
        if folder is not None:
            parts = [(tokens, targets), validation]
            key = identity_of(encoder, vocabulary, settings, seed, parts, state)
        return _Training(classifier, examples, checks, seed, ranks).run(folder, key)


class _Training:
    """The training loop: epochs of steps, validation, and progress on disk."""

    def __init__(
        self,
        classifier: Classifier,
        examples: Examples,
        checks: Examples | None,
        seed: int,
        ranks: Ranks | None,
    ) -> None:
        self._classifier, self._examples, self._checks = classifier, examples, checks
        self._settings, self._seed = classifier.settings, seed
        self._rank, self._world_size = (ranks.rank, ranks.world_size) if ranks else (0, 1)
        self._steps_per_epoch = -(-len(examples.active) // self._settings.batch_cells)
        least = -(-self._settings.steps // self._steps_per_epoch)
        self._epochs = max(self._settings.epochs, least)
        self._optimizer = torch.optim.AdamW(
            _groups(classifier), lr=self._settings.learning_rate, fused=True
        )
        StageZeroClipper(self._optimizer, _MAX_GRAD_NORM)
        self._model, self._deepspeed = classifier, None
        if self._world_size > 1:
            import deepspeed

            self._deepspeed, *_ = deepspeed.initialize(
                model=classifier, optimizer=self._optimizer, config=_DEEPSPEED_CONFIG
            )
            self._model = self._deepspeed

    def run(self, folder: Path | None, key: str) -> Classifier:
        """Train, from the progress in `folder` if there is any, and return the classifier."""
        progress = FinetuningProgress()
        if folder is not None:
            progress = load_progress(folder, key, self._classifier, self._optimizer) or progress
        if self._checks is not None and self._settings.may_keep_start and not progress.history:
            progress.start_loss = self._validation_loss(self._checks)
            self._keep_if_best(progress, progress.start_loss)
        while not self._is_finished(progress):
            epoch = len(progress.history)
            train_loss, losses = self._train_epoch(epoch)
            entry = {"epoch": epoch + 1, "train_loss": train_loss}
            progress.losses += losses
            if self._checks is not None:
                entry["validation_loss"] = self._validation_loss(self._checks)
            progress.history.append(entry)
            logger.debug("epoch %s", entry)
            if self._settings.patience:
                self._keep_if_best(progress, entry["validation_loss"])
            if folder is not None:
                if self._rank == 0:
                    save_progress(folder, key, self._classifier, self._optimizer, progress)
                if self._deepspeed is not None:
                    dist.wait_for_all()
        if progress.best is not None:
            self._classifier.load_state_dict(progress.best, strict=False)
        self._classifier.history, self._classifier.losses = progress.history, progress.losses
        self._classifier.start_loss = progress.start_loss
        return self._classifier.eval()

    def _keep_if_best(self, progress: FinetuningProgress, loss: float) -> None:
        """Keep the weights that have this validation loss if no others had a lower one."""
        if loss < progress.best_loss:
            progress.best_epoch, progress.best_loss = len(progress.history) - 1, loss
            progress.best = {
                n: p.detach().clone()
                for n, p in self._classifier.named_parameters()
                if p.requires_grad
            }

    def _is_finished(self, progress: FinetuningProgress) -> bool:
        done = len(progress.history)
        waited = done - 1 - progress.best_epoch
        impatient = 0 < self._settings.patience <= waited and progress.best is not None
        return done >= self._epochs or impatient

    def _train_epoch(self, epoch: int) -> tuple[float, list[float]]:
        """Train for one epoch; return the mean loss of its steps, and that of each step."""
        self._classifier.train()
        rng = np.random.default_rng([self._seed, epoch])
        order = rng.permutation(self._examples.active)
        losses = []
        for start in range(0, len(order), self._settings.batch_cells):
            step = epoch * self._steps_per_epoch + len(losses)
            losses.append(self._step(order[start : start + self._settings.batch_cells], step))
        stacked = torch.stack(losses)
        total, *each = self._over_ranks([float(stacked.sum()), *stacked.tolist()])
        return total / len(losses), each

    def _step(self, batch: np.ndarray, step: int) -> torch.Tensor:
        """Do one optimizer step and return this rank's part of its loss."""
        examples, settings = self._examples, self._settings
        scale = examples.scale(batch)
        batch = batch[np.argsort(examples.lengths[batch], kind="stable")]
        mine = batch[self._rank :: self._world_size]
        if not len(mine):  # every rank must take part, so it gets a cell of weight 0
            mine, scale = batch[:1], np.zeros_like(scale)
        # The dropout seed is a function of (seed, step, rank), so no random state has to be saved.
        torch.manual_seed(stream_key(self._seed, "dropout", step, self._rank))
        budget = settings.token_budget
        if settings.device == "cpu":
            budget = min(budget, _CPU_PASS_TOKENS)
        total = torch.zeros((), device=settings.device)
        for cells in _passes(mine, examples.lengths, budget):
            loss = examples.loss(self._model, cells, scale)
            total += loss.detach()
            if self._deepspeed is None:
                loss.backward()
            else:
                # The factor undoes DeepSpeed's mean over ranks.
                self._deepspeed.backward(loss * self._world_size, scale_wrt_gas=False)
        all_steps = self._epochs * self._steps_per_epoch
        rate = learning_rate_at(step, all_steps, settings)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["share"]
        try:
            if self._deepspeed is None:
                self._optimizer.step()
                self._optimizer.zero_grad()
            else:
                self._deepspeed.step()
        except FloatingPointError as error:
            raise FloatingPointError(
                f"fine-tuning, step {step + 1} of {all_steps}: {error}; lower the learning rate "
                f"({settings.learning_rate:g})"
            ) from error
        return total

    def _validation_loss(self, checks: Examples) -> float:
        """Return the loss over all validation cells together; NaN if none has a labelled item."""
        if not len(checks.active):
            return float("nan")
        self._classifier.eval()
        scale = checks.scale(checks.active)
        batches = list(length_batches(checks.lengths[checks.active], self._settings.token_budget))
        total = torch.zeros((), device=self._settings.device)
        with torch.inference_mode():
            for batch in batches[self._rank :: self._world_size]:
                total += checks.loss(self._classifier, checks.active[batch], scale)
        return self._over_ranks([float(total)])[0]

    def _over_ranks(self, values: list[float]) -> list[float]:
        if self._deepspeed is None:
            return values
        return dist.sum_over_ranks(values, torch.device(self._settings.device))


def _groups(classifier: Classifier) -> list[dict]:
    """Return the optimizer's parameter groups.

    `share` is the factor by which a group multiplies the encoder's learning rate.
    """
    settings, heads = classifier.settings, set(classifier.outputs.parameters())
    head_rate = settings.head_learning_rate or settings.learning_rate
    above = _layers_above(classifier.encoder)
    groups = []
    for group in parameter_groups(classifier, settings.weight_decay):
        members: dict[tuple[bool, float], list[nn.Parameter]] = {}
        for parameter in group["params"]:
            of_head, share = parameter in heads, settings.layer_decay ** above.get(parameter, 0)
            if of_head:
                share = head_rate / settings.learning_rate
            members.setdefault((of_head, share), []).append(parameter)
        # The encoder before the heads, and its top before its lower layers.
        for of_head, share in sorted(members, key=lambda key: (key[0], -key[1])):
            groups.append(group | {"params": members[of_head, share], "share": share})
    return groups


def _layers_above(encoder: Encoder) -> dict[nn.Parameter, int]:
    """Return how many layers stand above each parameter of a layer, or of the embeddings."""
    layers = list(layers_of(encoder))
    found = {p: len(layers) for p in encoder.embeddings.parameters()}
    for number, layer in enumerate(reversed(layers)):
        found |= dict.fromkeys(layer.parameters(), number)
    return found


@dataclass(frozen=True)
class _Read:
    """What a head reads of its labelled items before any training: float32 [items, width].

    `cells` are the positions of the items' cells, `groups` what stays together in a fold.
    """

    states: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    cells: np.ndarray

    def with_state(self, state: CellState, tokens: list[np.ndarray]) -> _Read:
        """Return the cell states whose means these are."""
        states = state.of_means([tokens[i] for i in self.cells], self.states)
        return replace(self, states=states)


def _start_heads(
    classifier: Classifier,
    examples: Examples,
    seed: int,
    state: CellState | None,
    ranks: Ranks | None,
) -> None:
    """Set every head to the weights of a regression on the states that it reads.

    With a `state`, heads of cells read it instead of means if that tells held-out items better, or
    if there is nothing to choose by.
    """
    heads, balanced = classifier.heads, classifier.settings.class_weights
    read = _frozen(classifier, examples)
    if state:
        changed = [
            r.with_state(state, examples.tokens) if h.kind == "cells" else r
            for r, h in zip(read, heads, strict=True)
        ]
        losses = [
            sum(
                heldout_loss(r.states, r.labels, r.groups, balanced, seed)
                for r, h in zip(found, heads, strict=True)
                if h.kind == "cells"
            )
            for found in (read, changed)
        ]
        if ranks and ranks.world_size > 1:  # heads have one shape, whatever a rank's last bits say
            losses = dist.sum_over_ranks(losses, ranks.device)
        if not losses[0] < losses[1]:
            classifier.read(state)
            read = changed
    for i, (output, found) in enumerate(zip(classifier.outputs, read, strict=True)):
        assert isinstance(output, torch.nn.Linear)
        centre = torch.from_numpy(found.states.mean(axis=0))
        classifier.centres[i, : len(centre)] = centre
        strength = start_from_probe(
            output, found.states, found.labels, found.groups, balanced, seed,
            each_group_once=heads[i].kind == "genes" and classifier.settings.genes_count_once,
        )  # fmt: skip
        logger.debug("head %s: from a probe, C = %g", heads[i].name, strength)


def _frozen(classifier: Classifier, examples: Examples) -> list[_Read]:
    """Return what each head reads of its labelled items."""
    parts: list[list[_Read]] = [[] for _ in classifier.heads]
    classifier.eval()
    lengths = examples.lengths[examples.active]
    for batch in length_batches(lengths, classifier.settings.token_budget):
        cells = examples.active[batch]
        items = examples.items(cells)
        with torch.inference_mode():
            read = classifier.states([examples.tokens[i] for i in cells], items)
        for i, (head, item) in enumerate(zip(classifier.heads, items, strict=True)):
            of_item = cells[item.cell]
            if head.kind == "cells":
                groups = examples.groups(i)[of_item]
            else:
                placed = zip(of_item, item.place, strict=True)
                groups = np.array([examples.tokens[c][p] for c, p in placed], np.int64)
            states = read[i].float().cpu().numpy()
            parts[i].append(_Read(states, item.label, groups, of_item))
    return [
        _Read(*(np.concatenate([getattr(r, f.name) for r in found]) for f in fields(_Read)))
        for found in parts
    ]


def learning_rate_at(step: int, total_steps: int, settings: FinetuneSettings) -> float:
    """Return the learning rate of a step (counted from 0): warm-up, then linear decay towards 0."""
    warmup = max(1, int(total_steps * settings.warmup_share))
    rising = (step + 1) / warmup
    falling = (total_steps - step) / max(1, total_steps - warmup)
    return settings.learning_rate * min(1.0, rising, falling)


def _passes(cells: np.ndarray, lengths: np.ndarray, token_budget: int) -> list[np.ndarray]:
    """Divide cells, in ascending order of length, into groups that are computed together."""
    found, start, real = [], 0, 0
    for stop in range(len(cells)):
        padded = lengths[cells[stop]] * (stop + 1 - start)
        real += lengths[cells[stop]]
        if stop > start and (padded > token_budget or real < (1 - _MAX_PADDING) * padded):
            found.append(cells[start:stop])
            start, real = stop, lengths[cells[stop]]
    return [*found, cells[start:]]
