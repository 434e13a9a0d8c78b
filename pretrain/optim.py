"""The optimizer, its parameter groups, and the learning rate as a function of the step.

`build_optimizer` is called once per run; `learning_rates_at` and `set_learning_rate` in every
training step.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import nn

from pretrain.checkpoints.zero_state import MOMENTS
from pretrain.config import OptimConfig
from pretrain.measure.step_loss import StepLoss
from pretrain.optimizer.muon import MuonBesideAdamW, is_layer_matrix

RATE, MUON_RATE = "learning_rate", "muon_learning_rate"


def parameter_groups(
    model: nn.Module, weight_decay: float, left_out: Collection[str] = ()
) -> list[dict]:
    """Return two parameter groups: matrices with weight decay, biases and LayerNorm without.

    A parameter with fewer than two dimensions has no weight decay. `left_out` names the parameters
    that belong to another optimizer.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad and n not in left_out]
    decay = [p for _, p in named if p.ndim >= 2]
    plain = [p for _, p in named if p.ndim < 2]
    return [
        {"params": decay, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Return the optimizer of the settings: AdamW, or Muon together with AdamW.

    AdamW is torch's fused version, which passes once over weights, gradient and moments instead of
    ten times. DeepSpeed's own CPU kernels keep running powers of beta, so a resumed run would
    differ in the last bits; torch's version is exact and needs no compiler. If `optim.kind` is
    muon, Muon trains the matrices inside the layers.
    """
    adamw = {
        "lr": config.learning_rate,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "fused": True,
    }
    if config.kind == "adamw":
        return torch.optim.AdamW(parameter_groups(model, config.weight_decay), **adamw)
    matrices = {n: p for n, p in model.named_parameters() if is_layer_matrix(n, p)}
    muon = {
        "lr": config.muon_learning_rate,
        "weight_decay": config.muon_weight_decay,
        "momentum": config.muon_momentum,
        "newton_schulz_steps": config.muon_newton_schulz_steps,
    }
    others = parameter_groups(model, config.weight_decay, matrices)
    return MuonBesideAdamW(matrices, muon, others, **adamw)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the size in bytes of the float32 weights and moments of the whole model.

    It is the size before ZeRO divides them among ranks.
    """
    return sum(
        4 * parameter.numel() * (1 + len(MOMENTS[group.get("kind", "adamw")]))
        for group in optimizer.param_groups
        for parameter in group["params"]
    )


def learning_rates_at(step: int, total_steps: int, config: OptimConfig) -> dict[str, float]:
    """Return the learning rates of a step (counted from 0) under their names in the metrics."""
    rates = {RATE: learning_rate_at(step, total_steps, config)}
    if config.kind == "muon":
        peak, schedule = config.muon_learning_rate, config.muon_schedule
        warmup = config.muon_warmup_steps
        assert peak is not None and schedule is not None and warmup is not None
        rates[MUON_RATE] = _scheduled(step, total_steps, peak, schedule, warmup)
    return rates


def learning_rate_at(step: int, total_steps: int, config: OptimConfig) -> float:
    """Return AdamW's learning rate of a step (counted from 0).

    The rate rises from 0 to the peak during warm-up, then decays to 0, unless it stays constant.
    """
    peak, schedule = config.learning_rate, config.schedule
    return _scheduled(step, total_steps, peak, schedule, config.warmup_steps)


def _scheduled(step: int, total_steps: int, peak: float, schedule: str, warmup: int) -> float:
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule == "constant":
        return peak
    done = (step - warmup) / max(1, total_steps - warmup)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    return peak * (1 - done)


def require_reachable_peak(config: OptimConfig, steps: int) -> None:
    """Raise ValueError if the run would end before its warm-up does."""
    for of, warmup in (("", config.warmup_steps), ("muon_", config.muon_warmup_steps)):
        if warmup is not None and warmup >= steps:
            raise ValueError(
                f"optim.{of}warmup_steps={warmup}: the run has only {steps} steps and would "
                "never reach its learning rate; lower it (a tenth of the steps is usual)"
            )


def set_learning_rate(
    optimizer: torch.optim.Optimizer, learning_rate: float, muon_learning_rate: float | None = None
) -> None:
    """Set the learning rate of all parameter groups; Muon's groups get their own."""
    for group in optimizer.param_groups:
        is_muon = group.get("kind") == "muon"
        group["lr"] = muon_learning_rate if is_muon else learning_rate


class StageZeroClipper:
    """Clips and reports the gradient norm at ZeRO stage 0, where DeepSpeed reports none.

    It runs in the optimizer's own pre-step hook: after DeepSpeed's all-reduce, before the update.
    `loss` is the loss of the step; it is read together with the norm, and a loss that is not finite
    stops the step too.
    """

    loss: StepLoss | None = None

    def __init__(self, optimizer: torch.optim.Optimizer, max_norm: float) -> None:
        self.last_norm = float("nan")
        self._max_norm = max_norm if max_norm > 0 else math.inf
        optimizer.register_step_pre_hook(self._clip)

    def _clip(self, optimizer: torch.optim.Optimizer, _args: tuple, _kwargs: dict) -> None:
        parameters = [p for g in optimizer.param_groups for p in g["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self._max_norm)
        self.last_norm = self.loss.read_with(norm) if self.loss else float(norm)
        if not math.isfinite(self.last_norm) or (self.loss and not self.loss.is_finite):
            raise FloatingPointError(f"gradient norm is {self.last_norm}")
