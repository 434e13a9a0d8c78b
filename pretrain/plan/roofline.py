"""Predict the training speed on a GPU by arithmetic, and what limits it.

The limit can be matrix products, memory or the host. The prediction was written before any
measurement, so that the first measurement can be compared with it. Each kind of work takes the
longer of two times: its operations divided by the GPU's rate for that kind, and its bytes divided
by the memory bandwidth. The times of all kinds add up. A step takes this sum, or the time that the
host needs to launch the kernels, if that is longer.

This module does not import torch. Symbols: d width, i intermediate width, V vocabulary, T positions
of a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pretrain.config import RunConfig
from pretrain.plan.corpus import Corpus
from pretrain.plan.flops import Gpu, asked_shares, layer_matrices, places_seen
from pretrain.settings.architecture import MODERNBERT

# The share of the data sheet that is reached by dense products of large matrices and by memory, and
# the rate of the attention kernel (flash attention 2 was made for A100; on H100 it is published at
# 350 of 989 TFLOP/s).
_OF_PRODUCTS, _OF_MEMORY = 0.7, 0.85
_ATTENTION_FLOPS = {"a100": 190e12, "a100-40": 190e12}
_ATTENTION_ELSE = 330e12
# Forward, and a backward that computes the attention weights again: 4 + 10 operations where 12 are
# counted.
_RECOMPUTED = 14 / 12
# The time of the host for an operation: Python, autograd and the launch, also for a compiled one.
_LAUNCH_S = 8e-6
# The operations of a micro-batch and of each layer in it, forward and backward, for packed cells
# with the published dropout (`tests/test_pretrain_roofline.py` counts them), and DeepSpeed's
# operations for each parameter in a micro-batch and in a step: sums in float32, norm, clipping.
_BASE, _LAYER, _COMPILED_LAYER = 85, {"bert": 46, MODERNBERT: 73}, 16
_OF_PARAMETER, _OF_PARAMETER_IN_STEP, _OF_STEP = 2, 4, 60
_PARAMETERS = {"bert": 16, MODERNBERT: 6}
# The bytes that memory moves for a logit, from its product to its gradient and back
# (`pretrain.model.head_scores`), and for each position in a layer's sums, norms, dropout and
# activations: factors of d and of i, without and with compilation.
_OF_LOGIT = 66
_ELEMENTWISE = {
    ("bert", False): (90, 12), ("bert", True): (48, 12),
    (MODERNBERT, False): (190, 30), (MODERNBERT, True): (66, 18),
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """The work of one kind in a step: operations, bytes, seconds, and what limits it."""

    name: str
    flops: float
    bytes: float
    seconds: float
    bound: str


@dataclass(frozen=True)
class Roofline:
    """The predicted step of one GPU; `limit` names what limits its speed."""

    parts: tuple[Part, ...]
    launches: int
    device_s: float
    host_s: float
    tokens_per_s: float
    mfu: float
    limit: str

    @property
    def record(self) -> dict[str, Any]:
        """Return the prediction as JSON values."""
        return {
            "flops_per_step": sum(p.flops for p in self.parts),
            "bytes_per_step": sum(p.bytes for p in self.parts),
            "launches_per_step": self.launches,
            "device_s": self.device_s,
            "host_s": self.host_s,
            "tokens_per_s": self.tokens_per_s,
            "mfu": self.mfu,
            "limit": self.limit,
            "parts": [vars(p) for p in self.parts],
        }


def roofline(
    config: RunConfig, gpu: Gpu, num_tokens: int, parameters: int, length: float, passes: int,
    places: float, is_compiled: bool = False,
) -> Roofline:  # fmt: skip
    """Return the prediction for bf16 and packed cells.

    Parameters
    ----------
    num_tokens, parameters
        Size of the vocabulary, and number of parameters of the model.
    length
        Mean length of a cell, in which each position has the same weight.
    passes, places
        Micro-batches of a GPU in a step, and real tokens in each.
    """
    model, (asked, of_genes) = config.model, asked_shares(config)
    d, layers, total = model.hidden_size, model.num_layers, passes * places
    keys, others = layer_matrices(model)
    matrices = layers * keys + (layers - 1 + asked) * others
    logits = of_genes + (1 / length if config.objective.cell_weight else 0)
    whole, local = places_seen(model, asked)
    seen = 12 * d * (whole * length + local)
    wide, narrow = _ELEMENTWISE[model.architecture, is_compiled]
    # A product reads its input and writes its output, three times; a layer does so for some 2 d and
    # i numbers for every d of weights.
    moved = 3 * 2 * (layers - 1 + asked) * (8 * d + 2 * model.intermediate_size)
    products = gpu.bf16_flops * _OF_PRODUCTS
    attention = min(products, _ATTENTION_FLOPS.get(gpu.name, _ATTENTION_ELSE))
    parts = (
        _part("products", 6 * matrices * total, moved * total, products, gpu),
        _part("head", 6 * logits * d * (num_tokens + d) * total, 0.0, products, gpu),
        _part("attention", seen * _RECOMPUTED * total, layers * 40 * d * total, attention, gpu),
        _part("norms, sums", 0.0,
              layers * (wide * d + narrow * model.intermediate_size) * total, products, gpu),
        _part("loss", 0.0, logits * num_tokens * _OF_LOGIT * total, products, gpu),
        # Weights, gradients, sums and moments: 8 bytes in each pass, and about 40 in each step.
        _part("optimizer", 0.0, parameters * (8.0 * passes + 40), products, gpu),
    )  # fmt: skip
    device_s = sum(part.seconds for part in parts)
    launches = _launches(config, passes, is_compiled)
    host_s = launches * _LAUNCH_S
    counted = (6 * matrices + seen + 6 * logits * d * (num_tokens + d)) * total
    longest = max(parts, key=lambda part: part.seconds)
    limit = "the host" if host_s > device_s else f"{longest.name}: {longest.bound}"
    step_s = max(device_s, host_s)
    return Roofline(
        parts, launches, device_s, host_s, total / step_s, counted / step_s / gpu.bf16_flops, limit
    )


def _part(name: str, flops: float, moved: float, rate: float, gpu: Gpu) -> Part:
    times = {"arithmetic": flops / rate, "memory": moved / (gpu.bytes_per_s * _OF_MEMORY)}
    bound = max(times, key=lambda k: times[k])
    return Part(name, flops, moved, times[bound], bound)


def _launches(config: RunConfig, passes: int, is_compiled: bool) -> int:
    kind, layers = config.model.architecture, config.model.num_layers
    layer = _COMPILED_LAYER if is_compiled else _LAYER[kind]
    parameters = 10 + _PARAMETERS[kind] * layers
    a_pass = _BASE + layers * layer + _OF_PARAMETER * parameters
    return passes * a_pass + _OF_PARAMETER_IN_STEP * parameters + _OF_STEP


def rooflines(
    config: RunConfig, gpu: Gpu, gpus: int, corpus: Corpus, parameters: int, micro_batch: int
) -> dict[str, Any]:
    """Return the predictions for a step without and with compiled layers."""
    length = sum(n * size**2 for size, n in corpus.buckets) / corpus.padded_tokens
    share = config.batch.tokens_per_step / gpus
    passes = int(-(-share // micro_batch))
    places = share / passes * corpus.tokens / corpus.padded_tokens
    return {
        how: roofline(
            config, gpu, corpus.num_tokens, parameters, length, passes, places, compiled
        ).record
        for how, compiled in (("as written", False), ("compiled", True))
    }
