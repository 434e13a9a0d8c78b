"""What a run computes with, chosen by the device it finds: precision, packed cells, compilation.

Rules only; who asks says what there is. A run records what was chosen, for settings that say "auto"
do not tell it.
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
    """What was chosen. `compile`: the mode of torch.compile, or "off"; `remarks`: what was asked
    for and is not so, or costs something, in words."""

    device: str
    precision: str
    tf32: bool
    packed: bool
    compile: str
    remarks: tuple[str, ...] = ()

    @property
    def record(self) -> dict[str, Any]:
        """What a run says of it."""
        return {k: v for k, v in asdict(self).items() if k != "remarks"}


def capability_of(device: torch.device) -> Capability | None:
    """Return the compute capability of a GPU; None: it is none."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def capability_here() -> Capability | None:
    """Return that of the GPU that ranks of this machine would compute on."""
    return torch.cuda.get_device_capability() if dist.finds_gpu() else None


def with_precision(config: RunConfig, capability: Capability | None) -> RunConfig:
    """Return settings with the precision that "auto" means on a GPU of this capability, or on none.

    bfloat16 where products of matrices have units for it; weights, moments and sums of gradients
    are float32 in both cases.
    """
    if config.run.precision != "auto":
        return config
    found = "bf16" if capability and capability >= OLDEST_GPU else "fp32"
    return config.model_copy(update={"run": config.run.model_copy(update={"precision": found})})


def computing(
    config: RunConfig, device: torch.device, capability: Capability | None, micro_batches: int
) -> Computing:
    """Return what a run with a known precision computes with.

    Parameters
    ----------
    micro_batches
        Of a rank in a step, at most.

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
    """Return how layers are compiled.

    CUDA graphs write their results to the same places at each replay. Gradients that are kept from
    a micro-batch to the next lie there, and so do states that a layer is computed again from.
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
    """Set torch's switches for this process; rank 0 says the remarks."""
    for remark in chosen.remarks if is_first else ():
        logger.warning("%s", remark)
    if chosen.device == "cuda":
        torch.set_float32_matmul_precision("high" if chosen.tf32 else "highest")


def compiled_so_far() -> tuple[int, float]:
    """Return how many graphs this process has compiled, and the seconds that took.

    Kernels of earlier processes are found on the disk (``TORCHINDUCTOR_CACHE_DIR``).
    """
    from torch._dynamo.utils import compilation_time_metrics, counters

    seconds = sum(compilation_time_metrics.get("_compile.compile_inner", []))
    return counters["stats"]["unique_graphs"], seconds
