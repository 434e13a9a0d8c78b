"""Choose precision, packing and compilation of a run by the device that it computes on.

The functions contain only the rules, and get the device from their caller. A run records the
choice, because a setting "auto" does not show it.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pretrain.config import RunConfig
from pretrain.model.packing import OLDEST_GPU, kernel_refuses
from pretrain.ranks import dist

logger = logging.getLogger(__name__)

Capability = tuple[int, int]


@dataclass(frozen=True)
class Computing:
    """The chosen way to compute.

    `compile` is the mode of torch.compile, or "off". `remarks` are sentences about settings that
    could not be followed, or that cost speed.
    """

    device: str
    precision: str
    tf32: bool
    packed: bool
    compile: str
    remarks: tuple[str, ...] = ()

    @property
    def record(self) -> dict[str, Any]:
        """Return the choice as a dict for the record of the run."""
        return {k: v for k, v in asdict(self).items() if k != "remarks"}


def capability_of(device: torch.device) -> Capability | None:
    """Return the compute capability of a GPU; None for any other device."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def capability_here() -> Capability | None:
    """Return the compute capability of the GPU that ranks of this machine use, or None."""
    return torch.cuda.get_device_capability() if dist.finds_gpu() else None


def with_precision(config: RunConfig, capability: Capability | None) -> RunConfig:
    """Return settings in which the precision "auto" is resolved for a GPU, or for no GPU.

    It is bfloat16 if the GPU has units for bfloat16 products of matrices, else float32. Weights,
    moments and sums of gradients are float32 in both cases.
    """
    if config.run.precision != "auto":
        return config
    found = "bf16" if capability and capability >= OLDEST_GPU else "fp32"
    return config.model_copy(update={"run": config.run.model_copy(update={"precision": found})})


def computing(
    config: RunConfig, device: torch.device, capability: Capability | None, micro_batches: int
) -> Computing:
    """Return how a run computes; its precision must be resolved already.

    Parameters
    ----------
    micro_batches
        Largest number of micro-batches of a rank in a step.

    Raises
    ------
    ValueError
        `run.packing` and `run.compile` contradict each other.
    """
    run, remarks = config.run, []
    packed, mode = (
        _packs(config, capability, remarks),
        _compile_mode(config, micro_batches, remarks),
    )
    tf32 = run.tf32 and device.type == "cuda"
    return Computing(device.type, run.precision, tf32, packed, mode, tuple(remarks))


def _packs(config: RunConfig, capability: Capability | None, remarks: list[str]) -> bool:
    run, model = config.run, config.model
    if run.packing == "never":
        return False
    if run.compile == "reduce-overhead":
        if run.packing == "always":
            raise ValueError(
                "run.packing=always: not with run.compile=reduce-overhead, whose CUDA graphs want "
                "the same number of tokens each time; take run.compile=default, or run.packing=auto"
            )
        return False
    reason = kernel_refuses(model.hidden_size // model.num_heads, run.precision, capability)
    if run.packing == "always" and reason:
        remarks.append(f"run.packing=always: {reason}; attention is computed cell by cell, slowly")
    return run.packing == "always" or reason is None


def _compile_mode(config: RunConfig, micro_batches: int, remarks: list[str]) -> str:
    """Return the mode in which layers are compiled.

    CUDA graphs write their results to the same memory at each replay. Gradients that are kept from
    one micro-batch to the next are stored there, and so are the states from which activation
    checkpointing recomputes a layer.
    """
    mode = config.run.compile
    if mode != "reduce-overhead":
        return mode
    reason = ""
    if micro_batches > 1:
        reason = (
            f"a step has {micro_batches} micro-batches, whose gradients CUDA graphs would write "
            "over; raise batch.tokens_per_micro_batch to have one"
        )
    elif config.model.activation_checkpointing:
        reason = "model.activation_checkpointing computes layers again from what they wrote over"
    if not reason:
        return mode
    remarks.append(f"run.compile=reduce-overhead: compiled without CUDA graphs: {reason}")
    return "default"


def use(chosen: Computing, is_first: bool) -> None:
    """Set torch's switches for this process; rank 0 logs the remarks."""
    for remark in chosen.remarks if is_first else ():
        logger.warning("%s", remark)
    if chosen.device == "cuda":
        torch.set_float32_matmul_precision("high" if chosen.tf32 else "highest")


def compiled_so_far() -> tuple[int, float]:
    """Return how many graphs this process has compiled, and the seconds that this took.

    Kernels that earlier processes compiled are read from disk (``TORCHINDUCTOR_CACHE_DIR``).
    """
    from torch._dynamo.utils import compilation_time_metrics, counters

    seconds = sum(compilation_time_metrics.get("_compile.compile_inner", []))
    return counters["stats"]["unique_graphs"], seconds
