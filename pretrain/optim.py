"""Optimizer, parameter groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from pretrain.config import OptimConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Return two groups: matrices decay; biases and LayerNorm (fewer dimensions) do not."""
    decay = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    return [
        {"params": decay, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Return torch's AdamW, fused: one pass over weights, gradient and moments instead of ten.

    DeepSpeed's own CPU kernels keep running powers of beta, so a resumed run would differ in the
    last bits; torch's is exact, and needs no compiler.
    """
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def learning_rate_at(step: int, total_steps: int, config: OptimConfig) -> float:
    """Return the learning rate of a step (0-based): warm-up from 0 to the peak, then decay to 0."""
    warmup = config.warmup_steps
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return config.learning_rate
    done = (step - warmup) / max(1, total_steps - warmup)
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    return config.learning_rate * (1 - done)


def require_reachable_peak(config: OptimConfig, steps: int) -> None:
    """Raise ValueError if a run ends before its warm-up does."""
    if config.warmup_steps >= steps:
        raise ValueError(
            f"optim.warmup_steps={config.warmup_steps}: the run has only {steps} steps and would "
            "never reach its learning rate; lower it (a tenth of the steps is usual)"
        )


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the rate of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


class StageZeroClipper:
    """Clips and reports the gradient norm at ZeRO stage 0, where DeepSpeed reports none.

    Runs in the optimizer's own pre-step hook: after DeepSpeed's all-reduce, before the update.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, max_norm: float) -> None:
        self.last_norm = float("nan")
        self._max_norm = max_norm if max_norm > 0 else math.inf
        optimizer.register_step_pre_hook(self._clip)

    def _clip(self, optimizer: torch.optim.Optimizer, _args: tuple, _kwargs: dict) -> None:
        parameters = [p for g in optimizer.param_groups for p in g["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self._max_norm)
        self.last_norm = float(norm)
        if not math.isfinite(self.last_norm):
            raise FloatingPointError(f"gradient norm is {self.last_norm}")
