"""Arguments of the model's forward pass, made from a micro-batch, on the host or on a device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pretrain.batches.step_batch import MicroBatch, RankStep


def host_arguments(micro: MicroBatch) -> tuple[Any, ...]:
    """Return the arguments of `MaskedGeneModel.forward` as tensors on the host."""
    targets, cells = micro.targets or (None, None, None), None
    ids, real = micro.input_ids, micro.attention_mask
    if micro.packed:
        (ids, cells), real = micro.packed, None
    arguments = ids, real, micro.masked_places, micro.labels, *targets, micro.folds
    # The packing is a plain tuple, because DeepSpeed rebuilds the arguments from their types.
    return arguments if cells is None else (*arguments, tuple(cells))


def to_device(micro: MicroBatch, device: torch.device) -> tuple[Any, ...]:
    """Return the arguments of one forward pass as tensors on a device."""
    return _moved(host_arguments(micro), device)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(_moved(one, device) for one in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value


def device_arguments(data: RankStep, device: torch.device) -> Iterator[tuple[Any, ...]]:
    """Yield the arguments of each forward pass of a step; a staged step is copied at once."""
    if data.staged is not None:
        staging, staged = data.staged
        yield from staging.copies(staged)
        return
    for micro in data.micro_batches:
        yield to_device(micro, device)
