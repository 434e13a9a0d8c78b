"""Count the floating point operations of training, and list what GPUs can do in a second.

The module contains arithmetic only and does not import torch. Symbols: d width, i intermediate
width, L padded length of a cell, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.config import RunConfig
from pretrain.settings.architecture import MODERNBERT, layer_types
from pretrain.settings.model_settings import ModelConfig


@dataclass(frozen=True)
class Gpu:
    """A GPU with the values of its data sheet.

    They are dense bfloat16 and TF32 FLOP/s, memory in GiB, and memory bandwidth in bytes a second.
    """

    name: str
    bf16_flops: float
    fp32_flops: float
    memory_gib: float
    bytes_per_s: float

    @property
    def is_gpu(self) -> bool:
        """False for the entry of a CPU core, which is planned with beside the GPUs."""
        return self.name != "cpu"

    def flops(self, precision: str) -> float:
        return self.bf16_flops if precision == "bf16" else self.fp32_flops


# The seconds of a CPU core for an attention weight with dropout, forward and backward: 11.9e-9 in
# fp32 and 10.3e-9 in bf16 (docs/benchmarks/pretrain_cpu.json, with dropout against without).
_CPU_DROPOUT_S = 11e-9
# The size of float32 logits that a GPU holds at once (`pretrain.model.head_scores`).
CHUNK_BYTES = 2**28

GPUS = {
    g.name: g
    for g in (
        Gpu("a100", 312e12, 156e12, 79.2, 2.04e12),
        Gpu("a100-40", 312e12, 156e12, 39.4, 1.56e12),
        Gpu("l40s", 362e12, 183e12, 44.5, 0.86e12),
        Gpu("h100", 989e12, 495e12, 79.6, 3.35e12),
        Gpu("h200", 989e12, 495e12, 139.8, 4.8e12),
        Gpu("b200", 2250e12, 1125e12, 178.0, 8.0e12),
        # This is not a GPU but a core of the machine of docs/benchmarks.md; the values are reached
        # by its runs and are no peak.
        Gpu("cpu", 170e9, 92e9, 16.0, 10e9),
    )
}


def layer_matrices(model: ModelConfig) -> tuple[int, int]:
    """Return the weights of a layer that all positions pass, and those that query positions pass.

    The last layer has few query positions. ModernBERT projects queries together with keys and
    values, and has a gate.
    """
    d, i = model.hidden_size, model.intermediate_size
    if model.architecture == MODERNBERT:
        return 3 * d * d, d * d + 3 * d * i
    return 2 * d * d, 2 * d * d + 2 * d * i


def places_seen(model: ModelConfig, asked: float) -> tuple[float, float]:
    """Return (a, b): over all layers a token is compared with a L + b positions.

    In the last layer the share `asked` of positions are queries and attend to the whole cell; if
    all are queries it is a layer like the others. A local layer of a long cell is computed in
    blocks of two windows that attend to three (`pretrain.model.window_attention`).
    """
    if model.architecture != MODERNBERT:
        return model.num_layers - 1 + asked, 0.0
    assert model.local_window and model.global_every
    kinds = layer_types(model.num_layers, model.global_every)
    if asked == 1:
        asked = 0.0
    else:
        kinds.pop()
    whole = sum(kind == "full_attention" for kind in kinds)
    return whole + asked, 3.0 * model.local_window * (len(kinds) - whole)


def asked_shares(config: RunConfig) -> tuple[float, float]:
    """Return the shares of positions that the last layer computes, and that reach the gene head.

    The cell objective needs the states of all positions, and the head once per cell.
    """
    hidden, objective = config.masking.probability, config.objective
    return 1.0 if objective.cell_weight else hidden, hidden if objective.gene_weight else 0.0


def flops_per_token(config: RunConfig, num_tokens: int, length: float) -> float:
    """Return the forward and backward operations per token in a cell of this length.

    They are 6 for each weight of the layers' matrices, 12 d for each position that a layer attends
    to, and those of the head. The head, and the last layer except its keys and values (in a
    ModernBERT, also its queries), are computed at hidden genes only. With a cell objective the last
    layer is computed at all positions, and the head once more for each cell.
    """
    model, (asked, of_genes) = config.model, asked_shares(config)
    d = model.hidden_size
    keys, others = layer_matrices(model)
    matrices = model.num_layers * keys + (model.num_layers - 1 + asked) * others
    whole, local = places_seen(model, asked)
    attention = 12 * d * (whole * length + local)
    rows = of_genes + (1 / length if config.objective.cell_weight else 0)
    head = 6 * rows * (d * num_tokens + d * d)
    recomputed = (2 * matrices + attention / 3) if model.activation_checkpointing else 0
    return 6 * matrices + attention + head + recomputed


def dropout_seconds_per_token(config: RunConfig, gpu: Gpu, length: float) -> float:
    """Return what attention dropout costs per token in a cell of this length, besides operations.

    GPUs have kernels that never write the attention weights down. On a CPU each of them is written,
    masked by a hash, and read again in the backward pass.
    """
    model = config.model
    if gpu.is_gpu or not model.attention_dropout:
        return 0.0
    whole, local = places_seen(model, asked_shares(config)[0])
    return _CPU_DROPOUT_S * model.num_heads * (whole * length + local)


@dataclass(frozen=True)
class Work:
    """The floating point operations of training, and the peak of the device in a second.

    `peak_flops` is None if no manufacturer publishes it (a CPU, an unknown GPU); there is no MFU
    then.
    """

    config: RunConfig
    num_tokens: int
    gpu: Gpu | None

    def flops_per_token(self, length: int) -> float:
        """Return the forward and backward operations of a padded token in cells of this length."""
        return flops_per_token(self.config, self.num_tokens, length)

    @property
    def peak_flops(self) -> float | None:
        return self.gpu.flops(self.config.run.precision) if self.gpu else None

    def formula(self) -> str:
        """Return a text that explains how FLOP/s and MFU are counted."""
        model, (asked, of_genes) = self.config.model, asked_shares(self.config)
        d, layers = model.hidden_size, model.num_layers
        keys, others = layer_matrices(model)
        matrices = f"6 x ({layers} x {keys} + {layers - 1 + asked:g} x {others})"
        whole, local = places_seen(model, asked)
        attention = f"12 x {whole:g} x {d} x L"
        if local:
            attention = f"12 x {d} x ({whole:g} x L + {local:g})"
        rows = f"({of_genes:g} + 1 / L)" if self.config.objective.cell_weight else f"{of_genes:g}"
        head = f"6 x {rows} x {d * (self.num_tokens + d)}"
        peak = "no MFU: the peak of this device is not published"
        if self.peak_flops:
            assert self.gpu
            peak = (
                f"MFU = FLOP/s of a rank / {self.peak_flops / 1e12:g} TFLOP/s ({self.gpu.name}, "
                f"{self.config.run.precision}, dense)"
            )
        return (
            f"FLOPs of a padded token in a cell of L = {matrices} (weights) + {attention} "
            f"(attention) + {head} (head), only what is computed; {peak}"
        )


def known_gpu(name: str) -> Gpu | None:
    """Return the published values of a GPU by its CUDA name, or None if it is unknown."""
    words = name.lower().replace("-", " ").split()
    return next((g for n, g in GPUS.items() if n in words), None)
