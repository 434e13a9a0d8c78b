"""Short pretraining runs for tests; functions that a rank can be started with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pretrain.config import RunConfig


def tiny_config(shards: Path, out: Path, **changes: Any) -> RunConfig:
    """Return a run of seconds; `changes` are ``section__field=value``."""
    content: dict[str, dict[str, Any]] = {
        "data": {"shards": shards, "num_workers": 0},
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 64,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        },
        "batch": {"tokens_per_step": 1024, "tokens_per_micro_batch": 256},
        "optim": {"learning_rate": 5e-3, "warmup_steps": 3},
        "run": {"out": out, "epochs": 50, "max_steps": 10, "log_every_steps": 1, "threads": 1},
        "evaluation": {"every_steps": 1000, "max_cells": 20},
        "checkpoint": {"every_steps": 5},
    }
    for key, value in changes.items():
        section, _, field = key.partition("__")
        content[section][field] = value
    return RunConfig.model_validate(content)


def run_training(config: RunConfig, resume: bool = False, allow_changes: bool = False):
    """Train and return the losses and the final fp32 weights, flat by name."""
    from pretrain import checkpoint, dist
    from pretrain.train import train

    summary = train(config, resume, allow_changes)
    dist.leave()
    last = checkpoint.newest(config.run.out)
    assert last is not None
    reader = last.reader()
    weights = {n: reader.read("weight", n, 0, reader.numel(n)).numpy() for n in reader.names}
    return summary, weights
