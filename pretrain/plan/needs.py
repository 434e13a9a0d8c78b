"""Estimate the needs of a pretraining run before it starts: memory, steps, hours, traffic, cost.

`make_plan` puts everything together: `choose` finds a ZeRO stage and micro-batch that fit into
memory, and `step_time` gives the duration of a step. `print_plan` prints the result. The module
contains arithmetic only and does not import torch. Symbols: P parameters, d width, i intermediate
width, h heads, L padded length of a cell, V vocabulary.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pretrain.config import RunConfig
from pretrain.options import SpeedOptions
from pretrain.plan.corpus import AssumedCorpus, Corpus
from pretrain.plan.flops import (
    CHUNK_BYTES,
    Gpu,
    asked_shares,
    dropout_seconds_per_token,
    flops_per_token,
    layer_matrices,
)
from pretrain.plan.roofline import rooflines
from pretrain.plan.step_time import MACHINES, Compute, step_time
from pretrain.settings.architecture import MODERNBERT
from pretrain.settings.model_settings import ModelConfig

if TYPE_CHECKING:
    from rich.console import Console

GIB = 2**30
# Bytes of float32 weight and Adam's two moments, which a checkpoint stores for each parameter, and
# how much less it stores for Muon's parameters, which have one moment.
_STATE_BYTES, _MUON_SAVES = 12, 4
# The memory of the CUDA context and NCCL's buffers, and the waste of the allocator.
_OVERHEAD_GIB = 3.0
_LAYER_NORM_BYTES = 16
_SHARE_OF_MEMORY = 0.92
# The share of peak was published for another trainer on another GPU, so this factor is uncertain.
_DOUBT_OF_MFU = 1.7


@dataclass(frozen=True)
class Memory:
    """The bytes of each kind on one GPU at the peak of a step."""

    stage: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        states = self.weights + self.gradients + self.optimizer
        return states + self.activations + self.logits + _OVERHEAD_GIB * GIB

    def fits(self, gpu: Gpu) -> bool:
        return self.total <= _SHARE_OF_MEMORY * gpu.memory_gib * GIB


def num_parameters(model: ModelConfig, num_tokens: int, max_length: int) -> int:
    """Return the number of parameters of the model; tied embeddings count once."""
    d, i = model.hidden_size, model.intermediate_size
    if model.architecture == MODERNBERT:
        # Norms have no bias, the first layer has no norm before it, and the gate is a third matrix.
        layer = 4 * d * d + 3 * d * i + 2 * d
        return num_tokens * (d + 1) + model.num_layers * layer + d * d + 2 * d
    embeddings = (num_tokens + max_length + 2) * d + 2 * d
    layer = 4 * (d * d + d) + 2 * d * i + i + d + 4 * d
    head = d * d + d + 2 * d + num_tokens
    return embeddings + model.num_layers * layer + head


def muon_parameters(config: RunConfig) -> int:
    """Return the number of parameters that Muon trains: the matrices inside the layers, or none."""
    if config.optim.kind != "muon":
        return 0
    return config.model.num_layers * sum(layer_matrices(config.model))


def memory_per_gpu(
    config: RunConfig,
    corpus: Corpus,
    max_length: int,
    stage: int,
    gpus: int,
    micro_batch: int,
    on_gpu: bool = True,
) -> Memory:
    """Return the memory of one GPU in a step of ZeRO `stage` with `micro_batch` padded tokens.

    `on_gpu` is False for a rank that computes on a CPU.
    """
    p = num_parameters(config.model, corpus.num_tokens, max_length)
    if config.run.precision != "bf16":
        # ZeRO's optimizer has its own copy of the weights (counted in a run: 16 B a parameter after
        # a step).
        weights, gradients, optimizer = 4 * p, 4 * p, (12 if stage else 8) * p
    elif stage == 0:
        # Autocast has float32 weights and gradients, and bfloat16 copies that it keeps for a step.
        weights, gradients, optimizer = 6 * p, 4 * p, 8 * p
    else:
        # There are bfloat16 weights and gradients, sums in float32, and the optimizer's own float32
        # weights.
        weights, gradients, optimizer = 2 * p, 6 * p, 12 * p
    optimizer -= _MUON_SAVES * muon_parameters(config)
    activations = micro_batch * activation_bytes(config, on_gpu)
    # These are the head's input, and the logits, which their gradients overwrite. On a GPU some
    # rows have float32 copies too: of the logits, of the logits minus their log-sum, and of the
    # exponentials; on a CPU a kernel computes in the logits themselves.
    size, rows = (2 if config.run.precision == "bf16" else 4), micro_batch * asked_shares(config)[1]
    row = 4 * size * config.model.hidden_size + size * corpus.num_tokens
    logits = rows * row
    if on_gpu:
        logits += 3 * min(CHUNK_BYTES, rows * 4 * corpus.num_tokens)
    if config.objective.cell_weight:
        # A micro-batch of the shortest bucket has the most cells; each cell also has its shares of
        # hidden genes.
        cells = micro_batch / min(length for length, _ in corpus.buckets)
        logits += cells * (row + 20 * corpus.num_tokens)
    return Memory(
        stage,
        weights / (gpus if stage == 3 else 1),
        gradients / (gpus if stage >= 2 else 1),
        optimizer / (gpus if stage >= 1 else 1),
        activations,
        logits,
    )


def activation_bytes(config: RunConfig, on_gpu: bool = True) -> float:
    """Return the bytes that the layers keep per token for backward, without the head.

    A layer of a BERT keeps 8 d + i values, of a ModernBERT 10 d + 4 i, and its dropout masks, which
    are stored as numbers on a CPU (measured: hooks on the saved tensors of the model,
    `tests/test_pretrain_plan.py`). Attention weights are never kept. With activation checkpointing,
    layers keep their input alone and one layer at a time is recomputed. It is ignored that the last
    layer keeps less.
    """
    model = config.model
    size = 2 if config.run.precision == "bf16" else 4
    d = model.hidden_size
    values = 8 * d + model.intermediate_size * (2 if model.activation == "gelu" else 1)
    masked = 2 * d
    if model.architecture == MODERNBERT:
        values, masked = 10 * d + 4 * model.intermediate_size, model.intermediate_size
    masks = masked * (1 if on_gpu else size) if model.hidden_dropout else 0
    layer = size * values + masks + 2 * _LAYER_NORM_BYTES
    embeddings = 4 * size * d
    if model.activation_checkpointing:
        return embeddings + model.num_layers * size * d + layer
    return embeddings + model.num_layers * layer


def checkpoint_bytes(parameters: int, of_muon: int = 0) -> int:
    """Return the size of one checkpoint in bytes: float32 weights and moments, at any precision.

    `of_muon` is the number of parameters that have one moment instead of two.
    """
    return parameters * _STATE_BYTES - of_muon * _MUON_SAVES


# What a rank sends for each micro-batch and once a step, in units of the size of all gradients (or
# weights) times (N - 1) / N. It was counted on a cable between two hosts
# (deepspeed_configs/README.md). Stage 0 is an all-reduce; stage 1 sums whole gradients (2) and
# collects weights (1); stages 2 and 3 are as counted.
_SENT = {0: (0.0, 2.0), 1: (0.0, 3.0), 2: (1.6, 2.0), 3: (2.4, 1.5)}


def traffic_bytes(
    parameters: int, precision: str, stage: int, gpus: int, passes: int, of_muon: int = 0
) -> float:
    """Return the bytes that one GPU sends in a step of `passes` micro-batches, by a ring.

    The factors were counted. Gradients are sent in the precision of the weights, at stages 2 and 3
    with every micro-batch, because a rank keeps only its part of the sum. Muon's matrices are sent
    once more in float32: a rank's pieces to the owners and back, or, if all ranks store everything
    (stage 0), from their owners to all.
    """
    size = 4 if precision == "fp32" or stage == 0 else 2
    part = (gpus - 1) / gpus * parameters * size
    muon = 4 * (gpus - 1) / gpus * of_muon * (2 / gpus if stage else 1)
    by_pass, by_step = _SENT[stage]
    return part * (by_pass * passes + by_step) + muon


@dataclass(frozen=True)
class GpuChoice:
    """A ZeRO stage, and the padded tokens of a micro-batch that fits into memory."""

    memory: Memory
    micro_batch: int


def choose(
    config: RunConfig, corpus: Corpus, max_length: int, gpu: Gpu, gpus: int
) -> GpuChoice | None:
    """Return the lowest stage from 1 that fits, with its largest useful micro-batch, or None.

    Lower stages send less. Stage 1 is tried instead of stage 0, because it sends as much and keeps
    only a part of the optimizer state (the default; measured in docs/benchmarks.md). Useful sizes
    are at most a rank's share of a step and 131,072 tokens, and are halved until one fits.
    """
    share = max(config.batch.tokens_per_step // gpus, corpus.longest)
    sizes = [s for s in (2**n for n in range(17, 5, -1)) if corpus.longest <= s <= share]
    for stage in (1, 2, 3):
        for size in [*sizes, corpus.longest]:
            memory = memory_per_gpu(config, corpus, max_length, stage, gpus, size, gpu.is_gpu)
            if memory.fits(gpu):
                return GpuChoice(memory, size)
    return None


def usual_mfu(model: ModelConfig, gpu: Gpu) -> float:
    """Return the share of peak that a published trainer of such models reached (NVIDIA BioNeMo).

    Its chart for A100 gives 11.5 % at 10 million parameters and 32 % at 106 million, relative to
    the floating point operations counted here. What is listed for a CPU is reached, so it is 1.
    """
    if not gpu.is_gpu:
        return 1.0
    return 0.115 if model.hidden_size < 512 else 0.32


def make_plan(
    config: RunConfig,
    corpus: Corpus,
    max_length: int,
    gpu: Gpu,
    gpus: int,
    speed: SpeedOptions = SpeedOptions(),
    assumed: AssumedCorpus | None = None,
) -> dict[str, Any]:
    """Return the dict that `geneloom plan --json` prints.

    Parameters
    ----------
    assumed
        The assumed corpus; None: the corpus is that of shards.

    Raises
    ------
    ValueError
        The shards contain no training cells.
    """
    if not corpus.tokens:
        raise ValueError("the shards hold no training cells")
    config, precision = (found := _without_auto(config)), found.run.precision
    parameters = num_parameters(config.model, corpus.num_tokens, max_length)
    chosen = choose(config, corpus, max_length, gpu, gpus)
    # What attention costs depends on the length of each cell.
    length = sum(n * each**2 for each, n in corpus.buckets) / corpus.padded_tokens
    flops = flops_per_token(config, corpus.num_tokens, length)
    share = usual_mfu(config.model, gpu) if speed.mfu is None else speed.mfu
    steps_per_epoch = corpus.num_steps(config.batch.tokens_per_step)
    steps = config.run.total_steps(steps_per_epoch)
    tokens = corpus.tokens / steps_per_epoch * steps
    micro_batch = chosen.micro_batch if chosen else corpus.longest
    passes = -(-config.batch.tokens_per_step // (gpus * micro_batch))
    of_muon = muon_parameters(config)
    sent = {
        stage: traffic_bytes(parameters, precision, stage, gpus, passes, of_muon)
        for stage in range(4)
    }
    padded = corpus.padded_tokens / steps_per_epoch / gpus
    if measured := speed.tokens_per_second:
        compute, doubt = padded * corpus.tokens / corpus.padded_tokens / measured, 1.1
    else:
        of_dropout = dropout_seconds_per_token(config, gpu, length)
        compute = padded * (flops / (share * gpu.flops(precision)) + of_dropout)
        doubt = _DOUBT_OF_MFU if speed.mfu is None and gpu.is_gpu else 1.25
    stage = chosen.memory.stage if chosen else 3
    step = step_time(
        config, MACHINES[gpu.name], Compute(compute, doubt, bool(measured)), parameters, stage,
        gpus, passes, sent[stage],
    )  # fmt: skip
    source = "given" if measured else f"arithmetic at {share:.1%} of {gpu.name}'s peak"
    hours = steps * step.seconds / 3600
    rate = tokens / (hours * 3600 * gpus)
    return {
        "gpu": gpu.name,
        "gpus": gpus,
        "precision": precision,
        "parameters": parameters,
        "cells": corpus.cells,
        "tokens_per_epoch": corpus.tokens,
        "padding": 1 - corpus.tokens / corpus.padded_tokens,
        "steps": steps,
        "tokens": round(tokens),
        "flops_per_padded_token": flops,
        "tokens_per_second_and_gpu": rate,
        "rate_from": source,
        "corpus": assumed.sentence() if assumed else "of the shards",
        "step_seconds": asdict(step) | {"all": step.seconds},
        "steps_per_second": 1 / step.seconds,
        "hours": hours,
        "hours_interval": [steps * s / 3600 for s in step.interval],
        "cost": None if speed.price is None else hours * gpus * speed.price,
        "suggested": asdict(chosen) if chosen else None,
        "roofline": rooflines(config, gpu, gpus, corpus, parameters, micro_batch),
        "memory": _memory_rows(config, corpus, max_length, gpu, gpus, micro_batch),
        "checkpoint_bytes": checkpoint_bytes(parameters, of_muon),
        "traffic_bytes_per_step": sent,
        "loader_bytes_per_second": rate * gpus * corpus.bytes_per_token,
    }


def _without_auto(config: RunConfig) -> RunConfig:
    """Return a configuration in which the precision ``auto`` is the one of a GPU."""
    if config.run.precision != "auto":
        return config
    return config.model_copy(update={"run": config.run.model_copy(update={"precision": "bf16"})})


def _memory_rows(
    config: RunConfig, corpus: Corpus, max_length: int, gpu: Gpu, gpus: int, micro_batch: int
) -> list[dict[str, Any]]:
    """Return the memory needs of each ZeRO stage as rows of a plan."""
    of_stages = [
        memory_per_gpu(config, corpus, max_length, stage, gpus, micro_batch, gpu.is_gpu)
        for stage in range(4)
    ]
    return [asdict(m) | {"total": m.total, "fits": m.fits(gpu)} for m in of_stages]


def print_plan(plan: dict[str, Any], console: Console) -> None:
    """Print a plan as a table of memory and a few sentences."""
    from rich.table import Table

    console.print(f"corpus: {plan['corpus']}", highlight=False, soft_wrap=True)
    table = Table(title=f"GiB on each of {plan['gpus']} {plan['gpu']}", title_justify="left")
    for name in ("ZeRO", "weights", "gradients", "optimizer", "activations", "logits", "all", ""):
        table.add_column(name, justify="right")
    parts = ("weights", "gradients", "optimizer", "activations", "logits", "total")
    for row in plan["memory"]:
        sizes = [f"{row[k] / GIB:,.2f}" for k in parts]
        table.add_row(str(row["stage"]), *sizes, "fits" if row["fits"] else "too much")
    console.print(table)
    chosen = plan["suggested"]
    suggestion = "no stage fits: more GPUs, larger ones, or model.activation_checkpointing=true"
    if chosen:
        suggestion = (
            f"suggested: run.deepspeed=zero{chosen['memory']['stage']} "
            f"batch.tokens_per_micro_batch={chosen['micro_batch']}"
        )
    traffic = ", ".join(f"{s}: {b / 2**20:,.0f}" for s, b in plan["traffic_bytes_per_step"].items())
    cost = "" if plan["cost"] is None else f", cost {plan['cost']:,.0f}"
    low, high = plan["hours_interval"]
    parts = {k: v for k, v in plan["step_seconds"].items() if k not in ("all", "doubt") and v}
    spent = ", ".join(f"{k} {v * 1e3:,.1f}" for k, v in parts.items())
    roof = "; ".join(
        f"{how} {r['tokens_per_s']:,.0f} tokens/s, MFU {r['mfu']:.0%}, {r['limit']} binds, "
        f"{r['launches_per_step']:,} launches a step"
        for how, r in plan["roofline"].items()
    )
    console.print(
        f"{plan['parameters']:,} parameters, {plan['precision']}; {plan['cells']:,} cells, "
        f"{plan['tokens_per_epoch']:,} tokens an epoch, padding {plan['padding']:.1%}\n"
        f"{suggestion}\n"
        f"{plan['steps']:,} steps, {plan['tokens']:,} tokens, {plan['hours']:,.1f} hours "
        f"({low:,.1f} to {high:,.1f}){cost}: {plan['steps_per_second']:,.1f} steps/s, "
        f"{plan['tokens_per_second_and_gpu']:,.0f} tokens/s and GPU ({plan['rate_from']})\n"
        f"a step, ms: {spent}\n"
        f"by arithmetic, packed, in bf16, not measured: {roof}\n"
        f"a checkpoint {plan['checkpoint_bytes'] / GIB:,.2f} GiB; sent by a GPU each step, MiB by "
        f"ZeRO stage: {traffic}; read {plan['loader_bytes_per_second'] / 2**20:,.1f} MiB/s in all",
        highlight=False,
        soft_wrap=True,
    )
